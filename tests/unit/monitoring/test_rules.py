"""The rules that ship: built from their source, about metrics that exist, each alert tested and explained."""

import json
import math
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from app.monitoring import DURATION_BUCKETS
from dashboards.__main__ import OUTPUT as DASHBOARDS
from dashboards.queries import other_expressions, panel_queries
from monitoring.promql import buckets, metric_names
from monitoring.rules import OUTPUT, SOURCE, build, main, read, seconds

ROOT = Path(__file__).parents[3]
RULES = [
    rule
    for path in sorted(OUTPUT.glob("*.yml"))
    for group in yaml.safe_load(path.read_text())["groups"]
    for rule in group["rules"]
]
ALERTS = [rule for rule in RULES if "alert" in rule]
TESTS = [
    test
    for path in sorted((ROOT / "tests/rules").glob("*.yml"))
    for test in yaml.safe_load(path.read_text())["tests"]
]

# What rules and panels read of Prometheus itself and of Debian's daemons, which the end-to-end tests ask.
OTHERS = {
    "ALERTS",
    "up",
    "alertmanager_notifications_failed_total",
    "alertmanager_notifications_total",
    "haproxy_backend_active_servers",
    "haproxy_server_status",
    "namedprocess_namegroup_cpu_seconds_total",
    "namedprocess_namegroup_memory_bytes",
    "namedprocess_namegroup_num_procs",
    "node_boot_time_seconds",
    "node_cpu_seconds_total",
    "node_disk_io_time_seconds_total",
    "node_disk_read_bytes_total",
    "node_disk_written_bytes_total",
    "node_filesystem_avail_bytes",
    "node_filesystem_readonly",
    "node_filesystem_size_bytes",
    "node_load1",
    "node_memory_MemAvailable_bytes",
    "node_memory_MemTotal_bytes",
    "node_network_receive_bytes_total",
    "node_network_transmit_bytes_total",
    "node_systemd_service_restart_total",
    "node_systemd_unit_state",
    "node_time_seconds",
    "node_timex_sync_status",
    "prometheus_config_last_reload_successful",
    "prometheus_notifications_errors_total",
    "prometheus_remote_storage_highest_timestamp_in_seconds",
    "prometheus_remote_storage_queue_highest_sent_timestamp_seconds",
    "prometheus_rule_evaluation_failures_total",
    "prometheus_rule_group_last_duration_seconds",
    "prometheus_tsdb_head_series",
    "prometheus_tsdb_retention_limit_bytes",
    "prometheus_tsdb_storage_blocks_bytes",
    "scrape_duration_seconds",
    "scrape_samples_scraped",
    "winemon_release_step_timestamp_seconds",  # of winemon-release, through the node exporter
}
# What Jenkins' plugins document.
JENKINS = {
    entry["series"].partition("{")[0]
    for entry in yaml.safe_load((ROOT / "tests/unit/dashboards/jenkins_series.yml").read_text())
}
SHOWN = [
    expression
    for path in sorted(DASHBOARDS.glob("*.json"))
    for dashboard in [json.loads(path.read_text())]
    for expression in [*(query.expr for query in panel_queries(dashboard)), *other_expressions(dashboard)]
]

# The expositions of the API, with a model, and of Locust, each from a process of its own.
EXPOSE_API = """
import sys
from pathlib import Path
sys.path[:0] = ["tests/unit/app"]
from api_harness import Client, make_artifacts
from app.main import create_app
from app.settings import Settings
directory = Path(sys.argv[1])
settings = Settings(artifacts_dir=make_artifacts(directory / "artifacts"), metrics_dir=directory / "metrics")
print(Client(create_app(settings)).get("/metrics").text)
"""
EXPOSE_LOCUST = """
from locust.env import Environment
from prometheus_client import CollectorRegistry, generate_latest
from loadtest.exporter import LocustCollector
registry = CollectorRegistry()
registry.register(LocustCollector(Environment(user_classes=[]).create_local_runner(), [("/predict", "POST")]))
print(generate_latest(registry).decode())
"""


