"""As much of Grafana's dashboard format as winemon's dashboards use; it loads in Grafana 9.4 to 13."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

Json = dict[str, Any]
Panel = Json
Query = Json
Row = tuple[str, Sequence[Sequence[Panel]]]
Steps = list[Json]

SCHEMA: Final = 36
"""Of Grafana 9: a server migrates older dashboards to its own schema, and never newer ones."""

PLUGIN: Final = "9.4.0"
"""Whose panels' options these are; without it Grafana takes them for much older ones and migrates them."""

TAG: Final = "winemon"
COLUMNS: Final = 24
DATASOURCE: Final = {"type": "prometheus", "uid": "${datasource}"}
GREEN, ORANGE, RED, BLUE = "green", "orange", "red", "blue"

# --- queries and limits -----------------------------------------------------------------------------------


def query(expr: str, legend: str = "", **options: Any) -> Query:
    """Return what a panel asks Prometheus; `legend` names its series by their {{labels}}."""
    return {"expr": expr, "legendFormat": legend, **options}


def rate(counter: str, matchers: str = "", by: str = "") -> str:
    """Return how fast a counter rises, in units per second, summed by the labels `by`."""
    return _summed(f"rate({_select(counter, matchers)}[$__rate_interval])", by)


def increase(counter: str, matchers: str = "", by: str = "") -> str:
    """Return by how much a counter rises in the interval that fits the zoom, summed by the labels `by`."""
    return _summed(f"increase({_select(counter, matchers)}[$__rate_interval])", by)


def _select(metric: str, matchers: str) -> str:
    return f"{metric}{{{matchers}}}" if matchers else metric


def _summed(expr: str, by: str) -> str:
    return f"sum by ({by}) ({expr})" if by else f"sum({expr})"


def above(*limits: float) -> Steps:
    """Return thresholds: red from the last limit on, orange from the one before, green below."""
    colours = (ORANGE, RED)[-len(limits) :]
    return [_step(GREEN, None), *map(_step, colours, limits)]


def below(*limits: float) -> Steps:
    """Return thresholds: red below the first limit, orange below the next, green from the last one on."""
    colours = (*(RED, ORANGE)[: len(limits)], GREEN)
    return list(map(_step, colours, (None, *limits)))


def _step(colour: str, value: float | None) -> Json:
    return {"color": colour, "value": value}


def values(names: Mapping[int, tuple[str, str]]) -> list[Json]:
    """Return what to show for single values: a text and its colour."""
    options = {str(value): {"text": text, "color": colour} for value, (text, colour) in names.items()}
    return [{"type": "value", "options": options}]


# --- panels -----------------------------------------------------------------------------------------------


def timeseries(
    title: str,
    unit: str,
    *queries: Query,
    description: str = "",
    limits: Steps | None = None,
    stacked: bool = False,
    minimum: float | None = 0,
    steps: bool = False,
) -> Panel:
    """Return lines over time; `limits` are drawn as lines, `steps` keeps a value until the next one."""
    custom = {
        "lineWidth": 1,
        "fillOpacity": 30 if stacked else 10,
        "lineInterpolation": "stepAfter" if steps else "linear",
        "showPoints": "auto",
        "stacking": {"mode": "normal" if stacked else "none", "group": "A"},
        "thresholdsStyle": {"mode": "line" if limits else "off"},
    }
    options = {
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []},
        "tooltip": {"mode": "multi", "sort": "desc"},
    }
    panel = _panel(
        "timeseries", title, unit, queries, description, options=options, limits=limits, custom=custom
    )
    if minimum is not None:
        panel["fieldConfig"]["defaults"]["min"] = minimum
    return panel


def stat(
    title: str,
    unit: str,
    *queries: Query,
    description: str = "",
    limits: Steps | None = None,
    mappings: list[Json] | None = None,
    text: str = "auto",
    decimals: int | None = None,
    no_value: str = "",
) -> Panel:
    """Return the value now; `text="name"` shows the legend in its place."""
    options = {
        "reduceOptions": _LAST,
        "colorMode": "value",
        "graphMode": "none",
        "justifyMode": "auto",
        "orientation": "auto",
        "textMode": text,
    }
    panel = _panel(
        "stat",
        title,
        unit,
        queries,
        description,
        options=options,
        limits=limits,
        mappings=mappings,
        no_value=no_value,
    )
    if decimals is not None:
        panel["fieldConfig"]["defaults"]["decimals"] = decimals
    return panel


