#!/usr/bin/python3 -I
"""What is live on a machine: installed as `winemon-release`, the one command that changes it.

    winemon-release install ARCHIVE [--wheels ARCHIVE] [--sha256 HASH]
    winemon-release switch NAME [--why TEXT]
    winemon-release rollback [NAME] [--why TEXT]
    winemon-release status
    winemon-release publish ARCHIVE [--wheels ARCHIVE]... [--sha256 HASH]     in the store of this machine
    winemon-release promote NAME                                             as what a new machine gets
    winemon-release environment LOCK --wheels ARCHIVE                        for what is not of a release

Each is one transaction of this machine alone, so that whoever asked for it may be gone before it ends.
Nothing of a release is imported or unpickled before every hash of it is right. It is tried beside the live
one before `current` names it, and `current` is put back where the service does not come up with it. What an
interrupted call left is finished or removed by the next one. Contents are on disk before a name says that
they are there, so that a power cut leaves what was before or what is new. Exit code 2: bad input; 1: it
failed, and what was live is live.

It runs as root for users who may call it and nothing else: it takes nothing of their environment and working
directory, and starts no interpreter of an environment that a wheel went into.

Standard library only: it runs on Debian's Python 3.11 and 3.13.
"""

import argparse
import contextlib
import ctypes
import fcntl
import getpass
import hashlib
import http.client
import json
import os
import platform
import re
import resource
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import count
from pathlib import Path, PurePosixPath
from typing import IO, Any, Final

FORMAT: Final = 1
MANIFEST: Final = "manifest.json"
LOCK: Final = "requirements/app.txt"
NAME: Final = re.compile(r"[0-9A-Za-z][0-9A-Za-z._+-]{0,199}")
SYSTEM_PYTHON: Final = "/usr/bin/python3"
ENVIRONMENT: Final = {
    "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
    "LC_ALL": "C.UTF-8",
    "PIP_CONFIG_FILE": "/dev/null",
}
"""All that this command, and what it starts, has of an environment."""
INSTALLED: Final = "installed"
AT_FDCWD: Final = -100
RENAME_EXCHANGE: Final = 2
"""Of Linux' renameat2(2), which Python has no name for."""
PIN: Final = re.compile(r"[0-9A-Za-z][\w.-]*(\[[\w,.-]+\])?==[\w.!+-]+", re.ASCII)
HASH: Final = re.compile(r"--hash=sha256:[0-9a-f]{64}")
COMPILE: Final = """
import compileall, os, re, sys
os.nice(10)
tests = re.compile("/site-packages/(.*/)?tests/")
compileall.compile_dir(sys.argv[1], rx=tests, force=True, quiet=2, workers=0)
"""
"""Compiles all but the libraries' tests, as what serves may not write bytecode; what is live has priority."""
NO_ANSWER: Final = "no answer"
PYTHON: Final = f"{sys.version_info.major}.{sys.version_info.minor}"
TOLERANCE: Final = 1e-9
"""How far an answer may be from the one that the release's manifest has for the same wine."""
TRIAL_SECONDS: Final = 60.0
READY_SECONDS: Final = 10.0
"""How long a release on trial may take to answer, and from then on to be ready."""
LIVE_SECONDS: Final = 90.0
"""How long the service may take to answer: gunicorn reloads when the workers of the last reload have left."""


class InputError(Exception):
    """What was asked for cannot be done; the message is one line that says why."""


class OperationError(Exception):
    """What was asked for went wrong, and what was live is live; the message is one line that says why."""


# --- the service, and what it is made of --------------------------------------------------------------------


class Service:
    """The API under systemd: what this command asks of it."""

    unit = "winemon-api.service"
    socket = "winemon-api.socket"
    trials = "winemon-trial-"

    def address(self) -> tuple[str, int]:
        """Return where this machine reaches the API."""
        listen = self._systemctl("show", "--property=Listen", "--value", self.socket)
        found = re.match(r"(.*):(\d+) \(Stream\)", listen)
        if not found:
            raise OperationError(f"{self.socket} listens nowhere: see `systemctl status {self.socket}`")
        host = found[1].strip("[]")
        return {"::": "127.0.0.1", "0.0.0.0": "127.0.0.1", "": "127.0.0.1"}.get(host, host), int(found[2])  # noqa: S104 - compared, not bound

    def master(self) -> int:
        """Return the process id of gunicorn's master, or 0 where it does not run."""
        return int(self._systemctl("show", "--property=MainPID", "--value", self.unit) or 0)

    def reload(self) -> None:
        """Have gunicorn start workers on what `current` names now."""
        self._systemctl("reload", self.unit)

    def restart(self) -> None:
        """Start the service anew; systemd holds its socket meanwhile, and who connects waits."""
        self._systemctl("reset-failed", self.unit, self.socket)
        self._systemctl("restart", self.unit)

    def stop(self) -> None:
        """Stop the service."""
        self._systemctl("stop", self.unit)

    def room(self, name: str) -> Path:
        """Return the directory that the trial `name` may write to while it runs."""
        return Path("/run", self.trials + name)

    def trial(self, name: str, directory: Path, command: Sequence[str]) -> list[str]:
        """Return what runs `command` in `directory` as the service would run, in a unit of its own."""
        properties = transient_properties(self._systemctl("cat", self.unit))
        room = self.trials + name
        properties += [
            "Type=exec",
            f"WorkingDirectory={directory}",
            f"RuntimeDirectory={room} {room}/metrics {room}/state",
            # Whatever becomes of this process, the trial ends.
            f"RuntimeMaxSec={2 * TRIAL_SECONDS:.0f}",
        ]
        options = ["--quiet", "--collect", "--wait", "--pipe", f"--unit={room}"]
        return ["systemd-run", *options, *(f"--property={line}" for line in properties), "--", *command]

    def end_trials(self) -> None:
        """Stop what `trial` started, where it still runs."""
        self._systemctl("kill", "--signal=KILL", f"{self.trials}*.service")
        self._systemctl("stop", f"{self.trials}*.service")

    @staticmethod
    def _systemctl(*arguments: str) -> str:
        # What it says where a unit does not come up is told better by what is asked of it afterwards.
        command = ["systemctl", *arguments]
        result = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - no shell
        return result.stdout.strip()


