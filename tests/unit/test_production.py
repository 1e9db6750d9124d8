"""The inventory that production starts from: it parses, and every play runs on the machines of its groups."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
EXAMPLE = "inventory/production.example"
APIS, BALANCERS, JENKINS = {"api1", "api2"}, {"lb1"}, {"jenkins1"}
WATCHERS, LOADERS = {"mon1"}, {"load1", "load2"}
EVERYWHERE = APIS | BALANCERS | JENKINS | WATCHERS | LOADERS
# Runs on machines of this computer, which an inventory says in a group of its own.
LOCAL = {"machine.yml"}
PLAYBOOKS = sorted(path.name for path in (ROOT / "ansible").glob("*.yml") if path.name not in LOCAL)


def run(tool: str, *arguments: str) -> str:
    done = subprocess.run(
        [BIN / tool, "-i", EXAMPLE, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def plays(playbook: str) -> dict[str, set[str]]:
    """Return the hosts of each play of a playbook by its name."""
    found = re.split(r"^ +play #\d+ ", run("ansible-playbook", playbook, "--list-hosts"), flags=re.MULTILINE)
    return {
        re.sub(r"^\(.*?\): |\tTAGS: .*$", "", play.splitlines()[0]).strip(): set(
            re.findall(r"^ {6}(\S+)$", play, re.MULTILINE)
        )
        for play in found[1:]
    }


def test_it_has_every_group_on_machines_of_its_own_with_an_address() -> None:
    listed = json.loads(run("ansible-inventory", "--list"))
    groups = {name: set(group["hosts"]) for name, group in listed.items() if "hosts" in group}
    assert groups == {
        "api": APIS,
        "loadbalancer": BALANCERS,
        "jenkins": JENKINS,
        "monitoring": WATCHERS,
        "loadtest": LOADERS,
    }
    variables = listed["_meta"]["hostvars"]
    assert variables.keys() == EVERYWHERE
    assert len({own["ansible_host"] for own in variables.values()}) == len(EVERYWHERE)
    # The load balancer's clients are not shut out, and only they are let in.
    guarded = {name: own.get("winemon_firewall_ports") for name, own in variables.items()}
    assert {name for name, ports in guarded.items() if ports is not None} == BALANCERS
    assert not {80, 443} & set(guarded["lb1"])
    assert 8404 in guarded["lb1"]


def test_every_play_of_the_site_runs_on_the_machines_of_its_group() -> None:
    found = plays("site.yml")
    expected = {
        "Prepare every machine": EVERYWHERE,
        "Serve the model": APIS,
        "Balance the load": BALANCERS,
        "Load the model": LOADERS,
        "Watch it all": WATCHERS,
    }
    assert {name: found[name] for name in expected} == expected


@pytest.mark.parametrize("playbook", ["deploy", "rollback"])
def test_a_deployment_goes_through_all_apis(playbook: str) -> None:
    first, *_ = plays(f"ansible/{playbook}.yml").values()
    assert first == APIS


@pytest.fixture(scope="module")
def checked() -> str:
    """Have Ansible read all the playbooks at once; it names each one that it could."""
    return run("ansible-playbook", "--syntax-check", *(f"ansible/{playbook}" for playbook in PLAYBOOKS))


@pytest.mark.parametrize("playbook", PLAYBOOKS)
def test_every_play_is_written_for_it(checked: str, playbook: str) -> None:
    assert f"playbook: ansible/{playbook}\n" in checked
