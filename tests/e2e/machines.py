"""Throw-away machines, bare or on a layer that has all of winemon; removed at the end, whatever happened."""

import contextlib
import fcntl
import functools
import hashlib
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.e2e.grafana import package as grafana
from tests.e2e.jenkins import package as jenkins
from tests.e2e.site import ROOT, Site, until

INVENTORY: Final = Path(__file__).parent / "inventory"
"""The inventory of one machine, which most scenarios use."""
ONE_MACHINE: Final = "one-machine"
"""The lock that whoever has that machine holds."""
BUILD: Final = ROOT / "build" / "e2e"
SECRETS: Final = BUILD / "secrets"
MACHINES: Final = ROOT / ".machines"
MACHINE: Final = ROOT / "ansible" / "files" / "machine"
DEBIAN: Final = os.environ.get("DEBIAN", "13")
SOURCES: Final = (
    *("ansible", "ansible.cfg", "app", "delivery", "loadtest", "pyproject.toml", "requirements", "roles"),
    *("site.yml", "training", "tests/e2e/grafana", "tests/e2e/inventory", "tests/e2e/jenkins"),
)
"""What a provisioned machine is made from."""
PROCESSORS: Final = Path("/sys/fs/cgroup/cpu")
"""The first version of control groups; what is in no group of it has 1,024 shares."""
UNITS: Final = (
    "winemon-api",
    "haproxy",
    "winemon-locust",
    "winemon-locust-worker@1",
    "prometheus",
    "grafana-server",
    "winemon-firewall",
    "jenkins",
)


