"""The service with parts of it left out, to see what they cost; gunicorn loads each in place of the whole."""

from typing import Any

from fastapi import FastAPI, Response

from app import main
from app.monitoring import Monitor
from app.schemas import Prediction, Wine

QUALITY = 5.497


class _Silent(Monitor):
    """Counts nothing, neither predictions nor requests."""

    def describe(self, manifest: Any, baseline: Any, predictor: Any) -> Any:
        """Return what only predicts."""
        super().describe(manifest, baseline, predictor)
        return predictor.predict, predictor.predict_many

    def observe(self, *_: Any) -> None:
        """Count nothing."""

    def route(self, *_: str) -> Any:
        """Return what counts nothing either."""
        return self


def unmetered() -> FastAPI:
    """Build the service without metrics."""
    main.Monitor = _Silent  # type: ignore[misc]  # the one part of it that is another
    return main.create_app()


class _Constant:
    """Predicts the same for every wine."""

    compiled = True

    def predict(self, _row: Any) -> float:
        """Predict what it always predicts."""
        return QUALITY

    def predict_many(self, rows: Any) -> list[float]:
        """Predict it for each."""
        return [QUALITY] * len(rows)


def floor() -> FastAPI:
    """Build the service without metrics and without a model: our own route, which only validates."""
    main.load_predictor = lambda _artifacts: _Constant()
    main.disagreement = lambda *_: None
    return unmetered()


def limit() -> FastAPI:
    """Build the endpoint as FastAPI would have it written, with the same body, response and headers."""
    app = FastAPI()

    @app.post("/predict")
    async def predict(wine: Wine, response: Response) -> Prediction:  # noqa: ARG001 - it is only validated
        response.headers["X-Model-Score"] = repr(QUALITY)
        response.headers["X-Model-Version"] = "limit"
        return Prediction(quality=QUALITY)

    @app.get("/ready")
    async def ready() -> dict[str, bool]:
        return {"ready": True}

    return app