def exported(script: str, directory: Path) -> set[str]:
    """Return the names of the series that a script exposes, and of those its histograms have."""
    text = subprocess.run(
        [sys.executable, "-c", script, str(directory)], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    names = {re.split(r"[{ ]", line)[0] for line in text.splitlines() if line and not line.startswith("#")}
    return names | set(re.findall(r"^# TYPE (\S+) gauge$", text, re.MULTILINE))


def test_the_built_rules_are_those_of_the_source() -> None:
    for name, text in build(read()).items():
        assert (OUTPUT / name).read_text() == text, f"{name} is not what `make rules` builds"


def test_rules_and_panels_read_only_what_is_exported_or_recorded(tmp_path: Path) -> None:
    recorded = {rule["record"] for rule in RULES if "record" in rule}
    known = recorded | OTHERS | JENKINS | exported(EXPOSE_API, tmp_path) | exported(EXPOSE_LOCUST, tmp_path)
    used = set().union(*map(metric_names, [*(rule["expr"] for rule in RULES), *SHOWN]))
    assert used - known == set()
    assert (OTHERS | JENKINS) - used == set(), "no rule and no panel reads these any more"


def test_objectives_name_buckets_that_the_api_counts_into() -> None:
    named = set().union(*(buckets(rule["expr"]) for rule in RULES))
    assert named
    assert {float(bucket) for bucket in named} <= set(DURATION_BUCKETS)


def test_prometheus_keeps_samples_longer_than_any_rule_looks_back() -> None:
    retention = yaml.safe_load((ROOT / "roles/prometheus/defaults/main.yml").read_text())[
        "prometheus_retention_time"
    ]
    windows = {match for rule in RULES for match in re.findall(r"\[(\w+)\]", rule["expr"])}
    assert read().period in windows
    assert seconds(retention) > max(map(seconds, windows))


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert["alert"])
def test_an_alert_says_how_urgent_it_is_what_it_means_and_what_to_do(alert: dict[str, Any]) -> None:
    assert alert["labels"]["severity"] in {"critical", "warning", "info"}
    annotations = alert["annotations"]
    assert annotations.keys() == {"summary", "description", "runbook_url"}
    assert "{{" not in annotations["summary"], "a summary is constant, or alerts cannot be grouped by it"
    assert annotations["runbook_url"] == f"docs/runbooks.md#{alert['alert'].lower()}"


def test_every_alert_has_a_runbook_and_every_runbook_an_alert() -> None:
    sections = re.split(r"^## ", (ROOT / "docs/runbooks.md").read_text(), flags=re.MULTILINE)[1:]
    by_title = {section.splitlines()[0]: section for section in sections}
    assert by_title.keys() == {alert["alert"] for alert in ALERTS}
    for title, section in by_title.items():
        parts = re.findall(r"^\*\*(.+?)\.\*\*", section, re.MULTILINE)
        assert parts == ["Meaning", "First look", "Fix", "Undo"], title


def variant(name: str, labels: dict[str, str]) -> tuple[str, ...]:
    """Tell the rules of one alert apart: by how urgent it is, or over which window."""
    return name, labels["severity"], labels.get("window", "")


def test_every_alert_has_a_case_that_fires_and_one_that_stays_silent() -> None:
    fires, silent = set(), set()
    for test in TESTS:
        cases = defaultdict(list)
        for case in test.get("alert_rule_test", []):
            cases[case["alertname"]].append(bool(case["exp_alerts"]))
            # promtool compares all labels and annotations with these.
            for alert in case["exp_alerts"]:
                assert alert["exp_annotations"].keys() == {"summary", "description", "runbook_url"}
                fires.add(variant(case["alertname"], alert["exp_labels"]))
        silent |= {name for name, fired in cases.items() if not any(fired)}
        for name in cases:
            assert name in test["name"] or not any(cases[name]), (
                f"{test['name']!r} does not say that {name} fires"
            )
    assert fires == {variant(alert["alert"], alert["labels"]) for alert in ALERTS}
    assert silent >= {alert["alert"] for alert in ALERTS} - {"Watchdog"}
    assert len({test["name"] for test in TESTS}) == len(TESTS)


