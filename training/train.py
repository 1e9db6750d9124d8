"""Train the model and write its artifacts: `python -m training.train [--data FILE] [--output DIR]`."""

import argparse
import hashlib
import json
import logging
import os
import platform
import signal
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import joblib
import numpy as np
from sklearn.preprocessing import StandardScaler

from app.contract import (
    ARTIFACT_FILES,
    BASELINE_FILE,
    COMPILED_FILE,
    FEATURE_NAMES,
    FEATURES,
    MANIFEST_FILE,
    MANIFEST_FORMAT,
    MODEL_FILE,
    SCALER_FILE,
    TARGET,
)
from training.baseline import make_baseline
from training.compile import CompileError, compile_forest, edge_wines
from training.dataset import Array, DataError, Dataset, prepare
from training.evaluate import fit, mse, out_of_fold, predict
from training.model import Forest, make_model

ROOT: Final = Path(__file__).parent.parent
SAMPLE_WINES: Final = 8
HUGE: Final = 1e30
"""A value far beyond every wine that the float32 arithmetic of a tree still holds."""

logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code: 2 for data that cannot be trained on."""
    parser = argparse.ArgumentParser(prog="python -m training.train", description="Train the model.")
    parser.add_argument("--data", type=Path, metavar="FILE", help="train on this file, UCI or Kaggle style")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", default="artifacts", help="default: %(default)s"
    )
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO)
    try:
        train(make_model(), arguments.data, arguments.output)
    except (DataError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


def train(model: Forest, data: Path | None, output: Path) -> None:
    """Train a clone of `model` on `data`, or the canonical file, and write its artifacts to `output`.

    Raises:
        DataError: the file cannot be trained on.
        OSError: a file cannot be read or written. In both cases `output` is as it was.

    """
    logger.info("Preparing dataset...")
    dataset = prepare(data)

    logger.info("Training model...")
    scaler, fitted = fit(model, dataset.training)
    out_of_fold_predictions = out_of_fold(model, dataset.training)
    metrics = {
        "test_mse": mse(predict(scaler, fitted, dataset.test.features), dataset.test.quality),
        "holdout_mse": mse(predict(scaler, fitted, dataset.holdout.features), dataset.holdout.quality),
        "cv_mse": mse(out_of_fold_predictions, dataset.training.quality),
    }
    logger.info("Test MSE: %s", metrics["test_mse"])
    logger.info(
        "Hold-out MSE: %s (the %d of %d test rows without a twin in training)",
        metrics["holdout_mse"],
        len(dataset.holdout),
        len(dataset.test),
    )
    logger.info("Grouped CV MSE: %s (equal rows never straddle a fold)", metrics["cv_mse"])

    logger.info("Saving artifacts...")
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".new-", dir=output) as staging:
        new = Path(staging)
        joblib.dump(scaler, new / SCALER_FILE)
        # A quarter of the size, for some ten milliseconds more at start.
        joblib.dump(fitted, new / MODEL_FILE, compress=3)
        try:
            compile_forest(scaler, fitted, new / COMPILED_FILE)
        except CompileError as error:
            logger.warning("Not compiled, so scikit-learn will serve, more slowly: %s", error)
        write_json(new / BASELINE_FILE, make_baseline(dataset.training.features, out_of_fold_predictions))
        write_json(new / MANIFEST_FILE, make_manifest(new, dataset, scaler, fitted, metrics))
        publish(new, output)


def make_manifest(
    directory: Path, dataset: Dataset, scaler: StandardScaler, model: Forest, metrics: dict[str, float]
) -> dict[str, Any]:
    """Return the manifest of the artifacts in `directory`: what they are, come from and answer."""
    contents = {path.name: path.read_bytes() for path in sorted(directory.iterdir())}
    identity = hashlib.sha256(contents[SCALER_FILE] + contents[MODEL_FILE]).hexdigest()[:8]
    ranges = zip(
        FEATURES,
        dataset.training.features.min(axis=0).tolist(),
        dataset.training.features.max(axis=0).tolist(),
        strict=True,
    )
    samples = np.vstack([sample_wines(dataset), edge_wines(scaler, model, dataset.holdout.features[0])])
    return {
        "format": MANIFEST_FORMAT,
        "version": f"{project_version()}+{identity}",
        "code_version": code_version(),
        "trained_at": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "algorithm": type(model).__name__,
        "parameters": model.get_params(),
        "python": platform.python_version(),
        "libraries": {library: version(library) for library in ("scikit-learn", "numpy", "joblib")},
        "data": {
            "file": dataset.file,
            "sha256": dataset.sha256,
            "rows": dataset.rows,
            "training_rows": len(dataset.training),
            "holdout_rows": len(dataset.holdout),
            "duplicate_rows": dataset.duplicate_rows,
        },
        "features": [
            {"name": feature.name, "unit": feature.unit, "minimum": minimum, "maximum": maximum}
            for feature, minimum, maximum in ranges
        ],
        "metrics": metrics,
        "artifacts": {
            name: {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
            for name, content in contents.items()
        },
        "samples": [
            {"wine": dict(zip(FEATURE_NAMES, wine, strict=True)), TARGET: quality}
            for wine, quality in zip(samples.tolist(), predict(scaler, model, samples).tolist(), strict=True)
        ],
    }


def sample_wines(dataset: Dataset) -> Array:
    """Return wines, shape (n, 11), whose predictions a reader of the artifacts must reproduce.

    Some of the hold-out, then the corners: the least and the most of the training range, nothing, and huge
    values.
    """
    huge = [HUGE if feature.maximum is None else feature.maximum for feature in FEATURES]
    return np.vstack(
        [
            dataset.holdout.features[:SAMPLE_WINES],
            dataset.training.features.min(axis=0),
            dataset.training.features.max(axis=0),
            [feature.minimum for feature in FEATURES],
            huge,
        ]
    )


def project_version() -> str:
    """Return the version in pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return str(project["version"])


def code_version() -> str:
    """Return what git calls the checkout, or the project's version where there is none."""
    # Naming the repository keeps git from describing one that this directory happens to lie in.
    command = ["git", f"--git-dir={ROOT / '.git'}", f"--work-tree={ROOT}", "describe", "--always", "--dirty"]
    # A hook's environment names another index.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)  # noqa: S603 (fixed)
        return done.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return project_version()


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write readable JSON whose numbers read back exactly."""
    path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")


def flush(path: Path) -> None:
    """Have a file's content, or the names in a directory, on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(new: Path, output: Path) -> None:
    """Put the complete set of files in `new` in place of the old one in `output`, on the same file system.

    Signals wait for the renames. Whoever sees the set half renamed all the same, as a reader or after a
    power cut, is told by the manifest: it comes last and vouches for the other files.
    """
    compiled = [COMPILED_FILE] if (new / COMPILED_FILE).exists() else []
    names = (*ARTIFACT_FILES, *compiled)
    for name in (*names, MANIFEST_FILE):
        flush(new / name)
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        for name in names:
            (new / name).replace(output / name)
        if not compiled:
            (output / COMPILED_FILE).unlink(missing_ok=True)
        flush(output)
        (new / MANIFEST_FILE).replace(output / MANIFEST_FILE)
        flush(output)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


if __name__ == "__main__":
    sys.exit(main())