def transient_properties(unit: str) -> list[str]:
    """Return the [Service] lines of a unit, as `systemctl cat` prints it, that a trial of it shares."""
    own = (
        "Exec",
        "Type",
        "NotifyAccess",
        "Restart",
        "RuntimeDirectory=",
        "StateDirectory",
        "WorkingDirectory",
    )
    section, properties = "", []
    for line in re.sub(r"\\\n\s*", " ", unit).splitlines():
        if line.startswith("["):
            section = line.strip()
        elif (
            section == "[Service]"
            and "=" in line
            and not line.startswith(("#", ";", *own, "Timeout", "Kill"))
        ):
            properties.append(line.strip())
    return properties


UNANSWERED: Final = (OSError, http.client.HTTPException, ValueError, RecursionError)
"""What asking raises where no proper answer comes."""


class UnixConnection(http.client.HTTPConnection):
    """HTTP over a unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=1)
        self._path = path

    def connect(self) -> None:
        """Connect to the socket."""
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


def ask(connection: http.client.HTTPConnection, path: str, body: Any = None) -> tuple[int, Any, str]:
    """Return status, JSON body and X-Model-Version of an answer; raises one of UNANSWERED."""
    if body is None:
        connection.request("GET", path)
    else:
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    return response.status, json.loads(response.read()), response.headers.get("X-Model-Version", "")


def readiness(connection: http.client.HTTPConnection, version: str | None = None) -> str | None:
    """Return why the other side is not ready to serve this model, or None where it is."""
    try:
        status, answer, _ = ask(connection, "/ready")
    except UNANSWERED as error:
        return f"{NO_ANSWER} ({error})"
    if status != 200 or not isinstance(answer, dict):
        return str((isinstance(answer, dict) and answer.get("reason")) or f"it says {status}")
    if version is not None and answer.get("version") != version:
        return f"serves model {answer.get('version')}"
    return None


def children(pid: int) -> set[int]:
    """Return the processes whose parent is `pid`; none where that is 0."""
    found = set[int]()
    if pid == 0:
        return found
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # The name before it is in parentheses, and may have any character in it.
            if int(path.read_text().rpartition(")")[2].split()[1]) == pid:
                found.add(int(path.parent.name))
    return found


def working_directory(pid: int) -> Path | None:
    """Return where a process works, or None where it has ended."""
    try:
        return Path(f"/proc/{pid}/cwd").readlink()
    except OSError:
        return None


def served_by(connection: socket.socket, candidates: set[int]) -> int | None:
    """Return which of these processes has the other end of a connection within this machine."""
    near, far = (_kernel_form(name) for name in (connection.getsockname(), connection.getpeername()))
    for table in ("tcp", "tcp6"):
        for line in Path("/proc/net", table).read_text().splitlines()[1:]:
            columns = line.split()
            # Its local end is our far one. An IPv4 address ends the IPv6 one that it is mapped to.
            if not (columns[1].endswith(far) and columns[2].endswith(near)):
                continue
            for pid in candidates:
                for descriptor in Path(f"/proc/{pid}/fd").glob("*"):
                    with contextlib.suppress(OSError):
                        if str(descriptor.readlink()) == f"socket:[{columns[9]}]":
                            return pid
    return None


def _kernel_form(name: Sequence[Any]) -> str:
    host, port = str(name[0]), int(name[1])
    address = socket.inet_pton(socket.AF_INET6 if ":" in host else socket.AF_INET, host)
    words = struct.unpack(f"={len(address) // 4}I", address)
    return "".join(f"{word:08X}" for word in words) + f":{port:04X}"


# --- files --------------------------------------------------------------------------------------------------


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush(path: Path) -> None:
    """Have a file's content, or the names in a directory, on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_all(directory: Path) -> None:
    """Have a directory, and all that is below it, on disk."""
    # One call instead of one for each of thousands of files.
    _run("sync", "--file-system", str(directory))


def put(new: Path, target: Path) -> None:
    """Give a directory, which is on disk, its name at once; what had that name before gets the other one."""
    if target.exists():
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.renameat2(AT_FDCWD, os.fsencode(new), AT_FDCWD, os.fsencode(target), RENAME_EXCHANGE):
            raise OSError(ctypes.get_errno(), f"{target}: {os.strerror(ctypes.get_errno())}")
    else:
        new.rename(target)
    flush(target.parent)


def write(path: Path, content: str) -> None:
    """Write a file whole or not at all, following no link."""
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644)
    with os.fdopen(descriptor, "w") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    flush(path.parent)


def copy(source: Path, target: Path) -> Path:
    """Copy a plain file, whole or not at all, and return the copy, which is on disk."""
    partial = target.with_name(f".{target.name}.partial")
    try:
        # A pipe, a device or a file of /proc may have no end, and opening a device may do something.
        named = os.open(source, os.O_PATH)
        try:
            kind = os.fstat(named)
            if not stat.S_ISREG(kind.st_mode) or kind.st_dev == Path("/proc").stat().st_dev:
                raise InputError(f"{source}: not a plain file")
            with Path(f"/proc/self/fd/{named}").open("rb") as original, partial.open("xb") as file:
                shutil.copyfileobj(original, file)
                file.flush()
                os.fsync(file.fileno())
        finally:
            os.close(named)
    except OSError as error:
        raise InputError(f"{source}: {error.strerror}") from error
    return partial.replace(target)