def test_rules_are_tested_in_the_order_in_which_they_need_one_another() -> None:
    # What is not named here, promtool evaluates in an order that changes from run to run.
    for path in sorted((ROOT / "tests/rules").glob("*.yml")):
        tests = yaml.safe_load(path.read_text())
        rules = [yaml.safe_load((path.parent / name).read_text()) for name in tests["rule_files"]]
        groups = [group["name"] for file in rules for group in file["groups"]]
        assert tests.get("group_eval_order") == groups, path.name


def shares(series: list[dict[str, str]], metric: str, labels: str) -> dict[str, float]:
    """Return a sum over machines for each bin of input series: a constant, or the rise a scrape."""
    result: dict[str, float] = defaultdict(float)
    for entry in series:
        name, matchers = entry["series"].split("{", 1)
        if name == metric and labels in matchers:
            label = re.search(r'bin="(\w+)"', matchers)
            assert label
            rise = re.match(r"0\+([\d.]+)x", entry["values"])
            constant = re.match(r"([\d.]+)x", entry["values"])
            value = rise or constant
            assert value
            result[label[1]] += float(value[1])
    return result


def test_psi_in_the_rule_tests_is_what_python_computes() -> None:
    tests = yaml.safe_load((ROOT / "tests/rules/drift.yml").read_text())["tests"]
    compared = 0
    for test in tests[:3]:
        for case in test["promql_expr_test"]:
            if "drift_psi" not in case["expr"]:
                continue
            for sample in case["exp_samples"]:
                feature = re.search(r'feature="\w+"', sample["labels"])
                assert feature
                counts = shares(test["input_series"], "winemon_feature_bin_total", feature[0])
                ratios = shares(test["input_series"], "winemon_baseline_ratio", feature[0])
                total, expected_total = sum(counts.values()), sum(ratios.values())
                psi = 0.0
                for name, count in counts.items():
                    served, wanted = max(count / total, 1e-4), max(ratios[name] / expected_total, 1e-4)
                    psi += (served - wanted) * math.log(served / wanted)
                assert sample["value"] == round(1e6 * psi)
                compared += 1
    assert compared >= 5


@pytest.mark.parametrize(
    ("expression", "names"),
    [
        (
            'sum by (job, le) (rate(a_bucket{le="1", b="c"}[5m])) / on (d) group_left () (x:y:z > bool 1e3)',
            {"a_bucket", "x:y:z"},
        ),
        ("up == 0 unless on (instance) up offset 15m", {"up"}),
        ("vector(0.001)", set()),
        ("histogram_quantile(0.99, s) > +Inf or time() - t > 2 * 3600", {"s", "t"}),
        ("label_replace(m, 'a', '$1', 'b', '(x+)')", {"m"}),
    ],
)
def test_metric_names_are_those_that_an_expression_selects(expression: str, names: set[str]) -> None:
    assert metric_names(expression) == names


def test_other_numbers_build_other_rules(tmp_path: Path) -> None:
    source = tmp_path / "objectives.yml"
    source.write_text(SOURCE.read_text().replace("feature_psi: 0.25", "feature_psi: 0.5"))
    assert main(["--source", str(source), "--output", str(tmp_path)]) == 0
    assert 'feature:drift_psi:1h{feature!="quality"} > 0.5' in (tmp_path / "drift.yml").read_text()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("ratio: 0.999", "ratio: 99.9", "objectives.0.ratio: Input should be less than 1"),
        ("period: 30d", "period: a month", "period: String should match"),
        (
            "short: 5m",
            "short: 2h",
            "burn_rates.0: Value error, the short window 2h must be shorter than the long one 1h",
        ),
        ("second: 0.05", "second: 0.001", "a single error in 1h could fire the alert on availability"),
        ("floor:", "flour:", "drift.floor: Field required"),
        ("objectives:\n", "objectives: [\n", "is no YAML"),
    ],
)
def test_a_wrong_number_is_one_clear_line(
    old: str, new: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "objectives.yml"
    source.write_text(SOURCE.read_text().replace(old, new))
    assert main(["--source", str(source), "--output", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "drift.yml").exists()
