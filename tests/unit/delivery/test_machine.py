"""winemon-release with real archives, gunicorns and a socket that is held open; only systemd is not there."""

import fcntl
import hashlib
import http.client
import io
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from prometheus_client.parser import text_string_to_metric_families

from delivery import archive, machine
from delivery.machine import InputError, Machine, OperationError, Service

ROOT = Path(__file__).parents[3]
UNIT = ROOT / "roles/winemon_api/templates/etc/systemd/system/winemon-api.service.j2"

thorough = pytest.mark.thorough

GUNICORN = """
import os
wsgi_app = "app.main:app"
chdir = os.environ["WINEMON_RELEASE"]
bind = os.environ["WINEMON_BIND"]
workers = int(os.environ["WINEMON_WORKERS"])
worker_class = "uvicorn_worker.UvicornWorker"
control_socket_disable = True
graceful_timeout = 2
"""

MAIN = """
import json, os
from pathlib import Path
model = json.loads(Path("artifacts/manifest.json").read_text())
async def app(scope, receive, send):
    if scope["type"] != "http":
        return
    ready, predicted = {"ready": True, "version": model["version"]}, {"quality": model["quality"]}
    answers = {"/ready": ready, "/predict": predicted}
    headers = [(b"x-model-version", model["version"].encode()), (b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(answers[scope["path"]]).encode()})
"""

SELFTEST = "import sys; from pathlib import Path; assert Path(sys.argv[1], 'manifest.json').exists()\n"
LOCK = "winestub==1.0 \\\n    --hash=sha256:{digest}\n"


def wheel(path: Path, content: str = "# nothing\n", **more: str) -> Path:
    """Write a wheel of one module that has a program, and of more files."""
    info = "winestub-1.0.dist-info"
    files = {
        "winestub.py": content,
        **more,
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: winestub\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": "[console_scripts]\nwinestub = sys:exit\n",
    }
    with zipfile.ZipFile(path / "winestub-1.0-py3-none-any.whl", "w") as file:
        for name, text in files.items():
            file.writestr(name, text)
        file.writestr(f"{info}/RECORD", "".join(f"{name},,\n" for name in [*files, f"{info}/RECORD"]))
    return path / "winestub-1.0-py3-none-any.whl"


def contents(version: str, **changes: str) -> dict[str, bytes]:
    """Return the files of a release of a stand-in application, with some of them changed."""
    model = {"version": f"model-{version}", "quality": 5.5, "samples": [{"wine": {}, "quality": 5.5}]}
    files = {
        "app/__init__.py": "",
        "app/gunicorn.conf.py": GUNICORN,
        "app/main.py": MAIN,
        "app/selftest.py": SELFTEST,
        "artifacts/manifest.json": json.dumps(model),
        "requirements/app.txt": "# nothing\n",
        **changes,
    }
    encoded = {name: text.encode() for name, text in files.items()}
    hashes = {name: archive.digest(content) for name, content in encoded.items()}
    manifest = {
        "format": 1,
        "version": version,
        "lock": hashes["requirements/app.txt"],
        "model": {"version": f"model-{version}"},
        "files": hashes,
    }
    return {**encoded, "manifest.json": json.dumps(manifest).encode()}


