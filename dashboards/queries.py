"""The queries of a built dashboard, as Prometheus gets them from Grafana."""

import re
from collections.abc import Iterator, Mapping
from typing import Any, Final, NamedTuple

ANYTHING: Final = {
    "__rate_interval": "1m",
    "__range": "1h",
    "instance": ".+",
    "handler": ".+",
    "feature": "alcohol_pct_vol",
    "jenkins_job": ".+",
}
"""Values of all variables that the dashboards use: their defaults, or all there is."""


class PanelQuery(NamedTuple):
    """A query with its variables filled in; `instant` ones are asked for now, others over time."""

    panel: str
    expr: str
    instant: bool


def panel_queries(dashboard: Mapping[str, Any]) -> Iterator[PanelQuery]:
    """Yield every query of every panel."""
    for panel in dashboard["panels"]:
        for target in panel.get("targets", []):
            yield PanelQuery(panel["title"], fill(target["expr"]), target["instant"])


def other_expressions(dashboard: Mapping[str, Any]) -> Iterator[str]:
    """Yield what the variables and annotations select."""
    for variable in dashboard["templating"]["list"]:
        if variable["type"] == "query":
            found = re.fullmatch(r"label_values\((.+), \w+\)", variable["definition"])
            assert found, f"{variable['definition']} is not label_values(series, label)"  # noqa: S101 - of ours
            yield fill(found[1])
    for annotation in dashboard["annotations"]["list"]:
        if "expr" in annotation:
            yield fill(annotation["expr"])


def fill(expression: str) -> str:
    """Return an expression with its variables filled in; KeyError names one that is not known."""
    return re.sub(r"\$(\w+)", lambda match: ANYTHING[match[1]], expression)
