"""The service with parts of it left out, to see what they cost; gunicorn loads each in place of the whole."""

from array import array
from typing import Any

from fastapi import FastAPI, Response
from prometheus_fastapi_instrumentator.middleware import PrometheusInstrumentatorMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from app import main
from app.contract import FEATURES
from app.monitoring import Monitor
from app.predictor import Serving
from app.schemas import Prediction, Wine

QUALITY = 5.497


class _WithoutHttp(Monitor):
    """Counts predictions, but not requests."""

    def route(self, *_: str) -> Any:
        """Return what counts nothing."""
        return lambda *_: None


class _Silent(_WithoutHttp):
    """Counts nothing, neither predictions nor requests."""

    def describe(self, manifest: Any, baseline: Any, predictor: Any) -> Any:
        """Return what only predicts."""
        super().describe(manifest, baseline, predictor)
        return predictor.counting()


def instrumented() -> ASGIApp:
    """Build the service with prometheus-fastapi-instrumentator's metrics of HTTP in place of its own."""
    main.Monitor = _WithoutHttp  # type: ignore[misc]  # the one part of it that is another
    app = main.create_app()
    counted = PrometheusInstrumentatorMiddleware(
        app, metric_namespace="fastapi", metric_subsystem="monitoring"
    )

    async def instrumented(scope: Scope, receive: Receive, send: Send) -> None:
        scope["app"] = app  # it looks the route up there
        scope.pop("winemon.reply", None)  # it knows the messages of ASGI alone
        await counted(scope, receive, send)

    return instrumented


def unmetered() -> FastAPI:
    """Build the service without metrics."""
    main.Monitor = _Silent  # type: ignore[misc]  # the one part of it that is another
    return main.create_app()


class _Constant:
    """Predicts the same for every wine."""

    compiled = True

    def counting(self) -> Serving:
        """Return what predicts it for each wine that Pydantic validated."""
        return Serving(lambda wines: array("d", [QUALITY] * (len(wines) // len(FEATURES))))


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
