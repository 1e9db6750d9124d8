"""Prove artifacts where they are to be served: `python -m app.selftest [DIRECTORY]`.

Serving with the compiled form never unpickles the model, so a deployment asks here, before it switches,
whether the scikit-learn path would work on this machine too. Prints one line, and exits 1 where either
disagrees with training.
"""

import logging
import sys
from pathlib import Path

from app.artifacts import ArtifactError, load
from app.predictor import load_fitted, load_predictor


def main(directory: Path) -> int:
    """Run the command; return its exit code."""
    logging.basicConfig(format="%(message)s")
    try:
        artifacts = load(directory)
        load_fitted(artifacts)
        predictor = load_predictor(artifacts)
    except ArtifactError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    form = "compiled" if predictor.compiled else "scikit-learn"
    samples = len(artifacts.manifest.samples)
    sys.stdout.write(
        f"model {artifacts.manifest.version} predicts {samples} samples as training did; serves {form}\n"
    )
    return 0


if __name__ == "__main__":  # pragma: no cover - main is tested, and this as a command
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "artifacts")))
