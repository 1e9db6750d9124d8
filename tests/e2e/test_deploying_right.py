"""Whoever may run `sudo winemon-release`, and nothing else, gets no further by it."""

import shlex
import subprocess
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from delivery import archive
from tests.e2e.releases import Build
from tests.e2e.site import Site

HOME = "/home/someone"
RAN = "/var/tmp/ran"  # noqa: S108 - of a throw-away machine
TELLS = f"import os; open(f'{RAN}/{{os.getuid()}}-WHAT', 'w').close()"
MODULES = ("venv", "pip", "json", "ensurepip", "tempfile", "encodings", "sitecustomize", "usercustomize")
PROGRAMS = ("python3", "python", "systemctl", "systemd-run", "sync", "env")
CONFIGURATION = f"[global]\ntarget = {HOME}/target\nindex-url = http://127.0.0.1:1/\n"
HOSTILE = {
    "PATH": f"{HOME}:/usr/sbin:/usr/bin:/sbin:/bin",
    **dict.fromkeys(
        ("PYTHONPATH", "PYTHONHOME", "PYTHONUSERBASE", "TMPDIR", "HOME", "XDG_CONFIG_HOME"), HOME
    ),
    "PYTHONSTARTUP": f"{HOME}/json.py",
    "PIP_CONFIG_FILE": f"{HOME}/pip.conf",
    "PIP_TARGET": f"{HOME}/target",
    "PIP_PYTHON": f"{HOME}/python",
    "LD_LIBRARY_PATH": HOME,
}


def tells(what: str) -> str:
    return TELLS.replace("WHAT", what)


@pytest.fixture(scope="module")
def someone(site: Site) -> Iterator[str]:
    """Make a user with that one right, and lay down what it would like root to run."""
    right = "someone ALL=(root) NOPASSWD: /usr/local/sbin/winemon-release"
    site.run(f"useradd --create-home someone && mkdir --mode=1777 {RAN}")
    site.run(f"echo '{right}' >/etc/sudoers.d/someone && chmod 440 /etc/sudoers.d/someone")
    for name in MODULES:
        site.run(f"cat >{HOME}/{name}.py", tells(f"module-{name}") + "\n")
    for name in PROGRAMS:
        site.run(
            f"cat >{HOME}/{name} && chmod 755 {HOME}/{name}", f"#!/bin/sh\n: >{RAN}/$(id -u)-program-{name}\n"
        )
    for place in ("pip.conf", ".pip/pip.conf", ".config/pip/pip.conf", "pip/pip.conf"):
        site.run(f"install -D /dev/stdin {HOME}/{place}", CONFIGURATION)
    site.run(f"chown -R someone: {HOME}")
    yield "someone"
    site.run(f"userdel --remove someone; rm -r /etc/sudoers.d/someone {RAN}")


INFO = "evil-1.0.dist-info"
Send = Callable[[dict[str, str]], str]


