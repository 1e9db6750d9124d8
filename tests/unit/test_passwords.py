"""Passwords beside an inventory: no hosts to Ansible, their owner's alone, moved from where they were."""

import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
ROLES = ["alertmanager", "grafana", "haproxy", "jenkins", "locust", "prometheus"]
GENERATED = [f"{role}_password" for role in ROLES] + ["jenkins_metrics_password"]
OLD = {
    "grafana": "anAdministratorsPassword",
    "prometheus": "anotherOne",
    "prometheus.salt": "0123456789abcdef",
}


def ansible(home: Path, *command: str | Path, status: int = 0, config: Path | None = None) -> str:
    """Run a tool of Ansible where no ansible.cfg is in sight but its home's, and return all that it says."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ANSIBLE_")}
    environment |= {"HOME": str(home)} | ({"ANSIBLE_CONFIG": str(config)} if config else {})
    done = subprocess.run(
        [BIN / command[0], *command[1:]],
        cwd=home,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        umask=0,
    )
    assert done.returncode == status, done.stdout
    return done.stdout


def write(directory: Path, files: dict[str, str]) -> Path:
    """Write passwords that everybody can read."""
    directory.mkdir(parents=True)
    for name, text in files.items():
        (directory / name).write_text(text)
        (directory / name).chmod(0o644)
    directory.chmod(0o755)
    return directory


def read(directory: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in directory.iterdir()}


def modes(directory: Path) -> set[int]:
    """Return those of a directory and its files."""
    return {stat.S_IMODE(path.stat().st_mode) for path in (directory, *directory.iterdir())}


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an inventory whose passwords the roles have generated where they do so by default."""
    home = tmp_path_factory.mktemp("generated")
    inventory = home / "local"
    inventory.mkdir()
    shutil.copy(ROOT / "inventory/local/hosts.yml", inventory)
    variables = [f"--extra-vars=@{ROOT}/roles/{role}/defaults/main.yml" for role in ROLES]
    said = "msg={{ [" + ", ".join(GENERATED) + "] | length }}"
    ansible(
        home, "ansible", "winemon", "-i", inventory, "-m", "ansible.builtin.debug", "-a", said, *variables
    )
    return inventory


