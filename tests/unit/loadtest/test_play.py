"""`ansible/loadtest.yml` as `make loadtest HERE=1` runs it, with the tests' Locust and without a machine."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from test_locust import Api, serving

from loadtest.shapes import SHAPES

ROOT = Path(__file__).parents[3]
BIN = Path(sys.executable).parent


@pytest.fixture
def play(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Return a function from variables and the port of the API to the finished play."""

    def run(port: int = 1, **variables: object) -> subprocess.CompletedProcess[str]:
        inventory = tmp_path / "hosts.yml"
        wine = {"ansible_host": "127.0.0.1", "winemon_api_port": port}
        inventory.write_text(json.dumps({"api": {"hosts": {"wine": wine}}}))
        here = {"loadtest_report": str(tmp_path / "report"), "loadtest_locust": str(BIN / "locust")}
        extra = json.dumps({**here, **variables})
        return subprocess.run(
            [BIN / "ansible-playbook", "-i", inventory, "ansible/loadtest.yml", "-e", extra],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    return run


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"loadtest_target": "example.org"}, "of this inventory is called example.org: it has wine"),
        ({"loadtest_here": False}, "No group loadtest in this inventory to run the users"),
        pytest.param({"loadtest_users": 9}, "At least 10 users for 1 second", marks=pytest.mark.thorough),
        pytest.param(
            {"loadtest_shape": "circle"},
            f"No shape is called circle: {', '.join([*SHAPES][:-1])} or spike",
            marks=pytest.mark.thorough,
        ),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_asked(
    play: Callable[..., subprocess.CompletedProcess[str]], variables: dict[str, object], message: str
) -> None:
    api = Api()
    with serving(api):
        done = play(api.server_address[1], **{"loadtest_here": True, **variables})
    assert done.returncode != 0
    assert message in done.stdout
    assert not api.seen


@pytest.mark.thorough
def test_a_load_from_here_is_reported_and_held_to_the_limits(
    play: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    api = Api()
    with serving(api):
        done = play(api.server_address[1], loadtest_here=True, loadtest_seconds=5)
    assert done.returncode == 0, done.stdout
    assert " requests, 0 failed, median " in done.stdout
    assert {path.name for path in (tmp_path / "report").iterdir()} == {
        "report.html",
        "requests.csv",
        "failures.csv",
        "exceptions.csv",
        "junit.xml",
    }
    cases = ET.parse(tmp_path / "report" / "junit.xml").getroot()  # noqa: S314 - our own file
    assert (cases.attrib["tests"], cases.attrib["failures"]) == ("16", "0")


@pytest.mark.thorough
def test_an_api_that_answers_wrongly_fails_the_play_and_is_named(
    play: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    api = Api(broken=True)
    with serving(api):
        done = play(api.server_address[1], loadtest_here=True, loadtest_seconds=5)
    assert done.returncode != 0
    assert "/predict: " in done.stdout
    assert "CatchResponseError('wrong body')" in done.stdout
    assert "/report/report.html" in done.stdout
