"""The machines of an inventory, as their user sees them."""

import re
import shlex
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import testinfra
import yaml

ROOT = Path(__file__).resolve().parents[2]


def until(condition: Callable[[], bool], what: str, seconds: float = 90) -> float:
    """Return the seconds that a condition took to come true."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() < start + seconds, f"waited {seconds:.0f} s in vain: {what}"
        time.sleep(0.2)
    return time.monotonic() - start


class Site:
    """The machines of an inventory, as their user sees them: plays, a shell over SSH, and HTTP from here.

    `name` and `address` are those of the first one, the only one of most scenarios.
    Logs are kept in `build`, and passwords are taken from `secrets`, which is `build/secrets` unless given.
    """

    user = "debian"
    key = ROOT / ".machines" / "id_ed25519"
    known_hosts = ROOT / ".machines" / "known_hosts"
    connections = Path.home() / ".ansible" / "cp"
    # How many times as long as usual to wait.
    patience = 1

    def __init__(self, inventory: Path, build: Path, secrets: Path | None = None) -> None:
        groups = yaml.safe_load((inventory / "hosts.yml").read_text())
        self.inventory = inventory
        self.build = build
        self.secrets = secrets or build / "secrets"
        self.bridge: str = groups["machines"]["vars"]["winemon_machine_bridge"]
        self.groups = {group: list(own["hosts"]) for group, own in groups.items()}
        self.addresses = {name: own["ansible_host"] for name, own in groups["machines"]["hosts"].items()}
        self.name, self.address = next(iter(self.addresses.items()))
        self.commands = 0
        self.ssh_config = build / "ssh_config"
        self.connections.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.ssh_config.write_text(
            "".join(f"Host {name}\n  HostName {address}\n" for name, address in self.addresses.items())
            + f"Host *\n  User {self.user}\n  ConnectTimeout {2 * self.patience}\n"
            f"  IdentityFile {self.key}\n  UserKnownHostsFile {self.known_hosts}\n"
            # To log in costs ten times what most commands cost.
            f"  ControlMaster auto\n  ControlPersist 60\n  ControlPath {self.connections}/winemon-%C\n"
            f"  ServerAliveInterval {5 * self.patience}\n"
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

    def hang_up(self, *names: str) -> None:
        """End the connections that commands ran over: one to a machine that is gone would never answer."""
        for name in names or self.addresses:
            command = ["ssh", "-F", self.ssh_config, "-O", "exit", name]
            subprocess.run(command, capture_output=True, check=False)  # fails where there is none

    def reboot(self, on: str = "") -> None:
        """Reboot a machine and return when its user can log in again."""

        def boot() -> str:
            return self.ssh("cat /proc/sys/kernel/random/boot_id", on=on).stdout

        before = boot()
        assert before
        self.ssh("sudo reboot", on=on)
        self.hang_up(on or self.name)
        until(lambda: boot() not in {"", before}, "the machine comes back", 60 * self.patience)

    def close(self) -> None:
        """End all connections."""
        self.client.close()
        self.hang_up()

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
