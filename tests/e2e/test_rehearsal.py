"""The rehearsal: what the tutorial types and pushes goes through the Jenkinsfile as Jenkins would run it.

Two things are shorter, and each transcript says so: of `make check` the unit tests are left out, as they take
longer than all else here, and after the first build the linters too; and load tests end after some seconds.
"""

import os
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import httpx
import pytest

from tests.e2e.checkout import clone, git
from tests.e2e.jenkins.build import Build
from tests.e2e.jenkins.pipeline import Stage, load
from tests.e2e.machines import BUILD, INVENTORY
from tests.e2e.releases import STORE, index, ledger, status
from tests.e2e.site import ROOT, Site
from tests.e2e.test_tutorial import FENCE, pattern

PAGE: Final = ROOT / "docs/tutorial/2-jenkins-delivery.md"
SECTIONS: Final = {
    part.partition("\n")[0]: FENCE.findall(part)
    for part in re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)
}
LOGS: Final = BUILD / "rehearsal" / "builds"
SHORT: Final = {"USERS": "50", "SECONDS": "15"}
AS_GIT: Final = "runuser -u git -- git --git-dir=/srv/git/winemon.git"


class Person:
    """Who follows the tutorial: one shell, in a checkout of this code with a history of its own."""

    def __init__(self, site: Site, checkout: Path) -> None:
        self.site = site
        self.checkout = clone(checkout)
        self.builds = 0
        for name in ("user.name", "user.email"):
            git(checkout, "config", name, "tester@localhost")
        self.log = LOGS / "typed.log"
        with self.log.open("w") as file:
            self.shell = subprocess.Popen(
                ["bash", "-euo", "pipefail"],
                cwd=checkout,
                env=os.environ
                | SHORT
                | {"INVENTORY": str(INVENTORY), "ANSIBLE_INVENTORY": str(INVENTORY), "no_proxy": "*"},
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=subprocess.STDOUT,
                text=True,
            )

    def type(self, commands: str, output: str) -> None:
        """Type what the page says, and require what it says that comes of it."""
        start, script, end = self.log.stat().st_size, LOGS / "typed.sh", LOGS / "end"
        script.write_text(commands)
        assert self.shell.stdin
        self.shell.stdin.write(f"source {script} </dev/null; touch {end}\n")
        self.shell.stdin.flush()
        deadline = time.monotonic() + 300
        while not end.exists():
            ended = self.shell.poll() is not None or time.monotonic() > deadline
            assert not ended, f"{commands}{self.log.read_text()[start:]}"
            time.sleep(0.1)
        end.unlink()
        printed = self.log.read_text()[start:]
        assert re.search(pattern(output), printed), printed

    def read(self, title: str, build_after: str = "make push", data: str = "", **environment: str) -> Build:
        """Follow a section of the page that makes Jenkins build, and return that build."""
        build = None
        for commands, output in SECTIONS[title]:
            self.type(commands, output)
            if build is None and build_after in commands:
                self.builds += 1
                name = f"{self.builds}-{title.lower().replace(' ', '-')}"
                build = Build(self.site, self.builds, LOGS / name, data, SHORT | environment).run()
        assert build
        return build


@pytest.fixture(scope="module")
def person(site: Site, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Person]:
    """Take Jenkins' place, which would build the same in the same workspace, until the end."""
    if site.ssh("systemctl --quiet is-active jenkins").returncode:
        pytest.skip("there is no Jenkins on this machine, nor a stand-in")
    LOGS.mkdir()
    site.run("systemctl stop jenkins")
    before = site.run(f"{AS_GIT} rev-parse main")
    site.run(f"{AS_GIT} update-ref -d refs/heads/main")  # an earlier test may have pushed commits of its own
    person = Person(site, tmp_path_factory.mktemp("rehearsal") / "winemon")
    yield person
    assert person.shell.stdin
    person.shell.stdin.close()
    person.shell.wait(timeout=10)
    site.run(f"{AS_GIT} update-ref refs/heads/main {before}")
    site.run("systemctl start jenkins")


