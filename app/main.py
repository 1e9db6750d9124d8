"""The HTTP interface: `create_app` builds it in each worker; gunicorn.conf.py runs the workers."""

import gzip
import json
import logging
from array import array
from collections.abc import Callable
from itertools import chain
from math import isnan, nan
from pathlib import Path
from time import perf_counter
from typing import Any, Final, cast

from fastapi import FastAPI
from fastapi.openapi.docs import get_redoc_html, get_swagger_ui_html
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from pydantic_core import to_json
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import Receive, Scope, Send

from app.artifacts import ArtifactError, Baseline, Manifest, load
from app.contract import FEATURES
from app.monitoring import Monitor, Observe
from app.predictor import Numbers, Predictor, Serving, disagreement, load_predictor
from app.schemas import (
    EXAMPLE,
    Batch,
    FeatureCard,
    Liveness,
    ModelCard,
    Prediction,
    Predictions,
    Problems,
    Readiness,
    Refusal,
    Wine,
)
from app.settings import Settings

METRICS_CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
PAGE: Final = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
PAGE_POLICY: Final = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:;"
    " connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
SCORE_HEADER: Final = "X-Model-Score"
VERSION_HEADER: Final = "X-Model-Version"

logger = logging.getLogger("uvicorn.error")

Reply = tuple[int, bytes, bytes]
"""Status, header lines and body of a response, ready to be sent."""

Responses = dict[int | str, dict[str, Any]]
"""Documentation of the statuses of a route."""

JSON: Final = b"content-type: application/json\r\n"
MAX_PROBLEMS: Final = 50
"""Most problems named in one 422, so that a small bad request never makes a huge answer."""


