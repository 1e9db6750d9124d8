"""Locust as it is installed: in processes of its own, because it patches the interpreter that it runs in."""

import base64
import json
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from loadtest import limits

LOADTEST = Path(__file__).parents[3] / "loadtest"
CREDENTIALS = "admin:påss:word"
USERS = 10
REQUESTS = {
    ("/predict", "POST"),
    ("/predict (bad value)", "POST"),
    ("/predict/batch", "POST"),
    ("/healthcheck", "GET"),
}


class Api(ThreadingHTTPServer):
    """Counts requests and connections; answers as the API does, or in all the ways that it must not."""

    daemon_threads = True

    def __init__(self, broken: bool = False) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.broken = broken
        self.seen: Counter[str] = Counter()
        self.connections = 0

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of connections that end with their users."""

    def process_request(self, request: Any, client_address: Any) -> None:
        """Count a connection."""
        self.connections += 1
        super().process_request(request, client_address)

    def answer(self, path: str, body: Any) -> tuple[int, Any]:
        """Return status and JSON body."""
        if path == "/healthcheck":
            name, right, wrong = path, (200, {"status": "ok"}), (503, {})
        elif path == "/predict/batch":
            name, right, wrong = (
                path,
                (200, {"qualities": [5.5] * len(body["samples"])}),
                (200, {"qualities": []}),
            )
        elif len(body) == 11 and all(isinstance(value, float) and value >= 0 for value in body.values()):
            name, right, wrong = path, (200, {"quality": 5.5}), (200, {"quality": None})
        else:
            name, right, wrong = "/predict (bad value)", (422, {"detail": []}), (200, {"quality": 5.5})
        self.seen[name] += 1
        return wrong if self.broken else right


class Handler(BaseHTTPRequestHandler):
    """One connection of an `Api`."""

    protocol_version = "HTTP/1.1"
    server: Api

    def do_GET(self) -> None:
        """Answer without a body."""
        self.reply(None)

    def do_POST(self) -> None:
        """Answer a JSON body."""
        self.reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def reply(self, body: Any) -> None:
        """Send what the API answers to a body."""
        status, answer = self.server.answer(self.path, body)
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Keep the log of the tests readable."""


@contextmanager
def serving(api: Api) -> Iterator[str]:
    """Serve and yield the URL."""
    thread = threading.Thread(target=api.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{api.server_address[1]}"
    finally:
        api.shutdown()
        api.server_close()
        thread.join()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Return a directory that holds nothing of the project but `loadtest`."""
    shutil.copytree(LOADTEST, tmp_path / "loadtest", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "password").write_text(CREDENTIALS.partition(":")[2] + "\n")
    return tmp_path


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "locust", "-f", "loadtest/locustfile.py", *arguments]


def environment(**variables: str) -> dict[str, str]:
    return {"PATH": "/usr/bin:/bin", **variables}


@contextmanager
def running(directory: Path, *arguments: str, **variables: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run Locust and stop it, however the test ends."""
    with (directory / f"{arguments[0]}.log").open("wb") as log:
        process = subprocess.Popen(
            command(*arguments), cwd=directory, env=environment(**variables), stdout=log, stderr=log
        )
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


class WebUI:
    """The web UI on a port, as a script talks to it."""

    def __init__(self, port: int, credentials: str | None = CREDENTIALS) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.headers = {}
        if credentials is not None:
            self.headers["Authorization"] = f"Basic {base64.b64encode(credentials.encode()).decode()}"

    def ask(self, path: str, form: dict[str, Any] | None = None, **headers: str) -> str:
        """Return the body of the answer to GET, or with a form to POST; raise on an error status."""
        data = None if form is None else urllib.parse.urlencode(form).encode()
        request = urllib.request.Request(self.url + path, data, {**self.headers, **headers})  # noqa: S310 - loopback
        with urllib.request.urlopen(request, timeout=10) as response:  # noqa: S310 - loopback
            text: str = response.read().decode()
            return text

    def status(self, path: str, form: dict[str, Any] | None = None, **headers: str) -> int:
        """Return the status of the answer."""
        try:
            self.ask(path, form, **headers)
        except urllib.error.HTTPError as error:
            with error:
                return error.code
        return 200

    def metrics(self) -> dict[str, dict[tuple[str, ...], float]]:
        """Return the samples by metric and label values, in the order of the label names."""
        found: dict[str, dict[tuple[str, ...], float]] = {}
        for family in text_string_to_metric_families(self.ask("/metrics")):
            for sample in family.samples:
                labels = tuple(
                    sample.labels[name] for name in ("name", "method", "quantile") if name in sample.labels
                )
                series = found.setdefault(sample.name, {})
                assert labels not in series
                series[labels] = sample.value
        return found

    def value(self, metric: str) -> float:
        """Return the value of a metric without labels."""
        return self.metrics()[metric][()]

    def up(self) -> bool:
        """Tell whether it answers yet."""
        try:
            self.ask("/metrics")
        except (urllib.error.URLError, ConnectionError):
            return False
        return True


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)


