"""What is counted, and how several workers count together.

Each worker keeps its counts in files of prometheus_client's multiprocess format, named by the worker's slot,
and any worker can add them all up for a scrape. A count is in the shared file the moment it is made, so a
killed worker loses nothing. The request path does not go through the client library: each child is bound once
to its place in the mapped file, and counting is one store there.
"""

import ctypes
import json
import mmap
import os
import struct
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle
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
from app.predictor import MAX_BINS, CompiledPredictor, Numbers, Predictor, Serving
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

Cell = tuple["memoryview[float]", int]
"""Where a value lives: `view[index]` is a double in a file that every worker reads."""

Observe = Callable[[int, float, float, float], None]
"""Counts one request: status, seconds, bytes received, bytes sent.

Before its answer is sent, so that whoever has that is in the next scrape.
"""

Bins = tuple[list[float], list[Cell]]
"""Edges, and where values are counted: below all of them, from each of them on to the next."""


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
        self._routes: dict[tuple[str, str], Observe] = {}

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
        self._output = Histogram(
            "regression_model_output", "Predicted qualities of wines.", buckets=QUALITY_BUCKETS, **named
        )
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
            self.route(handler, method)

    def describe(self, manifest: Manifest, baseline: Baseline, predictor: Predictor) -> Serving:
        """Expose the model that this worker serves; return what predicts, and counts values and qualities."""
        registry = CollectorRegistry()
        registry.register(_ModelCollector(manifest, baseline))
        self._model = generate_latest(registry)
        counter = Counter(
            "winemon_feature_bin_total",
            "Served values by the quantile bin of the training values that they fall into.",
            ("feature", "bin", "baseline"),
            registry=None,
        )
        bins: list[Bins] = []
        for feature, expected in baseline.bins.items():
            names = ("below", *map(str, range(len(expected.shares))), "above")
            cells = [self._cell(counter.labels(feature, name, baseline.id)._value) for name in names]
            # The last bin holds its upper edge, so `above` begins at the next double.
            bins.append(([*expected.edges[:-1], nextafter(expected.edges[-1], inf)], cells))
        # So does each bucket of a histogram.
        edges = [nextafter(bound, inf) for bound in QUALITY_BUCKETS[:-1]]
        bins.append((edges, [self._cell(bucket) for bucket in self._output._buckets]))
        total = self._cell(self._output._sum)
        self._state(ready=True, compiled=predictor.compiled)
        if isinstance(predictor, CompiledPredictor) and all(len(cells) <= MAX_BINS for _, cells in bins):
            addresses = [[_address(cell) for cell in cells] for _, cells in bins]
            return predictor.counting([edges for edges, _ in bins], addresses, _address(total))
        return Serving(_counting(predictor, bins, total))

    def refuse(self) -> None:
        """Count artifacts that were refused, and show that this worker serves no model."""
        self._refused.inc()
        self._state(ready=False, compiled=False)

    def route(self, handler: str, method: str) -> Observe:
        """Return what counts a request of a route and method, whose counts exist from then on."""
        key = (handler, method)
        if key not in self._routes:
            durations = self._durations.labels(*key)
            received, sent = self._request_sizes.labels(handler), self._response_sizes.labels(handler)
            self._routes[key] = _observe(
                [self._cell(self._requests.labels(*key, status)._value) for status in STATUSES],
                (self._cell(durations._sum), [self._cell(bucket) for bucket in durations._buckets]),
                (self._cell(received._sum), self._cell(received._count)),
                (self._cell(sent._sum), self._cell(sent._count)),
            )
        return self._routes[key]

    async def watch(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one HTTP request with `app`, and count it as its answer starts, or as it fails."""
        started = perf_counter()
        counted = False

        def count(status: int, headers: Sequence[tuple[bytes, bytes]]) -> None:
            nonlocal counted
            counted = True
            matched = scope.get("route")
            observe = self.route("none" if matched is None else matched.path, scope["method"])
            sizes = _content_length(scope["headers"]), _content_length(headers)
            observe(status, perf_counter() - started, *sizes)

        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start":
                count(message["status"], message["headers"])
            await send(message)

        try:
            await app(scope, receive, watched)
        except Exception:
            if not counted:
                count(500, [])
            raise

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

    def _cell(self, value: Any) -> Cell:
        """Find where prometheus_client keeps a value, in a mapping of our own of the same file."""
        name, position = value._file._fname, value._file._positions[value._key] // 8
        if name not in self._views or position >= len(self._views[name]):
            with Path(name).open("r+b") as file:
                self._views[name] = memoryview(mmap.mmap(file.fileno(), 0)).cast("d")
        return self._views[name], position


def _observe(
    statuses: Sequence[Cell],
    durations: tuple[Cell, Sequence[Cell]],
    requests: tuple[Cell, Cell],
    responses: tuple[Cell, Cell],
) -> Observe:
    # Written out and bound beforehand, as every request pays for each call and lookup in here.
    (times, time), buckets = durations
    (received, i), (receipts, j) = requests
    (sent, k), (sendings, m) = responses

    def observe(status: int, seconds: float, request_size: float, response_size: float) -> None:
        view, index = statuses[status // 100 - 1]
        view[index] += 1.0
        times[time] += seconds
        view, index = buckets[bisect_left(DURATION_BUCKETS, seconds)]
        view[index] += 1.0
        received[i] += request_size
        receipts[j] += 1.0
        sent[k] += response_size
        sendings[m] += 1.0

    return observe


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
    """The sum over all workers' files; one that cannot be read is left out, and counted.

    Counts are added up before their keys are looked at; the library does it the other way round. Here one
    more slot costs next to nothing.
    """

    def __init__(self, directory: Path, unreadable: Counter) -> None:
        self._directory = directory
        self._unreadable = unreadable

    def collect(self) -> Iterator[Metric]:
        totals: dict[tuple[str, str], float] = defaultdict(float)
        gauges = []
        for path in sorted(self._directory.glob("*.db")):
            kind = path.name.partition("_")[0]
            try:
                values = _read(path)
            except FileNotFoundError:  # the gauges of a worker that has just ended
                continue
            except _UNREADABLE:
                # A file that a worker is creating at this moment is empty: it holds no counts yet.
                self._unreadable.inc(path.stat().st_size > 0)
                continue
            if kind == "gauge":
                gauges.append(str(path))
                continue
            for key, value in values:
                totals[kind, key] += value
        families: dict[str, Metric] = {}
        bucket = 0.0
        for (kind, key), value in totals.items():
            family, name, labels, documentation = _parsed[key]
            metric = families.setdefault(family, Metric(family, documentation, kind))
            if "le" not in labels:
                metric.add_sample(name, labels, value)
                bucket = 0.0
                continue
            # A histogram's sum comes first in every file, then its buckets from the least to +Inf.
            bucket += value
            metric.add_sample(name, labels, bucket)
            if labels["le"] == "+Inf":
                rest = {label: text for label, text in labels.items() if label != "le"}
                metric.add_sample(f"{family}_count", rest, bucket)
        yield from families.values()
        yield from MultiProcessCollector.merge(gauges)  # type: ignore[no-untyped-call]  # the library has no types here


_UNREADABLE: Final = (OSError, RuntimeError, ValueError, struct.error)
"""What reading a damaged metric file raises: gone, cut short, or not its JSON or UTF-8."""


_parsed: dict[str, tuple[str, str, dict[str, str], str]] = {}
"""The family, name, labels and documentation that each key seen so far holds as JSON."""


def _read(path: Path) -> list[tuple[str, float]]:
    """Return the keys and values in a metric file; raises one of _UNREADABLE where it is damaged."""
    file = MmapedDict.read_all_values_from_file(str(path))  # type: ignore[no-untyped-call]  # the library has no types here
    values = [(key, value) for key, value, _timestamp, _position in file]
    for key, _ in values:
        if key not in _parsed:
            family, name, labels, documentation = json.loads(key)
            _parsed[key] = family, name, labels, documentation
    return values


def _set_aside_unreadable(directory: Path, slot: int) -> int:
    """Rename the slot's files that a worker could not continue; return how many."""
    count = 0
    for path in directory.glob(f"*_{slot}.db"):
        try:
            _read(path)
        except _UNREADABLE:
            path.rename(path.with_suffix(".unreadable"))
            count += 1
    return count


def _counting(
    predictor: Predictor, bins: Sequence[Bins], total: Cell
) -> Callable[["Numbers[float]"], "Numbers[float]"]:
    """Predict, and count as the compiled code does where there is none."""
    *features, quality_bins, output = bins

    def predict(wines: "Numbers[float]") -> "Numbers[float]":
        qualities = predictor.predict_many(wines)
        counted = [
            *zip(wines, cycle(features), strict=False),
            *((quality, into) for quality in qualities for into in (quality_bins, output)),
        ]
        for value, (edges, cells) in counted:
            view, index = cells[bisect_right(edges, value)]
            view[index] += 1.0
        view, index = total
        view[index] += sum(qualities)
        return qualities

    return predict


def _address(cell: Cell) -> int:
    """Return where a cell is in memory; its mapping is never moved, and lives as long as the worker."""
    view, index = cell
    return ctypes.addressof(ctypes.c_char.from_buffer(view.cast("B"))) + 8 * index


def _content_length(headers: Sequence[tuple[bytes, bytes]]) -> float:
    """Return the Content-Length among ASGI headers in bytes, 0 where there is none that could be true."""
    for name, value in headers:
        if name == b"content-length":
            # A claim of 10^13 bytes or more would drown every honest one in the sum.
            return float(value) if value.isdigit() and len(value) <= 13 else 0.0
    return 0.0
