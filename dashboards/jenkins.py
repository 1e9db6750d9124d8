"""Does the delivery pipeline deliver? Metric names are those of Jenkins' plugins prometheus and metrics."""

from dashboards.panels import (
    GREEN,
    ORANGE,
    RED,
    Json,
    above,
    bargauge,
    below,
    dashboard,
    increase,
    query,
    rate,
    stat,
    timeline,
    timeseries,
    values,
    variable,
)
from monitoring.rules import Source

HERE = 'job="jenkins", instance=~"$instance"'
JOBS = f'{HERE}, jenkins_job=~"$jenkins_job"'
BUILDS = "default_jenkins_builds"
RESULTS = {
    0: ("success", GREEN),
    1: ("unstable", ORANGE),
    2: ("failure", RED),
    3: ("not built", "text"),
    4: ("aborted", "text"),
}


def build(_: Source) -> Json:
    """Return the dashboard."""
    return dashboard(
        "winemon-jenkins",
        "Jenkins",
        "Builds and their results, what waits for them, and how Jenkins itself is.",
        ("Now", _now()),
        ("Builds", _builds()),
        ("Queue and executors", _queue()),
        ("Jenkins itself", _controller()),
        variables=[
            variable("instance", "Instance", 'label_values(up{job="jenkins"}, instance)'),
            variable("jenkins_job", "Job", f"label_values({BUILDS}_last_build_result_ordinal, jenkins_job)"),
        ],
        since="24h",
        refresh="1m",
    )


def _now() -> list[list[Json]]:
    return [
        [
            stat(
                "Jenkins",
                "short",
                query(f"min(up{{{HERE}}})"),
                mappings=values({1: ("up", GREEN), 0: ("down", RED)}),
                description="Whether Prometheus can read its metrics.",
                no_value="none in the inventory",
            ),
            stat(
                "Version",
                "short",
                query(f"default_jenkins_version_info{{{HERE}}}", "{{version}}"),
                text="name",
            ),
            stat("Running for", "ms", query(f"min(vm_uptime_milliseconds{{{HERE}}})")),
            stat(
                "Health checks",
                "percentunit",
                query(f"min(jenkins_health_check_score{{{HERE}}})"),
                description="Share of Jenkins' own health checks that pass: disk space, plugins, "
                "deadlocks. Red below all.",
                limits=below(1),
            ),
            stat(
                "Jobs whose last build failed",
                "short",
                query(f"count({BUILDS}_last_build_result_ordinal{{{JOBS}}} == 2) or vector(0)"),
                description="Red from one on; JenkinsBuildFailed fires for each.",
                limits=above(1),
            ),
            stat(
                "Stuck in the queue",
                "short",
                query(f"sum(jenkins_queue_stuck_value{{{HERE}}})"),
                description="Builds that no executor can take. Red from one on; JenkinsQueueStuck fires "
                "when they stay.",
                limits=above(1),
            ),
        ],
    ]


