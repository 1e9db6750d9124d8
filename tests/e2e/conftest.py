"""Throw-away machines for the end-to-end tests: built bare, removed at the end, also after a failure."""

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import testinfra
import yaml

from delivery import release
from tests.e2e.grafana import package as grafana
from tests.e2e.jenkins import package as jenkins

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "e2e"
INVENTORY = Path(__file__).parent / "inventory"
UNITS = (
    "winemon-api",
    "haproxy",
    "winemon-locust",
    "winemon-locust-worker@1",
    "prometheus",
    "grafana-server",
    "winemon-firewall",
    "jenkins",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the story of the bare machine first, and that of alerts after those that raise none.

    The tutorial shifts the wines of an hour, which shows only where few others were asked about in it.
    """
    first = ["test_one_machine.py", "test_dashboards.py", "test_grafana.py", "test_tutorial.py"]
    items.sort(key=lambda item: first.index(item.path.name) if item.path.name in first else len(first))


class Site:
    """The machines of an inventory, as their user sees them: plays, a shell over SSH, and HTTP from here.

    `name` and `address` are those of the first one, the only one of most stories.
    """

    user = "debian"
    key = ROOT / ".machines" / "id_ed25519"
    known_hosts = ROOT / ".machines" / "known_hosts"
    # How many times as long as usual to wait.
    patience = 1

    def __init__(self, inventory: Path, build: Path) -> None:
        groups = yaml.safe_load((inventory / "hosts.yml").read_text())
        self.inventory = inventory
        self.build = build
        self.secrets = build / "secrets"
        self.bridge: str = groups["machines"]["vars"]["winemon_machine_bridge"]
        self.groups = {group: list(own["hosts"]) for group, own in groups.items()}
        self.addresses = {name: own["ansible_host"] for name, own in groups["machines"]["hosts"].items()}
        self.name, self.address = next(iter(self.addresses.items()))
        self.commands = 0
        self.ssh_config = build / "ssh_config"
        self.ssh_config.write_text(
            "".join(f"Host {name}\n  HostName {address}\n" for name, address in self.addresses.items())
            + f"Host *\n  User {self.user}\n  ConnectTimeout {2 * self.patience}\n"
            f"  IdentityFile {self.key}\n  UserKnownHostsFile {self.known_hosts}\n"
        )
        self.client = self.connect()

    def connect(self) -> httpx.Client:
        """Return a client that has no connections yet."""
        return httpx.Client(trust_env=False, timeout=10 * self.patience)

    def reconnect(self) -> None:
        """Talk over new connections."""
        self.client.close()
        self.client = self.connect()

    def up(self) -> str:
        """Do what `make up` does, for these machines."""
        return self.log("up", [str(ROOT / "ansible" / "up"), str(self.inventory)])

    def play(self, playbook: str, *options: str) -> str:
        """Run a playbook."""
        command = [str(ROOT / ".venv/ansible/bin/ansible-playbook"), "-i", str(self.inventory)]
        return self.log(Path(playbook).stem, [*command, playbook, *options])

    def log(self, name: str, command: list[str]) -> str:
        """Run a command, keep its output under build/, and return it; the test fails with the command."""
        self.commands += 1
        log = self.build / f"{self.commands:02}-{name}.log"
        with log.open("w") as file:
            status = subprocess.run(
                command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, check=False
            ).returncode
        output = log.read_text()
        if status:
            pytest.fail(f"{' '.join(command)} failed ({log}):\n" + "\n".join(output.splitlines()[-60:]))
        return output

    def changed(self, output: str) -> int:
        """Return how many tasks changed the machines, from the recaps of all plays."""
        found = re.findall(rf"^(?:{'|'.join(self.addresses)}) +: ok=\d+ +changed=(\d+)", output, re.MULTILINE)
        assert found, output[-2000:]
        return sum(map(int, found))

    def at(self, group: str) -> str:
        """Return the address of the first machine of a group."""
        address: str = self.addresses[self.groups[group][0]]
        return address

    def ssh(self, command: str, stdin: str = "", on: str = "") -> "subprocess.CompletedProcess[str]":
        """Run a command on a machine as the user who logs in."""
        return subprocess.run(
            ["ssh", "-F", self.ssh_config, on or self.name, command],
            input=stdin,
            capture_output=True,
            text=True,
            check=False,
        )

    def run(self, command: str, stdin: str = "", on: str = "") -> str:
        """Run a command on a machine as root and return what it prints; sudo logs it, but not its input."""
        result = self.ssh(f"sudo sh -c {shlex.quote(command)}", stdin, on)
        assert result.returncode == 0, f"{command}: {result.stderr}{result.stdout}"
        return result.stdout.strip()

    def host(self) -> Any:
        """Return testinfra's view of the machine."""
        return testinfra.get_host(f"ssh://{self.name}", ssh_config=str(self.ssh_config), sudo=True)

    def secret(self, name: str) -> tuple[str, str]:
        """Return user and password of a console."""
        return "admin", (self.secrets / name).read_text().strip()

    def api(self, path: str) -> str:
        """Return the URL of a route of the first API."""
        return f"http://{self.at('api')}:5000{path}"

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Return what Prometheus answers to an expression."""
        answer = self.client.get(
            f"http://{self.at('monitoring')}:9090/api/v1/query",
            params={"query": expression},
            auth=self.secret("prometheus"),
        )
        answer.raise_for_status()
        result: list[dict[str, Any]] = answer.json()["data"]["result"]
        return result

    def eventually(self, expression: str, seconds: float = 60) -> float:
        """Return the one value of an expression as soon as Prometheus has it."""
        deadline = time.monotonic() + seconds
        while not (result := self.query(expression)):
            assert time.monotonic() < deadline, f"Prometheus has nothing for {expression}"
            time.sleep(1)
        return float(result[0]["value"][1])


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
        "files": [str(path) for name in site.addresses for path in (ROOT / ".machines").glob(f"{name}*")],
    }
    return {place: lines for place, lines in found.items() if lines}


@contextlib.contextmanager
def machines(session: pytest.Session, inventory: Path, build: Path, *options: str) -> Iterator[Site]:
    """Build the machines of an inventory, bare, and remove them at the end, whatever happens."""
    if os.geteuid() != 0:
        pytest.fail("Machines are built as root: run `sudo make test`.")
    shutil.rmtree(build, ignore_errors=True)
    build.mkdir(parents=True)
    site = Site(inventory, build)
    options = ("-e", f"winemon_machine_debian={os.environ.get('DEBIAN', '13')}", *options)
    loaded = ROOT / ".machines" / f"{inventory.name}-loaded"  # that `make up` has loaded them once
    # A machine that a killed run left behind would not be bare.
    loaded.unlink(missing_ok=True)
    site.play("ansible/machine.yml", *options, "-e", "winemon_machine_state=absent")
    try:
        site.play("ansible/machine.yml", *options)
        assert left_behind(site).keys() >= {"interfaces", "nftables", "processes", "files"}, (
            "it looks in the wrong places"
        )
        yield site
        if session.testsfailed:
            units = " ".join(f"-u {unit}" for unit in UNITS)
            for name in site.addresses:
                said = site.ssh(
                    f"sudo systemctl --failed; sudo journalctl --no-pager -n 200 {units}", on=name
                )
                print(name, said.stdout, said.stderr, sep="\n")  # noqa: T201
    finally:
        site.client.close()
        loaded.unlink(missing_ok=True)
        site.play("ansible/machine.yml", *options, "-e", "winemon_machine_state=absent")
    assert left_behind(site) == {}


@pytest.fixture(scope="session")
def site(request: pytest.FixtureRequest) -> Iterator[Site]:
    """Build the machine, bare at first; every test goes on from where the one before it left it."""
    with machines(request.session, INVENTORY, BUILD) as site:
        # The inventory names them where they are.
        if not grafana.real_one_answers():
            grafana.package(grafana.VERSION, BUILD)
        if not jenkins.real_one_answers():
            jenkins.package(jenkins.VERSION, BUILD)
            jenkins.plugins(BUILD)
        yield site


Edit = Callable[[Path], None]


def replace(file: str, old: str, new: str) -> Edit:
    """Return an edit that changes one line of one file."""

    def edit(checkout: Path) -> None:
        path = checkout / file
        text = path.read_text()
        assert text.count(old) == 1, f"{file}: {old}"
        path.write_text(text.replace(old, new))

    return edit


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Edit], Path]:
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
