"""From the values of a wine to its predicted quality."""

import ctypes
import logging
from array import array
from collections.abc import Callable, Collection, Sequence
from functools import partial
from itertools import chain
from math import inf, nan
from pathlib import Path
from struct import Struct
from typing import Any, Protocol

from app.artifacts import ArtifactError, Artifacts, Sample
from app.contract import COMPILED_FILE, FEATURES, MODEL_FILE, SCALER_FILE
from app.schemas import LARGEST, MAX_BATCH

logger = logging.getLogger("uvicorn.error")

_ROW = Struct(f"{len(FEATURES)}d")
_FIELD = Struct("32s2d")

Row = Collection[float]
"""The eleven values of a wine in the contract's order."""

Numbers = array  # of doubles: one quality after the other, or one wine's values after the other's

INTERFACE = 2
"""The number by which training/wines.c calls what its functions take."""

MAX_BINS = 32
"""Most bins that the compiled form counts into."""

TOLERANCE = 1e-9
"""How far a prediction may be from the one that training stored for the same wine."""


class Serving:
    """What predicts wines and counts them; only the compiled form reads JSON, and then not all of it."""

    def __init__(self, predict: Callable[["Numbers[float]"], "Numbers[float]"]) -> None:
        self.predict = predict
        """Predict wines whose values are valid."""

    def read_one(self, _body: bytes) -> float:
        """Predict the wine of a request's body, or answer NaN, having counted nothing."""
        return nan

    def read_many(self, _body: bytes) -> "Numbers[float]":
        """Predict the batch of a request's body, or answer nothing, having counted nothing."""
        return array("d")


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
            self._code = code = ctypes.CDLL(str(library.resolve()))
            interface = ctypes.c_uint32.in_dll(code, "winemon_interface").value
            if interface != INTERFACE:
                raise ArtifactError(
                    f"{library.name}: interface {interface} instead of {INTERFACE}; train again"
                )
            self._one, self._many = code.winemon_predict, code.winemon_predict_many
            code.winemon_serve.restype = ctypes.c_double
            code.winemon_serve_many.restype = ctypes.c_size_t
            code.winemon_count.restype = None
        except (OSError, AttributeError, ValueError) as error:
            raise ArtifactError(f"{library.name}: cannot be loaded: {error}") from error
        self._one.restype, self._many.restype = ctypes.c_double, None
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

    def counting(
        self, edges: Sequence[Sequence[float]] = (), cells: Sequence[Sequence[int]] = (), total: int = 0
    ) -> Serving:
        """Return what predicts as above, reads JSON, and counts, if anything.

        `edges` are those of each feature, and of the quality for its bins and for its histogram; `cells` the
        addresses of one double more for each of them, at most MAX_BINS; `total` that of the sum of qualities.
        """
        return _CompiledServing(self, self._code, edges, cells, total)


class _CompiledServing(Serving):
    def __init__(
        self,
        predictor: CompiledPredictor,
        code: ctypes.CDLL,
        edges: Sequence[Sequence[float]],
        cells: Sequence[Sequence[int]],
        total: int,
    ) -> None:
        super().__init__(self._predict)
        fields = b"".join(
            _FIELD.pack(
                f'{feature.name}"'.encode(),
                feature.minimum,
                LARGEST if feature.maximum is None else feature.maximum,
            )
            for feature in FEATURES
        )
        # Kept, as the library is given their addresses.
        self._tables = (
            array("B", fields),
            array("d", chain.from_iterable([*some, *[inf] * (MAX_BINS - len(some))] for some in edges)),
            array("Q", chain.from_iterable([*some, *[0] * (MAX_BINS - len(some))] for some in cells)),
        )
        addresses = (table.buffer_info()[0] if table else 0 for table in self._tables)
        self._counts = array("Q", [*addresses, total])
        self._wines = array("d", bytes(8 * len(FEATURES) * MAX_BATCH))
        self._qualities = array("d", bytes(8 * MAX_BATCH))
        self._predict_many = predictor.predict_many
        counts = _address(self._counts)
        self._count = partial(code.winemon_count, counts)
        self._serve = partial(code.winemon_serve, counts)
        self._serve_many = partial(code.winemon_serve_many, counts)
        self._room = _address(self._wines), _address(self._qualities), ctypes.c_size_t(MAX_BATCH)

    def _predict(self, wines: "Numbers[float]") -> "Numbers[float]":
        qualities = self._predict_many(wines)
        self._count(_address(wines), _address(qualities), ctypes.c_size_t(len(qualities)))
        return qualities

    def read_one(self, body: bytes) -> float:
        quality: float = self._serve(body, ctypes.c_size_t(len(body)))
        return quality

    def read_many(self, body: bytes) -> "Numbers[float]":
        return self._qualities[: self._serve_many(body, ctypes.c_size_t(len(body)), *self._room)]


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