def test_master_and_worker_do_what_they_are_told_and_count_it(directory: Path) -> None:
    api, port, bus = Api(), free_port(), str(free_port())
    with ExitStack() as stack:
        url = stack.enter_context(serving(api))
        master = ("--master", "--master-bind-host", "127.0.0.1", "--master-bind-port", bus)
        web = ("--web-host", "127.0.0.1", "--web-port", str(port), "--host", url)
        stack.enter_context(
            running(directory, *master, *web, LOCUST_PASSWORD_FILE=str(directory / "password"))
        )
        stack.enter_context(
            running(directory, "--worker", "--master-host", "127.0.0.1", "--master-port", bus)
        )
        ui = WebUI(port)
        wait_until(ui.up)
        wait_until(lambda: ui.value("winemon_locust_workers") == 1)

        # Idle until told, and everything is known at 0.
        idle = ui.metrics()
        assert (
            set(idle["winemon_locust_requests_total"])
            == set(idle["winemon_locust_failures_total"])
            == REQUESTS
        )
        assert not sum(idle["winemon_locust_requests_total"].values())
        assert idle["winemon_locust_users"][()] == 0
        assert idle["winemon_locust_requests_per_second"][()] == 0
        assert not api.seen

        # Nothing without the password, nor for a page of another site.
        load = {"user_count": USERS, "spawn_rate": USERS, "run_time": "8s", "max_wait": 0.05}
        for path in ("/", "/metrics", "/stats/requests", "/stats/exceptions/csv", "/no-such-page"):
            assert WebUI(port, credentials=None).status(path) == 401
        assert WebUI(port, credentials="admin:wrong").status("/swarm", load) == 401
        assert ui.status("/swarm", load, Origin="http://elsewhere.example") == 403
        assert "<html" in ui.ask("/")
        assert not api.seen

        answer = json.loads(ui.ask("/swarm", load, Origin=ui.url))
        assert (answer["success"], answer["run_time"]) == (True, 8)
        wait_until(lambda: ui.value("winemon_locust_users") == USERS)
        wait_until(lambda: ui.value("winemon_locust_requests_per_second") > 0)
        wait_until(lambda: json.loads(ui.ask("/stats/requests"))["state"] == "stopped")

        def counted(counts: dict[tuple[str, ...], float]) -> bool:
            # A user that is stopped in the middle of a request has not finished it.
            return all(0 < count <= api.seen[name] <= count + USERS for (name, _), count in counts.items())

        # The last report of a worker follows its last request.
        wait_until(lambda: counted(ui.metrics()["winemon_locust_requests_total"]))
        done = ui.metrics()
        assert not sum(done["winemon_locust_failures_total"].values())
        assert api.connections == USERS
        seconds = done["winemon_locust_response_seconds"]
        assert {name for name, _ in seconds} == {*(name for name, _ in REQUESTS), "Aggregated"}
        assert {quantile for _, quantile in seconds} == {"0.5", "0.95", "0.99"}
        assert 0 <= seconds["Aggregated", "0.5"] <= seconds["Aggregated", "0.99"] < 5

        # Locust forgets at a reset and at the next start; the counters do not.
        before = sum(done["winemon_locust_requests_total"].values())
        assert ui.ask("/stats/reset", {}) == "ok"
        wait_until(lambda: json.loads(ui.ask("/stats/requests"))["stats"][0]["num_requests"] == 0)
        assert sum(ui.metrics()["winemon_locust_requests_total"].values()) == before
        ui.ask("/swarm", {**load, "run_time": "60s"})
        wait_until(lambda: sum(ui.metrics()["winemon_locust_requests_total"].values()) > before)
        assert json.loads(ui.ask("/stop", {}))["success"]
        wait_until(lambda: ui.value("winemon_locust_users") == 0)