def bargauge(
    title: str,
    unit: str,
    *queries: Query,
    description: str = "",
    limits: Steps | None = None,
    mappings: list[Json] | None = None,
    maximum: float | None = None,
    no_value: str = "",
    links: Mapping[str, str] | None = None,
) -> Panel:
    """Return a bar for each series now, in the order of the answer; `links` are URLs by title."""
    options = {
        "reduceOptions": _LAST,
        "displayMode": "basic",
        "orientation": "horizontal",
        "showUnfilled": True,
        "minVizHeight": 10,
        "minVizWidth": 0,
    }
    panel = _panel(
        "bargauge",
        title,
        unit,
        queries,
        description,
        options=options,
        limits=limits,
        mappings=mappings,
        no_value=no_value,
    )
    defaults = panel["fieldConfig"]["defaults"]
    defaults["min"] = 0
    if maximum is not None:
        defaults["max"] = maximum
    if links:
        defaults["links"] = [{"title": name, "url": url} for name, url in links.items()]
    return panel


def heatmap(title: str, unit: str, *queries: Query, description: str, cumulative: bool = True) -> Panel:
    """Return counts over time by bucket.

    `cumulative` for Prometheus' histograms, summed by `le`; otherwise each series is a row as it is.
    """
    options = {
        "calculate": False,
        "cellGap": 1,
        "color": {"mode": "scheme", "scheme": "Oranges", "fill": "dark-orange", "exponent": 0.5, "steps": 64},
        "yAxis": {"axisPlacement": "left", "unit": unit},
        "rowsFrame": {"layout": "auto"},
        "filterValues": {"le": 1e-9},
        "showValue": "never",
        "legend": {"show": True},
        "tooltip": {"show": True, "mode": "single", "yHistogram": False},
        "exemplars": {"color": "rgba(255,0,255,0.7)"},
    }
    panel = _panel("heatmap", title, unit, queries, description, options=options)
    if cumulative:
        for target in panel["targets"]:
            target["format"] = "heatmap"
    return panel


def timeline(
    title: str, *queries: Query, mappings: list[Json], description: str = "", merge: bool = True
) -> Panel:
    """Return a line of states over time for each series."""
    options = {
        "mergeValues": merge,
        "showValue": "never",
        "alignValue": "left",
        "rowHeight": 0.9,
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
        "tooltip": {"mode": "single", "sort": "none"},
    }
    custom = {"fillOpacity": 70, "lineWidth": 0}
    return _panel(
        "state-timeline",
        title,
        "none",
        queries,
        description,
        options=options,
        mappings=mappings,
        custom=custom,
    )


def barchart(title: str, unit: str, label: str, queries: Mapping[str, str], *, description: str) -> Panel:
    """Return bars side by side, one colour for each of the named queries, along the values of a label."""
    names = {f"Value #{ref}": name for ref, name in zip("ABCDEFGH", queries, strict=False)}
    # Where one query alone has an answer, Grafana leaves out its letter; the last is the one to compare with.
    names["Value"] = list(queries)[-1]
    options = {
        "xField": label,
        "orientation": "vertical",
        "showValue": "never",
        "stacking": "none",
        "groupWidth": 0.8,
        "barWidth": 0.9,
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []},
        "tooltip": {"mode": "multi", "sort": "none"},
    }
    targets = [query(expr, name, format="table") for name, expr in queries.items()]
    panel = _panel(
        "barchart",
        title,
        unit,
        targets,
        description,
        options=options,
        custom={"fillOpacity": 80, "lineWidth": 0},
    )
    panel["transformations"] = [
        {"id": "merge", "options": {}},
        {"id": "organize", "options": {"excludeByName": {"Time": True}, "renameByName": names}},
        {"id": "sortBy", "options": {"sort": [{"field": label}]}},
    ]
    return panel


_INSTANT: Final = frozenset({"stat", "bargauge", "barchart"})
_LAST: Final = {"calcs": ["lastNotNull"], "fields": "", "values": False}


def _panel(
    kind: str,
    title: str,
    unit: str,
    queries: Iterable[Query],
    description: str,
    *,
    options: Json,
    limits: Steps | None = None,
    mappings: list[Json] | None = None,
    custom: Json | None = None,
    no_value: str = "",
) -> Panel:
    instant = kind in _INSTANT
    defaults: Json = {
        "unit": unit,
        "color": {"mode": "thresholds" if instant and kind != "barchart" else "palette-classic"},
        "thresholds": {"mode": "absolute", "steps": limits or [_step(BLUE, None)]},
        "mappings": mappings or [],
        "custom": custom or {},
    }
    if no_value:
        defaults["noValue"] = no_value
    targets = [
        {
            "refId": ref,
            "datasource": DATASOURCE,
            "instant": instant,
            "range": not instant,
            "format": "time_series",
        }
        | target
        for ref, target in zip("ABCDEFGHIJ", queries, strict=False)
    ]
    return {
        "type": kind,
        "title": title,
        "description": description,
        "datasource": DATASOURCE,
        "pluginVersion": PLUGIN,
        "targets": targets,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": options,
    }