class Processes(Service):
    """The service as plain processes: a socket that is held open, and gunicorn on it."""

    def __init__(self, directory: Path, current: Path) -> None:
        self.directory, self.current = directory, current
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.process: subprocess.Popen[bytes] | None = None
        self.restarts = self.reloads = 0

    def address(self) -> tuple[str, int]:
        """Return where the socket is."""
        address: tuple[str, int] = self.listener.getsockname()
        return address

    def master(self) -> int:
        """Return gunicorn's process id."""
        return self.process.pid if self.process and self.process.poll() is None else 0

    def reload(self) -> None:
        """Send HUP, as the unit does."""
        self.reloads += 1
        if master := self.master():  # 0 would be every process of the tests
            os.kill(master, signal.SIGHUP)

    def restart(self) -> None:
        """Start gunicorn anew on the same socket."""
        self.restarts += 1
        self.stop()
        descriptor = self.listener.fileno()
        environment = {
            "WINEMON_RELEASE": str(self.current),
            "WINEMON_BIND": f"fd://{descriptor}",
            "WINEMON_WORKERS": "2",
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        self.process = subprocess.Popen(
            [self.current / "venv/bin/gunicorn", f"--config={self.current}/app/gunicorn.conf.py"],
            env=environment,
            cwd=self.current.parent,  # as the unit has it, or it could not reload once a release is removed
            pass_fds=[descriptor],
            stderr=subprocess.DEVNULL,
        )

    def stop(self) -> None:
        """Stop gunicorn."""
        if self.process:
            self.process.terminate()
            self.process.wait()

    def room(self, name: str) -> Path:
        """Return a directory of the test."""
        return self.directory / name

    def trial(self, name: str, directory: Path, command: Sequence[str]) -> list[str]:
        """Return the command as it is."""
        del name
        return ["/usr/bin/env", f"--chdir={directory}", "PYTHONDONTWRITEBYTECODE=1", *command]

    def end_trials(self) -> None:
        """Stop every child but the service."""
        for pid in machine.children(os.getpid()) - {self.master()}:
            os.kill(pid, signal.SIGTERM)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """Make a machine that has an environment for the stand-in application, and no release."""
    monkeypatch.setenv("SUDO_USER", "tester")
    root = tmp_path / "winemon"
    places = [tmp_path / name for name in ("state", "store", "metrics")]
    here = Machine(Processes(tmp_path, root / "current"), root, *places)
    venv = here.venvs / f"app-{archive.digest(b'# nothing' + bytes([10]))[:12]}-py{machine.PYTHON}"
    venv.mkdir(parents=True)
    for name in ("bin", "lib", "pyvenv.cfg"):
        (venv / name).symlink_to(Path(sys.prefix) / name)
    machine.seal(venv)
    yield here
    here.service.stop()
    here.service.listener.close()  # type: ignore[attr-defined]  # of Processes


@pytest.fixture
def pack(tmp_path: Path) -> Callable[..., Path]:
    """Return what writes an archive of files, named as a release is."""

    def write(files: dict[str, bytes], name: str = "winemon-x.tar.gz") -> Path:
        archive.write(tmp_path / name, files)
        return tmp_path / name

    return write


def ask(here: Machine, path: str = "/ready") -> Any:
    connection = http.client.HTTPConnection(*here.service.address(), timeout=5)
    try:
        return machine.ask(connection, path)[1]
    finally:
        connection.close()


def results(here: Machine) -> list[tuple[str, str, str]]:
    return [(line["action"], line["to"], line["result"]) for line in here._ledger()]


# --- install


def test_an_installed_release_is_what_the_archive_holds(here: Machine, pack: Callable[..., Path]) -> None:
    built = pack(contents("1"))
    assert here.install(built, expected=archive.sha256(built)) == "1"
    release = machine.verified(here.releases / "1")
    assert (release.path / "app" / "main.py").read_text() == MAIN
    assert (release.path / "venv" / "installed").exists()
    assert here.live() is None
    assert results(here) == [("install", "1", "ok")]
    assert here.install(built) == "1"
    assert results(here) == [("install", "1", "ok")], "it was there"


def test_a_damaged_release_is_refused_and_installing_it_again_mends_it(
    here: Machine, pack: Callable[..., Path]
) -> None:
    built = pack(contents("1"))
    here.install(built)
    (here.releases / "1" / "app" / "main.py").write_text("other = True\n")
    with pytest.raises(InputError, match=r"1: app/main\.py is not the file that its manifest names"):
        here.switch("1")
    here.install(built)
    machine.verified(here.releases / "1")
    assert here.installed() == ["1"]


def test_another_content_under_the_same_name_is_refused(here: Machine, pack: Callable[..., Path]) -> None:
    here.install(pack(contents("1")))
    with pytest.raises(OperationError, match="1 is installed with another content"):
        here.install(pack(contents("1", **{"app/main.py": "other = True\n"})))
    assert (here.releases / "1" / "app" / "main.py").read_text() == MAIN


def changed(**changes: Any) -> dict[str, bytes]:
    files = contents("1")
    manifest = {**json.loads(files["manifest.json"]), **changes}
    return {**files, "manifest.json": json.dumps(manifest).encode()}


@pytest.mark.parametrize(
    ("files", "why"),
    [
        ({**contents("1"), "app/main.py": b"x"}, "app/main.py is not the file"),
        ({**contents("1"), "app/more.py": b"x"}, "app/more.py is not in its manifest"),
        ({k: v for k, v in contents("1").items() if k != "app/main.py"}, "app/main.py is missing"),
        ({**contents("1"), "../escape": b"x"}, "'../escape' is not a plain file below it"),
        ({**contents("1"), "venv": b"x"}, "venv is not in its manifest"),
        ({"app/main.py": b"x"}, "not a release: manifest.json"),
        ({**contents("1"), "manifest.json": b"[]"}, "not a release"),
        (changed(format=2), "format 2, this command reads 1"),
        (changed(version="../1"), "no proper version"),
        (changed(lock="0" * 64), "its lock is not that of"),
    ],
)
def test_what_is_not_whole_is_not_installed(
    here: Machine, pack: Callable[..., Path], files: dict[str, bytes], why: str
) -> None:
    with pytest.raises(InputError) as refused:
        here.install(pack(files))
    assert why in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not list(here.releases.iterdir())
    assert results(here) == [("install", "winemon-x.tar.gz", str(refused.value))]


def test_links_and_wrong_hashes_and_other_files_are_refused(
    here: Machine, pack: Callable[..., Path], tmp_path: Path
) -> None:
    with tarfile.open(tmp_path / "link.tar.gz", "w:gz") as tar:
        link = tarfile.TarInfo("app")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc"
        tar.addfile(link)
    with pytest.raises(InputError, match="'app' is not a plain file"):
        here.install(tmp_path / "link.tar.gz")
    with pytest.raises(InputError, match=r"winemon-x\.tar\.gz: its SHA-256 is not the expected 000000000000"):
        here.install(pack(contents("1")), expected="0" * 64)
    (tmp_path / "text").write_text("no archive")
    with pytest.raises(InputError, match="text: cannot be unpacked"):
        here.install(tmp_path / "text")
    with pytest.raises(InputError, match="nowhere: No such file"):
        here.install(tmp_path / "nowhere")
    assert here.installed() == []


# --- environments


def test_an_environment_is_made_from_wheels_that_the_lock_file_names(
    here: Machine, pack: Callable[..., Path], tmp_path: Path
) -> None:
    good = wheel(tmp_path)
    lock = LOCK.format(digest=archive.sha256(good))
    built = pack(contents("1", **{"requirements/app.txt": lock + "    # via nothing\n"}))
    with pytest.raises(InputError, match=r"1 needs the environment app-\w+-py3[.\d]+: give --wheels"):
        here.install(built)

    stray = pack(
        {good.name: good.read_bytes(), "requirements.txt": LOCK.format(digest="0" * 64).encode()}, "w"
    )
    with pytest.raises(InputError, match="the wheels are of another lock file"):
        here.install(built, stray)
    (tmp_path / "other").mkdir()
    other = wheel(tmp_path / "other", "stolen = True\n").read_bytes()
    with pytest.raises(InputError, match=r"winestub.*whl: not a wheel that the lock file names"):
        here.install(built, pack({good.name: other, "requirements.txt": lock.encode()}, "w"))
    assert len(list(here.venvs.iterdir())) == 1

    wheels = pack({good.name: good.read_bytes(), "requirements.txt": lock.encode()}, "w")
    assert here.install(built, wheels) == "1"
    programs = here.releases / "1" / "venv" / "bin"
    subprocess.run([programs / "python", "-c", "import winestub"], check=True)
    subprocess.run([programs / "winestub"], check=True)
    (activated,) = subprocess.check_output(
        ["/bin/sh", "-c", f". {programs}/activate; echo $VIRTUAL_ENV"], text=True
    ).splitlines()
    assert Path(activated) == (here.releases / "1" / "venv").resolve()
    assert len(here.status()["environments"]) == 2


def emptied(venv: Path) -> None:
    for path in venv.rglob("*.py*"):
        path.write_bytes(b"")


def stale(venv: Path) -> None:
    next(venv.rglob("winestub*.pyc")).write_bytes(b"")


def strange(venv: Path) -> None:
    next(venv.rglob("winestub.py")).with_name("more.pth").write_text("import antigravity\n")


def older(venv: Path) -> None:
    (venv / "installed").write_bytes(b"")


def elsewhere(venv: Path) -> None:
    (venv / "bin" / "python").unlink()
    (venv / "bin" / "python").symlink_to("/bin/false")


@thorough
@pytest.mark.parametrize("damage", [emptied, stale, strange, older, elsewhere])
def test_a_damaged_environment_does_not_count_and_installing_again_mends_it(
    here: Machine, pack: Callable[..., Path], tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    good = wheel(tmp_path)
    lock = LOCK.format(digest=archive.sha256(good))
    built = pack(contents("1", **{"requirements/app.txt": lock}))
    wheels = pack({good.name: good.read_bytes(), "requirements.txt": lock.encode()}, "w")
    here.install(built, wheels)
    venv = (here.releases / "1" / "venv").resolve()
    assert venv.name in here.status()["environments"]
    damage(venv)
    assert venv.name not in here.status()["environments"]
    with pytest.raises(InputError, match="give --wheels"):
        here.install(built)
    here.install(built, wheels)
    assert venv.name in here.status()["environments"]
    subprocess.run([venv / "bin" / "winestub"], check=True)


@thorough
def test_an_environment_that_no_release_has_is_made_for_its_lock_file(
    here: Machine, pack: Callable[..., Path], tmp_path: Path
) -> None:
    good = wheel(tmp_path)
    lock = tmp_path / "loadtest.txt"
    lock.write_text(LOCK.format(digest=archive.sha256(good)))
    wheels = pack({good.name: good.read_bytes(), "requirements.txt": lock.read_bytes()}, "w")
    name = f"loadtest-{archive.sha256(lock)[:12]}-py{machine.PYTHON}"
    for _ in range(2):
        assert here.environment(lock, wheels) == name
    assert name in here.status()["environments"]
    subprocess.run([here.venvs / name / "bin" / "winestub"], check=True)
    with pytest.raises(InputError, match=r"Lock: not the name of a lock file"):
        here.environment(lock.rename(tmp_path / "Lock"), wheels)


@pytest.mark.parametrize(
    "option",
    [
        "\n--no-binary=:all:\n",
        pytest.param(" ; python_version > '3' --no-binary=:all:\n", marks=thorough),
        "\n-e /somewhere\n",
    ],
)
def test_what_is_no_wheel_is_not_built(
    here: Machine, pack: Callable[..., Path], tmp_path: Path, option: str
) -> None:
    good = wheel(tmp_path)
    setup = f"open({str(tmp_path / 'ran')!r}, 'w')\n".encode()
    source = pack({"evil-1.0/setup.py": setup, "evil-1.0/PKG-INFO": b"Name: evil\n"}, "evil-1.0.tar.gz")
    lock = f"evil==1.0 --hash=sha256:{archive.sha256(source)}{option}"
    built = pack(contents("1", **{"requirements/app.txt": lock}))
    with pytest.raises(InputError, match=r"evil-1\.0\.tar\.gz: not a wheel"):
        here.install(built, pack({source.name: source.read_bytes(), "requirements.txt": lock.encode()}, "w"))
    lock = LOCK.format(digest=archive.sha256(good)).rstrip() + option
    built = pack(contents("2", **{"requirements/app.txt": lock}))
    wheels = pack({good.name: good.read_bytes(), "requirements.txt": lock.encode()}, "w")
    if ";" in option:
        assert here.install(built, wheels) == "2", "what follows a marker is left out"
    else:
        with pytest.raises(InputError, match="neither a version nor its hash"):
            here.install(built, wheels)
    assert not (tmp_path / "ran").exists()


@thorough
def test_nothing_of_who_calls_it_and_of_the_wheels_is_run(
    here: Machine, pack: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = tmp_path / "ran"
    ran.mkdir()
    tells = f"import os\nopen(os.path.join({str(ran)!r}, __name__), 'w').close()\n"
    modules = ("venv", "pip", "json", "sitecustomize", "usercustomize", "ensurepip", "tempfile", "encodings")
    pth = tells.replace("\n", ";").replace("__name__", "'pth'")
    good = wheel(
        tmp_path,
        **{"stub.pth": f"{pth}\n", "pip/__init__.py": tells, "pip/_internal/__init__.py": tells},
        **{f"{name}.py": tells for name in modules if name not in ("pip", "encodings")},
        **{"winestub-1.0.data/scripts/python": f"#!/bin/sh\ntouch {ran}/python\n"},
    )
    lock = LOCK.format(digest=archive.sha256(good))
    built = pack(contents("1", **{"requirements/app.txt": lock}))
    wheels = pack({good.name: good.read_bytes(), "requirements.txt": lock.encode()}, "w.tar.gz")
    hostile = tmp_path / "hostile"
    hostile.mkdir()
    for name in modules:
        (hostile / f"{name}.py").write_text(tells)
    for name in ("sync", "python3", "python", "systemctl", "systemd-run", "env"):
        (hostile / name).write_text(f"#!/bin/sh\ntouch {ran}/{name}\n")
        (hostile / name).chmod(0o755)
    (hostile / "pip.conf").write_text(f"[install]\ntarget = {tmp_path}/target\n")
    for name, value in {
        "PATH": f"{hostile}:{os.environ['PATH']}",
        "PYTHONPATH": str(hostile),
        "PYTHONUSERBASE": str(hostile),
        "PYTHONSTARTUP": str(hostile / "json.py"),
        "TMPDIR": str(hostile),
        "HOME": str(hostile),
        "PIP_CONFIG_FILE": str(hostile / "pip.conf"),
        "PIP_TARGET": str(tmp_path / "target"),
        "PIP_REQUIRE_VIRTUALENV": "nonsense",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(hostile)
    with mock.patch.dict(os.environ):
        (hostile / built.name).symlink_to(built)
        assert machine.main(["install", built.name, f"--wheels={wheels}"], here) == 0
    assert sorted(path.name for path in ran.iterdir()) == []
    assert not (tmp_path / "target").exists()
    assert (here.releases / "1" / "venv" / "lib").is_dir()
    with mock.patch.dict(os.environ):
        assert machine.main(["install", "/dev/zero"], here) == 2
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


# --- switch


def test_releases_are_switched_and_rolled_back_without_a_pause(
    here: Machine, pack: Callable[..., Path]
) -> None:
    service = here.service
    assert isinstance(service, Processes)
    for version in ("1", "2", "3"):
        here.install(pack(contents(version)))
    assert here.switch("1", "first") == "1"
    assert ask(here)["version"] == "model-1"
    assert (service.restarts, service.reloads) == (1, 0)
    master = service.master()

    assert here.switch("2", "better") == "2"
    assert here.switch("2") == "2", "it is live already"
    assert (service.restarts, service.reloads, service.master()) == (1, 1, master)
    workers = {
        pid for pid in machine.children(master) if machine.working_directory(pid) == here.releases / "2"
    }
    assert len(workers) == 2
    assert ask(here)["version"] == "model-2"

    here.switch("3")
    assert here.status()["previous"] == "2"
    assert here.switch(None, "worse", "rollback") == "2"
    assert here.switch(None, "worse still", "rollback") == "1", "3 is not gone back to"
    assert ask(here)["version"] == "model-1"
    with pytest.raises(InputError, match="nothing was live before"):
        here.switch(None, "", "rollback")
    status = here.status()
    assert (status["live"], status["ready"], status["previous"]) == ("1", True, None)
    last = list(here._ledger())[-1]
    assert (last["who"], last["from"], last["to"], last["why"]) == ("tester", "2", "1", "worse still")
    assert not here.pending.exists()


def test_the_node_exporter_is_told_of_the_last_step_of_each_kind(
    here: Machine, pack: Callable[..., Path]
) -> None:
    def told() -> dict[tuple[str, ...], float]:
        (family,) = text_string_to_metric_families((here.metrics / "winemon-release.prom").read_text())
        assert family.name == "winemon_release_step_timestamp_seconds"
        names = ("action", "release", "result")
        return {tuple(sample.labels[name] for name in names): sample.value for sample in family.samples}

    here.install(pack(contents("1")))
    assert not here.metrics.exists(), "where there is no exporter, nothing is written for it"
    here.metrics.mkdir()
    here.switch("1")
    assert time.time() - told()["switch", "1", "ok"] < 60
    with pytest.raises(InputError):
        here.switch('"no\\such"\n')
    assert told().keys() == {("install", "1", "ok"), ("switch", "", "failed")}


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"app/main.py": "import wine_cellar\n"}, "ModuleNotFoundError: No module named 'wine_cellar'"),
        pytest.param({"app/selftest.py": "raise SystemExit('corked')\n"}, "corked", marks=thorough),
        ({"app/main.py": MAIN.replace('model["quality"]', "5.6")}, "answers {'quality': 5.6}"),
        pytest.param(
            {"app/main.py": MAIN.replace('model["quality"]', "None")},
            "answers {'quality': None}",
            marks=thorough,
        ),
        ({"app/main.py": MAIN.replace('"status": 200', '"status": 503')}, "not ready in time: it says 503"),
        pytest.param(
            {"app/main.py": MAIN.replace('"version": model["version"]', '"version": "x"')},
            "serves model x",
            marks=thorough,
        ),
        pytest.param(
            {"app/gunicorn.conf.py": "workers = no_number\n"},
            "NameError: name 'no_number' is not defined",
            marks=thorough,
        ),
        ({"artifacts/manifest.json": json.dumps({"version": "model-2", "quality": 1})}, "no samples"),
    ],
)
def test_a_release_that_fails_its_trial_never_gets_live(
    here: Machine,
    pack: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, str],
    why: str,
) -> None:
    monkeypatch.setattr(machine, "READY_SECONDS", 0.5)
    here.install(pack(contents("1")))
    here.install(pack(contents("2", **changes)))
    here.switch("1")
    workers = machine.children(here.service.master())
    with pytest.raises((OperationError, InputError)) as refused:
        here.switch("2")
    assert why in str(refused.value)
    assert "\n" not in str(refused.value)
    assert here.live() == "1"
    assert machine.children(here.service.master()) == workers, "the live ones were left alone"
    assert results(here)[-1] == ("switch", "2", str(refused.value))