def test_wrong_answers_are_failures(directory: Path) -> None:
    api, port = Api(broken=True), free_port()
    with serving(api) as url:
        arguments = ("--web-host=127.0.0.1", f"--web-port={port}", f"--host={url}", "--max-wait=0.02")
        with running(directory, *arguments):
            # Without a password in the environment, as on one's own computer, the web UI is open.
            ui = WebUI(port, credentials=None)
            wait_until(ui.up)
            ui.ask("/swarm", {"user_count": USERS, "spawn_rate": USERS})
            wait_until(lambda: min(ui.metrics()["winemon_locust_requests_total"].values()) > 0)
            ui.ask("/stop", {})
            wait_until(lambda: ui.value("winemon_locust_users") == 0)
            metrics = ui.metrics()
            assert metrics["winemon_locust_failures_total"] == metrics["winemon_locust_requests_total"]
            errors = {
                (error["name"], error["error"]) for error in json.loads(ui.ask("/stats/requests"))["errors"]
            }
    assert ("/predict", "CatchResponseError('wrong body')") in errors
    assert ("/predict/batch", "CatchResponseError('wrong body')") in errors
    assert ("/predict (bad value)", "CatchResponseError('status 200 instead of 422')") in errors
    assert "/healthcheck" in {name for name, _ in errors}


@pytest.mark.thorough
def test_the_web_ui_runs_the_shape_that_is_asked_for_and_no_other(directory: Path) -> None:
    api, port = Api(), free_port()
    arguments = (f"--web-port={port}", "--web-host=127.0.0.1", "--max-wait=0.05")
    with serving(api) as url, running(directory, *arguments, f"--host={url}"):
        ui = WebUI(port, credentials=None)
        wait_until(ui.up)
        log = directory / f"{arguments[0]}.log"
        load = {"user_count": USERS, "spawn_rate": USERS, "run_time": "6s"}
        assert ui.status("/swarm", {**load, "shape": "circle"}) == 400
        assert not api.seen

        def ran(shape: dict[str, str]) -> tuple[list[str], float]:
            """Return the numbers of users that a shape asked for in turn, and the most that ran."""
            before = log.read_text()
            assert json.loads(ui.ask("/swarm", {**load, **shape}))["success"]
            most = 0.0
            deadline = time.monotonic() + 60
            # What this tells is up to two seconds old.
            time.sleep(3)
            while json.loads(ui.ask("/stats/requests"))["state"] != "stopped":
                assert time.monotonic() < deadline
                most = max(most, ui.value("winemon_locust_users"))
                time.sleep(0.1)
            return re.findall(r"Shape test updating to (\d+) users", log.read_text()[len(before) :]), most

        assert ran({"shape": "spike"}) == (["2", "10", "2"], 10)
        assert ran({"shape": "steady"}) == ([], 10)
        assert ran({}) == ([], 10)


def test_a_headless_run_writes_the_report_that_the_limits_judge(directory: Path) -> None:
    api = Api()
    report = directory / "build" / "loadtest"
    options = ("--users=10", "--spawn-rate=10", "--run-time=5s", "--max-wait=0.1", "--shape=step")
    with serving(api) as url:
        run = subprocess.run(
            [*command("--headless", *options, f"--host={url}", f"--report={report}")],
            cwd=directory,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert run.returncode == 0, run.stderr
    for users in (2, 4, 6, 8, 10):
        assert f"Shape test updating to {users} users" in run.stderr
    assert {path.name for path in report.iterdir()} == {
        "report.html",
        "requests.csv",
        "failures.csv",
        "exceptions.csv",
    }
    assert "<html" in (report / "report.html").read_text()
    _, checks = limits.judge(report, users=6, seconds=5)
    assert [check for check in checks if check.problem] == []
    counted = {
        check.name: int(check.found.split()[-1]) for check in checks if check.name.endswith("failures")
    }
    for name, _ in REQUESTS:
        # The last request of a user may have been answered and not been read.
        assert 0 < counted[f"{name} failures"] <= api.seen[name] <= counted[f"{name} failures"] + USERS


def test_no_answer_is_a_failure(directory: Path) -> None:
    arguments = (
        "--headless",
        "--users=1",
        "--run-time=3s",
        "--max-wait=0.02",
        "--json",
        "--exit-code-on-error=3",
    )
    run = subprocess.run(
        [*command(*arguments), f"--host=http://127.0.0.1:{free_port()}"],
        cwd=directory,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert run.returncode == 3
    for entry in json.loads(run.stdout):
        assert entry["num_failures"] == entry["num_requests"] > 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "LOCUST_PASSWORD_FILE: [Errno 2] No such file or directory"),
        (" \n", "is empty: put the password there"),
    ],
)
def test_without_the_named_password_the_web_ui_does_not_open(
    directory: Path, content: str | None, message: str
) -> None:
    secret = directory / "secret"
    if content is not None:
        secret.write_text(content)
    run = subprocess.run(
        command("--web-host=127.0.0.1", f"--web-port={free_port()}"),
        cwd=directory,
        env=environment(LOCUST_PASSWORD_FILE=str(secret)),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert run.returncode == 1
    assert message in run.stderr
    assert "Traceback" not in run.stderr
