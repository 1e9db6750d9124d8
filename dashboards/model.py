"""Whether the model is healthy, what it says, and whether the world still looks like its training data."""

from dashboards.panels import (
    GREEN,
    ORANGE,
    RED,
    Json,
    above,
    barchart,
    bargauge,
    below,
    dashboard,
    heatmap,
    increase,
    query,
    rate,
    stat,
    timeline,
    timeseries,
    values,
    variable,
)
from monitoring.promql import buckets
from monitoring.rules import Objective, Source, budget, limit

HERE = "/d/winemon-model"
API = 'instance=~"$instance"'
HTTP = "fastapi_monitoring_http"
OUTPUT = "fastapi_monitoring_regression_model_output"
REQUESTS = f'{API}, handler=~"$handler"'
FEW = "fewer predictions than a verdict takes"


def build(source: Source) -> Json:
    """Return the dashboard."""
    return dashboard(
        "winemon-model",
        "ML model performance",
        "Whether the model serves well, what it says, and whether it is asked what it was trained for.",
        ("Is it healthy?", _health(source)),
        ("Traffic and latency", _traffic(source)),
        ("What it says", _predictions(source)),
        ("What it is asked", _features(source)),
        ("Load test", _loadtest()),
        variables=[
            variable("instance", "Instance", 'label_values(up{job="fastapi"}, instance)'),
            variable(
                "handler",
                "Route",
                f"label_values({HTTP}_requests_total, handler)",
                chosen=["/predict", "/predict/batch"],
            ),
            variable(
                "feature",
                "Feature",
                'label_values(winemon_baseline_ratio{feature!="quality"}, feature)',
                chosen=["alcohol_pct_vol"],
                several=False,
            ),
        ],
        since="1h",
        refresh="30s",
    )


def _health(source: Source) -> list[list[Json]]:
    burning = "objective:errors:ratio_rate{} / objective:error_budget:ratio / {:g}"
    return [
        [
            stat(
                "Ready",
                "short",
                query(f"min(winemon_ready{{{API}}})"),
                mappings=values({1: ("ready", GREEN), 0: ("not ready", RED)}),
                description="Ready where every worker's model is loaded and predicts what training said it "
                "would.",
                no_value="no answer",
            ),
            stat(
                "Model",
                "short",
                query(f"count by (version) (winemon_model_info{{{API}}})", "{{version}}"),
                description="The model that is served; two for a moment, while a new one takes over.",
                text="name",
                no_value="none",
            ),
            stat(
                "Age of the model",
                "s",
                query(f"time() - min(winemon_model_trained_timestamp_seconds{{{API}}})"),
                description="Time since training. Red once it is so old that ModelStale fires.",
                limits=above(limit("ModelStale") * 86400),
            ),
            stat(
                "Alerts firing",
                "short",
                query('count(ALERTS{alertstate="firing", alertname!="Watchdog"}) or vector(0)'),
                description="Of all of winemon, without the watchdog. Red from one on.",
                limits=above(1),
            ),
            *(_promise(objective, source.period) for objective in source.objectives),
        ],
        [
            bargauge(
                "Error budget left",
                "percentunit",
                query(f"objective:error_budget_left:ratio{source.period}", "{{objective}}"),
                description=f"What is left of the requests that may break each promise in {source.period}. "
                "Red when it is used up, orange when less than a quarter is left.",
                limits=below(0, 0.25),
                maximum=1,
            ),
            timeseries(
                "Error budget burning, as a share of what alerts",
                "percentunit",
                *(
                    query(burning.format(burn.long, burn.factor), f"{{{{objective}}}} over {burn.long}")
                    for burn in source.burn_rates
                ),
                description="How fast the budget burns over each window, against the speed at which "
                "ErrorBudgetBurning fires once its short window agrees: the red line, 100 %.",
                limits=above(1),
            ),
            timeline(
                "Alerts",
                query(
                    'max by (alertname, severity) (ALERTS{alertstate="firing"}) or '
                    'max by (alertname, severity) (ALERTS{alertstate="pending"}) * 0',
                    "{{alertname}} {{severity}}",
                ),
                mappings=values({1: ("firing", RED), 0: ("pending", ORANGE)}),
                description="The watchdog always fires: where it stops, alerting does not work.",
            ),
        ],
    ]