# --- variables, annotations, the whole --------------------------------------------------------------------


def variable(
    name: str, label: str, values_of: str, *, chosen: Sequence[str] = (), several: bool = True
) -> Json:
    """Return a variable whose values Prometheus knows: `values_of` is label_values(...).

    `several` allows more than one, and all, which is the default unless others are `chosen`.
    """
    text, value = (list(chosen), list(chosen)) if chosen else (["All"], ["$__all"])
    return {
        "type": "query",
        "name": name,
        "label": label,
        "datasource": DATASOURCE,
        "definition": values_of,
        "query": {"query": values_of, "refId": name},
        "refresh": 2,  # on every change of the time range
        "sort": 1,
        "regex": "",
        "hide": 0,
        "options": [],
        "multi": several,
        "includeAll": several,
        "allValue": ".+" if several else None,
        "current": {"text": text, "value": value} if several else {"text": text[0], "value": value[0]},
    }


_DATASOURCE_VARIABLE: Final = {
    "type": "datasource",
    "name": "datasource",
    "label": "Data source",
    "query": "prometheus",
    "refresh": 1,
    "regex": "",
    "hide": 0,
    "options": [],
    "multi": False,
    "includeAll": False,
    "current": {},
}


def _annotation(name: str, colour: str, expr: str, title: str, text: str) -> Json:
    return {
        "name": name,
        "datasource": DATASOURCE,
        "enable": True,
        "iconColor": colour,
        "expr": expr,
        "step": "60s",
        "titleFormat": title,
        "textFormat": text,
        "tagKeys": "",
        "useValueForTime": False,
    }


_ANNOTATIONS: Final = [
    {
        "name": "Annotations & Alerts",
        "type": "dashboard",
        "builtIn": 1,
        "datasource": {"type": "grafana", "uid": "-- Grafana --"},
        "enable": True,
        "hide": True,
        "iconColor": "rgba(0, 211, 255, 1)",
    },
    # Another model under the same address has another time of training; its labels say which one serves now.
    _annotation(
        "Models",
        "blue",
        "count by (version, algorithm) (winemon_model_info and on (job, instance) "
        "changes(winemon_model_trained_timestamp_seconds[5m]) > 0)",
        "Model {{version}}",
        "{{algorithm}}",
    ),
    # Two minutes, so that a step is seen whatever the time between two looks at it.
    _annotation(
        "Releases",
        "purple",
        "count by (action, release, result, instance) "
        "(time() - winemon_release_step_timestamp_seconds < 120)",
        "{{action}} {{release}}",
        "{{result}} on {{instance}}",
    ),
    _annotation(
        "Alerts",
        "red",
        'ALERTS{alertstate="firing", alertname!="Watchdog"}',
        "{{alertname}}",
        "{{severity}} {{instance}} {{feature}} {{objective}}",
    ),
]


def dashboard(
    uid: str, title: str, description: str, *rows: Row, variables: Sequence[Json], since: str, refresh: str
) -> Json:
    """Return a dashboard; the panels of a line share its 24 columns."""
    panels: list[Panel] = []
    y = 0
    for name, lines in rows:
        panels.append(
            {"type": "row", "title": name, "collapsed": False, "panels": [], "gridPos": _at(0, y, COLUMNS, 1)}
        )
        y += 1
        for line in lines:
            height = 4 if all(panel["type"] == "stat" for panel in line) else 8
            edges = [round(COLUMNS * i / len(line)) for i in range(len(line) + 1)]
            for panel, left, right in zip(line, edges, edges[1:], strict=False):
                panels.append(panel | {"gridPos": _at(left, y, right - left, height)})
            y += height
    return {
        "uid": uid,
        "title": title,
        "description": description,
        "tags": [TAG],
        "schemaVersion": SCHEMA,
        "editable": False,
        "graphTooltip": 1,  # one crosshair over all panels
        "timezone": "browser",
        "time": {"from": f"now-{since}", "to": "now"},
        "refresh": refresh,
        "links": [
            {
                "type": "dashboards",
                "title": "winemon",
                "tags": [TAG],
                "asDropdown": False,
                "keepTime": True,
                "includeVars": False,  # an instance of one dashboard may be unknown to another
                "targetBlank": False,
            }
        ],
        "templating": {"list": [_DATASOURCE_VARIABLE, *variables]},
        "annotations": {"list": _ANNOTATIONS},
        "panels": [panel | {"id": i} for i, panel in enumerate(panels, 1)],
    }


def _at(x: int, y: int, width: int, height: int) -> Json:
    return {"x": x, "y": y, "w": width, "h": height}
