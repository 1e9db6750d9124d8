"""What roles do as root keeps out of directories that other users can change."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROLES = Path(__file__).parents[2] / "roles"
THEIRS = re.compile(
    r"/(var/(lib/(jenkins|grafana|prometheus|winemon|winemon-deploy/[.]ansible)|cache/jenkins|log/grafana|tmp)"
    r"|srv/git/winemon[.]git|run/(winemon-api|haproxy)|tmp)/"
)
"""Below a directory that a user other than root owns, or everybody may write to."""
LOOKS = {"assert", "debug", "fail", "find", "include_tasks", "import_tasks", "stat"}
BLOCKS = ("block", "rescue", "always")
KEYWORDS = {*BLOCKS, "name", "register", "when", "vars", "changed_when", "failed_when", "check_mode"}


def tasks(found: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield tasks, also those in blocks."""
    for task in found:
        yield task
        for part in BLOCKS:
            yield from tasks(task.get(part, []))


def texts(role: Path) -> dict[str, str]:
    """Return what each variable of a role says, as text."""
    files = [role / folder / "main.yml" for folder in ("defaults", "vars")]
    found = [yaml.safe_load(file.read_text()) or {} for file in files if file.exists()]
    return {name: json.dumps(value) for variables in found for name, value in variables.items()}


def leads_there(text: str, variables: dict[str, str], seen: frozenset[str] = frozenset()) -> bool:
    """Return whether a text names such a place, itself or by its variables."""
    if THEIRS.search(text):
        return True
    names = set(re.findall(r"\w+", text)) & variables.keys() - seen
    return any(leads_there(variables[name], variables, seen | names) for name in names)


def works_as_the_user(task: dict[str, Any]) -> bool:
    """Return whether a task is a command that the user itself runs."""
    command = task.get("ansible.builtin.command", "")
    words = command.split() if isinstance(command, str) else command.get("argv") or command["cmd"].split()
    return words[:1] == ["runuser"] and words[1].startswith("--user=") and words[1] != "--user=root"


@pytest.mark.parametrize(
    "file", sorted(ROLES.glob("*/[th]a*/*.yml")), ids=lambda path: "/".join(path.parts[-3:])
)
def test_root_changes_nothing_where_others_could_put_a_link(file: Path) -> None:
    variables = texts(file.parents[1])
    wrong = [
        task["name"]
        for task in tasks(yaml.safe_load(file.read_text()))
        if not works_as_the_user(task)
        and not {key.rpartition(".")[2] for key in task} & LOOKS
        and leads_there(
            json.dumps({key: value for key, value in task.items() if key not in KEYWORDS}), variables
        )
    ]
    assert wrong == []


@pytest.mark.parametrize("file", sorted(ROLES.glob("*/files/*")), ids=lambda path: path.name)
def test_python_that_root_starts_takes_nothing_from_its_caller(file: Path) -> None:
    first = file.read_bytes().partition(b"\n")[0] if file.is_file() else b""
    assert b"python" not in first or first == b"#!/usr/bin/python3 -I"