def _promise(objective: Objective, period: str) -> Json:
    return stat(
        f"{objective.name.capitalize()} over {period}",
        "percentunit",
        query(f'1 - objective:errors:ratio_rate{period}{{objective="{objective.name}"}}'),
        description=f"Promised: {objective.promise}, in {objective.ratio * 100:g} % of all cases. Red below "
        "that.",
        limits=below(objective.ratio),
        decimals=3,
        no_value="no requests yet",
    )


def _traffic(source: Source) -> list[list[Json]]:
    promises = {objective.name: objective for objective in source.objectives}
    availability, latency = promises["availability"], promises["latency"]
    promised = max(float(bucket) for bucket in buckets(latency.errors))
    durations = rate(f"{HTTP}_request_duration_seconds_bucket", REQUESTS, "le")
    return [
        [
            timeseries(
                "Requests by status",
                "reqps",
                query(
                    rate(f"{HTTP}_requests_total", REQUESTS, "status"),
                    "{{status}}",
                ),
                stacked=True,
            ),
            timeseries(
                "Time to answer",
                "s",
                *(
                    query(f"histogram_quantile({quantile}, {durations})", f"p{quantile * 100:g}")
                    for quantile in (0.5, 0.95, 0.99)
                ),
                description="Quantiles, interpolated between the buckets that the API counts into. The red "
                f"line is what is promised for {latency.ratio * 100:g} % of the predictions of one wine.",
                limits=above(promised),
            ),
            heatmap(
                "Distribution of the time to answer",
                "s",
                query(
                    increase(f"{HTTP}_request_duration_seconds_bucket", REQUESTS, "le"),
                    "{{le}}",
                ),
                description="Requests by how long they took; two bands are two kinds of requests, such as "
                "batches.",
            ),
        ],
        [
            timeseries(
                "Share of predictions failed by the server",
                "percentunit",
                query("job:prediction_errors:ratio_rate5m", "5xx"),
                description="Of five minutes, over all machines. Above the red line the promise of "
                "availability breaks.",
                limits=above(budget(availability)),
            ),
            timeseries(
                "In progress",
                "short",
                query(f"sum by (instance) (fastapi_inprogress{{{API}}})", "{{instance}}"),
            ),
            timeseries(
                "Mean size of bodies",
                "bytes",
                *(
                    query(
                        f"{rate(f'{HTTP}_{what}_size_bytes_sum', REQUESTS, 'handler')}\n/ "
                        f"{rate(f'{HTTP}_{what}_size_bytes_count', REQUESTS, 'handler')}",
                        f"{{{{handler}}}} {what}",
                    )
                    for what in ("request", "response")
                ),
            ),
            timeseries(
                "Turned away, and workers started",
                "short",
                query(increase("winemon_overload_total", API), "turned away"),
                query(
                    increase("winemon_worker_starts_total", API),
                    "workers started",
                ),
                description="Requests answered 503 because a worker had as many as it may have; and "
                "workers that began, which is usual for deployments and reloads only.",
            ),
        ],
    ]


