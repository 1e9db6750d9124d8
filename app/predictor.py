"""From the values of a wine to its predicted quality."""

from collections.abc import Sequence
from typing import Any, Protocol

from app.artifacts import ArtifactError, Artifacts, Sample
from app.contract import MODEL_FILE, SCALER_FILE

Row = Sequence[float]
"""The eleven values of a wine in the contract's order."""

TOLERANCE = 1e-9
"""How far a prediction may be from the one that training stored for the same wine."""


class Predictor(Protocol):
    """Anything that predicts as training did."""

    compiled: bool

    def predict(self, row: Row) -> float:
        """Predict the quality of one wine."""

    def predict_many(self, rows: Sequence[Row]) -> list[float]:
        """Predict the qualities of several wines, in their order."""


class SklearnPredictor:
    """The scaler and model as scikit-learn fitted them: exact by definition, half a millisecond a call."""

    compiled = False

    def __init__(self, scaler: Any, model: Any) -> None:
        self._scaler = scaler
        self._model = model

    def predict(self, row: Row) -> float:
        """Predict the quality of one wine."""
        return self.predict_many([row])[0]

    def predict_many(self, rows: Sequence[Row]) -> list[float]:
        """Predict the qualities of several wines, in their order."""
        qualities: list[float] = self._model.predict(self._scaler.transform(rows)).tolist()
        return qualities


def disagreement(predictor: Predictor, samples: Sequence[Sample]) -> str | None:
    """Say how the predictor differs from what training stored of these wines; None where it does not."""
    for sample, quality in zip(samples, predictor.predict_many([s.row for s in samples]), strict=True):
        if not abs(quality - sample.quality) <= TOLERANCE:
            return f"predicts {quality!r} for a sample for which training predicted {sample.quality!r}"
    return None


def load_predictor(artifacts: Artifacts) -> Predictor:
    """Return the predictor of verified artifacts, proved on the manifest's samples.

    Raises ArtifactError where it does not reproduce them.
    """
    predictor = SklearnPredictor(artifacts.unpickle(SCALER_FILE), artifacts.unpickle(MODEL_FILE))
    try:
        problem = disagreement(predictor, artifacts.manifest.samples)
    except Exception as error:  # the model is whatever was pickled
        problem = f"cannot predict: {type(error).__name__}: {error}".replace("\n", " ")
    if problem:
        raise ArtifactError(f"{MODEL_FILE}: {problem}")
    return predictor
