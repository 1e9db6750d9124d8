"""Locust's own metrics, for Prometheus, at /metrics of the web UI.

They are taken from the reports of the workers and not from Locust's statistics, which are forgotten at each
start of a test and each press of "Reset": a counter never goes down while this process lives. Locust rounds
response times to whole milliseconds below 100 ms, and to two digits above.
"""

import time
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

from flask import Flask, Response
from locust.runners import MasterRunner, Runner
from locust.stats import bucket_response_time, calculate_response_time_percentile
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

QUANTILES: Final = (0.5, 0.95, 0.99)
WINDOW: Final = 10
"""Seconds that a current value looks back."""
LATENESS: Final = 3
"""Seconds between two reports of a worker: younger requests may not be known yet."""
AGGREGATED: Final = "Aggregated"
"""Locust's name for all requests together."""


class LocustCollector(Collector):
    """Counts what the users of a runner do, and yields it at each scrape.

    `requests` are the names and methods that will be called: counters that exist from the start miss no
    increase.
    """

    def __init__(self, runner: Runner, requests: Iterable[tuple[str, str]]) -> None:
        self.runner = runner
        self.requests: Counter[tuple[str, str]] = Counter(dict.fromkeys(requests, 0))
        self.failures = self.requests.copy()
        self.recent: deque[tuple[float, str, Mapping[int, int]]] = deque()

    def on_worker_report(self, data: dict[str, Any], **_: Any) -> None:
        """Count what a worker has done since its last report: all that a master hears of requests."""
        for entry in data["stats"]:
            name, method = entry["name"], entry["method"]
            self.count(name, method, entry["num_requests"], entry["num_failures"], entry["response_times"])

    def on_request(
        self, name: str, request_type: str, response_time: float, exception: Exception | None, **_: Any
    ) -> None:
        """Count one request of this process, which without workers makes them itself."""
        times = {bucket_response_time(response_time): 1}
        self.count(name, request_type, 1, int(exception is not None), times)

    def count(self, name: str, method: str, requests: int, failures: int, times: Mapping[int, int]) -> None:
        """Add requests, the failed ones among them, and how many took so many milliseconds."""
        self.requests[name, method] += requests
        self.failures[name, method] += failures
        self.recent.append((time.monotonic(), name, times))
        while self.recent[0][0] < time.monotonic() - WINDOW:
            self.recent.popleft()

    def collect(self) -> Iterator[Metric]:
        """Yield the current metrics."""
        runner = self.runner
        workers = runner.worker_count if isinstance(runner, MasterRunner) else 1
        yield GaugeMetricFamily("winemon_locust_users", "Users that are running.", runner.user_count)
        yield GaugeMetricFamily("winemon_locust_workers", "Processes ready to run users.", workers)
        for family, documentation, counts in (
            ("winemon_locust_requests", "Requests sent and finished.", self.requests),
            ("winemon_locust_failures", "Requests that failed.", self.failures),
        ):
            counter = CounterMetricFamily(family, documentation, labels=["name", "method"])
            for labels, value in counts.items():
                counter.add_metric(labels, value)
            yield counter
        yield GaugeMetricFamily(
            "winemon_locust_requests_per_second", "Requests finished in a second.", self.rate()
        )
        response_seconds = GaugeMetricFamily(
            "winemon_locust_response_seconds",
            f"Quantiles of the response times of the last {WINDOW} seconds.",
            labels=["name", "quantile"],
        )
        for name, times in self.response_times().items():
            for quantile in QUANTILES:
                milliseconds = calculate_response_time_percentile(times, times.total(), quantile)
                response_seconds.add_metric([name, str(quantile)], milliseconds / 1000)
        yield response_seconds

    def rate(self) -> float:
        """Return requests in a second now; Locust's own figure stands still when responses stop coming."""
        total = self.runner.stats.total
        end = int(time.time()) - LATENESS
        seconds = range(max(end - WINDOW, int(total.start_time)), end)
        return sum(total.num_reqs_per_sec.get(second, 0) for second in seconds) / max(len(seconds), 1)

    def response_times(self) -> dict[str, Counter[int]]:
        """Return, by name and for all together, how many requests of the window took so many milliseconds."""
        oldest = time.monotonic() - WINDOW
        result: dict[str, Counter[int]] = defaultdict(Counter)
        for at, name, times in self.recent:
            if at >= oldest:
                result[name].update(times)
                result[AGGREGATED].update(times)
        return result


def install(app: Flask, runner: Runner, requests: Iterable[tuple[str, str]]) -> None:
    """Serve the metrics of `runner` at /metrics of its web UI `app`."""
    collector = LocustCollector(runner, requests)
    runner.environment.events.worker_report.add_listener(collector.on_worker_report)
    runner.environment.events.request.add_listener(collector.on_request)
    registry = CollectorRegistry()
    registry.register(collector)

    def metrics() -> Response:
        return Response(generate_latest(registry), content_type=CONTENT_TYPE_LATEST)

    app.add_url_rule("/metrics", view_func=metrics)
