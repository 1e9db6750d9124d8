"""Whether the machines have what the services need, whether those run, and whether watching them works."""

from dashboards.panels import (
    GREEN,
    ORANGE,
    RED,
    Json,
    above,
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
from monitoring.rules import Source, limit

HERE = 'instance=~"$instance"'
NODE = f'job="node", {HERE}'
UNITS = (
    "winemon-.*|prometheus(-alertmanager|-node-exporter|-process-exporter)?|grafana-server|jenkins|haproxy"
)


def build(_: Source) -> Json:
    """Return the dashboard."""
    return dashboard(
        "winemon-machines",
        "Machines and services",
        "What the machines have left, what each service takes of it, and whether all of it is watched.",
        ("Machines", _machines()),
        ("Services", _services()),
        ("Monitoring", _monitoring()),
        variables=[variable("instance", "Machine", 'label_values(up{job="node"}, instance)')],
        since="1h",
        refresh="30s",
    )


def _machines() -> list[list[Json]]:
    idle = f'avg by (instance) (rate(node_cpu_seconds_total{{{NODE}, mode="idle"}}[$__rate_interval]))'
    cores = f'count by (instance) (node_cpu_seconds_total{{{NODE}, mode="idle"}})'
    free = f"node_filesystem_avail_bytes{{{NODE}}} / node_filesystem_size_bytes{{{NODE}}}"
    available = f"node_memory_MemAvailable_bytes{{{NODE}}} / node_memory_MemTotal_bytes{{{NODE}}}"
    least_memory = limit("MemoryShort")
    least_disk, no_disk = limit("DiskFilling"), limit("DiskFilling", "critical")
    skew = limit("ClockSkewed")
    return [
        [
            stat("Machines watched", "short", query(f"count(up{{{NODE}}})")),
            stat(
                "Not answering",
                "short",
                query(f"count(up{{{NODE}}} == 0) or vector(0)"),
                description="Machines whose node exporter cannot be read. Red from one on.",
                limits=above(1),
            ),
            stat(
                "Units failed",
                "short",
                query(f'sum(node_systemd_unit_state{{{NODE}, state="failed"}})'),
                description="On all machines, `systemctl --failed` names them. Red from one on.",
                limits=above(1),
            ),
            stat("Running for", "s", query(f"time() - max(node_boot_time_seconds{{{NODE}}})")),
        ],
        [
            timeseries("CPU used", "percentunit", query(f"1 - {idle}", "{{instance}}")),
            timeseries(
                "Load, by core",
                "none",
                query(f"sum by (instance) (node_load1{{{NODE}}}) / {cores}", "{{instance}}"),
                description="Processes that run or want to, for each core: beyond 1 they wait.",
            ),
            timeseries(
                "Memory used",
                "percentunit",
                query(f"1 - {available}", "{{instance}}"),
                description=f"What is not available to processes. Above the red line {least_memory:.0%} are "
                "left and MemoryShort fires.",
                limits=above(1 - least_memory),
            ),
            timeseries(
                "Disk used",
                "percentunit",
                query(f"1 - {free}", "{{instance}} {{mountpoint}}"),
                description=f"DiskFilling fires when less than {no_disk:.0%} is left, and from "
                f"{least_disk:.0%} on where the disk will be full within a day.",
                limits=above(1 - least_disk, 1 - no_disk),
            ),
        ],
        [
            timeseries(
                "Disk reads and writes",
                "Bps",
                *(
                    query(
                        rate(f"node_disk_{counter}_bytes_total", NODE, "instance"),
                        f"{{{{instance}}}} {counter}",
                    )
                    for counter in ("read", "written")
                ),
            ),
            timeseries(
                "Disk busy",
                "percentunit",
                query(
                    f"max by (instance) (rate(node_disk_io_time_seconds_total{{{NODE}}}[$__rate_interval]))",
                    "{{instance}}",
                ),
                description="Share of the time in which the busiest disk of the machine had something to do.",
            ),
            timeseries(
                "Network",
                "Bps",
                *(
                    query(
                        rate(f"node_network_{way}_bytes_total", f'{NODE}, device!="lo"', "instance"),
                        f"{{{{instance}}}} {way}",
                    )
                    for way in ("receive", "transmit")
                ),
            ),
            timeseries(
                "Clock",
                "s",
                query(
                    f"abs(node_time_seconds{{{NODE}}} - timestamp(node_time_seconds{{{NODE}}}))",
                    "{{instance}}",
                ),
                description="Difference from Prometheus' clock. Above the red line ClockSkewed fires.",
                limits=above(skew),
            ),
        ],
    ]


def _services() -> list[list[Json]]:
    def used(expr: str) -> str:
        return f"sum by (instance, groupname) ({expr})"

    unit = f'{NODE}, name=~"({UNITS})[.]service"'
    state = f'sum by (instance, name) (node_systemd_unit_state{{{unit}, state="%s"}})'
    name = "{{instance}} {{name}}"
    return [
        [
            timeseries(
                "CPU by service",
                "percentunit",
                query(
                    rate("namedprocess_namegroup_cpu_seconds_total", HERE, "instance, groupname"),
                    "{{instance}} {{groupname}}",
                ),
                description="100 % is one core.",
                stacked=True,
            ),
            timeseries(
                "Memory by service",
                "bytes",
                query(
                    used(f'namedprocess_namegroup_memory_bytes{{{HERE}, memtype="resident"}}'),
                    "{{instance}} {{groupname}}",
                ),
                description="Resident. What processes of a service share, such as the API's workers, "
                "counts for each.",
                stacked=True,
            ),
            timeseries(
                "Processes by service",
                "short",
                query(used(f"namedprocess_namegroup_num_procs{{{HERE}}}"), "{{instance}} {{groupname}}"),
                steps=True,
            ),
        ],
        [
            timeline(
                "Units",
                query(f"{state % 'active'} - {state % 'failed'}", name),
                mappings=values({1: ("active", GREEN), 0: ("inactive", ORANGE), -1: ("failed", RED)}),
            ),
            timeseries(
                "Restarts by systemd",
                "short",
                query(
                    increase("node_systemd_service_restart_total", unit, "instance, name"),
                    name,
                ),
                description="Services that ended by themselves and were started again; not those that "
                "somebody restarted.",
            ),
        ],
    ]


def _monitoring() -> list[list[Json]]:
    return [
        [
            timeline(
                "Targets",
                query(f"max by (job, instance) (up{{{HERE}}})", "{{job}} {{instance}}"),
                mappings=values({1: ("up", GREEN), 0: ("down", RED)}),
            ),
            timeseries(
                "Time to scrape",
                "s",
                query(f"max by (job, instance) (scrape_duration_seconds{{{HERE}}})", "{{job}} {{instance}}"),
            ),
            timeseries(
                "Samples by scrape",
                "short",
                query(f"sum by (job, instance) (scrape_samples_scraped{{{HERE}}})", "{{job}} {{instance}}"),
                steps=True,
            ),
        ],
        [
            timeseries(
                "Prometheus' blocks on disk",
                "bytes",
                query(
                    'sum by (instance) (prometheus_tsdb_storage_blocks_bytes{job="prometheus"})',
                    "{{instance}}",
                ),
                query('max(prometheus_tsdb_retention_limit_bytes{job="prometheus"})', "at most"),
                description="What is older than two or three hours; the rest is in memory and in the "
                "write-ahead log.",
            ),
            timeseries(
                "Prometheus' series in memory",
                "short",
                query('sum by (instance) (prometheus_tsdb_head_series{job="prometheus"})', "{{instance}}"),
            ),
            timeseries(
                "Rules",
                "s",
                query(
                    'sum by (instance) (prometheus_rule_group_last_duration_seconds{job="prometheus"})',
                    "{{instance}} all groups once",
                ),
                description="Time that evaluating every group of rules took last.",
            ),
            timeseries(
                "Notifications",
                "short",
                query(
                    increase("alertmanager_notifications_total", 'job="alertmanager"', "instance"),
                    "{{instance}} sent",
                ),
                query(
                    increase("alertmanager_notifications_failed_total", 'job="alertmanager"', "instance"),
                    "{{instance}} failed",
                ),
                description="What Alertmanager sent to people, and how much of that failed.",
            ),
        ],
    ]