def test_a_release_that_fails_only_where_it_is_live_is_taken_back(
    here: Machine, pack: Callable[..., Path]
) -> None:
    fails = "import os\nassert not os.environ['WINEMON_RELEASE'].endswith('current')\n" + MAIN
    here.install(pack(contents("1")))
    here.install(pack(contents("2", **{"app/main.py": fails})))
    with pytest.raises(OperationError, match=r"2: .*; no release is live"):
        here.switch("2")
    assert here.live() is None
    here.switch("1")
    with pytest.raises(OperationError, match=r"2: the service went down with it.*; 1 is live again"):
        here.switch("2")
    assert ask(here)["version"] == "model-1"
    assert not here.pending.exists()
    assert results(here)[-1][2].endswith("1 is live again")


def test_what_is_not_installed_cannot_be_live(here: Machine, pack: Callable[..., Path]) -> None:
    here.install(pack(contents("1")))
    with pytest.raises(InputError, match="2 is not installed; installed are 1"):
        here.switch("2")
    assert results(here)[-1][:2] == ("switch", "2")


# --- interrupted, and at once


class PowerCut(BaseException):
    """Ends a call where nothing can be done about it."""


PLACED = ("rename", "replace", "symlink", "unlink", "remove")


def test_whenever_it_is_killed_what_is_live_can_start(
    here: Machine, pack: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Install what is live again, damaged, and be killed before each change of a name in turn."""

    def installed(*command: str, **_: Any) -> None:
        if "--prefix" in " ".join(command):
            new = next(Path(word.partition("=")[2]) for word in command if word.startswith("--prefix="))
            (new / "bin").mkdir(exist_ok=True)
            (new / "bin" / "python").symlink_to(sys.executable)
            (new / "pyvenv.cfg").touch()

    monkeypatch.setattr(machine, "_run", installed)
    good = wheel(tmp_path)
    lock = LOCK.format(digest=archive.sha256(good))
    built = pack(contents("1", **{"requirements/app.txt": lock}))
    wheels = pack({good.name: good.read_bytes(), "requirements.txt": lock.encode()}, "w")
    here.install(built, wheels)
    here._point("1")
    program = here.current / "venv" / "bin" / "python"
    venv = program.parent.parent.resolve()
    other_way = tmp_path / "other way"
    other_way.symlink_to(venv)
    kept: dict[str, Any] = {name: getattr(os, name) for name in PLACED}

    def killed_at(last: int) -> bool:
        steps = itertools.count(1)

        def step(name: str) -> Callable[..., Any]:
            def change(*arguments: Any, **options: Any) -> Any:
                if next(steps) == last:
                    raise PowerCut
                done = kept[name](*arguments, **options)
                assert program.exists(), f"after {name} {arguments}"
                assert (here.current / "manifest.json").exists(), f"after {name} {arguments}"
                return done

            return change

        with monkeypatch.context() as patch:
            for name in PLACED:
                patch.setattr(os, name, step(name))
            try:
                here.install(built, wheels)
            except PowerCut:
                return True
        return False

    for last in itertools.count(1):
        (venv / "installed").write_bytes(b"")
        (here.releases / "1" / "app" / "main.py").write_bytes(b"")
        (here.releases / "1" / "venv").unlink()
        (here.releases / "1" / "venv").symlink_to(other_way)
        if not killed_at(last):
            break
        assert program.exists()
        assert (here.current / "manifest.json").exists()
    assert last > 5
    assert here.status()["releases"] == ["1"]


@pytest.mark.parametrize(("method", "live"), [("_point", "1"), ("_bring_up", "2")])
def test_an_interrupted_switch_is_ended_by_the_next_call(
    here: Machine, pack: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, method: str, live: str
) -> None:
    def cut(*_: Any) -> None:
        raise PowerCut

    for version in ("1", "2", "3"):
        here.install(pack(contents(version)))
    here.switch("1")
    with monkeypatch.context() as patch:
        patch.setattr(here, method, cut)
        with pytest.raises(PowerCut):
            here.switch("2", "why not")
    assert here.live() == live
    assert ask(here)["version"] == "model-1", "the workers were told nothing yet"
    # What other interrupted calls leave.
    (here.releases / ".partial").mkdir()
    (here.venvs / "app-000000000000-py3.13").mkdir()
    here.install(pack(contents("3")))
    assert ask(here)["version"] == f"model-{live}"
    (line,) = [line for line in here._ledger() if "(interrupted)" in line["why"]]
    assert line["result"] == ("ok" if live == "2" else "ended before the switch")
    assert not here.pending.exists()
    assert not (here.releases / ".partial").exists()
    assert len(list(here.venvs.iterdir())) == 1


def test_two_calls_at_once_do_not_mix(here: Machine, pack: Callable[..., Path]) -> None:
    here.state.mkdir()
    with (here.state / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(OperationError, match="another winemon-release is at work"):
            here.install(pack(contents("1")))
    here.install(pack(contents("1")))


def test_only_so_many_releases_are_kept_and_environments_that_are_used(
    here: Machine, pack: Callable[..., Path]
) -> None:
    here.keep = 2
    unused = here.venvs / "app-000000000000-py3.13"
    unused.mkdir()
    machine.seal(unused)
    others = here.venvs / "loadtest-000000000000-py3.13"
    others.mkdir()
    for version in ("1", "2", "never", "4"):
        here.install(pack(contents(version)))
        if version != "never":
            here.switch(version)
    assert sorted(here.installed()) == ["2", "4"], "what never was live goes first"
    assert not unused.exists()
    assert others.exists()
    here.switch("2", "", "rollback")
    assert here.service.reloads == 3, "also where the release it began with is gone"  # type: ignore[attr-defined]  # of Processes


# --- the store


def test_a_published_release_is_for_ever(here: Machine, pack: Callable[..., Path], tmp_path: Path) -> None:
    good = wheel(tmp_path)
    lock = LOCK.format(digest=archive.sha256(good))
    name = f"app-{hashlib.sha256(lock.encode()).hexdigest()[:12]}"
    wheels = pack(
        {good.name: good.read_bytes(), "requirements.txt": lock.encode()}, f"{name}-py3.13-x86_64.tar.gz"
    )
    built = pack(contents("1", **{"requirements/app.txt": lock}))
    for _ in range(2):
        assert here.publish(built, [wheels], archive.sha256(built)) == "1"
    index = json.loads((here.store / "index.json").read_text())
    assert index["live"] == "1"
    entry = index["releases"]["1"]
    assert archive.sha256(here.store / entry["archive"]) == entry["sha256"] == archive.sha256(built)
    assert (entry["environment"], entry["model"], entry["by"]) == (name, "model-1", "tester")
    assert (here.store / wheels.name).read_bytes() == wheels.read_bytes()

    with pytest.raises(InputError, match="1 was published with another content"):
        here.publish(pack(contents("1", **{"requirements/app.txt": lock, "app/main.py": ""})))
    built = pack(contents("1", **{"requirements/app.txt": lock}))
    with pytest.raises(InputError, match="w: not the name of wheels of 1"):
        here.publish(built, [pack({}, "w")])
    here.publish(pack(contents("2")))
    here.promote("2")
    assert json.loads((here.store / "index.json").read_text())["live"] == "2"
    with pytest.raises(InputError, match="3 is not in the store"):
        here.promote("3")
    assert sorted(path.name for path in here.store.iterdir()) == sorted(
        ["index.json", "winemon-1.tar.gz", "winemon-2.tar.gz", wheels.name]
    )


def test_publishing_again_replaces_what_is_damaged_in_the_store(
    here: Machine, pack: Callable[..., Path], tmp_path: Path
) -> None:
    good = wheel(tmp_path)
    lock = LOCK.format(digest=archive.sha256(good))
    wheels = pack(
        {good.name: good.read_bytes(), "requirements.txt": lock.encode()},
        f"app-{archive.digest(lock.encode())[:12]}-py3.13-x86_64.tar.gz",
    )
    built = pack(contents("1", **{"requirements/app.txt": lock}))
    here.publish(built, [wheels])
    for name in ("winemon-1.tar.gz", wheels.name):
        (here.store / name).write_bytes(b"")
        here.publish(built, [wheels])
    assert archive.sha256(here.store / "winemon-1.tar.gz") == archive.sha256(built)
    assert archive.sha256(here.store / wheels.name) == archive.sha256(wheels)
    (here.store / "index.json").write_bytes(b"")
    with pytest.raises(OperationError, match=r"index\.json is damaged .*: remove it and publish"):
        here.publish(built, [wheels])


# --- files


def test_a_line_of_the_ledger_that_a_power_cut_ended_early_takes_no_other_with_it(
    here: Machine, pack: Callable[..., Path]
) -> None:
    here.install(pack(contents("1")))
    with here.ledger.open("a") as ledger:
        ledger.write('{"time": "2026-')
    here.install(pack(contents("2")))
    assert [line["to"] for line in here._ledger()] == ["1", "2"]


def test_a_file_is_written_through_no_link(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("mine")
    for name in ("x.prom", ".x.prom.partial"):
        (tmp_path / name).symlink_to(tmp_path / "kept")
    machine.write(tmp_path / "x.prom", "told")
    assert (tmp_path / "kept").read_text() == "mine"
    assert not (tmp_path / "x.prom").is_symlink()
    assert (tmp_path / "x.prom").read_text() == "told"


def test_only_a_plain_file_is_copied(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        with pytest.raises(InputError, match=f"^{path}: "):
            machine.copy(path, tmp_path / "copy")


# --- the command


def test_the_command_answers_in_one_line_and_by_its_exit_code(
    here: Machine,
    pack: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run(*arguments: str) -> tuple[int, str, str]:
        return machine.main(arguments, here), *capsys.readouterr()

    monkeypatch.chdir("/")
    monkeypatch.setattr(machine, "leave_caller", lambda: None)
    built = str(pack(contents("1")))
    assert run("install", built) == (0, "1\n", "")
    assert run("switch", "1", "--why", "first") == (0, "1 is live\n", "")
    assert run("publish", built) == (0, "1 is published\n", "")
    assert run("promote", "1") == (0, "1 is what a new machine gets\n", "")
    code, out, _ = run("status")
    assert (code, json.loads(out)["live"], json.loads(out)["workers"]) == (0, "1", {"1": 2})
    assert run("rollback") == (2, "", "nothing was live before; name an installed release\n")
    assert run("rollback", "2") == (2, "", "2 is not installed; installed are 1\n")
    here.install(pack(contents("2", **{"app/main.py": "import wine_cellar\n"})))
    code, out, error = run("switch", "2")
    assert (code, out, error.count("\n")) == (1, "", 1)
    with pytest.raises(SystemExit, match="2"):
        run("swich", "1")
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def test_nobody_need_be_there_to_read_the_answer() -> None:
    class Gone(io.StringIO):
        def write(self, _: str) -> int:
            raise BrokenPipeError

    machine.tell(Gone(), "it is live")


# --- what it knows of the machine


def test_a_trial_shares_the_sandbox_of_the_unit_and_not_its_directories() -> None:
    hardening = (ROOT / "roles/base/files/hardening.conf").read_text()
    properties = machine.transient_properties(UNIT.read_text() + hardening + "[Install]\nWantedBy=x\n")
    assert {"User=winemon", "EnvironmentFile=/etc/winemon/api.env", "ProtectSystem=strict"} <= set(properties)
    sandbox = [line for line in hardening.splitlines() if "=" in line and not line.startswith("#")]
    assert [line for line in properties if line in sandbox] == sandbox, "all of it, in its order"
    assert "\nWorkingDirectory=/opt/winemon\n" in UNIT.read_text(), "what a removed release cannot take away"
    names = {line.partition("=")[0] for line in properties}
    assert not names & {"ExecStart", "Type", "Restart", "RuntimeDirectory", "StateDirectory", "WantedBy"}


@pytest.mark.parametrize(
    ("server", "client"), [("127.0.0.1", "127.0.0.1"), ("::", "127.0.0.1"), ("::1", "::1")]
)
def test_who_serves_a_connection_is_found_by_its_other_end(server: str, client: str) -> None:
    family = socket.AF_INET6 if ":" in server else socket.AF_INET
    with socket.create_server((server, 0), family=family, dualstack_ipv6=server == "::") as listener:
        port = listener.getsockname()[1]
        with socket.create_connection((client, port)) as connection:
            accepted, _ = listener.accept()
            with accepted:
                assert machine.served_by(connection, {os.getpid()}) == os.getpid()
                assert machine.served_by(connection, {1}) is None


def test_a_lock_file_is_read_without_markers_and_comments() -> None:
    lock = (
        'a==1 ; python_version < "3.13" \\\n    --hash=sha256:00 \\\n    --hash=sha256:11\n'
        "    # via b\nb==2 \\\n    --hash=sha256:22\n"
    )
    assert machine.pins(lock) == ["a==1", "--hash=sha256:00", "--hash=sha256:11", "b==2", "--hash=sha256:22"]


def test_the_last_words_are_those_that_say_what_was_wrong() -> None:
    log = io.BytesIO(
        b"[1] [INFO] Starting\nTraceback:\nKeyError: 'a'\nDuring:\nHaltServer: 3\n[1] [ERROR] down\n"
    )
    assert machine._last_words(log) == "KeyError: 'a'"
    assert (
        machine._last_words(io.BytesIO(b"[1] [ERROR] no model\n[1] [INFO] bye\n")) == "[1] [ERROR] no model"
    )
    assert machine._last_words(io.BytesIO(b"")) == ""
