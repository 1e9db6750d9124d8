"""Every query of every dashboard, asked of the machine's own Prometheus after a load test.

Those of Jenkins are asked of recorded series instead: tests/unit/dashboards/test_jenkins.py.
"""

import json
import math
import time
from typing import Any

import pytest

from dashboards.__main__ import OUTPUT
from dashboards.queries import PanelQuery, other_expressions, panel_queries
from tests.e2e.site import Site

DASHBOARDS = sorted(path for path in OUTPUT.glob("*.json") if path.stem != "winemon-jenkins")
PATIENCE = 240
"""Seconds: the slowest rules, those of the day's drift, are evaluated every two minutes."""


def series(site: Site, query: PanelQuery) -> int:
    """Return how many series of an answer have at least one number."""
    now = time.time()
    path, moment = (
        ("query", {"time": now})
        if query.instant
        else ("query_range", {"start": now - 600, "end": now, "step": 15})
    )
    answer = site.client.get(
        f"http://{site.address}:9090/api/v1/{path}",
        params={"query": query.expr, **moment},
        auth=site.secret("prometheus"),
    )
    assert answer.status_code == 200, f"{query.panel}: {answer.text}"
    result: list[dict[str, Any]] = answer.json()["data"]["result"]
    samples = ([each["value"]] if query.instant else each["values"] for each in result)
    return sum(any(math.isfinite(float(value)) for _, value in values) for values in samples)


@pytest.fixture(scope="module")
def loaded(site: Site) -> Site:
    site.play("ansible/loadtest.yml", "-e", "loadtest_users=10", "-e", "loadtest_seconds=30")
    return site


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_every_query_of_a_dashboard_returns_data(
    path: Any, loaded: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    dashboard = json.loads(path.read_text())
    queries = list(panel_queries(dashboard))
    deadline = time.monotonic() + PATIENCE
    counts: dict[PanelQuery, int] = {}
    while missing := [query for query in queries if not counts.get(query)]:
        assert time.monotonic() < deadline, "nothing for\n" + "\n".join(map(str, missing))
        counts |= {query: series(loaded, query) for query in missing}
        time.sleep(1)
    report = loaded.build / f"{path.stem}.txt"
    report.write_text(
        "".join(
            f"{counts[query]:4} series  {query.panel}: {' '.join(query.expr.split())}\n" for query in queries
        )
    )
    with capsys.disabled():
        print(f"{path.stem}: {len(queries)} queries, {sum(counts.values())} series, see {report}")  # noqa: T201 - what it is for


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_every_variable_has_values_and_every_annotation_can_be_asked_for(path: Any, loaded: Site) -> None:
    dashboard = json.loads(path.read_text())
    quiet = {annotation.get("expr") for annotation in dashboard["annotations"]["list"]}
    for expression in other_expressions(dashboard):
        assert loaded.query(expression) or expression in quiet, expression
