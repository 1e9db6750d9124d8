"""The dashboards that ship: built from their source, in a format that Grafana 9.4 to 13 loads, readable."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from dashboards import panels
from dashboards.__main__ import OUTPUT, build, main
from dashboards.queries import fill, other_expressions, panel_queries
from monitoring.promql import metric_names
from monitoring.rules import SOURCE, limit, read

ROOT = Path(__file__).parents[3]
DASHBOARDS = {path.stem: json.loads(path.read_text()) for path in sorted(OUTPUT.iterdir())}
PANELS = [
    pytest.param(panel, id=f"{uid}: {panel['title']}")
    for uid, dashboard in DASHBOARDS.items()
    for panel in dashboard["panels"]
    if panel["type"] != "row"
]
each_dashboard = pytest.mark.parametrize("uid", DASHBOARDS)
each_panel = pytest.mark.parametrize("panel", PANELS)

# What every Grafana from 9.4 to 13 brings and names so.
TYPES = {"timeseries", "stat", "bargauge", "heatmap", "state-timeline", "barchart"}
UNITS = {"none", "short", "percent", "percentunit", "s", "ms", "bytes", "Bps", "reqps"}

# Jenkins forgets these when it restarts: they count since then, as the panel says. The last two are gauges.
NOT_RISING = {
    "default_jenkins_builds_success_build_count_total",
    "default_jenkins_builds_unstable_build_count_total",
    "default_jenkins_builds_failed_build_count_total",
    "default_jenkins_builds_aborted_build_count_total",
    "default_jenkins_builds_total_build_count_total",
    "default_jenkins_builds_last_build_tests_total",
    "default_jenkins_builds_last_stage_duration_milliseconds_summary_sum",
}


def test_the_committed_dashboards_are_those_of_the_source() -> None:
    built = build(read())
    assert {path.name for path in OUTPUT.iterdir()} == built.keys()
    for name, text in built.items():
        assert (OUTPUT / name).read_text() == text, f"{name} is not what `make dashboards` builds"


@each_dashboard
def test_a_dashboard_has_a_readable_address_and_finds_the_others(uid: str) -> None:
    dashboard = DASHBOARDS[uid]
    assert dashboard["uid"] == uid
    assert re.fullmatch(r"winemon-[a-z]{1,32}", uid)
    assert dashboard["tags"] == ["winemon"]
    assert [(link["type"], link["tags"]) for link in dashboard["links"]] == [("dashboards", ["winemon"])]
    assert dashboard["editable"] is False
    assert dashboard["description"].endswith(".")
    assert dashboard["schemaVersion"] <= 37, "Grafana 9.4 knows no newer one, and nobody migrates backwards"
    addresses = re.findall(r'"url": "/d/([a-z-]+)', json.dumps(dashboard))
    assert set(addresses) <= DASHBOARDS.keys()


def test_titles_tell_the_dashboards_apart() -> None:
    assert len({dashboard["title"] for dashboard in DASHBOARDS.values()}) == len(DASHBOARDS) == 4


@each_dashboard
def test_every_variable_is_used_and_every_variable_used_is_there(uid: str) -> None:
    dashboard = DASHBOARDS[uid]
    source, *others = dashboard["templating"]["list"]
    assert (source["type"], source["query"], source["name"]) == ("datasource", "prometheus", "datasource")
    for variable in others:
        assert variable["datasource"] == panels.DATASOURCE
        assert variable["refresh"] == 2, "values follow the time range"
        assert variable["definition"] == variable["query"]["query"]
        assert (variable["allValue"] == ".+") == variable["includeAll"] == variable["multi"]
    text = json.dumps([panel.get("targets") for panel in dashboard["panels"]])
    used = set(re.findall(r"\$\{?(\w+)", text)) - {"__rate_interval", "__range"}
    assert used == {variable["name"] for variable in dashboard["templating"]["list"]}


@each_dashboard
def test_deploys_and_alerts_are_marked(uid: str) -> None:
    own = [each for each in DASHBOARDS[uid]["annotations"]["list"] if each.get("builtIn") != 1]
    assert [each["name"] for each in own] == ["Models", "Releases", "Alerts"]
    for annotation in own:
        assert annotation["enable"]
        assert annotation["datasource"] == panels.DATASOURCE


@each_dashboard
def test_panels_fill_the_columns_and_do_not_overlap(uid: str) -> None:
    taken = set()
    for panel in DASHBOARDS[uid]["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, f"{panel['title']} lies on another panel"
        assert panel["type"] == "row" or at["w"] >= 4, f"{panel['title']} is too narrow to read"
        taken |= cells
    height = max(y for _, y in taken) + 1
    assert taken == {(x, y) for x in range(24) for y in range(height)}


@each_dashboard
def test_panels_have_an_id_and_a_title_of_their_own(uid: str) -> None:
    listed = DASHBOARDS[uid]["panels"]
    assert len({panel["id"] for panel in listed}) == len({panel["title"] for panel in listed}) == len(listed)


@each_panel
def test_a_panel_is_of_a_kind_and_unit_that_grafana_knows(panel: dict[str, Any]) -> None:
    assert panel["type"] in TYPES
    assert panel["fieldConfig"]["defaults"]["unit"] in UNITS
    assert panel["datasource"] == panels.DATASOURCE
    assert panel["pluginVersion"] == "9.4.0"


@each_panel
def test_a_panel_names_each_of_its_queries_and_series(panel: dict[str, Any]) -> None:
    targets = panel["targets"]
    assert [target["refId"] for target in targets] == list("ABCDEFGH")[: len(targets)]
    assert targets
    now = panel["type"] in {"stat", "bargauge", "barchart"}
    for target in targets:
        assert target["datasource"] == panels.DATASOURCE
        assert target["expr"].strip()
        assert (target["instant"], target["range"]) == (now, not now)
        # A single number needs no name; the title is one.
        one = (
            panel["type"] == "stat"
            and " by " not in target["expr"]
            and panel["options"]["textMode"] == "auto"
        )
        assert target["legendFormat"] or one
        labels = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
        kept = {
            label for found in re.findall(r" by \(([^)]+)\)", target["expr"]) for label in found.split(", ")
        }
        assert not kept or labels <= kept, "the legend names a label that the query drops"


@each_panel
def test_a_panel_that_can_turn_red_or_is_no_plain_line_says_what_it_means(panel: dict[str, Any]) -> None:
    description = panel["description"]
    colours = panel["fieldConfig"]["defaults"]["thresholds"]["steps"]
    assert colours[0]["value"] is None
    bounds = [step["value"] for step in colours[1:]]
    assert bounds == sorted(bounds)
    if bounds or panel["type"] in {"heatmap", "barchart"}:
        assert description
    if bounds:
        assert re.search(r"[Rr]ed|fires", description), "it does not say when it is red"
    assert not description or description.endswith(".")


@each_panel
def test_counters_are_read_as_rates_over_the_interval_that_fits_the_zoom(panel: dict[str, Any]) -> None:
    for target in panel["targets"]:
        expression = target["expr"]
        rates = re.findall(r"\b(?:rate|increase)\(([\w:]+)(?:\{[^{}]*\})?\[(\$\w+)\]\)", expression)
        assert len(rates) == len(re.findall(r"\b(?:i?rate|i?delta|increase)\(", expression)), "a fixed window"
        assert len(rates) == expression.count("$__rate_interval") + expression.count("$__range")
        assert all(interval == "$__range" for _, interval in rates if target["instant"])
        counters = {
            name
            for name in metric_names(fill(expression))
            if re.search(r"(_total|_count|_sum|_bucket)$", name)
        }
        counted = set(re.findall(r"\bcount(?: by \([^)]+\))? \((\w+)", expression))
        assert counters - NOT_RISING - counted <= {name for name, _ in rates}


@each_dashboard
def test_every_expression_is_promql(uid: str, tmp_path: Path) -> None:
    dashboard = DASHBOARDS[uid]
    expressions = [*(query.expr for query in panel_queries(dashboard)), *other_expressions(dashboard)]
    rules = [{"record": f"q{i}", "expr": expression} for i, expression in enumerate(expressions)]
    path = tmp_path / "rules.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": rules}]}))
    command = [ROOT / "build/tools/promtool", "check", "rules", path]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"{len(rules)} rules found" in result.stdout


def limits(uid: str, title: str) -> list[float]:
    """Return where a panel changes its colour."""
    panel = next(each for each in DASHBOARDS[uid]["panels"] if each["title"] == title)
    return [step["value"] for step in panel["fieldConfig"]["defaults"]["thresholds"]["steps"][1:]]


def test_the_lines_are_where_the_rules_fire() -> None:
    drift = read().drift
    assert limits("winemon-model", "Drift of predictions") == [drift.prediction_psi]
    for title in ("Drift by feature, last 1h", "Drift by feature, last 24h", "Drift by feature over 1h"):
        assert limits("winemon-model", title)[-1] == drift.feature_psi
    assert limits("winemon-model", "Share of values out of range over 1h") == [drift.out_of_range_ratio]
    for objective in read().objectives:
        assert limits("winemon-model", f"{objective.name.capitalize()} over 30d") == [objective.ratio]
    assert limits("winemon-model", "Time to answer") == [0.1]
    assert limits("winemon-machines", "Memory used") == [1 - limit("MemoryShort")]
    assert limits("winemon-machines", "Disk used") == [1 - 0.2, 1 - 0.05]


def test_other_numbers_draw_other_lines_and_old_files_go(tmp_path: Path) -> None:
    source = tmp_path / "objectives.yml"
    source.write_text(SOURCE.read_text().replace("prediction_psi: 0.2", "prediction_psi: 0.4"))
    output = tmp_path / "dashboards"
    output.mkdir()
    (output / "winemon-old.json").write_text("{}")
    assert main(["--source", str(source), "--output", str(output)]) == 0
    assert {path.name for path in output.iterdir()} == {path.name for path in OUTPUT.iterdir()}
    written = json.loads((output / "winemon-model.json").read_text())
    steps = [
        panel["fieldConfig"]["defaults"]["thresholds"]["steps"]
        for panel in written["panels"]
        if panel["title"] == "Drift of predictions"
    ]
    assert [step["value"] for step in steps[0]] == [None, 0.4]


def test_a_wrong_number_is_one_clear_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "objectives.yml"
    source.write_text(SOURCE.read_text().replace("ratio: 0.999", "ratio: 99.9"))
    assert main(["--source", str(source), "--output", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not list(tmp_path.glob("*.json"))


def test_colours_change_at_their_limits() -> None:
    def colours(steps: panels.Steps) -> list[tuple[float | None, str]]:
        return [(step["value"], step["color"]) for step in steps]

    assert colours(panels.above(2)) == [(None, "green"), (2, "red")]
    assert colours(panels.above(1, 2)) == [(None, "green"), (1, "orange"), (2, "red")]
    assert colours(panels.below(1)) == [(None, "red"), (1, "green")]
    assert colours(panels.below(1, 2)) == [(None, "red"), (1, "orange"), (2, "green")]


def test_a_line_is_shared_by_its_panels() -> None:
    number = panels.stat("Number", "short", panels.query("up"))
    line = panels.timeseries("Line", "short", panels.query("up", "{{job}}"))
    built = panels.dashboard(
        "winemon-x", "X", "", ("Row", [[number] * 5, [line, number]]), variables=[], since="1h", refresh="30s"
    )
    places = [tuple(panel["gridPos"][key] for key in "xywh") for panel in built["panels"]]
    assert places == [
        (0, 0, 24, 1),
        (0, 1, 5, 4),
        (5, 1, 5, 4),
        (10, 1, 4, 4),
        (14, 1, 5, 4),
        (19, 1, 5, 4),
        (0, 5, 12, 8),
        (12, 5, 12, 8),
    ]
    assert [panel["id"] for panel in built["panels"]] == list(range(1, 9))


def test_an_unknown_variable_or_alert_is_named() -> None:
    with pytest.raises(KeyError, match="no_such"):
        fill("up{a=~'$no_such'}")
    with pytest.raises(LookupError, match="NoSuchAlert"):
        limit("NoSuchAlert")