class Service:
    """One worker's model and the answers it gives; without a model it says why."""

    def __init__(self, settings: Settings, monitor: Monitor) -> None:
        self._monitor = monitor
        self._manifest: Manifest | None = None
        self._predictor: Predictor | None = None
        self._serving: Serving | None = None
        self._reason: str | None = None
        self._head = JSON
        self._consoles = settings.consoles
        self.card: ModelCard | None = None
        try:
            artifacts = load(settings.artifacts_dir)
            self._predictor = load_predictor(artifacts)
        except ArtifactError as error:
            self._reason = str(error)
            monitor.refuse()
            logger.error("Refused the artifacts: %s", error)
            return
        self._manifest = artifacts.manifest
        self.card = _card(artifacts.manifest, artifacts.baseline)
        self._head = JSON + b"x-model-version: %b\r\n" % artifacts.manifest.version.encode()
        self._serving = monitor.describe(artifacts.manifest, artifacts.baseline, self._predictor)

    def predict(self, wine: Wine) -> Reply:
        """Predict the quality of one wine, on the tasters' scale of 0 to 10."""
        if self._serving is None:
            return self._unavailable()
        return self._one(self._serving.predict(array("d", wine.__dict__.values()))[0])

    def predict_batch(self, batch: Batch) -> Reply:
        """Predict the qualities of up to 1,000 wines, in their order."""
        if self._serving is None:
            return self._unavailable()
        wines = chain.from_iterable(wine.__dict__.values() for wine in batch.samples)
        return self._many(self._serving.predict(array("d", wines)))

    def read(self, body: bytes) -> Reply | None:
        """Do what `predict` does with a plain body, or leave it to that."""
        quality = nan if self._serving is None else self._serving.read_one(body)
        return None if isnan(quality) else self._one(quality)

    def read_batch(self, body: bytes) -> Reply | None:
        """Do what `predict_batch` does with a plain body, or leave it to that."""
        qualities = None if self._serving is None else self._serving.read_many(body)
        return self._many(qualities) if qualities else None

    def _one(self, quality: float) -> Reply:
        score = b"%a" % quality
        body = b'{"quality":%b}' % score
        return 200, b"%bcontent-length: %d\r\nx-model-score: %b\r\n" % (self._head, len(body), score), body

    def _many(self, qualities: "Numbers[float]") -> Reply:
        body = b'{"qualities":%b}' % to_json(qualities.tolist())
        return 200, b"%bcontent-length: %d\r\n" % (self._head, len(body)), body

    async def healthcheck(self) -> Liveness:
        """Answer 200 while the process serves."""
        return Liveness(status="ok")

    async def ready(self) -> Response:
        """Answer 200 where the model predicts the manifest's samples as training did, else 503 and why."""
        reason = self._reason
        if self._predictor is not None and self._manifest is not None:
            reason = disagreement(self._predictor, self._manifest.samples)
        version = None if self._manifest is None else self._manifest.version
        readiness = Readiness(ready=reason is None, version=version, reason=reason)
        return JSONResponse(readiness.model_dump(), 200 if readiness.ready else 503)

    async def model(self) -> Response:
        """Show the model card: what is served and what is known about it."""
        if self.card is None:
            status, head, body = self._unavailable()
            return Response(body, status, {name.decode(): value.decode() for name, value in _headers(head)})
        return Response(self.card.model_dump_json(), media_type="application/json")

    async def page(self) -> Response:
        """Show a small page for people: try a wine, see the model card, find the other consoles."""
        start = {
            "card": self.card and self.card.model_dump(),
            "example": EXAMPLE,
            "consoles": self._consoles,
            "reason": self._reason,
        }
        # Within a script element, so nothing in it may end that.
        content = PAGE.replace("{{start}}", json.dumps(start).replace("<", "\\u003c"))
        return HTMLResponse(
            content, headers={"content-security-policy": PAGE_POLICY, "cache-control": "no-cache"}
        )

    async def metrics(self, request: Request) -> Response:
        """Expose the metrics of all workers."""
        body = self._monitor.scrape()
        headers = {"vary": "accept-encoding"}
        if "gzip" in request.headers.get("accept-encoding", ""):
            body = gzip.compress(body, compresslevel=5)
            headers["content-encoding"] = "gzip"
        return Response(body, headers=headers, media_type=METRICS_CONTENT_TYPE)

    @property
    def version(self) -> str:
        """The version of the model, or what stands for none."""
        return "none" if self._manifest is None else self._manifest.version

    def _unavailable(self) -> Reply:
        return _refuse(503, f"no model: {self._reason}", b"retry-after: 10\r\n")


