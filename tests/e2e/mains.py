"""A machine whose power can be cut.

Its disk is an ext4 image. The power goes with the ioctl that stops the file system as it is at that instant,
without writing its log, and with the death of all processes.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import signal
import struct
import subprocess
import time
from pathlib import Path
from typing import Any, Final

import httpx
import pytest

from tests.e2e.machines import MACHINE, MACHINES, halt
from tests.e2e.releases import HEALTH, STORE, Build, index, replace, status
from tests.e2e.site import Site

SHUTDOWN: Final = 0x8004587D
"""EXT4_IOC_SHUTDOWN of Linux' fs/ext4/ext4.h."""
WITHOUT_LOG: Final = struct.pack("I", 2)
"""EXT4_GOING_FLAGS_NOLOGFLUSH: what is not on disk now never will be."""
RECORDS: Final = """
import base64, csv, hashlib, pathlib, sys
bad = []
for record in pathlib.Path(sys.argv[1]).resolve().glob("lib/python*/site-packages/*.dist-info/RECORD"):
    rows = list(csv.reader(record.open()))
    bad += [record] if not rows else []
    for name, expected, _ in rows:
        if expected and "bin/" not in name:
            digest = hashlib.sha256((record.parents[1] / name).read_bytes()).digest()
            if expected != "sha256=" + base64.urlsafe_b64encode(digest).decode().rstrip("="):
                bad.append(name)
print(len(bad))
"""
"""Count the files of an environment that are not those of their packages, by what pip wrote down of them."""


def output(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


class Disk:
    """The disk of a machine: a file with a file system, mounted where the machine's overlay is.

    It has what the machine writes; what the machine has from its layers was on disk before.
    """

    def __init__(self, site: Site, image: Path, layers: str) -> None:
        self.site, self.image, self.layers, self.kept = site, image, layers, image.with_suffix(".kept")
        self.directory = MACHINES / site.name

    def insert(self) -> None:
        """Move the machine, which is provisioned, to a disk of its own, and keep a copy of that."""
        halt(self.site)
        # Other machines, which may start meanwhile, are told when the disk is removed.
        subprocess.run(["mount", "--bind", self.directory, self.directory], check=True)
        subprocess.run(["mount", "--make-shared", self.directory], check=True)
        with self.image.open("wb") as file:
            file.truncate(16 << 30)
        subprocess.run(["mkfs.ext4", "-q", "-F", self.image], check=True)
        place = self.image.with_suffix(".mounted")
        place.mkdir()
        subprocess.run(["mount", "-o", "loop", self.image, place], check=True)
        try:
            for name in ("root", "work"):
                (place / name).mkdir()
            subprocess.run(["cp", "--archive", self.directory / "upper", place], check=True)
        finally:
            subprocess.run(["umount", place], check=True)
        subprocess.run(["cp", "--sparse=always", self.image, self.kept], check=True)
        self.boot()

    def restore(self) -> None:
        """Have the disk as it was at first, whatever became of it."""
        if str(self.image) in output("losetup", "--all"):
            self.cut()
        subprocess.run(["cp", "--sparse=always", self.kept, self.image], check=True)
        self.boot()

    def boot(self) -> None:
        """Start the machine and wait until its user can log in."""
        subprocess.run(["mount", "-o", "loop", self.image, self.directory], check=True)
        command = [MACHINE, "start", self.site.name, self.directory, self.layers, self.site.bridge]
        subprocess.run(command, check=True)
        deadline = time.monotonic() + 60
        while self.site.ssh("true").returncode:
            assert time.monotonic() < deadline, "it does not boot"
            time.sleep(0.1)

    def cut(self) -> None:
        """Take the power away."""
        # Those that run it, and its first process, which takes all others along.
        processes = [int((self.directory / "pid").read_text())]
        while found := output("pgrep", "--parent", str(processes[-1])).split()[:1]:
            processes += map(int, found)
            if len(processes) == 3:
                break
        descriptor = os.open(self.directory, os.O_RDONLY)
        fcntl.ioctl(descriptor, SHUTDOWN, WITHOUT_LOG)
        os.close(descriptor)
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        self.site.hang_up()
        self.remove()

    def remove(self) -> None:
        """Unmount it as soon as nothing of the machine holds it any more."""
        deadline = time.monotonic() + 30
        while subprocess.run(["umount", self.directory], capture_output=True, check=False).returncode:
            assert time.monotonic() < deadline, "something still uses the disk"
            time.sleep(0.1)
        while str(self.image) in output("losetup", "--all"):
            assert time.monotonic() < deadline, "something still holds the disk"
            time.sleep(0.1)


class Mains:
    """The machine on its disk, and releases for it."""

    def __init__(self, site: Site, disk: Disk, build: Build) -> None:
        self.site, self.disk, self.build = site, disk, build
        now = self.status()
        self.suffix = f"py{now['python']}-{now['architecture']}.tar.gz"
        (environment,) = [name for name in now["environments"] if name.startswith("app-")]
        self.wheels = f"{STORE}/{environment}-{now['architecture']}.tar.gz"

    def status(self) -> dict[str, Any]:
        """Return what winemon-release says of the machine."""
        return status(self.site)

    def index(self) -> dict[str, Any]:
        """Return the index of the store."""
        return index(self.site)

    def sums(self, *files: str) -> list[str]:
        """Return the SHA-256 of files of the machine."""
        return [line.split()[0] for line in self.site.run(f"sha256sum {' '.join(files)}").splitlines()]

    def damaged(self, release: str) -> int:
        """Return how many files of a release's environment are not what they were."""
        return int(self.site.run(f"python3 - /opt/winemon/releases/{release}/venv", RECORDS))

    def release(self, *, other_libraries: bool) -> Path:
        """Build a release that is like no other."""
        unique = os.urandom(4).hex()
        if other_libraries:
            lock = "#    make lock\n"
            return self.build(replace("requirements/app.txt", lock, f"{lock[:-1]} {unique}\n"))
        return self.build(replace("app/main.py", HEALTH, f"{HEALTH}  # {unique}"))

    def send(self, built: Path) -> tuple[str, str]:
        """Copy a release to the machine, and wheels for it; return where they are."""
        lock = hashlib.sha256((built.parents[1] / "requirements" / "app.txt").read_bytes()).hexdigest()[:12]
        sent, wheels = f"/var/tmp/{built.name}", f"/var/tmp/app-{lock}-{self.suffix}"  # noqa: S108 - of a throw-away machine
        command = ["ssh", "-F", str(self.site.ssh_config), self.site.name, f"cat >{sent}"]
        subprocess.run(command, input=built.read_bytes(), check=True)
        self.site.run(f"cp {self.wheels} {wheels}")
        return sent, wheels

    def wait_for_right_answers(self) -> float:
        """Return the seconds until all wines that training predicted get what training said."""
        start = time.monotonic()
        manifest = json.loads(self.site.run("cat /opt/winemon/current/artifacts/manifest.json"))
        for sample in manifest["samples"]:
            while True:
                with contextlib.suppress(httpx.HTTPError):
                    answer = self.site.client.post(self.site.api("/predict"), json=sample["wine"])
                    break
                assert time.monotonic() < start + 60, "it does not answer"
                time.sleep(0.1)
            assert answer.status_code == 200, answer.text
            assert answer.json()["quality"] == pytest.approx(sample["quality"], abs=1e-9)
            assert answer.headers["X-Model-Version"] == manifest["version"]
        return time.monotonic() - start
