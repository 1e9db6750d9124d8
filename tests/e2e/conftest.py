"""What the scenarios share: a machine that has all of winemon, and releases to deploy there."""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

from delivery import release
from tests.e2e.machines import (
    BUILD,
    INVENTORY,
    ONE_MACHINE,
    SECRETS,
    background,
    journals,
    layer_path,
    locked,
    new_site,
    one_machine,
    provisioned,
    renew,
    running,
)
from tests.e2e.releases import Build, Edit
from tests.e2e.site import ROOT, Site, until

OWN_MACHINES = ("many_machines", "upgrade", "power", "offline")
"""Scenarios that share no machine with others, and run beside them in this order: power needs the layer."""


def scenario(file: str) -> str:
    """Return the name of a scenario from that of its file."""
    return file.removeprefix("test_").removesuffix(".py")


class ByMachines(LoadScopeScheduling):
    """Gives the scenarios that use the same machine to one worker of pytest-xdist."""

    def _split_scope(self, nodeid: str) -> str:
        name = scenario(nodeid.partition("::")[0].rpartition("/")[2])
        return name if name in OWN_MACHINES else "one machine"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    """Choose what runs side by side."""
    return ByMachines(config, log)


def pytest_sessionstart() -> None:
    """Note what the layer is made from before anybody can change that."""
    layer_path()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the lifecycle first, whose machine is the layer of others, then OWN_MACHINES in their order."""
    order = {name: place for place, name in enumerate(("one_machine", *OWN_MACHINES))}
    items.sort(key=lambda item: order.get(scenario(item.path.name), len(order)))


@pytest.fixture(scope="module", autouse=True)
def _priority(request: pytest.FixtureRequest) -> Iterator[None]:
    """Have those of OWN_MACHINES give way to the one machine, whose response times have limits."""
    gives_way = scenario(request.path.name) in OWN_MACHINES
    with background() if gives_way else contextlib.nullcontext():
        yield


@pytest.fixture(scope="session")
def renewed(request: pytest.FixtureRequest) -> Iterator[Callable[[Site], None]]:
    """Have the machine of most scenarios; return what brings it to the state of its first start."""
    layer, used = provisioned(request.session), False

    def bring_back(site: Site) -> None:
        nonlocal used
        if used:
            renew(site, layer)
        used = True

    with locked(ONE_MACHINE), running(one_machine("machine"), layer=layer):
        yield bring_back


@pytest.fixture(scope="module")
def site(request: pytest.FixtureRequest, renewed: Callable[[Site], None]) -> Iterator[Site]:
    """Have a machine that was provisioned; every test goes on from where the one before it left it."""
    site = new_site(INVENTORY, BUILD / scenario(request.path.name), SECRETS)
    renewed(site)
    # Its services are started, but perhaps not yet listening.
    ports = "for port in 5000 8089 9090 9093; do ss -Hltn sport = :$port | grep -q . || exit; done"
    until(lambda: site.ssh(ports).returncode == 0, "its services listen", 30)
    with journals(request.session, site):
        yield site
    site.close()


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Return what builds a release of this code and these artifacts after an edit."""
    subprocess.run(["make", "--silent", "artifacts/manifest.json"], cwd=ROOT, check=True)
    base = tmp_path_factory.mktemp("checkouts") / "base"
    for folder in ("app", "requirements", "artifacts"):
        shutil.copytree(ROOT / folder, base / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", base)
    (base / ".gitignore").write_text("/artifacts/\n/build/\n")
    git = ["git", "-C", str(base), "-c", "user.name=tester", "-c", "user.email=tester@localhost"]
    for command in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message=base"]):
        subprocess.run([*git, *command], check=True)

    def after(edit: Edit) -> Path:
        checkout = Path(shutil.copytree(base, base.with_name(os.urandom(4).hex())))
        edit(checkout)
        return release.build(checkout)

    return after
