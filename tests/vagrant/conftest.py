"""A VM by Vagrant and libvirt; tests/vagrant/run has started what it needs, and cloned what is committed."""

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.e2e.grafana import package as grafana
from tests.e2e.site import ROOT, Site

BUILD = ROOT / "build" / "vagrant"
CLONE = BUILD / "winemon-test"


class VM(Site):
    """The VM as its user sees it: vagrant, plays without -i, a shell over SSH, and HTTP from here."""

    user = "vagrant"
    key = CLONE / ".vagrant/machines/winemon/libvirt/private_key"
    known_hosts = BUILD / "known_hosts"  # Ansible comes by another address, and knows the key by that
    patience = 10 if os.environ.get("WINEMON_VAGRANT_DRIVER") == "qemu" else 1

    def __init__(self) -> None:
        known = {group: {"hosts": {"winemon": {}}} for group in os.environ["WINEMON_VAGRANT_GROUPS"].split()}
        host = {"ansible_host": os.environ["WINEMON_VAGRANT_ADDRESS"]}
        known["machines"] = {"hosts": {"winemon": host}, "vars": {"winemon_machine_bridge": {}}}
        (BUILD / "hosts.yml").write_text(yaml.dump(known))
        super().__init__(BUILD, BUILD)
        with self.ssh_config.open("a") as config:
            config.write("  StrictHostKeyChecking accept-new\n")
        self.secrets = CLONE / "inventory/vagrant/.secrets"

    def play(self, playbook: str, *options: str) -> str:
        """Run a playbook, with the inventory that goes without saying."""
        command = [str(CLONE / ".venv/ansible/bin/ansible-playbook"), playbook, *options]
        return self.log(Path(playbook).stem, command)

    def vagrant(self, *arguments: str) -> str:
        """Run vagrant in the clone."""
        self.hang_up()
        return self.log(arguments[0], ["vagrant", *arguments, "--no-tty"])

    def log(self, name: str, command: list[str]) -> str:
        """Run a command, show what it prints with the time passed, keep that in build/vagrant/, return it."""
        self.commands += 1
        log = self.build / f"{self.commands:02}-{name}.log"
        start = time.monotonic()
        print(f"\n=== {' '.join(command)}", flush=True)  # noqa: T201
        with (
            log.open("w") as file,
            subprocess.Popen(
                command,
                cwd=CLONE,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            ) as process,
        ):
            assert process.stdout
            try:
                for line in process.stdout:
                    file.write(line)
                    print(f"{time.monotonic() - start:5.0f} s  {line}", end="", flush=True)  # noqa: T201
            except KeyboardInterrupt:  # it would go on without us, and hold the VM
                process.terminate()
                raise
        print(f"{time.monotonic() - start:5.0f} s  in all", flush=True)  # noqa: T201
        if process.returncode:
            pytest.fail(f"{' '.join(command)} failed: see {log}")
        return log.read_text()


@pytest.fixture(scope="session")
def site() -> Iterator[VM]:
    """Bring the VM up; every test goes on from where the one before it left it, and the last destroys it."""
    variables = CLONE / "inventory/vagrant/group_vars/all.yml"
    if not grafana.real_one_answers():
        variables.parent.mkdir(parents=True)
        variables.write_text(yaml.dump({"grafana_package": str(grafana.package(grafana.VERSION, BUILD))}))
    site = VM()
    try:
        site.vagrant("up", "--provider", "libvirt")
        yield site
    finally:
        site.close()
        if (CLONE / ".vagrant/machines/winemon/libvirt/id").exists():
            site.vagrant("destroy", "--force")
