"""From the values of a wine to its predicted quality."""

import ctypes
import logging
from array import array
from collections.abc import Callable, Collection, Sequence
from functools import partial
from itertools import accumulate, chain
from pathlib import Path
from struct import Struct
from typing import Any, Protocol

from app.artifacts import ArtifactError, Artifacts, Sample
from app.contract import COMPILED_FILE, FEATURES, MODEL_FILE, SCALER_FILE

logger = logging.getLogger("uvicorn.error")

_ROW = Struct(f"{len(FEATURES)}d")

Row = Collection[float]
"""The eleven values of a wine in the contract's order."""

Numbers = array  # of doubles: one quality after the other, or one wine's values after the other's

TOLERANCE = 1e-9
"""How far a prediction may be from the one that training stored for the same wine."""


One = Callable[[Row], float]
Many = Callable[["Numbers[float]"], "Numbers[float]"]
"""What predicts one wine, and several."""


class Predictor(Protocol):
    """Anything that predicts as training did."""

    compiled: bool

    def predict(self, row: Row) -> float:
        """Predict the quality of one wine."""

    def predict_many(self, wines: "Numbers[float]") -> "Numbers[float]":
        """Predict the qualities of several wines, in their order."""


class SklearnPredictor:
    """The scaler and model as scikit-learn fitted them: exact by definition, milliseconds a call."""

    compiled = False

    def __init__(self, scaler: Any, model: Any) -> None:
        self._scaler = scaler
        self._model = model

    def predict(self, row: Row) -> float:
        """Predict the quality of one wine."""
        return self.predict_many(array("d", row))[0]

    def predict_many(self, wines: "Numbers[float]") -> "Numbers[float]":
        """Predict the qualities of several wines, in their order."""
        rows = memoryview(wines).cast("B").cast("d", (len(wines) // len(FEATURES), len(FEATURES)))
        return array("d", self._model.predict(self._scaler.transform(rows)).tolist())


class CompiledPredictor:
    """The scaler and model as training compiled them (training/forest.c): the same answers, in microseconds.

    Raises ArtifactError where this machine cannot load the library.
    """

    compiled = True

    def __init__(self, library: Path) -> None:
        try:
            code = ctypes.CDLL(str(library.resolve()))
            self._one, self._many = code.winemon_predict, code.winemon_predict_many
            self._serve, self._count = code.winemon_serve, code.winemon_count
        except (OSError, AttributeError) as error:
            raise ArtifactError(f"{library.name}: cannot be loaded: {error}") from error
        self._one.restype = self._serve.restype = ctypes.c_double
        self._many.restype = self._count.restype = None
        self._row = ctypes.create_string_buffer(_ROW.size)
        self._pack = partial(_ROW.pack_into, self._row, 0)

    def predict(self, row: Row) -> float:
        """Predict the quality of one wine."""
        self._pack(*row)
        quality: float = self._one(self._row)
        return quality

    def predict_many(self, wines: "Numbers[float]") -> "Numbers[float]":
        """Predict the qualities of several wines, in their order."""
        count = len(wines) // len(FEATURES)
        qualities = array("d", bytes(8 * count))
        self._many(_address(wines), _address(qualities), ctypes.c_size_t(count))
        return qualities

    def counting(self, edges: Sequence[Sequence[float]], cells: Sequence[int]) -> tuple[One, Many]:
        """Return what predicts as above and counts between these edges, at these addresses of doubles."""
        tables = (
            array("d", chain.from_iterable(edges)),
            array("I", accumulate(map(len, edges))),
            array("Q", cells),
        )
        addresses = [_address(table) for table in tables]
        pack, serve = self._pack, partial(self._serve, self._row, *addresses)

        def one(row: Row, _keep: Any = tables) -> float:
            pack(*row)
            quality: float = serve()
            return quality

        def many(wines: "Numbers[float]") -> "Numbers[float]":
            qualities = self.predict_many(wines)
            self._count(_address(wines), _address(qualities), ctypes.c_size_t(len(qualities)), *addresses)
            return qualities

        return one, many


def _address(numbers: "array[Any]") -> ctypes.c_void_p:
    return ctypes.c_void_p(numbers.buffer_info()[0])


def disagreement(predictor: Predictor, samples: Sequence[Sample]) -> str | None:
    """Say how the predictor differs from what training stored of these wines; None where it does not."""
    wines = array("d", chain.from_iterable(sample.row for sample in samples))
    for sample, quality in zip(samples, predictor.predict_many(wines), strict=True):
        if not abs(quality - sample.quality) <= TOLERANCE:
            return f"predicts {quality!r} for a sample for which training predicted {sample.quality!r}"
    return None


def load_predictor(artifacts: Artifacts) -> Predictor:
    """Return the predictor of verified artifacts, proved on the manifest's samples.

    The compiled form serves where it is there and exact, and scikit-learn is then never imported.
    Raises ArtifactError where not even scikit-learn reproduces the samples.
    """
    samples = artifacts.manifest.samples
    try:
        if artifacts.compiled is None:
            raise ArtifactError("training did not compile it")
        compiled = CompiledPredictor(artifacts.compiled)
        _prove(compiled, samples)
    except ArtifactError as error:
        logger.warning("Serving with scikit-learn, more slowly, without %s: %s", COMPILED_FILE, error)
    else:
        return compiled
    return load_fitted(artifacts)


def load_fitted(artifacts: Artifacts) -> Predictor:
    """Return the scikit-learn predictor of verified artifacts, proved on the manifest's samples.

    Raises ArtifactError where it cannot be unpickled here or does not reproduce them.
    """
    fitted = SklearnPredictor(artifacts.unpickle(SCALER_FILE), artifacts.unpickle(MODEL_FILE))
    _prove(fitted, artifacts.manifest.samples)
    return fitted


def _prove(predictor: Predictor, samples: Sequence[Sample]) -> None:
    try:
        problem = disagreement(predictor, samples)
    except Exception as error:  # the model is whatever was pickled
        problem = f"cannot predict: {type(error).__name__}: {error}".replace("\n", " ")
    if problem:
        raise ArtifactError(f"{MODEL_FILE}: {problem}")