class JsonRoute(APIRoute):
    """A route of one JSON body, which is read, limited and validated in one pass; FastAPI only documents it.

    Its endpoint takes the validated model and returns the whole reply; `quick` takes the body before that,
    and returns None where it is for Pydantic to judge.
    """

    def __init__(
        self, *args: Any, quick: Callable[[bytes], Reply | None], max_body_bytes: int, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._quick = quick
        assert self.body_field is not None  # noqa: S101 - by construction
        body = cast(type[BaseModel], self.body_field.field_info.annotation)
        self._validate = body.__pydantic_validator__.validate_json
        self._max_body_bytes = max_body_bytes

    def reply(self, scope: Scope, body: bytes | None) -> Reply:
        """Answer a request whose whole body was read, or None where it is too long."""
        if body is None:
            limit = f"the body is longer than {self._max_body_bytes} bytes"
            return _refuse(413, limit, b"connection: close\r\n")
        media_type = encoding = b""
        for name, value in scope["headers"]:
            if name == b"content-type":
                media_type = value
            elif name == b"content-encoding":
                encoding = value
        if (
            media_type != b"application/json"
            and media_type.split(b";")[0].strip().lower() != b"application/json"
        ):
            return _refuse(415, "send the body as application/json")
        if encoding.lower() not in (b"", b"identity"):
            return _refuse(415, "send the body without a content encoding")
        reply = self._quick(body)
        if reply is None:
            try:
                model = self._validate(body)
            except ValidationError as error:
                return _problems(error)
            reply = cast(Reply, self.endpoint(model))
        return reply

    async def read(self, receive: Receive) -> bytes | None:
        """Read the whole body; None where it is longer than the limit, whatever its Content-Length claims.

        Some of what is beyond the limit is read and dropped: closing on unread data would reset the
        connection, and the client might lose the answer.
        """
        message = await receive()
        body: bytes = message.get("body", b"")
        while message.get("more_body") and len(body) <= self._max_body_bytes:
            message = await receive()
            body += message.get("body", b"")
        dropped = 0
        while message.get("more_body") and dropped <= 8 * self._max_body_bytes:
            message = await receive()
            dropped += len(message.get("body", b""))
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        return body if len(body) <= self._max_body_bytes else None


class Api(FastAPI):
    """FastAPI, but for its JSON routes: those are served and counted in one pass, without its layers."""

    def __init__(self, monitor: Monitor, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._monitor = monitor
        self._json_routes: dict[str, tuple[JsonRoute, Observe]] = {}

    def add_json_route(self, route: JsonRoute) -> None:
        """Serve and document a JSON route."""
        self.router.routes.append(route)
        self._json_routes[route.path] = route, self._monitor.route(route.path, "POST")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI connection."""
        if scope["type"] != "http":
            await super().__call__(scope, receive, send)
            return
        view, index = self._monitor.inprogress
        view[index] += 1.0
        try:
            if "winemon.overload" in scope:
                self._monitor.overload.inc()
                await self._monitor.watch(_overloaded, scope, receive, send)
            elif scope["method"] == "POST" and scope["path"] in self._json_routes:
                await self._serve(*self._json_routes[scope["path"]], scope, receive, send)
            else:
                await self._monitor.watch(super().__call__, scope, receive, send)
        finally:
            view[index] -= 1.0

    @staticmethod
    async def _serve(route: JsonRoute, observe: Observe, scope: Scope, receive: Receive, send: Send) -> None:
        started = perf_counter()
        try:
            body = await route.read(receive)
        except ClientDisconnect:
            return
        received = 0 if body is None else len(body)
        try:
            reply = route.reply(scope, body)
        except Exception:
            observe(500, perf_counter() - started, received, 0)
            raise
        observe(reply[0], perf_counter() - started, received, len(reply[2]))
        await _send(reply, scope, send)


def create_app(settings: Settings | None = None) -> FastAPI:
    """Build the application of one worker, with the settings of the environment unless others are given."""
    settings = settings or Settings()
    monitor = Monitor(
        settings,
        [("/predict", "POST"), ("/predict/batch", "POST"), ("/healthcheck", "GET"), ("/ready", "GET")],
    )
    service = Service(settings, monitor)
    app = Api(
        monitor,
        title="winemon",
        description="Predicts the quality of red wine from its physicochemical measurements.",
        version=service.version,
        redirect_slashes=False,
        docs_url=None,
        redoc_url=None,
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )
    refusals: Responses = {
        413: {"model": Refusal, "description": "The body is too long."},
        415: {"model": Refusal, "description": "The body is not plain application/json."},
        422: {
            "model": Problems,
            "description": "The body is not what the schema says; each problem names its field.",
        },
        503: {
            "model": Refusal,
            "description": "No model is being served, or the worker has too many requests.",
        },
    }
    score = {
        SCORE_HEADER: {"description": "The predicted quality.", "schema": {"type": "number"}},
        VERSION_HEADER: {"description": "The version of the model.", "schema": {"type": "string"}},
    }
    batch = {VERSION_HEADER: score[VERSION_HEADER]}
    for path, endpoint, quick, response_model, headers in (
        ("/predict", service.predict, service.read, Prediction, score),
        ("/predict/batch", service.predict_batch, service.read_batch, Predictions, batch),
    ):
        route = JsonRoute(
            path,
            endpoint,
            quick=quick,
            methods=["POST"],
            response_model=response_model,
            responses={200: {"headers": headers}, **refusals},
            max_body_bytes=settings.max_body_bytes,
        )
        app.add_json_route(route)
    unready: Responses = {503: {"model": Readiness, "description": "Not ready, and why."}}
    unavailable: Responses = {503: {"model": Refusal, "description": "No model is being served."}}
    app.add_api_route("/healthcheck", service.healthcheck)
    app.add_api_route("/ready", service.ready, response_model=Readiness, responses=unready)
    app.add_api_route("/model", service.model, response_model=ModelCard, responses=unavailable)
    app.add_api_route("/", service.page, include_in_schema=False)
    app.add_api_route("/metrics", service.metrics, include_in_schema=False)
    document(app)
    return app


def document(app: FastAPI) -> None:
    """Add FastAPI's pages that show the API, with assets of a package instead of ones from the internet."""
    swagger = get_swagger_ui_html(
        openapi_url="openapi.json",
        title=app.title,
        swagger_js_url="docs/assets/swagger-ui-bundle.js",
        swagger_css_url="docs/assets/swagger-ui.css",
        swagger_favicon_url="docs/assets/favicon.png",
    )
    redoc = get_redoc_html(
        openapi_url="openapi.json",
        title=app.title,
        redoc_js_url="docs/assets/redoc.standalone.js",
        redoc_favicon_url="docs/assets/favicon.png",
        with_google_fonts=False,
    )
    app.add_api_route("/docs", lambda: swagger, response_class=HTMLResponse, include_in_schema=False)
    app.add_api_route("/redoc", lambda: redoc, response_class=HTMLResponse, include_in_schema=False)
    app.mount("/docs/assets", StaticFiles(packages=[("fastapi_offline", "static")]))


def _headers(head: bytes) -> list[tuple[bytes, bytes]]:
    """Split header lines as ASGI wants them."""
    return [(name, value) for name, _, value in (line.partition(b": ") for line in head.splitlines())]


def _card(manifest: Manifest, baseline: Baseline) -> ModelCard:
    features = [
        FeatureCard(
            name=feature.name,
            unit=feature.unit,
            minimum=feature.minimum,
            maximum=feature.maximum,
            trained_minimum=trained.minimum,
            trained_maximum=trained.maximum,
            edges=baseline.features[feature.name].edges,
            shares=baseline.features[feature.name].shares,
        )
        for feature, trained in zip(FEATURES, manifest.features, strict=True)
    ]
    return ModelCard(
        features=features,
        **manifest.model_dump(mode="json", include=ModelCard.model_fields.keys() - {"features"}),
    )


async def _send(reply: Reply, scope: Scope, send: Send) -> None:
    """Send a reply whole where the server can (see gunicorn.conf.py), else as ASGI says."""
    status, head, body = reply
    if "winemon.reply" in scope:
        await send({"type": "winemon.reply", "status": status, "head": head, "body": body})
        return
    await send({"type": "http.response.start", "status": status, "headers": _headers(head)})
    await send({"type": "http.response.body", "body": body})


async def _overloaded(_scope: Scope, _receive: Receive, send: Send) -> None:
    await _send(
        _refuse(503, "too many requests at once", b"retry-after: 1\r\nconnection: close\r\n"), {}, send
    )


def _refuse(status: int, detail: str, head: bytes = b"") -> Reply:
    body = json.dumps({"detail": detail}).encode()
    return status, b"%b%bcontent-length: %d\r\n" % (JSON, head, len(body)), body


def _problems(error: ValidationError) -> Reply:
    """Build a 422 in FastAPI's form, without the input: echoing a NaN would not be JSON."""
    problems = error.errors(include_url=False, include_context=False, include_input=False)[:MAX_PROBLEMS]
    body = json.dumps(
        {"detail": [{**problem, "loc": ["body", *problem["loc"]]} for problem in problems]}
    ).encode()
    return 422, b"%bcontent-length: %d\r\n" % (JSON, len(body)), body
