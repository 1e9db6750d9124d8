"""A throw-away machine for the end-to-end tests: built bare, removed at the end, also after a failure."""

import os
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import testinfra

from tests.e2e.grafana import package as grafana

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "e2e"
INVENTORY = Path(__file__).parent / "inventory"
# That `make up` has loaded the machine once.
LOADED = ROOT / ".machines" / "inventory-loaded"
UNITS = (
    "winemon-api",
    "winemon-locust",
    "winemon-locust-worker@1",
    "prometheus",
    "grafana-server",
    "winemon-firewall",
)

# Told by name only. Jenkins is not part of site.yml yet, and needs an inventory that has the group jenkins.
collect_ignore = ["test_jenkins.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the story of the bare machine first, and that of alerts after those that raise none.

    The tutorial shifts the wines of an hour, which shows only where few others were asked about in it.
    """
    first = ["test_one_machine.py", "test_dashboards.py", "test_grafana.py", "test_tutorial.py"]
    items.sort(key=lambda item: first.index(item.path.name) if item.path.name in first else len(first))


class Site:
    """The machine of the inventory, as its user sees it: plays, a shell over SSH, and HTTP from here."""

    name = "winemon-e2e"
    address = "10.213.1.2"

    def __init__(self) -> None:
        self.commands = 0
        self.ssh_config = BUILD / "ssh_config"
        machines = ROOT / ".machines"
        self.ssh_config.write_text(
            f"Host {self.name}\n  HostName {self.address}\n  User debian\n  ConnectTimeout 2\n"
            f"  IdentityFile {machines / 'id_ed25519'}\n  UserKnownHostsFile {machines / 'known_hosts'}\n"
        )
        self.client = httpx.Client(trust_env=False, timeout=10)

    def reconnect(self) -> None:
        """Talk over new connections."""
        self.client.close()
        self.client = httpx.Client(trust_env=False, timeout=10)

    def up(self) -> str:
        """Do what `make up` does, for this machine."""
        return self.log("up", [str(ROOT / "ansible" / "up"), str(INVENTORY)])

    def play(self, playbook: str, *options: str) -> str:
        """Run a playbook."""
        command = [str(ROOT / ".venv/ansible/bin/ansible-playbook"), "-i", str(INVENTORY), playbook, *options]
        return self.log(Path(playbook).stem, command)

    def log(self, name: str, command: list[str]) -> str:
        """Run a command, keep its output under build/e2e/, and return it; the test fails with the command."""
        self.commands += 1
        log = BUILD / f"{self.commands:02}-{name}.log"
        with log.open("w") as file:
            status = subprocess.run(
                command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, check=False
            ).returncode
        output = log.read_text()
        if status:
            pytest.fail(f"{' '.join(command)} failed ({log}):\n" + "\n".join(output.splitlines()[-60:]))
        return output

    def changed(self, output: str) -> int:
        """Return how many tasks changed the machine, from the recaps of all plays."""
        found = re.findall(rf"^{self.name} +: ok=\d+ +changed=(\d+)", output, re.MULTILINE)
        assert found, output[-2000:]
        return sum(map(int, found))

    def ssh(self, command: str, stdin: str = "") -> "subprocess.CompletedProcess[str]":
        """Run a command on the machine as the user who logs in."""
        return subprocess.run(
            ["ssh", "-F", self.ssh_config, self.name, command],
            input=stdin,
            capture_output=True,
            text=True,
            check=False,
        )

    def run(self, command: str, stdin: str = "") -> str:
        """Run a command on the machine as root and return what it prints; sudo logs it, but not its input."""
        result = self.ssh(f"sudo sh -c {shlex.quote(command)}", stdin)
        assert result.returncode == 0, f"{command}: {result.stderr}{result.stdout}"
        return result.stdout.strip()

    def host(self) -> Any:
        """Return testinfra's view of the machine."""
        return testinfra.get_host(f"ssh://{self.name}", ssh_config=str(self.ssh_config), sudo=True)

    def secret(self, name: str) -> tuple[str, str]:
        """Return user and password of a console."""
        return "admin", (BUILD / "secrets" / name).read_text().strip()

    def api(self, path: str) -> str:
        """Return the URL of a route of the API."""
        return f"http://{self.address}:5000{path}"

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Return what Prometheus answers to an expression."""
        answer = self.client.get(
            f"http://{self.address}:9090/api/v1/query",
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


def left_behind() -> dict[str, list[str]]:
    """Return what is on this computer of the machines of these tests: links, mounts, rules, processes."""

    def ours(*command: str) -> list[str]:
        output = subprocess.run(command, capture_output=True, text=True, check=False).stdout
        return [line for line in output.splitlines() if re.search(r"winemon1|winemon-e2e", line)]

    found = {
        "interfaces": ours("ip", "-brief", "link"),
        "mounts": ours("cat", "/proc/mounts"),
        "nftables": ours("nft", "list", "tables"),
        "network namespaces": ours("ip", "netns", "list"),
        "processes": ours("pgrep", "--list-full", "--full", "systemd-nspawn|files/machine"),
        "files": [str(path) for path in (ROOT / ".machines").glob("winemon-e2e*")],
    }
    return {place: lines for place, lines in found.items() if lines}


@pytest.fixture(scope="session")
def site(request: pytest.FixtureRequest) -> Iterator[Site]:
    """Build the machine, bare at first; every test goes on from where the one before it left it."""
    if os.geteuid() != 0:
        pytest.fail("Machines are built as root: run `sudo make test`.")
    shutil.rmtree(BUILD, ignore_errors=True)
    BUILD.mkdir(parents=True)
    if not grafana.real_one_answers():
        grafana.package(grafana.VERSION, BUILD)  # the inventory names it where it is
    site = Site()
    options = ["-e", f"winemon_machine_debian={os.environ.get('DEBIAN', '13')}"]
    # A machine that a killed run left behind would not be bare.
    LOADED.unlink(missing_ok=True)
    site.play("ansible/machine.yml", *options, "-e", "winemon_machine_state=absent")
    try:
        site.play("ansible/machine.yml", *options)
        assert left_behind().keys() >= {"interfaces", "nftables", "processes", "files"}, (
            "it looks in the wrong places"
        )
        yield site
        if request.session.testsfailed:
            units = " ".join(f"-u {unit}" for unit in UNITS)
            print(site.run(f"systemctl --failed; journalctl --no-pager -n 200 {units}"))  # noqa: T201
    finally:
        site.client.close()
        LOADED.unlink(missing_ok=True)
        site.play("ansible/machine.yml", *options, "-e", "winemon_machine_state=absent")
    assert left_behind() == {}
