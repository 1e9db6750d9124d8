"""What is counted, and how several workers count together.

Each worker keeps its counts in files of prometheus_client's multiprocess format, named by the worker's slot,
and any worker can add them all up for a scrape. A count is in the shared file the moment it is made, so a
killed worker loses nothing. The request path does not go through the client library: each child is bound once
to its place in the mapped file, and counting is one store there.
"""

import json
import mmap
import os
import struct
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from math import inf, nextafter
from pathlib import Path
from time import perf_counter
from typing import Any, Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Summary, generate_latest, values
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.mmap_dict import MmapedDict
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.artifacts import Baseline, Manifest
from app.contract import MODEL_FILE
from app.settings import Settings

DURATION_BUCKETS: Final = (
    0.0005,
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    inf,
)
QUALITY_BUCKETS: Final = (*(half / 2 for half in range(21)), inf)
STATUSES: Final = ("1xx", "2xx", "3xx", "4xx", "5xx")

_OVERLOADED: Final = [(b"content-length", b"0"), (b"retry-after", b"1"), (b"connection", b"close")]

Cell = tuple["memoryview[float]", int]
"""Where a value lives: `view[index]` is a double in a file that every worker reads."""


class Monitor:
    """All metrics of one worker; the children of `handlers` (route, method) exist from the start.

    Sets prometheus_client's value class and directory for this process, so there is one Monitor a process.
    """

    def __init__(self, settings: Settings, handlers: Sequence[tuple[str, str]] = ()) -> None:
        self._directory = settings.metrics_dir
        self._directory.mkdir(parents=True, exist_ok=True)
        set_aside = _set_aside_unreadable(self._directory, settings.slot)
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(self._directory)
        values.ValueClass = values.MultiProcessValue(lambda: settings.slot)  # type: ignore[no-untyped-call]  # the library has no types here
        self._views: dict[str, memoryview[float]] = {}
        self._model = b""
        self._bins: list[tuple[list[float], list[Cell]]] = []
        self._routes: dict[tuple[str, str], _Route] = {}

        named: dict[str, Any] = {
            "namespace": settings.metrics_namespace,
            "subsystem": settings.metrics_subsystem,
            "registry": None,
        }
        self._requests = Counter(
            "http_requests_total",
            "Requests by route, method and class of status.",
            ("handler", "method", "status"),
            **named,
        )
        self._durations = Histogram(
            "http_request_duration_seconds",
            "Time from a request's headers to its response's, by route and method.",
            ("handler", "method"),
            buckets=DURATION_BUCKETS,
            **named,
        )
        self._request_sizes = Summary(
            "http_request_size_bytes", "Content length of requests, by route.", ("handler",), **named
        )
        self._response_sizes = Summary(
            "http_response_size_bytes", "Content length of responses, by route.", ("handler",), **named
        )
        output = Histogram(
            "regression_model_output", "Predicted qualities of wines.", buckets=QUALITY_BUCKETS, **named
        )
        self._output = self._distribution(output)
        inprogress = Gauge(
            f"{settings.metrics_namespace}_inprogress",
            "Requests being served.",
            registry=None,
            multiprocess_mode="livesum",
        )
        self.inprogress = self._cell(inprogress._value)
        self._refused = Counter(
            "winemon_artifact_refused_total",
            "Times that a starting worker refused its artifacts.",
            registry=None,
        )
        self.overload = Counter(
            "winemon_overload_total", "Requests answered 503 as the worker had too many.", registry=None
        )
        self._unreadable = Counter(
            "winemon_metrics_unreadable_total", "Shared metric files found unreadable.", registry=None
        )
        self._unreadable.inc(set_aside)
        Counter("winemon_worker_starts_total", "Workers started.", registry=None).inc()
        for handler, method in handlers:
            self._route(handler, method)

    def describe(self, manifest: Manifest, baseline: Baseline, *, compiled: bool) -> None:
        """Expose the model that this worker serves, and count from now on into the bins of its baseline."""
        registry = CollectorRegistry()
        registry.register(_ModelCollector(manifest, baseline))
        self._model = generate_latest(registry)
        counter = Counter(
            "winemon_feature_bin_total",
            "Served values by the quantile bin of the training values that they fall into.",
            ("feature", "bin", "baseline"),
            registry=None,
        )
        for feature, bins in baseline.bins.items():
            names = ("below", *map(str, range(len(bins.shares))), "above")
            cells = [self._cell(counter.labels(feature, name, baseline.id)._value) for name in names]
            # The last bin holds its upper edge, so `above` begins at the next double.
            self._bins.append(([*bins.edges[:-1], nextafter(bins.edges[-1], inf)], cells))
        self._state(ready=True, compiled=compiled)

    def refuse(self) -> None:
        """Count artifacts that were refused, and show that this worker serves no model."""
        self._refused.inc()
        self._state(ready=False, compiled=False)

    def observe(self, row: Sequence[float], quality: float) -> None:
        """Count one served wine: each of its eleven values and its predicted quality into their bins."""
        for (edges, cells), value in zip(self._bins, (*row, quality), strict=True):
            view, index = cells[bisect_right(edges, value)]
            view[index] += 1.0
        self._output.observe(quality)

    def request(self, scope: Scope, response: Message, seconds: float) -> None:
        """Count one request as its response starts, so that whoever has an answer is in the next scrape."""
        matched = scope.get("route")
        key = ("none" if matched is None else matched.path, scope["method"])
        route = self._routes.get(key) or self._route(*key)
        view, index = route.statuses[response["status"] // 100 - 1]
        view[index] += 1.0
        route.durations.observe(seconds)
        route.request_sizes.observe(_content_length(scope["headers"]))
        route.response_sizes.observe(_content_length(response["headers"]))

    def scrape(self) -> bytes:
        """Expose the counts of all workers, and the model of this one."""
        registry = CollectorRegistry()
        registry.register(_SharedCollector(self._directory, self._unreadable))
        return generate_latest(registry) + self._model

    def _state(self, *, ready: bool, compiled: bool) -> None:
        # Only now: a worker that is still loading serves nothing, so it says nothing of the service.
        for name, documentation, state in (
            ("winemon_ready", "1 where every worker's model is loaded and agrees with training.", ready),
            (
                "winemon_model_compiled",
                "1 where every worker serves the compiled form of its model.",
                compiled,
            ),
        ):
            Gauge(name, documentation, registry=None, multiprocess_mode="livemin").set(state)

    def _route(self, handler: str, method: str) -> "_Route":
        route = self._routes[handler, method] = _Route(
            [self._cell(self._requests.labels(handler, method, status)._value) for status in STATUSES],
            self._distribution(self._durations.labels(handler, method)),
            self._distribution(self._request_sizes.labels(handler)),
            self._distribution(self._response_sizes.labels(handler)),
        )
        return route

    def _distribution(self, child: Histogram | Summary) -> "_Distribution":
        if isinstance(child, Histogram):
            return _Distribution(
                self._cell(child._sum), child._upper_bounds, [self._cell(bucket) for bucket in child._buckets]
            )
        return _Distribution(self._cell(child._sum), [], [self._cell(child._count)])

    def _cell(self, value: Any) -> Cell:
        """Find where prometheus_client keeps a value, in a mapping of our own of the same file."""
        name, position = value._file._fname, value._file._positions[value._key] // 8
        if name not in self._views or position >= len(self._views[name]):
            with Path(name).open("r+b") as file:
                self._views[name] = memoryview(mmap.mmap(file.fileno(), 0)).cast("d")
        return self._views[name], position


class _Distribution:
    """A histogram or, without bounds, a summary: a sum, and a count for each bucket."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, total: Cell, bounds: list[float], counts: list[Cell]) -> None:
        self._sum = total
        self._bounds = bounds
        self._counts = counts

    def observe(self, amount: float) -> None:
        view, index = self._sum
        view[index] += amount
        view, index = self._counts[bisect_left(self._bounds, amount)]
        view[index] += 1.0


class _Route:
    """The bound HTTP metrics of one route and method."""

    __slots__ = ("durations", "request_sizes", "response_sizes", "statuses")

    def __init__(
        self,
        statuses: list[Cell],
        durations: _Distribution,
        request_sizes: _Distribution,
        response_sizes: _Distribution,
    ) -> None:
        self.statuses = statuses
        self.durations = durations
        self.request_sizes = request_sizes
        self.response_sizes = response_sizes


class MonitorMiddleware:
    """Counts each HTTP request once, and refuses those that the server marks as too many."""

    def __init__(self, app: ASGIApp, monitor: Monitor) -> None:
        self._app = app
        self._monitor = monitor

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = perf_counter()
        counted = False

        async def count(message: Message) -> None:
            nonlocal counted
            if message["type"] == "http.response.start":
                counted = True
                self._monitor.request(scope, message, perf_counter() - started)
            await send(message)

        view, index = self._monitor.inprogress
        view[index] += 1.0
        try:
            if "winemon.overload" in scope:
                self._monitor.overload.inc()
                await count({"type": "http.response.start", "status": 503, "headers": _OVERLOADED})
                await count({"type": "http.response.body", "body": b""})
                return
            await self._app(scope, receive, count)
        except Exception:
            if not counted:
                self._monitor.request(scope, {"status": 500, "headers": []}, perf_counter() - started)
            raise
        finally:
            view[index] -= 1.0


class _ModelCollector(Collector):
    """What is true of the model while this worker lives; not shared, so there is one series of each."""

    def __init__(self, manifest: Manifest, baseline: Baseline) -> None:
        self._manifest = manifest
        self._baseline = baseline

    def collect(self) -> Iterator[Metric]:
        manifest = self._manifest
        info = GaugeMetricFamily(
            "winemon_model_info", "The model that is served.", labels=("version", "algorithm", "sha256")
        )
        info.add_metric((manifest.version, manifest.algorithm, manifest.artifacts[MODEL_FILE].sha256), 1)
        yield info
        yield GaugeMetricFamily(
            "winemon_model_test_mse",
            "Mean squared error of the model on the test split, in points of quality squared.",
            manifest.metrics["test_mse"],
        )
        yield GaugeMetricFamily(
            "winemon_model_trained_timestamp_seconds",
            "When the model was trained, in Unix time.",
            manifest.trained_at.timestamp(),
        )
        ratios = GaugeMetricFamily(
            "winemon_baseline_ratio",
            "Share of values that the baseline expects in each bin.",
            labels=("feature", "bin", "baseline"),
        )
        for feature, bins in self._baseline.bins.items():
            shares = {"below": 0.0, **{str(i): share for i, share in enumerate(bins.shares)}, "above": 0.0}
            for name, share in shares.items():
                ratios.add_metric((feature, name, self._baseline.id), share)
        yield ratios


class _SharedCollector(Collector):
    """The sum over all workers' files; one that cannot be read is left out, and counted."""

    def __init__(self, directory: Path, unreadable: Counter) -> None:
        self._directory = directory
        self._unreadable = unreadable

    def collect(self) -> Iterator[Metric]:
        files = [str(path) for path in self._directory.glob("*.db")]
        try:
            metrics = MultiProcessCollector.merge(files)  # type: ignore[no-untyped-call]  # the library has no types here
        except _UNREADABLE:
            # A file that a worker is creating at this moment is empty: it holds no counts yet.
            readable = [file for file in files if _is_readable(file)]
            self._unreadable.inc(sum(Path(file).stat().st_size > 0 for file in set(files) - set(readable)))
            metrics = MultiProcessCollector.merge(readable)  # type: ignore[no-untyped-call]  # the library has no types here
        yield from metrics


_UNREADABLE: Final = (OSError, RuntimeError, ValueError, struct.error)
"""What reading a damaged metric file raises: gone, cut short, or not its JSON or UTF-8."""


def _is_readable(file: str) -> bool:
    try:
        for key, *_ in MmapedDict.read_all_values_from_file(file):  # type: ignore[no-untyped-call]  # the library has no types here
            json.loads(key)
    except _UNREADABLE:
        return False
    return True


def _set_aside_unreadable(directory: Path, slot: int) -> int:
    """Rename the slot's files that a worker could not continue; return how many."""
    unreadable = [path for path in directory.glob(f"*_{slot}.db") if not _is_readable(str(path))]
    for path in unreadable:
        path.rename(path.with_suffix(".unreadable"))
    return len(unreadable)


def _content_length(headers: Sequence[tuple[bytes, bytes]]) -> float:
    """Return the Content-Length among ASGI headers in bytes, 0 where there is none that could be true."""
    for name, value in headers:
        if name == b"content-length":
            # A claim of 10^13 bytes or more would drown every honest one in the sum.
            return float(value) if value.isdigit() and len(value) <= 13 else 0.0
    return 0.0
