"""What Locust's users saw beside what the server saw: the network and Locust itself lie between them."""

from dashboards.panels import Json, above, dashboard, query, rate, stat, timeseries, variable
from monitoring.rules import Source, limit

SENT = "winemon_locust"
REQUESTS = "fastapi_monitoring_http_requests_total"
API = 'instance=~"$instance"'
# Only Prometheus reads /metrics.
SERVED = f'{API}, handler!="/metrics"'
ALL = 'name="Aggregated"'


def build(_: Source) -> Json:
    """Return the dashboard."""
    durations = rate("fastapi_monitoring_http_request_duration_seconds_bucket", SERVED, "le")
    idle = f'avg by (instance) (rate(node_cpu_seconds_total{{{API}, mode="idle"}}[$__rate_interval]))'
    errors = f'{SERVED}, status="5xx"'
    overload = limit("ApiOverloaded")
    return dashboard(
        "winemon-loadtest",
        "Load test",
        "What the users of the load test saw, and what the server saw of them.",
        (
            "Now",
            [
                [
                    stat("Users", "short", query(f"sum({SENT}_users)")),
                    stat("Processes of Locust", "short", query(f"sum({SENT}_workers)")),
                    stat("Requests", "reqps", query(f"sum({SENT}_requests_per_second)")),
                    stat(
                        "Failed",
                        "percentunit",
                        query(
                            f"sum(increase({SENT}_failures_total[$__range])) "
                            f"/ (sum(increase({SENT}_requests_total[$__range])) > 0)"
                        ),
                        description="Share of the requests of the time shown. A wrong value that got its "
                        "422 has not failed. Red from one in a thousand on.",
                        limits=above(0.001),
                        no_value="no requests",
                    ),
                ]
            ],
        ),
        (
            "The users",
            [
                [
                    timeseries("Running users", "short", query(f"sum({SENT}_users)", "users"), steps=True),
                    timeseries(
                        "Requests sent",
                        "reqps",
                        query(rate(f"{SENT}_requests_total", by="name"), "{{name}}"),
                        stacked=True,
                    ),
                    timeseries(
                        "Requests failed",
                        "reqps",
                        query(rate(f"{SENT}_failures_total", by="name"), "{{name}}"),
                        stacked=True,
                    ),
                    timeseries(
                        "Response times",
                        "s",
                        query(
                            f"max by (quantile) ({SENT}_response_seconds{{{ALL}}})", "quantile {{quantile}}"
                        ),
                        description="Of the last ten seconds, over all requests, as the users saw them: "
                        "with the network and the wait for a connection.",
                    ),
                ]
            ],
        ),
        (
            "The server",
            [
                [
                    timeseries(
                        "In progress",
                        "short",
                        query(f"sum by (instance) (fastapi_inprogress{{{API}}})", "{{instance}}"),
                    ),
                    timeseries(
                        "Requests served",
                        "reqps",
                        query(
                            rate(REQUESTS, SERVED, "handler"),
                            "{{handler}}",
                        ),
                        stacked=True,
                    ),
                    timeseries(
                        "Requests turned away or failed",
                        "percentunit",
                        query(
                            f"{rate('winemon_overload_total', API)} / {rate(REQUESTS, API)}",
                            "turned away",
                        ),
                        query(
                            f"{rate(REQUESTS, errors)} / {rate(REQUESTS, SERVED)}",
                            "5xx",
                        ),
                        description="Above the red line ApiOverloaded fires.",
                        limits=above(overload),
                    ),
                    timeseries(
                        "Time to answer",
                        "s",
                        *(
                            query(f"histogram_quantile({quantile}, {durations})", f"quantile {quantile}")
                            for quantile in (0.5, 0.95, 0.99)
                        ),
                        description="The same quantiles as the server saw them, interpolated between its "
                        "buckets.",
                    ),
                ],
                [
                    timeseries(
                        "CPU used on the API's machines", "percentunit", query(f"1 - {idle}", "{{instance}}")
                    ),
                    timeseries(
                        "Sent and served",
                        "reqps",
                        query(rate(f"{SENT}_requests_total"), "sent"),
                        query(
                            rate(REQUESTS, SERVED),
                            "served",
                        ),
                        description="More served than sent: somebody else asks too. The other way round: "
                        "requests are lost.",
                    ),
                ],
            ],
        ),
        variables=[variable("instance", "Instance", 'label_values(up{job="fastapi"}, instance)')],
        since="15m",
        refresh="10s",
    )
