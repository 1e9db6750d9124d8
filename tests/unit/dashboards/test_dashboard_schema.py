"""The dashboards' JSON against Grafana's published schema, as its Foundation SDK has it."""

import json
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models import units

from dashboards.__main__ import OUTPUT

with warnings.catch_warnings():
    # It would rather have us use the second schema, which Grafana 9 to 11 do not load.
    warnings.simplefilter("ignore", DeprecationWarning)
    from grafana_foundation_sdk.models.dashboard import Dashboard

DASHBOARDS = sorted(OUTPUT.glob("*.json"))

# Grafana 9 and 10.0 to 10.2 want it; the schema of today has `mode` instead, which is there too.
OLD = {"options.tooltip.show"}


def unknown(ours: Any, known: Any, path: str = "") -> Iterator[str]:
    """Yield the places that the schema does not know, or understands otherwise."""
    if isinstance(ours, dict):
        for key, value in ours.items():
            place = f"{path}.{key}"
            if key in known:
                yield from unknown(value, known[key], place)
            elif value not in (None, "", [], {}, False) and not place.endswith(tuple(OLD)):
                yield place
    elif isinstance(ours, list):
        if len(ours) != len(known):
            yield path
        for i, (one, other) in enumerate(zip(ours, known, strict=False)):
            yield from unknown(one, other, f"{path}[{i}]")
    elif ours != known:
        yield f"{path}: {ours!r} is read as {known!r}"


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_a_dashboard_keeps_to_the_schema(path: Any) -> None:
    register_default_plugins()
    dashboard = json.loads(path.read_text())
    read = json.loads(JSONEncoder().encode(Dashboard.from_json(dashboard)))
    assert list(unknown(dashboard, read)) == []


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_a_unit_is_one_that_grafana_has(path: Any) -> None:
    listed = {value for value in vars(units).values() if isinstance(value, str)}
    for panel in json.loads(path.read_text())["panels"]:
        if panel["type"] != "row":
            assert panel["fieldConfig"]["defaults"]["unit"] in listed, panel["title"]


@pytest.mark.parametrize(
    ("old", "new"), [('"cellGap"', '"cellgap"'), ('"stacking"', '"stackin"'), ('"xField"', '"xfield"')]
)
def test_a_key_that_the_schema_does_not_have_is_found(old: str, new: str) -> None:
    register_default_plugins()
    text = (OUTPUT / "winemon-model.json").read_text()
    dashboard = json.loads(text.replace(old, new))
    read = json.loads(JSONEncoder().encode(Dashboard.from_json(dashboard)))
    assert new.strip('"') in " ".join(unknown(dashboard, read))
