"""A machine loses its power, again and again: what was said to be done is there, and the rest heals."""

import itertools
import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from delivery import archive
from tests.e2e.machines import lower, machines, new_site, provisioned
from tests.e2e.mains import Disk, Mains
from tests.e2e.releases import STORE, Build, name
from tests.e2e.site import ROOT

INVENTORY = Path(__file__).parent / "power"
BUILD = ROOT / "build" / "power"
OTHERS = "prometheus prometheus-alertmanager grafana-server jenkins winemon-locust winemon-locust-worker@1"


class Operation:
    """What the power is cut in: it is prepared, started, done again, and held to what it said it did."""

    other_libraries = False

    def __init__(self, mains: Mains) -> None:
        self.mains = mains
        self.built = mains.release(other_libraries=self.other_libraries)
        self.name = name(self.built)
        self.sent, self.wheels = mains.send(self.built)
        self.prepare()

    def prepare(self) -> None:
        """Do what comes before it."""

    def command(self, verb: str) -> str:
        """Return the command of a verb."""
        given = verb in ("publish", "install")
        return f"winemon-release {verb} " + (f"{self.sent} --wheels {self.wheels}" if given else self.name)

    def start(self) -> "subprocess.Popen[str]":
        """Start it."""
        command = f"sudo {self.command(type(self).__name__.lower())}"
        return subprocess.Popen(
            ["ssh", "-F", str(self.mains.site.ssh_config), self.mains.site.name, command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self) -> float:
        """Do it undisturbed and return the seconds that it took."""
        start, process = time.monotonic(), self.start()
        said = process.communicate()[0]
        assert process.returncode == 0, said
        return time.monotonic() - start

    def heal(self) -> None:
        """Do it again, as whoever was interrupted would, who has the release still."""
        self.sent, self.wheels = self.mains.send(self.built)
        self.prepare()
        self.run()

    def require(self) -> None:
        """Require that it is done, and whole."""
        raise NotImplementedError


class Publish(Operation):
    """Put a release and its wheels into the store."""

    other_libraries = True

    def require(self) -> None:
        """Require that it is done, and whole."""
        entry = self.mains.index()["releases"][self.name]
        stored = [f"{STORE}/{entry['archive']}", f"{STORE}/{Path(self.wheels).name}"]
        assert self.mains.sums(*stored) == [archive.sha256(self.built), *self.mains.sums(self.mains.wheels)]


class Install(Operation):
    """Install a release that needs an environment of its own."""

    other_libraries = True

    def require(self) -> None:
        """Require that it is done, and whole."""
        assert self.name in self.mains.status()["releases"]
        assert self.mains.damaged(self.name) == 0


class Switch(Operation):
    """Make a release live, in the environment of the one before."""

    def prepare(self) -> None:
        """Do what comes before it."""
        self.mains.site.run(self.command("install"))

    def require(self) -> None:
        """Require that it is done, and whole."""
        status = self.mains.status()
        assert (status["live"], status["ready"]) == (self.name, True)
        assert self.name in status["releases"]
        assert self.mains.damaged(self.name) == 0


class Rollback(Switch):
    """Make the one before live again."""

    def prepare(self) -> None:
        """Do what comes before it."""
        before = self.mains.status()["live"]
        self.mains.site.run(self.command("install"))
        self.mains.site.run(self.command("switch"))
        self.name = before

    def heal(self) -> None:
        """Do it again."""
        self.run()


class Promote(Operation):
    """Note which release a new machine is to get."""

    def prepare(self) -> None:
        """Do what comes before it."""
        self.mains.site.run(self.command("publish"))

    def require(self) -> None:
        """Require that it is done, and whole."""
        assert self.mains.index()["live"] == self.name
        assert self.mains.sums(f"{STORE}/{self.built.name}") == [archive.sha256(self.built)]


class Provision(Operation):
    """`site.yml` with other settings, where packages are missing."""

    packages = "prometheus-node-exporter prometheus-process-exporter"
    runs = itertools.count()

    def prepare(self) -> None:
        """Do what comes before it."""
        run = next(self.runs)
        self.settings = {
            "winemon_api_workers": 3 + run % 2,  # never what the machine has
            "winemon_journal_max_size": f"{400 + run}M",
            "winemon_package_lists_max_age": 0,
        }
        self.mains.site.run(f"apt-get -qq purge {self.packages} >/dev/null 2>&1; apt-get clean")

    def start(self) -> "subprocess.Popen[str]":
        """Start it."""
        command = [str(ROOT / ".venv/ansible/bin/ansible-playbook"), "-i", str(INVENTORY), "site.yml"]
        return subprocess.Popen(
            [*command, "-e", json.dumps(self.settings)],
            cwd=ROOT,
            # Connections of its own, which end with it.
            env={**os.environ, "ANSIBLE_SSH_CONTROL_PATH_DIR": tempfile.mkdtemp()},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def heal(self) -> None:
        """Do it again."""
        self.run()

    def require(self) -> None:
        """Require that it is done, and whole."""
        units = self.mains.site.run(f"systemctl is-active winemon-api winemon-firewall {self.packages}")
        assert set(units.split()) == {"active"}
        assert self.mains.site.run("dpkg --audit; find /var/lib/dpkg/updates -name '[0-9]*'") == ""
        workers = f"WINEMON_WORKERS={self.settings['winemon_api_workers']}"
        assert workers in self.mains.site.run("cat /etc/winemon/api.env").splitlines()


@pytest.fixture(scope="module")
def mains(request: pytest.FixtureRequest, build: Build) -> Iterator[Mains]:
    """Put what a machine writes on a disk of its own; of its services, those of other groups are off."""
    layer = provisioned(request.session)
    site = new_site(INVENTORY, BUILD)
    with machines(request.session, site, layer=layer):
        # Some of them are left out on Debian 12.
        site.run(f"for unit in {OTHERS}; do systemctl disable --now $unit || true; done")
        site.run("rm -r /opt/winemon/venvs/loadtest-*")
        site.play("site.yml")
        disk = Disk(site, BUILD / "disk.img", lower(layer))
        disk.insert()
        yield Mains(site, disk, build)


@pytest.fixture(scope="module")
def seconds(mains: Mains) -> dict[type[Operation], float]:
    """Return how long each command takes undisturbed."""
    return {kind: kind(mains).run() for kind in (Publish, Install, Switch, Rollback)}


CUTS: Final = [
    *((Publish, at) for at in ("0.4", "0.7", "+0", "+6")),
    *((Install, at) for at in ("0.3", "0.5", "0.7", "+0", "+6")),
    *((Switch, at) for at in ("0.4", "0.7", "+0", "+6")),
    *((Rollback, at) for at in ("0.6", "+1")),
    *((Promote, at) for at in ("+1",)),
    (Provision, "Install the node exporter"),
    (Provision, "Install the process exporter"),
    (Provision, "Write the settings and units that are missing or different"),
    (Provision, "Enable and start the API"),
]
"""When the power goes: after a share of the time it takes, so many seconds after its end, in a task."""


@pytest.mark.parametrize(("kind", "at"), CUTS)
def test_nothing_that_was_done_is_lost_and_the_rest_heals(
    mains: Mains, seconds: dict[type[Operation], float], kind: type[Operation], at: str
) -> None:
    operation = kind(mains)
    process = operation.start()
    assert process.stdout
    if at.startswith("+"):
        assert process.wait() == 0, process.stdout.read()
        time.sleep(float(at))
    elif kind in seconds:
        time.sleep(float(at) * seconds[kind])
    else:
        while at not in (line := process.stdout.readline()):
            assert line, "it ended before"
        time.sleep(1)
    done = process.poll()
    mains.disk.cut()
    if done is None:
        os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    moment = f"{kind.__name__} {at} ({'cut' if done is None else 'done'})"
    try:
        mains.disk.boot()
        took = mains.wait_for_right_answers()
        status = mains.status()
        left = f"{len(status['releases'])} releases, {len(status['environments'])} environments whole"
        live = "the new one" if status["live"] == operation.name else "another"
        moment += f": {live} live after {took:.1f} s, {left}, {len(mains.index()['releases'])} published"
        if done is not None:
            operation.require()
        operation.heal()
        operation.require()
        mains.wait_for_right_answers()
        if kind is Install:  # each environment makes each look at the machine longer
            mains.disk.restore()
    except BaseException as error:
        moment += f"; LOST: {str(error)[:200]!r}"
        mains.disk.restore()
        raise
    finally:
        with (BUILD / "cuts.log").open("a") as log:
            log.write(f"{moment}\n")


def test_plays_heal_what_a_power_cut_left_empty_under_an_older_version(mains: Mains) -> None:
    site = mains.site
    built = site.log("release", ["make", "--silent", "release"]).splitlines()[-1]
    pythons = json.dumps({"winemon_api_pythons": [mains.status()["python"]]})
    publish = ("ansible/publish.yml", "-e", f"release={ROOT / built}", "-e", pythons)
    deploy = ("ansible/deploy.yml", "-e", f"release={name(Path(built))}")
    site.play(*publish)
    site.play(*deploy)
    site.run("for file in $(find -L /opt/winemon/current/ -type f -not -path '*/bin/*'); do : >$file; done")
    site.run(f"for file in {STORE}/*.tar.gz; do : >$file; done")
    site.run(
        "cd /var/tmp && apt-get -qq download tree && dpkg --unpack tree_*.deb >/dev/null && rm tree_*.deb"
    )
    assert "tree" in site.run("dpkg --audit")
    site.play(*publish)
    site.play(*deploy)
    mains.wait_for_right_answers()
    status = mains.status()
    assert status["live"] in status["releases"]
    assert mains.damaged(status["live"]) == 0
    site.play("site.yml")
    assert site.run("dpkg --audit") == ""
    assert site.changed(site.play("site.yml")) == 0
