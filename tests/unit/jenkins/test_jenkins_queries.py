"""The queries of the tutorial's third exercise, asked of recorded series of Jenkins."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs/tutorial/3-jenkins-monitoring.md"
SERIES = ROOT / "tests/unit/dashboards/jenkins_series.yml"
QUERIES = [
    query.replace(r"\|", "|")
    for query in re.findall(r"^\| .+\? .*\| `(.+)` \|$", PAGE.read_text(), re.MULTILINE)
]


def test_the_page_has_queries() -> None:
    assert len(QUERIES) >= 10


@pytest.mark.parametrize("query", QUERIES)
def test_a_query_answers(query: str, tmp_path: Path) -> None:
    case = {
        "expr": f"count({query}) > bool 0",
        "eval_time": "1h",
        "exp_samples": [{"labels": "{}", "value": 1}],
    }
    series = yaml.safe_load(SERIES.read_text())
    tests = [{"interval": "15s", "input_series": series, "promql_expr_test": [case]}]
    (tmp_path / "test.yml").write_text(yaml.safe_dump({"rule_files": [], "tests": tests}))
    command = [ROOT / "build/tools/promtool", "test", "rules", tmp_path / "test.yml"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
