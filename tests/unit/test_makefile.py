"""What the user's shell holds, or asks of make, changes no verb."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = [
    path
    for pattern in ("ansible/*", "ansible/files/*", "tests/*", "tests/*/*", "roles/*/files/*", ".ci/*")
    for path in sorted(ROOT.glob(pattern))
    if path.is_file() and re.search(rb"^#!/bin/(ba)?sh\n(.*\n)*[^#\n]*\bcd .*dirname", path.read_bytes())
]

# Each tool notes its name, its arguments and its environment, and makes what make waits for.
TOOL = """#!/bin/sh
{ echo "$0 $*"; env; } >> calls
case "$*" in *"venv --clear .venv/uv")
  mkdir -p .venv/uv/bin; cp "$0" .venv/uv/bin/python; touch .venv/uv/bin/uv;;
esac
case "$*" in "venv "*) mkdir -p .venv/app;; esac
case "$*" in *training.train*) sleep 0.2; echo new > artifacts/manifest.json;; esac
case "$*" in *delivery.release*) cp artifacts/manifest.json released; echo build/released.tar.gz;; esac
"""
TOOLS = (
    *(
        "tool",
        "ansible/debian-packages",
        "ansible/up",
        "ansible/down",
        "ansible/files/build-box",
        "tests/run",
    ),
    *(".venv/uv/bin/uv", ".venv/app/bin/gunicorn", ".venv/dev/bin/python", ".venv/training/bin/python"),
    *(".venv/ansible/bin/python", ".venv/ansible/bin/ansible-playbook"),
)
SAFE = {"PATH": os.environ["PATH"], "HOME": "/nonexistent"}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Make a checkout of the Makefile alone, with environments and a model, whose tools do nothing."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "requirements").mkdir()
    (tmp_path / "inventory").mkdir()
    (tmp_path / "artifacts").mkdir()
    (tmp_path / "inventory" / "current").touch()
    (tmp_path / "artifacts" / "manifest.json").write_text("old\n")
    uses = ("app", "training", "loadtest", "ansible", "dev")
    for use in ("uv", *uses):
        (tmp_path / "requirements" / f"{use}.txt").touch()
    for tool in TOOLS:
        path = tmp_path / tool
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(TOOL)
        path.chmod(0o755)
    for use in uses:
        (tmp_path / f".venv/{use}").mkdir(exist_ok=True)
        (tmp_path / f".venv/{use}/.synced").touch()
    return tmp_path


def make(project: Path, *arguments: str, **environment: str) -> str:
    """Run make with these variables in the environment and return what its tools noted."""
    command = ["make", f"PYTHON={project / 'tool'}", *arguments]
    done = subprocess.run(
        command, cwd=project, env=SAFE | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    calls = project / "calls"
    return calls.read_text() if calls.exists() else ""


def test_an_environment_is_filled_by_its_name_whatever_uv_hears_from_the_shell(project: Path) -> None:
    shutil.rmtree(project / ".venv/app")
    calls = make(project, ".venv/app/.synced", UV_SYSTEM_PYTHON="1", UV_PYTHON="/usr/bin/python3")
    assert re.search(r"^\S+/uv pip sync .*--python \.venv/app ", calls, re.MULTILINE)
    assert not re.search(r"^UV_(SYSTEM_)?PYTHON=", calls, re.MULTILINE)


@pytest.mark.parametrize(("told", "upgraded"), [("", 0), ("UPGRADE=1", 6)])
def test_pins_of_lock_files_stay_unless_make_is_told_to_upgrade(
    project: Path, told: str, upgraded: int
) -> None:
    make(project, "lock", *told.split())
    calls = re.findall("pip compile .*", (project / "requirements/calls").read_text())
    assert (len(calls), sum(" --upgrade " in call for call in calls)) == (6, upgraded)


@pytest.mark.parametrize(
    "name", ["PIP_USER", "PIP_TARGET", "PIP_PYTHON", "UV_CONSTRAINT", "PYTHONPATH", "PYTHONSAFEPATH"]
)
def test_what_changes_how_packages_are_installed_is_not_passed_on(project: Path, name: str) -> None:
    (project / ".venv/uv/bin/uv").unlink()
    calls = make(project, ".venv/uv/bin/uv", **{name: "1"})
    assert "-m pip install" in calls
    assert f"\n{name}=" not in calls


@pytest.mark.parametrize(
    "name", ["GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "CDPATH", "BASH_ENV", "VIRTUAL_ENV"]
)
def test_what_leads_elsewhere_is_not_passed_on(project: Path, name: str) -> None:
    assert f"\n{name}=" not in make(project, "release", **{name: "/nonexistent"})


def test_where_packages_come_from_and_the_way_there_is_passed_on(project: Path) -> None:
    kept = (
        *(
            "PIP_INDEX_URL",
            "PIP_EXTRA_INDEX_URL",
            "PIP_FIND_LINKS",
            "PIP_TRUSTED_HOST",
            "PIP_CERT",
            "PIP_CLIENT_CERT",
        ),
        *(
            "PIP_PROXY",
            "PIP_TIMEOUT",
            "PIP_DEFAULT_TIMEOUT",
            "PIP_RETRIES",
            "PIP_CACHE_DIR",
            "PIP_NO_CACHE_DIR",
        ),
        *(
            "UV_DEFAULT_INDEX",
            "UV_INDEX",
            "UV_INDEX_URL",
            "UV_EXTRA_INDEX_URL",
            "UV_INDEX_STRATEGY",
            "UV_FIND_LINKS",
        ),
        *(
            "UV_INDEX_COMPANY_PASSWORD",
            "UV_INSECURE_HOST",
            "UV_HTTP_TIMEOUT",
            "UV_HTTP_RETRIES",
            "UV_CACHE_DIR",
        ),
        *("UV_KEYRING_PROVIDER", "UV_OFFLINE", "SSL_CERT_FILE", "https_proxy", "GIT_SSH_COMMAND"),
    )
    calls = make(project, "release", **dict.fromkeys(kept, "told"))
    assert [name for name in kept if f"\n{name}=told\n" not in calls] == []
    assert "\nUV_SYSTEM_CERTS=true\n" in calls


def test_another_python_is_used_only_where_make_is_told(project: Path) -> None:
    wrong = project / "wrong"
    wrong.write_text("#!/bin/sh\ntouch used\n")
    wrong.chmod(0o755)
    # Not by make(): it tells it.
    subprocess.run(
        ["make", "release"], cwd=project, env=SAFE | {"PYTHON": str(wrong)}, capture_output=True, check=False
    )
    assert not (project / "used").exists()


def test_a_release_is_of_the_model_trained_before_it_also_with_parallel_jobs(project: Path) -> None:
    make(project, "train", "release", MAKEFLAGS="-j4")
    assert (project / "released").read_text() == "new\n"


def test_a_dry_run_of_any_verb_runs_nothing(project: Path) -> None:
    verbs = set(" ".join(re.findall(r"^\.PHONY:(.*)", (ROOT / "Makefile").read_text(), re.MULTILINE)).split())
    assert {"publish", "train", "clean", "test"} <= verbs
    before = sorted(project.rglob("*"))
    assert make(project, "--dry-run", *sorted(verbs)) == ""
    assert sorted(project.rglob("*")) == before


def test_publish_hands_over_the_release_that_it_builds(project: Path) -> None:
    calls = make(project, "publish")
    assert f"ansible/publish.yml -e release={project}/build/released.tar.gz\n" in calls


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_script_finds_its_checkout_whatever_cdpath_holds(script: Path, tmp_path: Path) -> None:
    name = script.relative_to(ROOT)
    begin = re.match(r".*?^[^#\n]*\bcd [^\n]+\n", script.read_text(), re.DOTALL | re.MULTILINE)
    assert begin
    copy = tmp_path / "checkout" / name
    copy.parent.mkdir(parents=True)
    copy.write_text(begin[0] + "pwd -P\n")
    (tmp_path / "decoy" / name.parent).mkdir(parents=True)
    done = subprocess.run(
        ["bash", name],
        cwd=tmp_path / "checkout",
        env=SAFE | {"CDPATH": str(tmp_path / "decoy")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"{tmp_path / 'checkout'}\n"
