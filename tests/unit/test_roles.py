"""Every role documents exactly the variables it has, with their defaults and types."""

from pathlib import Path
from typing import Any

import pytest
import yaml

ROLES = sorted(path for path in (Path(__file__).parents[2] / "roles").iterdir() if path.is_dir())
TYPES: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "path": (str,),
    "int": (int, str),
    "float": (float, str),
    "bool": (bool, str),
    "list": (list, str),
    "dict": (dict, str),
}


def load(path: Path) -> dict[str, Any]:
    return (yaml.safe_load(path.read_text(encoding="utf-8")) or {}) if path.exists() else {}


def flat(value: Any) -> Any:
    """Return a default without the line breaks that YAML folding leaves in a template."""
    return " ".join(value.split()) if isinstance(value, str) else value


@pytest.mark.parametrize("role", ROLES, ids=lambda path: path.name)
def test_defaults_are_the_specified_ones(role: Path) -> None:
    defaults = load(role / "defaults" / "main.yml")
    options = load(role / "meta" / "argument_specs.yml")["argument_specs"]["main"].get("options", {})
    specified = {name: option["default"] for name, option in options.items() if "default" in option}
    assert {name: flat(value) for name, value in defaults.items()} == {
        name: flat(value) for name, value in specified.items()
    }
    for name, option in options.items():
        assert option["description"]
        assert name not in specified or option.get("required") is not True
        value = specified.get(name)
        templated = isinstance(value, str) and "{{" in value
        if value is not None and not templated:
            assert isinstance(value, TYPES[option["type"]][0]), name
            if option["type"] == "list":
                assert all(isinstance(item, TYPES[option["elements"]][0]) for item in value), name


@pytest.mark.parametrize("role", ROLES, ids=lambda path: path.name)
def test_a_role_names_its_platforms_and_its_tasks(role: Path) -> None:
    galaxy = load(role / "meta" / "main.yml")["galaxy_info"]
    assert galaxy["platforms"] == [{"name": "Debian", "versions": ["bookworm", "trixie"]}]
    assert all(
        "name" in task for task in yaml.safe_load((role / "tasks" / "main.yml").read_text(encoding="utf-8"))
    )