def test_what_is_generated_is_its_owners_alone_and_no_matter_for_git(generated: Path) -> None:
    (directory,) = (path for path in generated.iterdir() if path.is_dir())
    assert len(read(directory)) == len(GENERATED)
    assert modes(directory) == {0o700, 0o600}
    ignored = f"inventory/local/{directory.name}/grafana"
    assert subprocess.run(["git", "check-ignore", "--quiet", ignored], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize("settings", ["none", "others", "not heeded"])
def test_no_password_is_a_host(generated: Path, tmp_path: Path, settings: str) -> None:
    inventory = Path(shutil.copytree(generated, tmp_path / "inventory/local"))
    config = tmp_path / "mine.cfg" if settings == "others" else None
    if config:
        config.write_text("[defaults]\nnocows = True\n")
    if settings == "not heeded":  # in WSL, in a shared folder
        shutil.copy(ROOT / "ansible.cfg", tmp_path)
        tmp_path.chmod(0o777)
    hosts = yaml.safe_load((inventory / "hosts.yml").read_text())["machines"]["hosts"]
    said = ansible(tmp_path, "ansible", "-i", inventory, "all", "--list-hosts", config=config)
    assert re.findall(r"^ {4}(\S+)$", said, re.MULTILINE) == list(hosts)
    passwords = [path.read_text().strip() for path in inventory.glob("*/*")]
    assert len(passwords) == len(GENERATED)
    assert not [password for password in passwords if password in said]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Return one with a play that moves passwords, and one that goes to all hosts."""
    (tmp_path / "ansible").mkdir()
    for name in ("passwords.yml", "passwords.py"):
        shutil.copy(ROOT / "ansible" / name, tmp_path / "ansible")
    then = {"hosts": "all", "gather_facts": False, "tasks": [{"ansible.builtin.meta": "noop"}]}
    plays = [{"ansible.builtin.import_playbook": "ansible/passwords.yml"}, then]
    (tmp_path / "site.yml").write_text(yaml.dump(plays))
    (tmp_path / "inventory/local/group_vars").mkdir(parents=True)
    (tmp_path / "inventory/local/hosts.yml").write_text("api: {hosts: {api1: , api2: }}\n")
    # Nothing of it is for the controller.
    elsewhere = {
        "ansible_connection": "ssh",
        "ansible_host": "192.0.2.1",
        "ansible_python_interpreter": "/none",
    }
    become = {"ansible_become": True, "ansible_become_user": "nobody", "ansible_user": "nobody"}
    (tmp_path / "inventory/local/group_vars/all.yml").write_text(yaml.dump({**elsewhere, **become}))
    return tmp_path


@pytest.mark.thorough
def test_passwords_are_moved_before_one_is_taken_for_a_host_and_kept_closed(checkout: Path) -> None:
    old = write(checkout / "inventory/local/secrets", OLD)
    new = old.with_name(".secrets")
    site: list[str | Path] = ["ansible-playbook", "-i", old.parent, "site.yml"]
    listed = ansible(checkout, "ansible", "-i", old.parent, "all", "--list-hosts")
    assert OLD["grafana"] in listed, "nothing has to be moved"
    said = ansible(checkout, *site, "--check", "--limit=api2")
    assert f"mv -T {new} {old}" in said
    assert not [password for password in OLD.values() if password in said]
    assert read(new) == OLD
    assert not old.exists()
    assert modes(new) == {0o700, 0o600}

    new.chmod(0o755)
    (new / "grafana").chmod(0o777)
    said = ansible(checkout, *site)
    assert len(re.findall(r"changed=0 ", said)) == len(re.findall("changed=", said)) > 0
    assert "mv -T" not in said
    assert read(new) == OLD
    assert modes(new) == {0o700, 0o600}


@pytest.mark.thorough
def test_only_what_is_ours_is_moved(checkout: Path) -> None:
    vagrant = write(checkout / "inventory/vagrant/secrets", OLD)
    write(checkout / "mine/secrets", {"diary": "of mine"})
    chosen = write(checkout / "mine/.secrets", {"grafana": "aPasswordOfMine"})
    hosts = {
        "vm": {"winemon_secrets_dir": str(vagrant.with_name(".secrets"))},
        "mine": {"winemon_secrets_dir": "~/mine/.secrets"},
        "none": {},
    }
    (checkout / "inventory/local/hosts.yml").write_text(yaml.dump({"api": {"hosts": hosts}}))
    ansible(checkout, "ansible-playbook", "-i", "inventory/local", "site.yml")
    assert read(vagrant.with_name(".secrets")) == OLD
    assert not vagrant.exists()
    assert read(checkout / "mine/secrets") == {"diary": "of mine"}
    assert modes(chosen) == {0o700, 0o600}
    assert not (checkout / "inventory/local/.secrets").exists()


@pytest.mark.thorough
def test_passwords_that_differ_are_left_to_people(checkout: Path) -> None:
    old = write(checkout / "inventory/local/secrets", OLD)
    new = write(old.with_name(".secrets"), {**OLD, "grafana": "aNewerOne"})
    site: list[str | Path] = ["ansible-playbook", "-i", old.parent, "site.yml"]
    said = ansible(checkout, *site, status=2)
    assert f"{old} and {new} differ in grafana. Of each remove" in said
    assert "api1" not in said
    assert (read(old), read(new)["grafana"]) == (OLD, "aNewerOne")

    (new / "grafana").unlink()
    (new / "locust").write_text("only here")
    ansible(checkout, *site)
    assert read(new) == {**OLD, "locust": "only here"}
    assert not old.exists()


@pytest.mark.parametrize("chmod", ["return None", "raise PermissionError"])
def test_a_file_system_without_modes_is_said(tmp_path: Path, chmod: str) -> None:
    directory = write(tmp_path / ".secrets", OLD)
    (tmp_path / "sitecustomize.py").write_text(
        f"import os\ndef chmod(*_, **__):\n    {chmod}\nos.chmod = chmod\n"
    )
    command: list[str | Path] = [sys.executable, ROOT / "ansible/passwords.py", directory]
    said = [
        subprocess.run(
            command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=True
        ).stdout
        for path in (str(tmp_path), "", str(tmp_path))
    ]
    assert "set winemon_secrets_dir" in said[0]
    # Where they are closed, as a mount option may have it, nothing is amiss.
    assert said[1:] == ["", ""]


def test_no_playbook_reads_a_password_before() -> None:
    readers = [path for path in (ROOT / "ansible").glob("*.yml") if "winemon_secrets_dir" in path.read_text()]
    assert {path.name for path in readers} >= {"passwords.yml", "verify.yml", "status.yml", "loadtest.yml"}
    for path in (ROOT / "site.yml", *readers):
        first = yaml.safe_load(path.read_text())[0].get("ansible.builtin.import_playbook", "passwords.yml")
        assert Path(first).name == "passwords.yml", path
