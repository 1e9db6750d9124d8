"""Releases under load: deployed, broken, rolled back, and never a failed request."""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import tarfile
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import httpx
import pytest

from delivery import archive
from tests.e2e.load import USERS, Load
from tests.e2e.machines import INVENTORY
from tests.e2e.releases import HEALTH, STORE, Build, Edit, index, ledger, name, publish, replace, send, status
from tests.e2e.site import ROOT, Site

SAYS_WHO = 'import os; return Liveness(status=f"changed {os.getpid()}")'


def timed(site: Site, playbook: str, *options: str) -> float:
    """Run a play and return the seconds from the command to the new version answering from every worker."""
    start = time.time()
    site.play(playbook, *options)
    line = ledger(site)[-1]
    assert line["result"] == "ok"
    seconds = datetime.fromisoformat(line["time"]).timestamp() - start
    with (site.build / "deployments.log").open("a") as file:
        file.write(f"{line['action']} {line['from']} -> {line['to']}: {seconds:.1f} s\n")
    return seconds


def refused(site: Site, command: str, why: str) -> None:
    """Require a command to be refused in one line that says why, and the live release to be what it was."""
    deadline = time.monotonic() + 60
    while (before := status(site))["workers"].keys() != {before["live"]}:  # those of the one before leave
        assert time.monotonic() < deadline, before
        time.sleep(1)
    result = site.ssh(f"sudo winemon-release {command}")
    assert result.returncode in (1, 2), result
    assert result.stderr.count("\n") == 1
    assert why in result.stderr, result.stderr
    assert ledger(site)[-1]["result"] in result.stderr
    after = status(site)
    assert (after["live"], after["workers"]) == (before["live"], before["workers"])
    assert "winemon-trial" not in site.run("systemctl list-units --all --plain --no-legend 'winemon-*'")


@pytest.fixture(scope="module")
def load(site: Site) -> Iterator[Load]:
    load = Load(site, site.api(""))
    load.start()
    yield load
    load.stop()


@pytest.fixture(autouse=True)
def _no_request_fails(load: Load) -> Iterator[None]:
    """Hold every test to it: requests before, meanwhile and after, and none that failed."""
    before = load.served()
    yield
    time.sleep(3)  # Locust's worker reports every three seconds
    assert load.served() > before


