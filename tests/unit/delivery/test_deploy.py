"""`ansible/deploy.yml` and `rollback.yml`: who is told what, and when; the commands here only note it."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
TOOL = """#!/bin/sh
case $2 in
status) echo 'STATUS' ;;
*) echo "$@" >>LOG; [ "$1 $2" != "BROKEN" ] || { echo it is broken >&2; exit 1; } ;;
esac
case $2 in switch | rollback) echo v2 is live ;; esac
"""
STATUS = {
    "live": "v1",
    "releases": ["v2"],
    "environments": ["app-1-py3"],
    "python": "3",
    "architecture": "x86_64",
}
INSTALL = "install winemon-v2.tar.gz"
LOCAL = {"ansible_connection": "local", "ansible_python_interpreter": sys.executable}
GONE = {"ansible_host": "127.0.0.1", "ansible_port": 1}
Play = Callable[..., tuple[subprocess.CompletedProcess[str], list[str]]]


@pytest.fixture
def play(tmp_path: Path) -> Play:
    """Return a function from a playbook and load balancers to the finished play and who was told what."""

    def run(
        playbook: str, balancers: dict[str, Any], broken: str = ""
    ) -> tuple[subprocess.CompletedProcess[str], list[str]]:
        log, tool = tmp_path / "log", tmp_path / "tool"
        script = TOOL.replace("LOG", str(log)).replace("BROKEN", broken)
        tool.write_text(script.replace("STATUS", json.dumps(STATUS)))
        tool.chmod(0o755)
        releases = {"v2": {"archive": "winemon-v2.tar.gz", "sha256": "0", "environment": "app-1"}}
        (tmp_path / "winemon-v2.tar.gz").write_bytes(b"")
        (tmp_path / "index.json").write_text(json.dumps({"live": "v2", "releases": releases}))
        inventory = tmp_path / "hosts.yml"
        apis = {"a": LOCAL, "b": LOCAL}
        inventory.write_text(json.dumps({"api": {"hosts": apis}, "loadbalancer": {"hosts": balancers}}))
        variables = {
            "winemon_api_store": str(tmp_path),
            "_winemon_api_command": [str(tool), "{{ item | default(inventory_hostname) }}"],
            "_haproxy_command": [str(tool), "{{ item }}"],
        }
        command = [
            Path(sys.executable).parent / "ansible-playbook",
            "-i",
            inventory,
            f"ansible/{playbook}.yml",
        ]
        done = subprocess.run(
            [*command, "-e", json.dumps(variables)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        told = log.read_text().splitlines() if log.exists() else []
        # Without why, and what a new machine is to get.
        told = [line for line in told if " promote " not in line]
        return done, [re.split(" --(?:why|sha256)", line)[0] for line in told]

    return run


@pytest.mark.thorough
def test_each_machine_is_taken_out_of_every_load_balancer_and_brought_back_in_its_turn(play: Play) -> None:
    done, told = play("deploy", {"one": LOCAL, "two": LOCAL})
    assert done.returncode == 0, done.stdout
    assert told == [
        *("one drain a", "two drain a", f"a {INSTALL}", "a switch v2", "one ready a", "two ready a"),
        *("one drain b", "two drain b", f"b {INSTALL}", "b switch v2", "one ready b", "two ready b"),
    ], "what is there is installed again, as it may be damaged"


def test_a_failure_brings_the_machine_back_and_spares_the_next(play: Play) -> None:
    done, told = play("rollback", {"one": LOCAL}, broken="a rollback")
    assert done.returncode != 0
    assert "it is broken" in done.stdout
    assert told == ["one drain a", "a rollback", "one ready a"]


@pytest.mark.thorough
def test_a_failure_takes_the_release_back_from_the_machines_before_it(play: Play) -> None:
    done, told = play("deploy", {}, broken="b switch")
    assert done.returncode != 0
    assert "it is broken" in done.stdout
    assert told == [f"a {INSTALL}", "a switch v2", f"b {INSTALL}", "b switch v2", "a switch v1"]


def test_a_load_balancer_that_is_gone_stops_it_and_the_others_ask_the_machine_again(play: Play) -> None:
    done, told = play("deploy", {"one": LOCAL, "two": GONE})
    assert done.returncode != 0
    assert "Not reached: two. Bring it back, or take it out of the group loadbalancer." in done.stdout
    assert told == ["one drain a", "one ready a"]
