"""Compare the candidate models: `python -m training.search [--data FILE]`; about ten minutes on two cores.

The grouped cross-validation on the training rows decides. Candidates within its noise of the best are
near-equals, and of those the one that costs least to serve is chosen. Neither the tutorial's test set nor the
hold-out is looked at.
"""

import argparse
import logging
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from training.dataset import DataError, Table, prepare
from training.evaluate import fit, mse, out_of_fold
from training.model import Forest, candidates

NOISE: Final = 0.004
"""Difference in grouped CV MSE that means nothing: another seed alone moves it by 0.001 to 0.003 (1 s.d.)."""

TUNED: Final = ("n_estimators", "min_samples_leaf", "max_features")

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Result:
    """One candidate: its grouped CV MSE and its cost, as tree nodes visited to predict one wine."""

    model: Forest
    cv_mse: float
    visits: float

    def __str__(self) -> str:
        name, parameters = type(self.model).__name__, self.model.get_params()
        tuned = ", ".join(f"{key}={parameters[key]}" for key in TUNED)
        return f"{self.cv_mse:.4f}  {self.visits:6.0f} visits  {name}({tuned})"


def search(models: Iterable[Forest], table: Table) -> list[Result]:
    """Measure each of `models` on `table`; the result is ordered by grouped CV MSE."""
    results = []
    for model in models:
        scaler, fitted = fit(model, table)
        paths, _ = fitted.decision_path(scaler.transform(table.features))
        results.append(Result(model, mse(out_of_fold(model, table), table.quality), paths.sum() / len(table)))
        logger.info("%s", results[-1])
    return sorted(results, key=lambda result: result.cv_mse)


def choose(results: Sequence[Result]) -> Result:
    """Return the cheapest of the results whose error is within the noise of the best."""
    best = min(result.cv_mse for result in results)
    return min(
        (result for result in results if result.cv_mse <= best + NOISE), key=lambda result: result.visits
    )


def main(argv: Sequence[str] | None = None, models: Iterable[Forest] | None = None) -> int:
    """Run the command over `models`, by default all candidates; return its exit code, 2 for bad data."""
    parser = argparse.ArgumentParser(
        prog="python -m training.search", description="Compare candidate models."
    )
    parser.add_argument("--data", type=Path, metavar="FILE", help="search on this file, UCI or Kaggle style")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO)
    try:
        table = prepare(arguments.data).training
    except (DataError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    results = search(candidates() if models is None else models, table)
    sys.stdout.write("".join(f"{result}\n" for result in [*results, "", f"choice: {choose(results)}"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
