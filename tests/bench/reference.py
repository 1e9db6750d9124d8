"""The reference: a model served as a tutorial would, with the usual libraries and nothing else."""

import os
from pathlib import Path

import joblib
import numpy as np
from fastapi import FastAPI, Response
from prometheus_client import Histogram
from prometheus_fastapi_instrumentator import Instrumentator
from prometheus_fastapi_instrumentator.metrics import Info
from pydantic import BaseModel

from app.contract import FEATURE_NAMES

ARTIFACTS = Path(os.environ.get("WINEMON_ARTIFACTS_DIR", "artifacts"))


class Wine(BaseModel):
    """The eleven measurements."""

    fixed_acidity: float
    volatile_acidity: float
    citric_acid: float
    residual_sugar: float
    chlorides: float
    free_sulfur_dioxide: float
    total_sulfur_dioxide: float
    density: float
    ph: float
    sulphates: float
    alcohol_pct_vol: float


class Rating(BaseModel):
    """The answer."""

    quality: float


app = FastAPI()
scaler = joblib.load(ARTIFACTS / "scaler.joblib")
model = joblib.load(ARTIFACTS / "model.joblib")
output = Histogram(
    "fastapi_monitoring_regression_model_output", "Predictions.", buckets=[half / 2 for half in range(21)]
)


def observe(info: Info) -> None:
    """Count the prediction that the response carries in a header."""
    if info.modified_handler == "/predict" and info.response is not None:
        output.observe(float(info.response.headers["X-Model-Score"]))


@app.post("/predict")
def predict(response: Response, wine: Wine) -> Rating:
    """Predict one wine."""
    values = wine.model_dump()
    scaled = scaler.transform(np.array([[values[name] for name in FEATURE_NAMES]]))
    quality = float(model.predict(scaled)[0])
    response.headers["X-Model-Score"] = str(quality)
    response.headers["X-Model-Version"] = "reference"
    return Rating(quality=quality)


@app.get("/ready")
def ready() -> dict[str, bool]:
    """Answer once the model is loaded."""
    return {"ready": True}


Instrumentator().instrument(app, metric_namespace="fastapi", metric_subsystem="monitoring").add(
    observe
).expose(app)