def unpack(archive: Path, target: Path) -> None:
    """Write the files of a tar into the directory `target`; anything but plain files is refused."""
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                parts = PurePosixPath(member.name).parts
                if not member.isreg() or not parts or ".." in parts or parts[0] == "/":
                    raise InputError(f"{archive.name}: {member.name!r} is not a plain file below it")
                file = target.joinpath(*parts)
                file.parent.mkdir(parents=True, exist_ok=True)
                source = tar.extractfile(member)
                assert source is not None  # noqa: S101 - of a regular file there is content
                with file.open("xb") as written:
                    shutil.copyfileobj(source, written)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise InputError(f"{archive.name}: cannot be unpacked: {str(error).partition(chr(10))[0]}") from error


@dataclass(frozen=True)
class Release:
    """A release whose every file has been found to be the one that its manifest names."""

    path: Path
    manifest: dict[str, Any] = field(repr=False)

    @property
    def name(self) -> str:
        """The version, which names it everywhere."""
        return str(self.manifest["version"])

    @property
    def model(self) -> str:
        """The version of the model, as the API tells it."""
        return str(self.manifest["model"]["version"])

    @property
    def lock(self) -> str:
        """The name of its lock file, with the start of its hash."""
        return f"app-{self.manifest['lock'][:12]}"

    @property
    def venv(self) -> str:
        """The name of the virtual environment that it runs in on this machine."""
        return f"{self.lock}-py{PYTHON}"

    def samples(self) -> list[dict[str, Any]]:
        """Return wines with the qualities that training predicted."""
        try:
            artifacts = json.loads((self.path / "artifacts" / MANIFEST).read_bytes())
            return [
                {"wine": sample["wine"], "quality": float(sample["quality"])}
                for sample in artifacts["samples"]
            ]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{self.name}: no samples in artifacts/{MANIFEST}: {error}") from error