def flat(stages: tuple[Stage, ...]) -> list[str]:
    """Return the names of all stages that have a command, in the order in which they run."""
    return [name for stage in stages for name in ([stage.name] if stage.command else []) + flat(stage.stages)]


STAGES: Final = flat(load(ROOT / "Jenkinsfile").stages)


def ran(build: Build) -> list[str]:
    """Return the commands that went well, and then the one that failed with what followed it."""
    return [name if status == 0 else f"{name} failed" for name, status in build.statuses.items()]


def serving(site: Site) -> dict[str, Any]:
    """Return what is live, which workers serve it, and what a new machine would get."""
    deadline = time.monotonic() + 30
    while set((now := status(site))["workers"]) != {now["live"]}:  # those of before take their time to leave
        assert time.monotonic() < deadline, now
        time.sleep(0.5)
    assert now["ready"], now
    return {"live": now["live"], "workers": now["workers"], "new machines": index(site)["live"]}


def trees(site: Site) -> set[int]:
    """Return how many trees the models of the workers have; a new connection goes to the idlest."""
    found = set()
    for _ in range(20):
        with httpx.Client(trust_env=False) as client:
            found.add(client.get(site.api("/model")).json()["parameters"]["n_estimators"])
    return found


@pytest.mark.parametrize("title", ["Refuse a bad model", "Hold what is live to its limits"])
def test_what_is_typed_by_hand_works(person: Person, title: str) -> None:
    for commands, output in SECTIONS[title]:
        person.type(commands, output)


def test_a_better_model_is_live_on_every_worker(site: Site, person: Person) -> None:
    before = serving(site)
    build = person.read("Push a better model", CHECK="packages lint rules")
    assert ran(build) == STAGES
    now = serving(site)
    assert now["live"] != before["live"]
    assert now["live"].startswith(git(person.checkout, "describe", "--always", "--match=v*"))
    assert build.commit == git(person.checkout, "rev-parse", "HEAD")
    assert now["new machines"] == now["live"]
    assert trees(site) == {100}
    line = ledger(site)[-1]
    assert (line["who"], line["to"], line["result"]) == ("winemon-deploy", now["live"], "ok")
    assert line["why"] == "jenkins-winemon-1"
    for report in ("gate/report.md", "gate/junit.xml", "loadtest/report.html", "loadtest/junit.xml"):
        assert (build.directory / "build" / report).stat().st_size, report


def test_a_bad_model_stops_at_the_gate_and_leaves_its_report(site: Site, person: Person) -> None:
    before = serving(site), site.run(f"ls {STORE}"), ledger(site)
    build = person.read("Have it learn nonsense", "shuffled.csv", "/srv/shuffled.csv", CHECK="packages")
    assert ran(build) == ["Check", "Train", "Gate failed"]
    assert (serving(site), site.run(f"ls {STORE}"), ledger(site)) == before
    assert "refused" in (build.directory / "build/gate/report.md").read_text()
    assert "<failure" in (build.directory / "build/gate/junit.xml").read_text()


def test_a_broken_release_never_gets_live(site: Site, person: Person) -> None:
    before = serving(site)
    build = person.read("Push what does not start", CHECK="packages")
    assert ran(build) == ["Check", "Train", "Gate", "Release", "Publish", "Deploy failed"]
    assert serving(site) == before
    line = ledger(site)[-1]
    assert "fails its trial" in line["result"]
    assert line["result"] in build.log("Deploy").read_text()


def test_a_slow_release_is_rolled_back_after_its_load_test(site: Site, person: Person) -> None:
    before = serving(site)
    build = person.read("Push what is slow", CHECK="packages")
    assert ran(build) == [*STAGES[:-1], "Load test failed", "Prove, unsuccessful"]
    assert serving(site) == before
    slow, back = ledger(site)[-2:]
    assert (slow["action"], slow["from"], slow["result"]) == ("switch", before["live"], "ok")
    assert (back["action"], back["from"], back["to"]) == ("rollback", slow["to"], before["live"])
    assert "p95" in (build.directory / "build/loadtest/junit.xml").read_text()
    assert trees(site) == {100}