@pytest.fixture
def send(site: Site, build: Build, tmp_path: Path) -> Send:
    """Return what sends a release with its own lock file, and a wheel that would run in every interpreter."""
    files = {
        "evil.pth": tells("pth") + "\n",
        "evil-1.0.data/scripts/python": f"#!/bin/sh\n: >{RAN}/$(id -u)-script\n",
        "evil-1.0.data/scripts/python3": f"#!/bin/sh\n: >{RAN}/$(id -u)-script\n",
        "pip/__init__.py": tells("wheel-pip"),
        "pip/_internal/__init__.py": tells("wheel-pip"),
        **{f"{name}.py": tells(f"wheel-{name}") for name in MODULES if name not in ("pip", "encodings")},
        f"{INFO}/METADATA": "Metadata-Version: 2.1\nName: evil\nVersion: 1.0\n",
        f"{INFO}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }

    def pack(more: dict[str, str]) -> str:
        wheel = tmp_path / "evil-1.0-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as file:
            for name, text in {**files, **more}.items():
                member = zipfile.ZipInfo(name)
                member.external_attr = 0o100755 << 16
                file.writestr(member, text)
            names = [*files, *more, f"{INFO}/RECORD"]
            file.writestr(f"{INFO}/RECORD", "".join(f"{name},,\n" for name in names))
        lock = f"evil==1.0 \\\n    --hash=sha256:{archive.sha256(wheel)}\n"

        def own_lock(checkout: Path) -> None:
            (checkout / "requirements" / "app.txt").write_text(lock)

        built = build(own_lock)
        wheels = tmp_path / "wheels.tar.gz"
        archive.write(wheels, {wheel.name: wheel, "requirements.txt": lock.encode()})
        for path in (built, wheels):
            command = f"sudo tee {HOME}/{path.name} >/dev/null"
            subprocess.run(
                ["ssh", "-F", str(site.ssh_config), site.name, command], input=path.read_bytes(), check=True
            )
        return built.name

    return pack


def as_root(site: Site) -> list[str]:
    """Return what root ran of what was laid down."""
    return [name for name in site.run(f"ls {RAN}").split() if name.startswith("0-")]


@pytest.mark.parametrize("caller", ["someone", "root"])
def test_nothing_of_the_callers_and_of_the_wheels_is_run_by_root(
    site: Site, someone: str, send: Send, caller: str
) -> None:
    evil = send({"caller.py": f"{caller!r}"})
    command = f"winemon-release install {evil} --wheels wheels.tar.gz"
    name = evil.removeprefix("winemon-").removesuffix(".tar.gz")
    settings = " ".join(f"{variable}={value}" for variable, value in HOSTILE.items())
    if caller == "someone":
        tried = f"cd {HOME} && runuser -u {someone} -- env {settings} /usr/bin/sudo {command}"
    else:
        tried = f"cd {HOME} && /usr/bin/env {settings} /usr/local/sbin/{command}"
    live = site.run("readlink /opt/winemon/current")
    installed = site.ssh(f"sudo sh -c {shlex.quote(tried)}")
    assert as_root(site) == []
    assert installed.returncode == 0, installed.stderr
    assert site.ssh(f"sudo test -e {HOME}/target").returncode == 1
    switched = site.ssh(
        f"cd /tmp; sudo sh -c {shlex.quote(tried.replace(command, f'winemon-release switch {name}'))}"
    )
    assert switched.returncode == 1, "it cannot serve"
    # Nor does what comes after it: another release, and a look.
    site.run("winemon-release status")
    assert as_root(site) == []
    assert site.run("readlink /opt/winemon/current") == live
    assert site.ssh("sudo systemctl --quiet is-active winemon-api").returncode == 0
    # All that was laid down does run where somebody asks for it.
    site.run(
        f"/opt/winemon/releases/{name}/venv/bin/python3.* -c ''; cd {HOME}; ./sync; python3 -c 'import venv'"
    )
    assert {"0-program-sync", "0-module-venv", "0-script"} <= set(as_root(site)), as_root(site)
    site.run(f"rm {RAN}/0-*")


def test_wheels_are_unpacked_by_a_user_who_can_write_nowhere_else(
    site: Site, someone: str, send: Send
) -> None:
    planted = f"{'../' * 9}usr/local/sbin/winemon-planted"
    evil = send({f"{INFO}/entry_points.txt": f"[console_scripts]\n{planted} = evil:main\n"})
    command = f"cd {HOME} && sudo -u {someone} sudo winemon-release install {evil} --wheels wheels.tar.gz"
    refused = site.ssh(f"sudo sh -c {shlex.quote(command)}")
    # Debian 12's pip leaves out the path of such a program, Debian 13's may try to follow it.
    assert refused.returncode in (0, 1), refused
    assert site.run("ls /usr/local/sbin/winemon-planted* 2>/dev/null || true") == ""
    owners = site.run("find /opt/winemon/venvs /opt/winemon/releases ! -user root")
    assert owners == ""


def test_devices_and_files_of_others_are_not_taken(site: Site, someone: str) -> None:
    site.run("umask 077; echo secret >/root/file")
    for path in ("/dev/zero", "/proc/kmsg", "/root/file", "/root"):
        command = f"runuser -u {someone} -- sudo winemon-release install {path} --sha256 {'0' * 64}"
        refused = site.ssh(f"sudo timeout 20 {command}")
        assert refused.returncode == 2, refused
        assert refused.stderr.count("\n") == 1
        assert "secret" not in refused.stderr
    site.run("rm /root/file")