def verified(path: Path) -> Release:
    """Return the release in the directory `path`.

    Raises InputError on the first file that is missing, too many, or not the one that the manifest names.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        if manifest["format"] != FORMAT:
            raise InputError(f"{MANIFEST}: format {manifest['format']}, this command reads {FORMAT}")
        files, model = dict(manifest["files"]), manifest["model"]["version"]
        if not NAME.fullmatch(manifest["version"]) or not isinstance(model, str):
            raise InputError(f"{MANIFEST}: no proper version")
        if any(PurePosixPath(name).parts[:1] == ("venv",) for name in files):
            raise InputError(f"{MANIFEST}: venv is not for a release to have")
        if manifest["lock"] != files[LOCK]:
            raise InputError(f"{MANIFEST}: its lock is not that of {LOCK}")
    except OSError as error:
        raise InputError(f"{path.name}: not a release: {MANIFEST}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path.name}: not a release: {MANIFEST}: {type(error).__name__} {error}") from error
    there = {
        str(file.relative_to(path)) for file in path.rglob("*") if file.is_symlink() or not file.is_dir()
    }
    for name in sorted(there ^ {*files, MANIFEST}):
        if name != "venv" or not (path / name).is_symlink():
            raise InputError(
                f"{manifest['version']}: {name} is {'missing' if name in files else 'not in its manifest'}"
            )
    for name, expected in files.items():
        if (path / name).is_symlink() or sha256(path / name) != expected:
            raise InputError(f"{manifest['version']}: {name} is not the file that its manifest names")
    return Release(path, manifest)


def pins(requirements: str) -> list[str]:
    """Return the words of a lock file, which are versions and hashes, without markers and comments."""
    return re.sub(r"\\$|#.*|;[^\\\n]*", "", requirements, flags=re.MULTILINE).split()


def verify_wheels(directory: Path, lock: str) -> str:
    """Return the requirements of an unpacked archive of wheels, as pip is to read them.

    Raises InputError unless it has what the lock file fixes and nothing else. What is returned is made of
    versions and hashes alone: pip would take options from the file, as one to build what is no wheel.
    """
    try:
        wanted = pins((directory / "requirements.txt").read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"the wheels have no requirements.txt: {error}") from error
    if not wanted or not set(wanted) <= set(pins(lock)):
        raise InputError("the wheels are of another lock file than the release")
    for wheel in directory.iterdir():
        named = wheel.suffix == ".whl" and wheel.is_file() and f"--hash=sha256:{sha256(wheel)}" in wanted
        if wheel.name != "requirements.txt" and not named:
            raise InputError(f"{wheel.name}: not a wheel that the lock file names")
    lines: list[str] = []
    for word in wanted:
        if PIN.fullmatch(word):
            lines.append(word)
        elif lines and HASH.fullmatch(word):
            lines[-1] += f" {word}"
        else:
            raise InputError(f"the lock file has {word!r}, which is neither a version nor its hash")
    return "\n".join(lines) + "\n"


# --- environments -------------------------------------------------------------------------------------------


def fingerprint(directory: Path) -> dict[str, str]:
    """Return the SHA-256 of every file below a directory, and where every link leads, by name."""
    found = {}

    def fail(error: OSError) -> None:
        raise error

    for parent, directories, files in os.walk(directory, onerror=fail):
        place = Path(parent)
        below = place.relative_to(directory)
        for name in (*directories, *files):
            path = place / name
            if path.is_symlink():
                found[str(below / name)] = f"-> {path.readlink()}"
            elif path.is_file():
                found[str(below / name)] = sha256(path)
    return found


def seal(venv: Path) -> None:
    """Write down what a virtual environment consists of: without that it counts as not there."""
    (venv / INSTALLED).write_text(json.dumps(fingerprint(venv)))


def is_whole(venv: Path) -> bool:
    """Return whether a virtual environment is there, and every file of it as it was installed."""
    try:
        expected = json.loads((venv / INSTALLED).read_bytes())
        found = fingerprint(venv)
    except (OSError, ValueError):  # as where it is removed or made at this moment
        return False
    found.pop(INSTALLED, None)
    return bool(found == expected)


def build_environment(venv: Path, wheels: Path, lock: str, room: Path, installer: str | None) -> None:
    """Install the wheels that a lock file names as the virtual environment `venv`, working in `room`.

    An interpreter runs what wheels leave for it, and pip imports what it finds beside itself. So the one that
    installs is of an environment of its own, which no wheel goes into, and works as the user `installer`.
    """
    sent, tools, new = room / "wheels", room / "tools", room / "new"
    sent.mkdir()
    unpack(copy(wheels, room / "wheels.tar.gz"), sent)
    (sent / "requirements.txt").write_text(verify_wheels(sent, lock))
    room.chmod(0o711)
    for place in (tools, new):
        place.mkdir()
        if installer:
            shutil.chown(place, installer, installer)
    _run(SYSTEM_PYTHON, "-I", "-m", "venv", str(tools), user=installer)
    _run(SYSTEM_PYTHON, "-I", "-m", "venv", "--without-pip", str(new), user=installer)
    pip = [str(tools / "bin" / "python"), "-I", "-m", "pip", "--isolated", "--disable-pip-version-check"]
    only = ["--no-index", "--no-deps", "--only-binary=:all:", "--require-hashes", "--no-cache-dir"]
    into = [f"--prefix={new}", "--ignore-installed", "--no-warn-script-location", "--no-compile"]
    what = [f"--find-links={sent}", f"--requirement={sent}/requirements.txt"]
    _run(*pip, "install", *only, *into, *what, user=installer)
    _run(str(tools / "bin" / "python"), "-I", "-c", COMPILE, str(new), user=installer)
    # Programs name the interpreter that installed them, and `activate` where it was made.
    names = [str(path) for path in (*(new / "bin").iterdir(), new / "pyvenv.cfg") if not path.is_symlink()]
    _run("sed", "--in-place", f"s|{tools}/|{venv}/|g; s|{new}|{venv}|g", *names, user=installer)
    if installer:
        for path in (new, *new.rglob("*")):
            os.chown(path, 0, 0, follow_symlinks=False)
            if not path.is_symlink():
                path.chmod(path.stat().st_mode & 0o755)
    seal(new)
    flush_all(new)
    put(new, venv)


# --- the machine --------------------------------------------------------------------------------------------


class Machine:
    """The releases of this machine: `root` holds them, `state` the ledger, `store` what is published here.

    `metrics` is where the node exporter, if there is one, reads what is to be known of the last steps;
    `installer` the user who installs wheels, where that is another than who runs this.
    """

    def __init__(
        self,
        service: Service,
        root: Path = Path("/opt/winemon"),
        state: Path = Path("/var/lib/winemon-release"),
        store: Path = Path("/srv/winemon/releases"),
        metrics: Path = Path("/var/lib/node-exporter"),
        *,
        installer: str | None = None,
        keep: int = 5,
    ) -> None:
        self.service, self.installer = service, installer
        self.releases, self.venvs, self.current = root / "releases", root / "venvs", root / "current"
        self.state, self.store, self.metrics, self.keep = state, store, metrics, keep
        self.ledger, self.pending = state / "ledger.jsonl", state / "pending.json"

    # -- what is there

    def live(self) -> str | None:
        """Return the name of the release that `current` names."""
        try:
            return self.current.readlink().name
        except OSError:
            return None

    def installed(self) -> list[str]:
        """Return the names of the installed releases, the newest first."""
        paths = [path for path in self.releases.glob("[!.]*") if (path / "venv").is_symlink()]
        return [path.name for path in sorted(paths, key=lambda path: path.stat().st_mtime, reverse=True)]

    def history(self) -> list[str]:
        """Return what was live, the latest last; what was rolled back from is not in it."""
        names: list[str] = []
        for line in self._ledger():
            if line["result"] != "ok" or line["action"] not in ("switch", "rollback"):
                continue
            if line["action"] == "rollback" and line["to"] in names:
                del names[names.index(line["to"]) + 1 :]
                continue
            latest = [name for name in (line["from"], line["to"]) if name]
            names = [name for name in names if name not in latest] + latest
        return names

    def _ledger(self) -> Iterator[dict[str, Any]]:
        with contextlib.suppress(FileNotFoundError):
            for text in self.ledger.read_text().splitlines():
                with contextlib.suppress(ValueError):  # the last line, where the power went
                    yield json.loads(text)

    def status(self) -> dict[str, Any]:
        """Return what is live, whether it is ready, what a rollback leads to, and what is there and whole."""
        live = self.live()
        reason = self._unready() if live else "no release is live"
        places = [working_directory(pid) for pid in children(self.service.master())]
        names = [place.name for place in places if place and place.parent == self.releases]
        return {
            "live": live,
            "ready": reason is None,
            "reason": reason,
            "workers": {name: names.count(name) for name in sorted(set(names))},
            "previous": self._previous(),
            "releases": [name for name in self.installed() if self._is_whole(name)],
            "environments": sorted(path.name for path in self.venvs.glob("[!.]*") if is_whole(path)),
            "python": PYTHON,
            "architecture": platform.machine(),
        }

    def _is_whole(self, name: str) -> bool:
        try:
            return verified(self.releases / name).name == name
        except (InputError, OSError):
            return False

    def _previous(self) -> str | None:
        live = self.live()
        return next((name for name in reversed(self.history()) if name != live), None)

    def _unready(self, release: Release | None = None) -> str | None:
        """Return why the service is not ready, or not with this release's model; None where it is."""
        try:
            with contextlib.closing(self._connection()) as connection:
                return readiness(connection, release.model if release else None)
        except OperationError as error:
            return str(error)

    def _connection(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(*self.service.address(), timeout=5)

    # -- transactions

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Be the only one who changes this machine, and begin by ending what an interrupted call left."""
        self.state.mkdir(parents=True, exist_ok=True)
        self.state.chmod(0o700)  # or anyone could hold the lock
        with (self.state / "lock").open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise OperationError(
                    "another winemon-release is at work on this machine; try again when it is done"
                ) from None
            for place in (self.releases, self.venvs, self.store, self.state):
                for path in place.glob(".*"):
                    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
            for path in self.venvs.glob("app-*"):
                if not (path / INSTALLED).exists():
                    shutil.rmtree(path)
            self._finish_pending()
            yield

    def record(self, action: str, name: str | None, before: str | None, why: str, result: str) -> None:
        """Add a line to the ledger, and have the dashboards know of it."""
        line = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "who": os.environ.get("SUDO_USER") or getpass.getuser(),
            "action": action,
            "from": before,
            "to": name,
            "why": why,
            "result": result,
        }
        with self.ledger.open("a+b") as file:
            # A line that a power cut ended early must not take this one with it.
            if file.tell() and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n":
                file.write(b"\n")
            file.write(json.dumps(line).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        flush(self.state)
        if self.metrics.is_dir():
            write(self.metrics / "winemon-release.prom", self._exposition())

    def _exposition(self) -> str:
        """Return the time of the last step of each kind as a metric."""
        name = "winemon_release_step_timestamp_seconds"
        lines = [f"# HELP {name} When the last step of each kind was taken.", f"# TYPE {name} gauge"]
        for line in {line["action"]: line for line in self._ledger()}.values():
            labels = {
                "action": line["action"],
                # Whatever else was asked for: one label that cannot be read would hide the whole file.
                "release": line["to"] if NAME.fullmatch(line["to"] or "") else "",
                "result": "ok" if line["result"] == "ok" else "failed",
            }
            shown = ",".join(f'{label}="{text}"' for label, text in labels.items())
            lines.append(f"{name}{{{shown}}} {datetime.fromisoformat(line['time']).timestamp()}")
        return "\n".join(lines) + "\n"

    @contextlib.contextmanager
    def _recorded(self, action: str, name: str, why: str = "") -> Iterator[None]:
        """Record what is refused or fails before anything has changed."""
        try:
            yield
        except (InputError, OperationError) as error:
            self.record(action, name, self.live(), why, str(error))
            raise

    # -- install

    def install(self, archive: Path, wheels: Path | None = None, expected: str | None = None) -> str:
        """Install a release beside the others and return its name; `expected` is the archive's SHA-256."""
        with (
            self.transaction(),
            self._recorded("install", archive.name),
            self._staged(archive, expected, self.releases) as (release, _),
        ):
            target = self.releases / release.name
            if target.exists():
                with contextlib.suppress(InputError):
                    if verified(target).manifest != release.manifest:
                        raise OperationError(f"{release.name} is installed with another content")
                    self._provide(release, wheels)
                    self._link_venv(Release(target, release.manifest))
                    return release.name
            self._provide(release, wheels)
            self._link_venv(release)
            flush_all(release.path)
            put(release.path, target)  # also in place of what is not what it was
            self.record("install", release.name, self.live(), "", "ok")
        return release.name

    @contextlib.contextmanager
    def _staged(self, archive: Path, expected: str | None, place: Path) -> Iterator[tuple[Release, Path]]:
        """Yield a verified release that is unpacked within `place`, and a copy of its archive."""
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".", dir=place) as directory:
            # A copy that nobody else can change between its hash and its use.
            unpacked, copies = Path(directory, "release"), Path(directory, "copies")
            unpacked.mkdir()
            copies.mkdir()
            own = copy(archive, copies / archive.name)
            if expected is not None and sha256(own) != expected:
                raise InputError(f"{archive.name}: its SHA-256 is not the expected {expected[:12]}...")
            unpack(own, unpacked)
            yield verified(unpacked), own

    def _link_venv(self, release: Release) -> None:
        link = release.path / "venv"
        if not link.is_symlink() or link.readlink() != self.venvs / release.venv:
            partial = self.releases / ".venv.partial"
            partial.symlink_to(self.venvs / release.venv)
            partial.replace(link)
            flush(release.path)

    @staticmethod
    def _away(path: Path) -> Path:
        """Return a name beside `path` under which the next call removes it."""
        return path.with_name(f".{path.name}.{time.time_ns()}")

    def _provide(self, release: Release, wheels: Path | None) -> None:
        """Create the release's virtual environment from an archive of wheels, unless it is whole."""
        if is_whole(self.venvs / release.venv):
            return
        if wheels is None:
            raise InputError(
                f"{release.name} needs the environment {release.venv}:"
                f" give --wheels {release.venv}-{platform.machine()}.tar.gz"
            )
        self._build(release.venv, wheels, (release.path / LOCK).read_text())

    def _build(self, name: str, wheels: Path, lock: str) -> None:
        self.venvs.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".", dir=self.venvs) as directory:
            build_environment(self.venvs / name, wheels, lock, Path(directory), self.installer)

    def environment(self, lock: Path, wheels: Path) -> str:
        """Create the virtual environment of a lock file that no release has, and return its name."""
        with self.transaction(), tempfile.TemporaryDirectory(prefix=".", dir=self.state) as directory:
            own = copy(lock, Path(directory, lock.name))
            name = f"{lock.stem}-{sha256(own)[:12]}-py{PYTHON}"
            if not re.fullmatch(r"[a-z]+-[0-9a-f]{12}-py[0-9.]+", name):
                raise InputError(f"{lock.name}: not the name of a lock file, as in loadtest.txt")
            if not is_whole(self.venvs / name):
                self._build(name, wheels, own.read_text())
        return name

    # -- switch

    def switch(self, name: str | None, why: str = "", action: str = "switch") -> str:
        """Make an installed release live, or what was live before where no name is given; return its name.

        Raises InputError where there is no such release or it is not what its manifest says, OperationError
        where it fails its trial or the service does not come up with it. What was live before is live then.
        """
        with self.transaction():
            before = self.live()
            name = name or self._previous()
            if name is None:
                raise InputError("nothing was live before; name an installed release")
            with self._recorded(action, name, why):
                if name not in self.installed():
                    there = ", ".join(self.installed()) or "none"
                    raise InputError(f"{name} is not installed; installed are {there}")
                release = verified(self.releases / name)
                if not (release.path / "venv" / INSTALLED).exists():
                    raise InputError(f"{name}: its environment {release.venv} is gone; install it again")
                if name == before and self._unready(release) is None:
                    return name
                self.try_out(release)
            write(self.pending, json.dumps({"from": before, "to": name, "why": why, "action": action}))
            self._make_live(release, before, why, action)
            self._prune({name, before})
        return name

    def try_out(self, release: Release) -> None:
        """Start a release beside the live one and require the answers that its manifest has.

        Raises OperationError, and leaves what it said in trial.log, where it does not give them.
        """
        # The sandbox may not make a socket that others reach, so it is handed one, as standard input.
        with (
            (self.state / "trial.log").open("w+b") as log,
            tempfile.TemporaryDirectory() as directory,
            socket.socket(socket.AF_UNIX) as listener,
        ):
            path = Path(directory, "api.sock")
            listener.bind(str(path))
            listener.listen()
            programs = release.path / "venv" / "bin"
            room = self.service.room("api")
            settings = {
                "WINEMON_RELEASE": release.path,
                "WINEMON_BIND": "fd://0",
                "WINEMON_WORKERS": 1,
                "PROMETHEUS_MULTIPROC_DIR": room / "metrics",
                "STATE_DIRECTORY": room / "state",
            }
            commands = {
                # Not as Environment=, which an environment file overrides.
                "api": [
                    "/usr/bin/env",
                    *(f"{name}={value}" for name, value in settings.items()),
                    str(programs / "gunicorn"),
                    f"--config={release.path}/app/gunicorn.conf.py",
                ],
                "selftest": [str(programs / "python"), "-m", "app.selftest", "artifacts"],
            }
            self.service.end_trials()
            processes = {
                name: subprocess.Popen(  # noqa: S603 - no shell
                    self.service.trial(name, release.path, command),
                    stdin=listener.fileno(),
                    stdout=log,
                    stderr=log,
                )
                for name, command in commands.items()
            }
            try:
                self._await_trials(release, processes["api"], processes["selftest"], path)
            except OperationError as error:
                said = _last_words(log) if any(process.poll() for process in processes.values()) else ""
                raise OperationError(
                    f"{release.name} fails its trial: {said or error} (all it said: {self.state}/trial.log)"
                ) from None
            finally:
                self.service.end_trials()
                for process in processes.values():
                    process.wait()

    def _await_trials(
        self,
        release: Release,
        api: "subprocess.Popen[bytes]",
        selftest: "subprocess.Popen[bytes]",
        path: Path,
    ) -> None:
        """Return when the API at `path` has answered right and the self-test has passed; else raise."""
        ends = time.monotonic() + TRIAL_SECONDS
        unready: str | None = NO_ANSWER
        while True:
            if api.poll() is not None or selftest.poll():
                raise OperationError("it ended")
            if unready is None and selftest.poll() == 0:
                return
            if time.monotonic() > ends:
                raise OperationError(f"not ready in time: {unready or 'its self-test goes on'}")
            if unready:
                was_silent, unready = unready.startswith(NO_ANSWER), self._answers(release, path)
                if was_silent and unready and not unready.startswith(NO_ANSWER):
                    ends = min(ends, time.monotonic() + READY_SECONDS)
            time.sleep(0.02)

    def _answers(self, release: Release, path: Path) -> str | None:
        """Return why the API at a unix socket does not answer yet; raise where it answers wrongly."""
        with contextlib.closing(UnixConnection(path)) as connection:
            if reason := readiness(connection, release.model):
                return reason
            for sample in release.samples():
                try:
                    status, answer, version = ask(connection, "/predict", sample["wine"])
                except UNANSWERED as error:
                    return f"{NO_ANSWER} ({error})"
                quality = answer.get("quality") if status == 200 and isinstance(answer, dict) else None
                wrong = not isinstance(quality, float) or abs(quality - sample["quality"]) > TOLERANCE
                if wrong or version != release.model:
                    raise OperationError(
                        f"{version} answers {answer}, training of {release.model} said {sample['quality']}"
                    )
        return None

    def _make_live(self, release: Release, before: str | None, why: str, action: str) -> None:
        """Point `current` to a release and bring the service up with it, or back up with what was before."""
        with undisturbed():
            self._point(release.name)
            problem = self._bring_up(release, before)
            back = self._put_back(before) if problem else ""
            self.record(action, release.name, before, why, f"{problem}; {back}" if problem else "ok")
            self.pending.unlink()
            flush(self.state)
        if problem:
            raise OperationError(f"{release.name}: {problem}; {back}")

    def _put_back(self, before: str | None) -> str:
        """Make what was live before live again; return how that went."""
        if before is None:
            self.current.unlink()
            flush(self.current.parent)
            self.service.stop()
            return "no release is live"
        self._point(before)
        try:
            release = verified(self.releases / before)
        except InputError as error:
            self.service.restart()
            return f"{before} is current again, but damaged: {error}; install it again"
        # A restart, as its successor's workers may have brought the master down.
        problem = self._bring_up(release, None)
        return f"{before} does not come up either: {problem}" if problem else f"{before} is live again"

    def _point(self, name: str) -> None:
        partial = self.current.with_name(".current.partial")
        partial.unlink(missing_ok=True)
        partial.symlink_to(self.releases / name)
        partial.replace(self.current)
        flush(self.current.parent)

    def _bring_up(self, release: Release, before: str | None) -> str | None:
        """Have the service serve `current`, and return what is wrong with it then, if anything."""
        libraries = (release.path / "venv").resolve()
        known = before is not None and before != release.name
        if known and (self.releases / str(before) / "venv").resolve() == libraries and self.service.master():
            self.service.reload()
        else:
            self.service.restart()
        started, address = time.monotonic(), self.service.address()
        first = master = self.service.master()
        answered = set[int]()
        # Connections are held for a while: a new one goes to the worker that has the fewest.
        with contextlib.ExitStack() as held:
            for attempt in count(1):
                if attempt % 100 == 0:
                    held.close()
                workers = {pid for pid in children(master) if working_directory(pid) == release.path}
                answered &= workers
                if master and answered == workers and len(workers) >= _worker_count(master):
                    return None
                connection = http.client.HTTPConnection(*address, timeout=5)
                held.callback(connection.close)
                reason = readiness(connection, release.model)
                if reason is None and connection.sock and (pid := served_by(connection.sock, workers)):
                    answered.add(pid)
                master = self.service.master()
                if master != first:
                    return "the service went down with it: see `journalctl -u winemon-api`"
                if time.monotonic() - started > (LIVE_SECONDS if master else 5):
                    return reason or f"{len(answered)} of {_worker_count(master)} workers answer"
                time.sleep(0.02)
        raise AssertionError  # count() does not end

    def _finish_pending(self) -> None:
        """End a switch that was interrupted between its first and its last step."""
        try:
            pending = json.loads(self.pending.read_bytes())
        except FileNotFoundError:
            return
        name, before, action = pending["to"], pending["from"], pending["action"]
        why = f"{pending['why']} (interrupted)".strip()
        if self.live() != name:
            self.record(action, name, before, why, "ended before the switch")
            self.pending.unlink()
            return
        with contextlib.suppress(InputError, OperationError):
            self._make_live(verified(self.releases / name), before, why, action)

    def _prune(self, needed: set[str | None]) -> None:
        """Remove releases beyond the number that is kept, and environments that no release uses."""
        # What a rollback leads to comes first, then what was ever live, then the newest.
        installed, lines = self.installed(), self._ledger()
        lived = [line["to"] for line in lines if line["result"] == "ok" and line["action"] != "install"]
        order = dict.fromkeys([*reversed(self.history()), *reversed(lived), *installed])
        kept = [name for name in order if name in installed][: self.keep]
        for name in set(installed) - {*kept, *needed}:
            away = self._away(self.releases / name)
            (self.releases / name).rename(away)
            shutil.rmtree(away)
        used = {(self.releases / name / "venv").readlink().name for name in self.installed()}
        for path in self.venvs.glob("app-*"):
            if path.name not in used:
                (path / INSTALLED).unlink()
                shutil.rmtree(path)

    # -- the store

    def publish(self, archive: Path, wheels: Sequence[Path] = (), expected: str | None = None) -> str:
        """Put a release and its wheels into the store, once and for ever; return its name."""
        with self.transaction(), self._staged(archive, expected, self.store) as (release, own):
            index, digest = self._index(), sha256(own)
            known = index["releases"].get(release.name)
            if known and known["sha256"] != digest:
                raise InputError(f"{release.name} was published with another content, and that is for ever")
            for file in wheels:
                if not re.fullmatch(re.escape(release.lock) + r"-py3\.\d+-\w+\.tar\.gz", file.name):
                    raise InputError(f"{file.name}: not the name of wheels of {release.name}")
                with tempfile.TemporaryDirectory(dir=own.parent) as directory:
                    same, sent = Path(directory, "wheels.tar.gz"), Path(directory, "wheels")
                    sent.mkdir()
                    unpack(copy(file, same), sent)
                    verify_wheels(sent, (release.path / LOCK).read_text())
                    self._keep(same, self.store / file.name)
            target = self._keep(own, self.store / f"winemon-{release.name}.tar.gz")
            if known is None:
                index["releases"][release.name] = {
                    "archive": target.name,
                    "sha256": digest,
                    "environment": release.lock,
                    "model": release.model,
                    "published": datetime.now(UTC).isoformat(timespec="seconds"),
                    "by": os.environ.get("SUDO_USER") or getpass.getuser(),
                }
                # The first one is what machines get until another is deployed.
                index["live"] = index["live"] or release.name
                write(self.store / "index.json", json.dumps(index, indent=2) + "\n")
        return release.name

    @staticmethod
    def _keep(file: Path, target: Path) -> Path:
        """Put a file that is on disk into the store, also in place of one that is damaged."""
        if not target.is_file() or sha256(target) != sha256(file):
            file.rename(target)
            flush(target.parent)
        return target

    def promote(self, name: str) -> None:
        """Note in the store which release is live, for machines that are new."""
        with self.transaction():
            index = self._index()
            if name not in index["releases"]:
                raise InputError(f"{name} is not in the store")
            if index["live"] != name:
                write(self.store / "index.json", json.dumps({**index, "live": name}, indent=2) + "\n")

    def _index(self) -> dict[str, Any]:
        try:
            index: dict[str, Any] = json.loads((self.store / "index.json").read_bytes())
        except FileNotFoundError:
            return {"live": None, "releases": {}}
        except ValueError as error:
            raise OperationError(
                f"{self.store}/index.json is damaged ({error}): remove it and publish the releases again"
            ) from error
        return index


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Go on whatever key is pressed or whoever hangs up: half way is the one place not to stop at."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT, signal.SIGTSTP)
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _run(*command: str, user: str | None = None) -> None:
    identity: dict[str, Any] = {"user": user, "group": user, "extra_groups": []} if user else {}
    result = subprocess.run(  # noqa: S603 - no shell
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        start_new_session=True,
        **identity,
    )
    if result.returncode:
        said = (result.stderr or result.stdout).strip().splitlines()
        raise OperationError(
            f"{' '.join(command[:4])}: {said[-1] if said else f'exit code {result.returncode}'}"
        )