@pytest.fixture(scope="module")
def model(build: Build, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build a release of a model that was trained on fewer wines."""
    directory = tmp_path_factory.mktemp("model")
    header, *rows = (ROOT / "training" / "data" / "winequality-red.csv").read_text().splitlines(keepends=True)
    (directory / "fewer.csv").write_text(header + "".join(rows[:-200]))
    command = [ROOT / ".venv/training/bin/python", "-m", "training.train", "--data", directory / "fewer.csv"]
    subprocess.run([*command, "--output", directory / "artifacts"], cwd=ROOT, check=True, capture_output=True)

    def edit(checkout: Path) -> None:
        shutil.rmtree(checkout / "artifacts")
        shutil.copytree(directory / "artifacts", checkout / "artifacts")

    return build(edit)


def test_a_model_is_deployed(site: Site, model: Path) -> None:
    before = site.client.get(site.api("/model")).json()["version"]
    published = publish(site, model)
    assert timed(site, "ansible/deploy.yml", "-e", "why='a better model'") < 60
    now = status(site)
    assert now["live"] == published
    assert now["ready"]
    assert site.client.get(site.api("/model")).json()["version"] != before
    line = ledger(site)[-1]
    assert (line["action"], line["to"], line["from"], line["who"]) == (
        "switch",
        published,
        now["previous"],
        "debian",
    )
    assert line["why"] == "a better model"


def test_one_changed_line_is_deployed_and_read_from_every_worker(site: Site, build: Build) -> None:
    published = publish(site, build(replace("app/main.py", HEALTH, SAYS_WHO)))
    timed(site, "ansible/deploy.yml", "-e", f"release={published}")
    master = site.run("systemctl show --property=MainPID --value winemon-api")
    answers = set()
    deadline = time.monotonic() + 20
    with contextlib.ExitStack() as held:  # a new connection goes to the worker that has the fewest
        while set(site.run(f"pgrep -P {master}").split()) != {answer.split()[1] for answer in answers}:
            assert time.monotonic() < deadline, answers
            for _ in range(10):
                client = held.enter_context(httpx.Client(trust_env=False))
                answers.add(client.get(site.api("/healthcheck")).json()["status"])
    assert all(answer.startswith("changed ") for answer in answers)


def test_a_rollback_brings_back_what_was_live_before(site: Site, model: Path) -> None:
    assert timed(site, "ansible/rollback.yml") < 40
    assert status(site)["live"] == name(model)
    assert site.client.get(site.api("/healthcheck")).json() == {"status": "ok"}


def test_broken_releases_are_refused(site: Site, build: Build, tmp_path: Path) -> None:
    good = build(replace("app/main.py", HEALTH, HEALTH + "  # the same"))
    with tarfile.open(good) as tar:
        files: dict[str, Path | bytes] = {
            member.name: content.read() for member in tar if (content := tar.extractfile(member))
        }
    corrupt = tmp_path / good.name
    archive.write(corrupt, {**files, "artifacts/model.joblib": b"something else"})
    refused(site, f"install {send(site, corrupt)}", "model.joblib is not the file that its manifest names")
    wrong = hashlib.sha256(b"another").hexdigest()
    refused(site, f"install {send(site, good)} --sha256 {wrong}", f"expected {wrong[:12]}")
    assert name(good) not in status(site)["releases"]


def predictions_off(checkout: Path) -> None:
    path = checkout / "artifacts" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["samples"][0]["quality"] += 1e-6
    path.write_text(json.dumps(manifest))


READY = "return JSONResponse(readiness.model_dump(), 200 if readiness.ready else 503)"


@pytest.mark.parametrize(
    ("edit", "why"),
    [
        (replace("app/main.py", "import gzip\n", "import gzip\nimport wine_cellar\n"), "wine_cellar"),
        (predictions_off, "fails its trial"),
        (
            replace("app/main.py", READY, READY.replace("200 if readiness.ready else ", "")),
            "it says 503",
        ),
    ],
    ids=["import error", "failing self-test", "never ready"],
)
def test_releases_that_do_not_work_never_get_live(site: Site, build: Build, edit: Edit, why: str) -> None:
    broken = send(site, build(edit))
    assert site.ssh(f"sudo winemon-release install {broken}").returncode == 0
    refused(site, f"switch {name(Path(broken))} --why test", why)


def test_a_controller_that_is_lost_right_after_the_switch_leaves_it_finished(
    site: Site, build: Build
) -> None:
    published = publish(site, build(replace("app/main.py", HEALTH, HEALTH.replace("ok", "fine"))))
    play = subprocess.Popen(
        [ROOT / ".venv/ansible/bin/ansible-playbook", "-i", INVENTORY, "ansible/deploy.yml"],
        cwd=ROOT,
        env={**os.environ, "ANSIBLE_SSH_ARGS": "-o ControlMaster=no"},
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    site.run(f"until readlink /opt/winemon/current | grep -qF {published}; do sleep 0.01; done")
    os.killpg(play.pid, signal.SIGKILL)
    assert play.wait() == -signal.SIGKILL
    deadline = time.monotonic() + 30
    while ledger(site)[-1]["to"] != published or ledger(site)[-1]["action"] != "switch":
        assert time.monotonic() < deadline, ledger(site)[-1]
        time.sleep(0.2)
    assert ledger(site)[-1]["result"] == "ok"
    assert status(site)["live"] == published
    assert site.client.get(site.api("/healthcheck")).json() == {"status": "fine"}


def test_other_libraries_restart_the_service_behind_its_socket(site: Site, build: Build) -> None:
    built = build(replace("requirements/app.txt", "#    make lock\n", "#    make lock (again)\n"))
    before = status(site)
    (venv,) = [name for name in before["environments"] if name.startswith("app-")]
    lock = hashlib.sha256((built.parents[1] / "requirements" / "app.txt").read_bytes()).hexdigest()[:12]
    suffix = f"py{before['python']}-{before['architecture']}.tar.gz"
    wheels = f"/var/tmp/app-{lock}-{suffix}"  # noqa: S108 - of a throw-away machine
    site.run(f"cp {STORE}/{venv}-{before['architecture']}.tar.gz {wheels}")
    site.run(f"winemon-release publish {send(site, built)} --wheels {wheels}")
    timed(site, "ansible/deploy.yml")
    now = status(site)
    assert now["live"] == name(built)
    assert now["workers"] == {now["live"]: sum(now["workers"].values())}
    assert len(now["environments"]) == len(before["environments"]) + 1


def test_site_leaves_the_version_to_deployment(site: Site) -> None:
    timed(site, "ansible/rollback.yml")
    live = status(site)["live"]
    assert site.changed(site.play("site.yml")) == 0
    assert status(site)["live"] == live
    assert index(site)["live"] == live, "what a new machine gets"


def test_the_load_was_a_load(site: Site, load: Load) -> None:
    assert load.served() > 1000
    with (site.build / "deployments.log").open("a") as file:
        file.write(f"{load.served()} requests of {USERS} users, 0 failed\n")
