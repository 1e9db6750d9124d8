"""Loading what training made: verified before a byte of it is unpickled, as a pickle is code."""

import hashlib
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

from pydantic import (
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    ValidationError,
    model_validator,
)

from app.contract import (
    ARTIFACT_FILES,
    BASELINE_FILE,
    COMPILED_FILE,
    FEATURE_NAMES,
    MANIFEST_FILE,
    MANIFEST_FORMAT,
    TARGET,
)

_T = TypeVar("_T")


class ArtifactError(Exception):
    """The artifacts cannot be served; the message is one line that says which and why."""


class _Digest(BaseModel):
    sha256: str
    size: int


class _TrainedFeature(BaseModel):
    name: str
    unit: str
    minimum: float
    maximum: float


class Sample(BaseModel):
    """A wine with the quality that training predicted for it."""

    wine: dict[str, float]
    quality: float

    @property
    def row(self) -> tuple[float, ...]:
        """The eleven values in the contract's order."""
        return tuple(self.wine[name] for name in FEATURE_NAMES)


class Manifest(BaseModel):
    """The parts of manifest.json that serving reads; training/train.py writes it."""

    model_config = ConfigDict(frozen=True)

    format: int
    version: str = Field(pattern="^[!-~]+$")  # it is sent as a header
    code_version: str
    trained_at: AwareDatetime
    algorithm: str
    parameters: dict[str, Any]
    libraries: dict[str, str]
    data: dict[str, Any]
    features: list[_TrainedFeature]
    metrics: dict[str, float]
    artifacts: dict[str, _Digest]
    samples: list[Sample] = Field(min_length=1)


class Bins(BaseModel):
    """Quantile bins of one feature: k + 1 rising edges and the k shares expected between them."""

    edges: list[FiniteFloat] = Field(min_length=2)
    shares: list[FiniteFloat] = Field(min_length=1)

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if len(self.edges) != len(self.shares) + 1:
            raise ValueError(f"{len(self.edges)} edges need {len(self.edges) - 1} shares")
        if self.edges != sorted(self.edges):
            raise ValueError("edges do not rise")
        return self


class Baseline(BaseModel):
    """The distributions that served values are compared with; the predictions are the feature `quality`."""

    id: str
    features: dict[str, Bins]
    quality: Bins

    @property
    def bins(self) -> dict[str, Bins]:
        """The bins of the features in the contract's order, and those of the quality last."""
        return {**{name: self.features[name] for name in FEATURE_NAMES}, TARGET: self.quality}


@dataclass(frozen=True)
class Artifacts:
    """Verified artifacts: what they say of themselves, and the bytes of each file, not yet unpickled."""

    manifest: Manifest
    baseline: Baseline
    files: dict[str, bytes]
    compiled: Path | None
    """The verified shared library, where training made one."""

    def unpickle(self, name: str) -> Any:
        """Return the object in the verified joblib file of that name.

        Raises ArtifactError where the installed libraries cannot read it.
        """
        import joblib  # noqa: PLC0415 - brings numpy and scikit-learn, which serving does without where it can

        try:
            return joblib.load(io.BytesIO(self.files[name]))
        except Exception as error:  # a pickle may raise anything
            raise ArtifactError(f"{name}: cannot be unpickled: {_line(error)}") from error


def load(directory: Path) -> Artifacts:
    """Read and verify the artifacts in `directory`.

    Raises ArtifactError on the first file that is missing, malformed or not as the manifest says.
    """
    content = _read(directory / MANIFEST_FILE)
    manifest = _parse(MANIFEST_FILE, lambda: Manifest.model_validate(json.loads(content)))
    if manifest.format != MANIFEST_FORMAT:
        raise ArtifactError(
            f"{MANIFEST_FILE}: format {manifest.format}, this release reads {MANIFEST_FORMAT}"
        )
    names = tuple(feature.name for feature in manifest.features)
    if names != FEATURE_NAMES:
        raise ArtifactError(f"{MANIFEST_FILE}: features {', '.join(names)} are not those of the API")
    if "test_mse" not in manifest.metrics:
        raise ArtifactError(f"{MANIFEST_FILE}: no test_mse among its metrics")
    if any(set(sample.wine) != set(FEATURE_NAMES) for sample in manifest.samples):
        raise ArtifactError(f"{MANIFEST_FILE}: a sample does not have the features of the API")
    files = {name: _verified(directory / name, manifest.artifacts.get(name)) for name in ARTIFACT_FILES}
    baseline = _parse(BASELINE_FILE, lambda: Baseline.model_validate(json.loads(files[BASELINE_FILE])))
    if set(baseline.features) != set(FEATURE_NAMES):
        raise ArtifactError(f"{BASELINE_FILE}: its features are not those of the API")
    compiled = None
    if COMPILED_FILE in manifest.artifacts:
        compiled = directory / COMPILED_FILE
        _verified(compiled, manifest.artifacts[COMPILED_FILE])
    return Artifacts(manifest, baseline, files, compiled)


def _verified(path: Path, digest: _Digest | None) -> bytes:
    if digest is None:
        raise ArtifactError(f"{path.name}: not in the manifest")
    content = _read(path)
    if len(content) != digest.size:
        raise ArtifactError(f"{path.name}: {len(content)} bytes, the manifest says {digest.size}")
    sha256 = hashlib.sha256(content).hexdigest()
    if sha256 != digest.sha256:
        raise ArtifactError(
            f"{path.name}: SHA-256 {sha256[:12]}..., the manifest says {digest.sha256[:12]}..."
        )
    return content


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"{path}: {error.strerror}; run `make train`") from error


def _parse(name: str, parse: Callable[[], _T]) -> _T:
    try:
        return parse()
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{name}: {_line(error)}") from error


def _line(error: Exception) -> str:
    """Write an error on one line, as the log wants it."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return f"{type(error).__name__}: {error}".replace("\n", " ")
