"""The queries of the dashboard Jenkins, asked of series under the names that its plugins document."""

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from dashboards.__main__ import OUTPUT
from dashboards.queries import PanelQuery, panel_queries

ROOT = Path(__file__).parents[3]
SERIES = yaml.safe_load((Path(__file__).parent / "jenkins_series.yml").read_text())
QUERIES = list(panel_queries(json.loads((OUTPUT / "winemon-jenkins.json").read_text())))


def ask(directory: Path, expected: Mapping[str, Mapping[str, float]], at: str = "1h") -> None:
    """Have promtool compare expressions with the samples expected, which are values by labels."""
    cases = [
        {
            "expr": expression,
            "eval_time": at,
            "exp_samples": [{"labels": labels, "value": value} for labels, value in samples.items()],
        }
        for expression, samples in expected.items()
    ]
    test = {"interval": "15s", "input_series": SERIES, "promql_expr_test": cases}
    path = directory / "test.yml"
    path.write_text(yaml.safe_dump({"rule_files": [], "tests": [test]}))
    promtool = ROOT / "build/tools/promtool"
    result = subprocess.run([promtool, "test", "rules", path], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def expression(panel: str) -> str:
    found = [query.expr for query in QUERIES if query.panel == panel]
    assert len(found) == 1
    return found[0]


def test_every_query_returns_data(tmp_path: Path) -> None:
    assert len(QUERIES) > 30
    ask(tmp_path, {f"count({query.expr}) > bool 0": {"{}": 1} for query in QUERIES})


def test_a_query_of_what_jenkins_does_not_export_would_be_found(tmp_path: Path) -> None:
    renamed = PanelQuery("", QUERIES[0].expr.replace("up{", "default_jenkins_up_of_old{"), instant=True)
    with pytest.raises(AssertionError, match="default_jenkins_up_of_old"):
        ask(tmp_path, {f"count({renamed.expr}) > bool 0": {"{}": 1}})


VALUES: list[tuple[str, dict[str, float]]] = [
    ("Jobs whose last build failed", {"{}": 1}),
    # The failed build of `deliver` does not count: its last success began after 600 of 3600 seconds.
    ("Time since the last success", {'{jenkins_job="deliver"}': 3000, '{jenkins_job="check"}': 2400}),
    ("Share of builds that did not fail", {'{jenkins_job="deliver"}': 0.75, '{jenkins_job="check"}': 1}),
]


@pytest.mark.parametrize(("panel", "samples"), VALUES, ids=[panel for panel, _ in VALUES])
def test_a_panel_shows_what_its_title_says(panel: str, samples: dict[str, Any], tmp_path: Path) -> None:
    ask(tmp_path, {expression(panel): samples})


def test_no_failed_build_is_zero_and_not_nothing(tmp_path: Path) -> None:
    ask(tmp_path, {expression("Jobs whose last build failed"): {"{}": 0}}, at="20m")
