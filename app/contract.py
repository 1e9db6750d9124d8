"""The contract between training and serving: features, units, bounds and artifact names.

Imports nothing of ours, and nothing but the standard library, so that any part of winemon may read it.
"""

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Feature:
    """One input of the model: name in the API, column in the data file, unit and physical bounds."""

    name: str
    column: str
    unit: str
    minimum: float = 0.0
    maximum: float | None = None


FEATURES: Final = (
    Feature("fixed_acidity", "fixed acidity", "g/dm3"),
    Feature("volatile_acidity", "volatile acidity", "g/dm3"),
    Feature("citric_acid", "citric acid", "g/dm3"),
    Feature("residual_sugar", "residual sugar", "g/dm3"),
    Feature("chlorides", "chlorides", "g/dm3"),
    Feature("free_sulfur_dioxide", "free sulfur dioxide", "mg/dm3"),
    Feature("total_sulfur_dioxide", "total sulfur dioxide", "mg/dm3"),
    Feature("density", "density", "g/cm3"),
    Feature("ph", "pH", "", maximum=14.0),
    Feature("sulphates", "sulphates", "g/dm3"),
    Feature("alcohol_pct_vol", "alcohol", "%", maximum=100.0),
)
FEATURE_NAMES: Final = tuple(feature.name for feature in FEATURES)

TARGET: Final = "quality"
TARGET_MINIMUM: Final = 0.0
TARGET_MAXIMUM: Final = 10.0

SCALER_FILE: Final = "scaler.joblib"
MODEL_FILE: Final = "model.joblib"
BASELINE_FILE: Final = "baseline.json"
MANIFEST_FILE: Final = "manifest.json"
ARTIFACT_FILES: Final = (SCALER_FILE, MODEL_FILE, BASELINE_FILE)
"""The files that the manifest always vouches for, by SHA-256 and size."""

COMPILED_FILE: Final = "model.so"
"""The scaler and model as machine code, vouched for where there is one; without it scikit-learn serves."""

MANIFEST_FORMAT: Final = 1
"""Layout version of the manifest; a reader refuses any other."""
