"""Print the wines of the frozen hold-out: `python -m training.holdout > loadtest/wines.csv`."""

import csv
import sys

from app.contract import FEATURE_NAMES
from training.dataset import prepare


def main() -> int:
    """Write the hold-out as CSV, one wine a row in the order of the test set, under the names of the API."""
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(FEATURE_NAMES)
    writer.writerows(prepare().holdout.features.tolist())
    return 0


if __name__ == "__main__":
    sys.exit(main())
