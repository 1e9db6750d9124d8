"""The bodies of requests and responses; what OpenAPI documents is what is enforced."""

from typing import TYPE_CHECKING, Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, Field, create_model
from pydantic.config import JsonDict

from app.contract import FEATURES, Feature

MAX_BATCH: Final = 1000
"""Most wines in one batch."""

LARGEST: Final = 1e30
"""Bound of features that physics does not bound: far beyond any wine, within a tree's float32 arithmetic."""

EXAMPLE: Final[JsonDict] = {
    "fixed_acidity": 7.4,
    "volatile_acidity": 0.7,
    "citric_acid": 0.0,
    "residual_sugar": 1.9,
    "chlorides": 0.076,
    "free_sulfur_dioxide": 11.0,
    "total_sulfur_dioxide": 34.0,
    "density": 0.9978,
    "ph": 3.51,
    "sulphates": 0.56,
    "alcohol_pct_vol": 9.4,
}
"""The first wine of the data set."""


def _field(feature: Feature) -> Any:
    description = f"{feature.column}, {feature.unit}" if feature.unit else feature.column
    maximum = LARGEST if feature.maximum is None else feature.maximum
    bounds = Field(ge=feature.minimum, le=maximum, allow_inf_nan=False, description=description)
    return Annotated[float, bounds], ...


if TYPE_CHECKING:
    Wine = BaseModel
else:
    # Strict: a number is a JSON number, never a string of digits or a boolean.
    Wine = create_model(
        "Wine",
        __config__=ConfigDict(extra="forbid", strict=True, json_schema_extra={"examples": [EXAMPLE]}),
        __doc__="The physicochemical measurements of one wine: the eleven features, all required and finite.",
        **{feature.name: _field(feature) for feature in FEATURES},
    )


class Batch(BaseModel):
    """Up to 1,000 wines to predict in one request."""

    model_config = ConfigDict(
        extra="forbid", strict=True, json_schema_extra={"examples": [{"samples": [EXAMPLE]}]}
    )

    samples: Annotated[list[Wine], Field(min_length=1, max_length=MAX_BATCH)]


class Prediction(BaseModel):
    """The predicted quality of one wine, on the tasters' scale of 0 to 10."""

    quality: float


class Predictions(BaseModel):
    """The predicted qualities of a batch, in its order."""

    qualities: list[float]


class Problem(BaseModel):
    """One thing wrong with a request: where, what, and a stable name for it."""

    type: str
    loc: list[str | int]
    msg: str


class Problems(BaseModel):
    """Why a request body was not accepted."""

    detail: list[Problem]


class Refusal(BaseModel):
    """Why a request was not served."""

    detail: str


class Liveness(BaseModel):
    """The process serves."""

    status: str


class Readiness(BaseModel):
    """Whether the model is loaded and answers as training said it would."""

    ready: bool
    version: str | None
    reason: str | None


class FeatureCard(BaseModel):
    """One input of the model: unit, physical bounds, the range and the quantiles it was trained on."""

    name: str
    unit: str
    minimum: float
    maximum: float | None
    trained_minimum: float
    trained_maximum: float
    edges: list[float]
    shares: list[float]


class ModelCard(BaseModel):
    """What is being served and what is known about it."""

    version: str
    code_version: str
    algorithm: str
    trained_at: str
    parameters: dict[str, Any]
    metrics: dict[str, float]
    data: dict[str, Any]
    libraries: dict[str, str]
    features: list[FeatureCard]