def _builds() -> list[list[Json]]:
    failed, total = (
        f"sum by (jenkins_job) ({BUILDS}_{what}_build_count_total{{{JOBS}}})" for what in ("failed", "total")
    )
    succeeded = (
        f"{BUILDS}_last_build_start_time_milliseconds{{{JOBS}}} "
        f"and on (instance, jenkins_job) {BUILDS}_last_build_result_ordinal == 0"
    )
    runs = ("success", "unstable", "failure", "aborted")
    stages = f"{BUILDS}_last_stage_duration_milliseconds_summary_sum{{{JOBS}}}"
    return [
        [
            timeline(
                "Result of the last build",
                query(
                    f"max by (jenkins_job) ({BUILDS}_last_build_result_ordinal{{{JOBS}}})", "{{jenkins_job}}"
                ),
                mappings=values(RESULTS),
            ),
            timeseries(
                "Builds by result",
                "short",
                *(query(increase(f"jenkins_runs_{run}_total", HERE), run) for run in runs),
                description="Builds that ended, of all jobs.",
                stacked=True,
            ),
            bargauge(
                "Builds by job",
                "short",
                *(
                    query(
                        f"sum by (jenkins_job) ({BUILDS}_{result}_build_count_total{{{JOBS}}})",
                        f"{{{{jenkins_job}}}} {result}",
                    )
                    for result in ("success", "unstable", "failed", "aborted")
                ),
                description="Since Jenkins started.",
            ),
            bargauge(
                "Share of builds that did not fail",
                "percentunit",
                # A job without failures has no counter of them.
                query(f"1 - ({failed} or {total} * 0) / {total}", "{{jenkins_job}}"),
                description="By job, since Jenkins started. Red below half, orange below nine tenths.",
                limits=below(0.5, 0.9),
                maximum=1,
            ),
        ],
        [
            bargauge(
                "Time since the last success",
                "s",
                query(
                    f"sort_desc(time() - max by (jenkins_job) (max_over_time(({succeeded})[7d:5m])) / 1000)",
                    "{{jenkins_job}}",
                ),
                description="Since the start of the last build that succeeded, by job; a job without one "
                "in seven days is missing here.",
            ),
            timeseries(
                "Duration of the last build",
                "ms",
                query(
                    f"max by (jenkins_job) ({BUILDS}_last_build_duration_milliseconds{{{JOBS}}})",
                    "{{jenkins_job}}",
                ),
                steps=True,
            ),
            bargauge(
                "Duration of the last build's stages",
                "ms",
                query(
                    f"sum by (jenkins_job, stage) ({stages})",
                    "{{jenkins_job}}: {{stage}}",
                ),
                description="Of the stages that succeeded.",
            ),
        ],
        [
            timeseries(
                "Tests of the last build",
                "short",
                query(
                    f"max by (jenkins_job) ({BUILDS}_last_build_tests_failing{{{JOBS}}})",
                    "{{jenkins_job}} failing",
                ),
                query(
                    f"max by (jenkins_job) ({BUILDS}_last_build_tests_total{{{JOBS}}})", "{{jenkins_job}} all"
                ),
                steps=True,
            ),
            bargauge(
                "Health of the jobs",
                "percent",
                query(f"sort(max by (jenkins_job) ({BUILDS}_health_score{{{JOBS}}}))", "{{jenkins_job}}"),
                description="Jenkins' own score from recent builds and tests. Red below 40, orange below 80.",
                limits=below(40, 80),
                maximum=100,
            ),
            timeseries(
                "Time that the last build waited",
                "ms",
                query(
                    f"max by (jenkins_job) ({BUILDS}_last_build_waiting_milliseconds{{{JOBS}}})",
                    "{{jenkins_job}}",
                ),
                description="In the queue, before an executor took it.",
                steps=True,
            ),
        ],
    ]


def _queue() -> list[list[Json]]:
    return [
        [
            timeseries(
                "Queue",
                "short",
                *(
                    query(f"sum(jenkins_queue_{state}_value{{{HERE}}})", state)
                    for state in ("buildable", "pending", "blocked", "stuck")
                ),
                description="Buildable ones wait for an executor, pending ones have one, blocked ones wait "
                "for another build, stuck ones have waited for too long.",
            ),
            timeseries(
                "Executors",
                "short",
                query(f"sum(jenkins_executor_in_use_value{{{HERE}}})", "in use"),
                query(f"sum(jenkins_executor_count_value{{{HERE}}})", "all"),
                steps=True,
            ),
        ],
    ]


def _controller() -> list[list[Json]]:
    return [
        [
            timeseries(
                "Memory of the JVM",
                "bytes",
                query(f"sum by (area) (jvm_memory_bytes_used{{{HERE}}})", "{{area}}"),
                query(f'sum(jvm_memory_bytes_max{{{HERE}, area="heap"}})', "heap at most"),
            ),
            timeseries(
                "CPU",
                "percentunit",
                query(rate("process_cpu_seconds_total", HERE), "used"),
                query(
                    rate("jvm_gc_collection_seconds_sum", HERE),
                    "garbage collection",
                ),
                description="100 % is one core.",
            ),
            timeseries(
                "Threads and files",
                "short",
                query(f"sum(jvm_threads_current{{{HERE}}})", "threads"),
                query(f"sum(process_open_fds{{{HERE}}})", "open files"),
            ),
            timeseries(
                "Answers over HTTP",
                "reqps",
                *(
                    query(rate(f"http_responseCodes_{code}_total", HERE), name)
                    for code, name in (
                        ("ok", "200"),
                        ("forbidden", "403"),
                        ("notFound", "404"),
                        ("serverError", "500"),
                    )
                ),
            ),
        ],
    ]