@contextlib.contextmanager
def locked(name: str, *, wait: bool = True) -> Iterator[bool]:
    """Keep other processes of these tests out, as scenarios run side by side; yield whether that is so."""
    MACHINES.mkdir(exist_ok=True)
    with (MACHINES / f"{name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            ours = True
        except BlockingIOError:
            ours = False
        yield ours


@contextlib.contextmanager
def background() -> Iterator[None]:
    """Give this process, and what it starts meanwhile, a quarter of others' share of the processors.

    Without the first version of control groups it has as much as they.
    """
    if not PROCESSORS.is_dir():
        yield
        return
    group = PROCESSORS / f"winemon-{os.getpid()}"
    group.mkdir()
    (group / "cpu.shares").write_text("256")
    (group / "cgroup.procs").write_text(str(os.getpid()))
    try:
        yield
    finally:
        dissolve(group)


def dissolve(group: Path) -> None:
    """Give the processes of a group the share of others again, and remove it."""
    while members := (group / "cgroup.procs").read_text().split():
        for member in members:
            with contextlib.suppress(ProcessLookupError):
                (PROCESSORS / "cgroup.procs").write_text(member)
    group.rmdir()


def left_behind(site: Site) -> dict[str, list[str]]:
    """Return what is on this computer of the machines of a site: links, mounts, rules, processes."""
    names = "|".join([site.bridge, *site.addresses])

    def ours(*command: str) -> list[str]:
        output = subprocess.run(command, capture_output=True, text=True, check=False).stdout
        return [line for line in output.splitlines() if re.search(names, line)]

    found = {
        "interfaces": ours("ip", "-brief", "link"),
        "mounts": ours("cat", "/proc/mounts"),
        "nftables": ours("nft", "list", "tables"),
        "network namespaces": ours("ip", "netns", "list"),
        "processes": ours("pgrep", "--list-full", "--full", "systemd-nspawn|files/machine"),
        "files": [str(path) for name in site.addresses for path in MACHINES.glob(f"{name}*")],
    }
    return {place: lines for place, lines in found.items() if lines}


def start(site: Site, debian: str, *options: str, layer: Path | None = None) -> None:
    """Start the machines of a site, bare or on a layer; those on a layer have started all their services."""
    options = ("-e", f"winemon_machine_debian={debian}", *options)
    if layer:
        options += ("-e", f"winemon_machine_layer={layer / 'upper'}")
        for name in site.addresses:  # what was provisioned knows its host key
            shutil.copytree(layer / "upper/etc/ssh", MACHINES / name / "upper/etc/ssh", dirs_exist_ok=True)
    # Ansible's list of known hosts is one file.
    with locked("machines"):
        site.play("ansible/machine.yml", *options)
    if layer:
        shutil.copytree(layer / "secrets", site.secrets, dirs_exist_ok=True)
        for name in site.addresses:
            await_services(site, name)


def await_services(site: Site, name: str) -> None:
    """Wait until a machine that was provisioned has started all its services."""
    until(lambda: site.ssh("true", on=name).returncode == 0, f"{name} lets its user in", 60)
    state = site.ssh("systemctl is-system-running --wait", on=name).stdout.strip()
    assert state == "running", site.ssh("systemctl --failed", on=name).stdout


def lower(layer: Path) -> str:
    """Return what a machine on a layer is an overlay of, as `MACHINE start` takes it."""
    return f"{layer / 'upper'}:{MACHINES / f'debian-{DEBIAN}'}"


def halt(site: Site) -> Path:
    """Stop the first machine of a site and return where it is."""
    machine = MACHINES / site.name
    site.hang_up()
    subprocess.run([MACHINE, "stop", site.name, machine], check=True)
    return machine


def renew(site: Site, layer: Path) -> None:
    """Have a machine on a layer as it was at its first start."""
    machine = halt(site)
    resolver = machine / "upper" / "etc" / "resolv.conf"  # of today's network
    servers = resolver.read_bytes()
    for place in ("upper", "work"):
        shutil.rmtree(machine / place)
        (machine / place).mkdir()
    resolver.parent.mkdir()
    resolver.write_bytes(servers)
    subprocess.run([MACHINE, "start", site.name, machine, lower(layer), site.bridge], check=True)
    shutil.rmtree(site.secrets)
    shutil.copytree(layer / "secrets", site.secrets)
    await_services(site, site.name)


def stop(site: Site) -> None:
    """Stop the machines of a site and remove them, with the disks of those that have one."""
    site.hang_up()
    for directory in (MACHINES / name for name in site.addresses):
        mounts = Path("/proc/mounts").read_text().count(f" {directory} ")
        if mounts:
            subprocess.run([MACHINE, "stop", directory.name, directory], check=True)
        for _ in range(mounts):
            subprocess.run(["umount", "--lazy", directory], check=True)
    for line in left_behind(site).get("network namespaces", []):
        subprocess.run(["ip", "netns", "delete", line.split()[0]], check=True)
    with locked("machines"):
        site.play("ansible/machine.yml", "-e", "winemon_machine_state=absent")


@contextlib.contextmanager
def journals(session: pytest.Session, site: Site) -> Iterator[None]:
    """Show the journals of a site's machines where a test fails meanwhile."""
    failed = session.testsfailed
    yield
    if session.testsfailed > failed:
        units = " ".join(f"-u {unit}" for unit in UNITS)
        for name in site.addresses:
            said = site.ssh(f"sudo systemctl --failed; sudo journalctl --no-pager -n 200 {units}", on=name)
            print(name, said.stdout, said.stderr, sep="\n")  # noqa: T201 - pytest shows it with the failure


@contextlib.contextmanager
def machines(
    session: pytest.Session, site: Site, *options: str, debian: str = DEBIAN, layer: Path | None = None
) -> Iterator[None]:
    """Have the machines of a site for the tests of a module, and remove them at the end, whatever happens."""
    with running(site, *options, debian=debian, layer=layer), journals(session, site):
        yield


@contextlib.contextmanager
def running(site: Site, *options: str, debian: str = DEBIAN, layer: Path | None = None) -> Iterator[None]:
    """Have the machines of a site, and remove them at the end, whatever happens."""
    if os.geteuid() != 0:
        pytest.fail("Machines are built as root: run `sudo make test`.")
    loaded = MACHINES / f"{site.inventory.name}-loaded"  # that `make up` has loaded them once
    loaded.unlink(missing_ok=True)
    if left_behind(site):  # by a run that was killed
        stop(site)
    try:
        start(site, debian, *options, layer=layer)
        assert left_behind(site).keys() >= {"interfaces", "nftables", "processes", "files"}, (
            "it looks in the wrong places"
        )
        yield
    finally:
        site.client.close()
        loaded.unlink(missing_ok=True)
        stop(site)
    assert left_behind(site) == {}


def new_site(inventory: Path, build: Path, secrets: Path | None = None) -> Site:
    """Return the site of an inventory with an empty directory for its logs."""
    if build.exists():
        shutil.rmtree(build)
    build.mkdir(parents=True)
    return Site(inventory, build, secrets)


def one_machine(scenario: str) -> Site:
    """Return the site of one machine; its inventory names stand-ins where the real ones cannot be reached."""
    given = BUILD / "given"
    for place in (given, SECRETS):
        if place.exists():
            shutil.rmtree(place)
    given.mkdir(parents=True)
    if not grafana.real_one_answers():
        grafana.package(grafana.VERSION, given)
    if not jenkins.real_one_answers():
        jenkins.package(jenkins.VERSION, given)
        jenkins.plugins(given)
    return new_site(INVENTORY, BUILD / scenario, SECRETS)


@functools.cache
def layer_path() -> Path:
    """Return where the layer belongs that is made from what is here when the tests begin."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *SOURCES]
    names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    digest = hashlib.sha256()
    for path in sorted(ROOT / name for name in names if name):
        if path.is_file():
            digest.update(
                f"{path.relative_to(ROOT)} {path.stat().st_mode:o} {path.stat().st_size}\n".encode()
            )
            digest.update(path.read_bytes())
    return MACHINES / "layers" / f"debian-{DEBIAN}-{digest.hexdigest()[:16]}"


def keep(site: Site) -> None:
    """Make a machine that was provisioned the layer of others; it goes on as an overlay of that itself."""
    path, machine = layer_path(), halt(site)
    partial = path.with_suffix(".partial")
    for old in path.parent.glob(f"debian-{DEBIAN}-*"):  # also what an interrupted run began
        shutil.rmtree(old)
    partial.mkdir(parents=True)
    (machine / "upper").rename(partial / "upper")
    shutil.rmtree(machine / "work")
    (machine / "upper").mkdir()
    samples = "var/lib/prometheus/metrics2"  # which others are not to have
    copy = ["cp", "--archive", "--parents", samples, machine / "upper"]
    subprocess.run(copy, check=True, cwd=partial / "upper")
    shutil.rmtree(partial / "upper" / samples)
    shutil.copytree(site.secrets, partial / "secrets")
    os.sync()
    partial.rename(path)
    start(site, DEBIAN, layer=path)


def provisioned(session: pytest.Session) -> Path:
    """Return the layer of a machine that has all of winemon; make it where it is missing."""
    path = layer_path()
    while not path.exists():
        with locked(ONE_MACHINE, wait=False) as ours:
            if not ours:
                time.sleep(1)  # as long as another process makes it
            elif not path.exists():
                site = one_machine("layer")
                with machines(session, site):
                    site.up()
                    keep(site)
    return path


if __name__ == "__main__":  # whatever an interrupted run has left
    for hosts in INVENTORY.parent.glob("*/hosts.yml"):
        if left_behind(left := new_site(hosts.parent, BUILD / "left")):
            stop(left)
        assert left_behind(left) == {}
    shutil.rmtree(BUILD / "left")
    for group in PROCESSORS.glob("winemon-[0-9]*"):
        dissolve(group)