def _last_words(log: IO[bytes]) -> str:
    """Return the line of a log that says what was wrong: that of the first exception, if there is one."""
    log.seek(0)
    lines = [line.strip() for line in log.read().decode(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Exit)\b", line)]
    return errors[0] if errors else next((line for line in reversed(lines) if "INFO" not in line), "")


def _worker_count(master: int) -> int:
    """Return how many workers a master was told to have."""
    with contextlib.suppress(OSError, ValueError):
        settings = dict(
            line.partition("=")[::2] for line in Path(f"/proc/{master}/environ").read_text().split("\0")
        )
        return int(settings["WINEMON_WORKERS"]) if "WINEMON_WORKERS" in settings else os.cpu_count() or 1
    return 1


# --- the command --------------------------------------------------------------------------------------------


def given(text: str) -> Path:
    """Return the path that the caller means, wherever this command works."""
    return Path(text).absolute()


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse a command line; what is wrong with it is one line, and exit code 2."""
    parser = argparse.ArgumentParser(prog="winemon-release", description="What is live on this machine.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in (
        ("install", "install a release beside the others"),
        ("publish", "put one into the store"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("archive", type=given)
        command.add_argument(
            "--wheels", type=given, action="append", default=[], help="archive of its libraries"
        )
        command.add_argument("--sha256", help="what the archive's SHA-256 has to be")
    command = commands.add_parser("switch", help="make an installed release live")
    command.add_argument("name")
    command.add_argument("--why", default="", help="for the ledger")
    command = commands.add_parser("rollback", help="make what was live before live again")
    command.add_argument("name", nargs="?")
    command.add_argument("--why", default="", help="for the ledger")
    commands.add_parser("status", help="what is live, as JSON")
    command = commands.add_parser("promote", help="note in the store what a new machine is to get")
    command.add_argument("name")
    command = commands.add_parser("environment", help="make the virtual environment of a lock file")
    command.add_argument("lock", type=given)
    command.add_argument("--wheels", type=given, required=True, help="archive of its libraries")
    return parser.parse_args(arguments)


def leave_caller() -> None:
    """Let nothing of the caller's environment, working directory and limits have a say in what root does."""
    caller = os.environ.get("SUDO_USER")
    os.environ.clear()
    os.environ.update(ENVIRONMENT | ({"SUDO_USER": caller} if caller else {}))
    os.chdir("/")
    os.umask(0o022)
    # Where it is ignored, the exit codes of what is started are lost.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for limit in (resource.RLIMIT_FSIZE, resource.RLIMIT_CPU, resource.RLIMIT_AS, resource.RLIMIT_DATA):
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(limit, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def main(arguments: Sequence[str], machine: Machine) -> int:
    """Run the command; return its exit code."""
    options = parse(arguments)
    leave_caller()
    # A terminal that is closed, or a connection that is lost, ends nothing half way.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        match options.command:
            case "install":
                answer = machine.install(options.archive, next(iter(options.wheels), None), options.sha256)
            case "switch" | "rollback":
                answer = f"{machine.switch(options.name, options.why, options.command)} is live"
            case "publish":
                answer = f"{machine.publish(options.archive, options.wheels, options.sha256)} is published"
            case "environment":
                answer = f"{machine.environment(options.lock, options.wheels)} is there"
            case "promote":
                machine.promote(options.name)
                answer = f"{options.name} is what a new machine gets"
            case _:
                answer = json.dumps(machine.status(), indent=2)
    except (InputError, OperationError) as error:
        tell(sys.stderr, str(error))
        return 2 if isinstance(error, InputError) else 1
    except (OSError, ValueError, TypeError, RecursionError) as error:
        tell(sys.stderr, f"{type(error).__name__}: {error}")
        return 1
    tell(sys.stdout, answer)
    return 0


def tell(stream: IO[str], text: str) -> None:
    """Write a line to whoever is still there to read it."""
    with contextlib.suppress(OSError):
        stream.write(text + "\n")
        stream.flush()


if __name__ == "__main__":
    if os.geteuid() != 0:
        sys.exit("winemon-release: run it as root, with sudo")
    sys.exit(main(sys.argv[1:], Machine(Service(), installer="winemon-install")))