def _predictions(source: Source) -> list[list[Json]]:
    drift = source.drift
    window = drift.windows[0].window
    # A space sorts before the digits of the other bins.
    by_bin = 'label_replace(max by (bin) ({}{{feature="quality"}}), "bin", " below", "bin", "below")'
    return [
        [
            timeseries(
                "Mean of predictions",
                "none",
                query("job:regression_model_output:mean5m", "quality"),
                minimum=None,
            ),
            heatmap(
                "Distribution of predictions",
                "none",
                query(
                    increase(f"{OUTPUT}_bucket", API, "le"),
                    "{{le}}",
                ),
                description="Predicted qualities, in steps of half a point.",
            ),
            barchart(
                "Predictions against those of training",
                "percentunit",
                "bin",
                {
                    f"served, last {window}": by_bin.format(f"feature_bin:served_values:ratio{window}"),
                    "training": by_bin.format("feature_bin:expected_values:ratio"),
                },
                description="Share of the predictions in each tenth of those that training made for wines "
                "it had not seen, from the lowest to the highest. `below` and `above` are predictions that "
                "training never made.",
            ),
            timeseries(
                "Drift of predictions",
                "none",
                *(
                    query(
                        f'max(feature:drift_psi:{each.window}{{feature="quality"}})',
                        f"PSI over {each.window}",
                    )
                    for each in drift.windows
                ),
                description="Population stability index of the predictions against those of training; the "
                "red line is where PredictionDrift fires. There is no verdict on fewer than "
                f"{drift.minimum_predictions} predictions.",
                limits=above(drift.prediction_psi),
            ),
        ],
    ]


def _features(source: Source) -> list[list[Json]]:
    drift = source.drift
    window = drift.windows[0].window
    others = 'feature!="quality"'
    chosen = f'{API}, feature="$feature"'
    counted = "winemon_feature_bin_total"
    psi = (
        "PSI, the distance between what is served and the training data. Up to 0.1 is noise, "
        f"red from {drift.feature_psi:g} on, where FeatureDrift fires. "
        f"There is no verdict on fewer than {drift.minimum_predictions} predictions."
    )
    return [
        [
            *(
                bargauge(
                    f"Drift by feature, last {each.window}",
                    "none",
                    query(
                        f"sort_desc(max by (feature) (feature:drift_psi:{each.window}{{{others}}}))",
                        "{{feature}}",
                    ),
                    description=f"{psi} Click on a feature to see its values below.",
                    limits=above(0.1, drift.feature_psi),
                    maximum=2 * drift.feature_psi,
                    no_value=FEW,
                    links={
                        "Show its values": HERE + "?var-feature=${__field.labels.feature}&${__url_time_range}"
                    },
                )
                for each in drift.windows
            ),
            timeseries(
                f"Drift by feature over {window}",
                "none",
                query(f"max by (feature) (feature:drift_psi:{window}{{{others}}})", "{{feature}}"),
                description=psi,
                limits=above(drift.feature_psi),
            ),
        ],
        [
            heatmap(
                "Values of $feature",
                "none",
                query(increase(counted, f'{chosen}, bin="below"', "bin"), "below"),
                query(increase(counted, f'{chosen}, bin!~"below|above"', "bin"), "{{bin}}"),
                query(increase(counted, f'{chosen}, bin="above"', "bin"), "above"),
                description="Served values by tenths of the training data, from the lowest to the highest: "
                "equally bright where the world looks as it did in training. `below` and `above` lie "
                "outside what training has seen.",
                cumulative=False,
            ),
            timeseries(
                f"Share of values out of range over {window}",
                "percentunit",
                query(f"max by (feature) (feature:out_of_range:ratio{window}{{{others}}})", "{{feature}}"),
                description="Values beyond the least and the greatest of the training data. Above the red "
                "line FeatureOutOfRange fires.",
                limits=above(drift.out_of_range_ratio),
            ),
        ],
    ]


def _loadtest() -> list[list[Json]]:
    return [
        [
            timeseries(
                "Users of the load test", "short", query("sum(winemon_locust_users)", "users"), steps=True
            ),
            timeseries(
                "Requests of the load test",
                "reqps",
                query("sum(winemon_locust_requests_per_second)", "sent"),
                query(rate("winemon_locust_failures_total"), "failed"),
                description="As Locust counts them. More on the dashboard Load test.",
            ),
        ],
    ]
