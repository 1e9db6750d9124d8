"""The service as processes: counts that stay exact whatever happens to workers, reloads, sockets."""

import asyncio
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from api_harness import GUNICORN, ROOT, Samples, Server, make_artifacts, value, wait_for

from tests.bench.clients import Tally, crowd, post

Start = Callable[..., Server]

PREDICTED = {"handler": "/predict", "method": "POST", "status": "2xx"}


def served(samples: Samples) -> float:
    """How many predictions the service says it answered, checked against its other counts of them."""
    count = value(samples, "fastapi_monitoring_http_requests_total", **PREDICTED)
    assert value(samples, "fastapi_monitoring_regression_model_output_count") == count
    for feature in ("ph", "quality"):
        bins = [
            number
            for (name, labels), number in samples.items()
            if name == "winemon_feature_bin_total" and ("feature", feature) in labels
        ]
        assert sum(bins) == count
    return count


def predict(server: Server, wine: dict[str, Any], times: int) -> None:
    for _ in range(times):
        assert server.request("POST", "/predict", wine)[0] == 200


def assert_always_reads(server: Server, count: int) -> None:
    """Every scrape reads exactly that many, whichever worker answers it."""
    assert [served(server.scrape()) for _ in range(10)] == [count] * 10


def test_counts_stay_exact_across_kill_reload_and_resize(start: Start, wine: dict[str, Any]) -> None:
    server = start()
    predict(server, wine, 50)
    assert_always_reads(server, 50)

    killed = min(server.workers)
    os.kill(killed, signal.SIGKILL)
    assert_always_reads(server, 50)
    wait_for(lambda: killed not in server.workers and len(server.workers) == 2)
    predict(server, wine, 50)
    assert_always_reads(server, 100)

    old = server.workers
    server.signal(signal.SIGHUP)
    predict(server, wine, 50)
    wait_for(lambda: not old & server.workers and len(server.workers) == 2)
    assert_always_reads(server, 150)

    server.signal(signal.SIGTTIN)
    wait_for(lambda: len(server.workers) == 3)
    predict(server, wine, 50)
    assert_always_reads(server, 200)
    samples = server.scrape()
    assert value(samples, "fastapi_inprogress") == 1
    assert value(samples, "winemon_ready") == 1


def test_a_reload_serves_the_release_that_the_symlink_names(
    start: Start, tmp_path: Path, artifacts: Path, wine: dict[str, Any]
) -> None:
    def release(name: str, artifacts: Path) -> Path:
        directory = tmp_path / name
        shutil.copytree(ROOT / "app", directory / "app", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copytree(artifacts, directory / "artifacts")
        main = directory / "app/main.py"
        main.write_text(main.read_text().replace('title="winemon"', f'title="{name}"'))
        return directory

    current = tmp_path / "current"
    current.symlink_to(release("one", artifacts))
    server = start(Path("artifacts"), WINEMON_RELEASE=str(current))
    assert json.loads(server.request("GET", "/openapi.json")[1])["info"]["title"] == "one"
    predict(server, wine, 10)

    new = release("two", make_artifacts(tmp_path / "new", version="2.0.0", seed=1))
    (tmp_path / "next").symlink_to(new)
    (tmp_path / "next").replace(current)
    old = server.workers
    server.signal(signal.SIGHUP)
    wait_for(lambda: not old & server.workers and len(server.workers) == 2)
    server.ready()
    for _ in range(10):
        information = json.loads(server.request("GET", "/openapi.json")[1])["info"]
        assert (information["title"], information["version"]) == ("two", "2.0.0")
        models = [dict(labels) for name, labels in server.scrape() if name == "winemon_model_info"]
        assert [model["version"] for model in models] == ["2.0.0"]
    predict(server, wine, 10)
    assert_always_reads(server, 20)


def test_counts_stay_exact_while_workers_are_recycled(start: Start, wine: dict[str, Any]) -> None:
    server = start(WINEMON_MAX_REQUESTS="20")
    first = server.workers
    answered = 0
    while value(server.scrape(), "winemon_worker_starts_total") < 6:
        predict(server, wine, 5)
        answered += 5
        assert served(server.scrape()) == answered
        assert answered < 1000
    assert not first & server.workers
    assert len(list(server.metrics.glob("counter_*.db"))) <= 4


def test_no_client_is_cut_off_by_reloads_and_recycling(start: Start, wine: dict[str, Any]) -> None:
    server = start(WINEMON_MAX_REQUESTS="60")
    request = post(json.dumps(wine).encode())

    async def disturb() -> Tally:
        stop = asyncio.Event()
        clients = asyncio.create_task(crowd(server.port, request, 30, 0.5, stop))
        for _ in range(3):
            await asyncio.sleep(1)
            old = server.workers
            server.signal(signal.SIGHUP)
            while old & server.workers:
                await asyncio.sleep(0.1)
        stop.set()
        return await clients

    tally = asyncio.run(disturb())
    assert tally.failures == []
    assert tally.answered > 100
    assert served(server.scrape()) == tally.answered
    assert value(server.scrape(), "winemon_worker_starts_total") >= 8


def connections(server: Server) -> list[int]:
    """How many connections each worker has."""
    return [number - 1 for number in array("q", (server.metrics / "board").read_bytes()) if number]


def test_connections_spread_over_the_workers(start: Start) -> None:
    server = start()
    wait_for(lambda: connections(server) == [0, 0])
    for _ in range(20):
        burst = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(16)]
        wait_for(lambda: sum(connections(server)) == 16)
        assert min(connections(server)) >= 4
        for connection in burst:
            connection.close()
        wait_for(lambda: connections(server) == [0, 0])


def answer(client: socket.socket) -> bytes:
    """Receive one response whole."""
    received = b""
    while b"\r\n\r\n" not in received:
        received += client.recv(65536)
    head, _, body = received.partition(b"\r\n\r\n")
    length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
    while len(body) < length:
        body += client.recv(65536)
    return head


def exchange(connection: socket.socket, sent: bytes) -> bytes:
    """Send and receive until the server closes; raise where nothing comes for long."""
    connection.settimeout(30)
    connection.sendall(sent)
    received = b""
    while part := connection.recv(65536):
        received += part
    return received


def test_more_requests_at_once_than_allowed_are_refused_quickly_and_counted(
    start: Start, wine: dict[str, Any]
) -> None:
    server = start(WINEMON_WORKERS="1", WINEMON_MAX_CONCURRENCY="4")
    request = post(json.dumps(wine).encode())
    clients = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(20)]
    for client in clients:
        client.sendall(request)
        assert answer(client).startswith(b"HTTP/1.1 200")
    (worker,) = server.workers
    os.kill(worker, signal.SIGSTOP)
    for client in clients:
        client.sendall(request)
    os.kill(worker, signal.SIGCONT)
    heads = [answer(client) for client in clients]
    refused = [head for head in heads if head.startswith(b"HTTP/1.1 503")]
    assert len(refused) >= 10
    assert all(b"retry-after: 1" in head and b"connection: close" in head for head in refused)
    samples = server.scrape()
    assert value(samples, "winemon_overload_total") == len(refused)
    assert served(samples) == 40 - len(refused)
    for client in clients:
        client.close()


def test_more_connections_than_allowed_are_refused(start: Start) -> None:
    server = start(WINEMON_WORKERS="1", WINEMON_MAX_CONNECTIONS="5")
    clients = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(8)]
    answers = []
    for client in clients:
        client.sendall(b"GET /healthcheck HTTP/1.1\r\nHost: x\r\n\r\n")
        answers.append(answer(client).split()[1])
    assert sorted(answers) == [b"200"] * 5 + [b"503"] * 3
    for client in clients:
        client.close()
    wait_for(lambda: server.request("GET", "/healthcheck")[0] == 200)


@pytest.mark.parametrize(
    "part",
    [
        pytest.param(b"POST /pre", id="line", marks=pytest.mark.thorough),
        pytest.param(b"POST /predict HTTP/1.1\r\nHost: x\r\n", id="head", marks=pytest.mark.thorough),
        pytest.param(post(b"{}")[:-1], id="body"),
    ],
)
def test_a_client_that_dawdles_is_told_and_closed(start: Start, part: bytes) -> None:
    server = start(WINEMON_REQUEST_TIMEOUT="0.5")
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        assert exchange(client, part).startswith(b"HTTP/1.1 408 ")


def test_a_client_that_is_idle_between_requests_is_kept(start: Start) -> None:
    server = start(WINEMON_REQUEST_TIMEOUT="0.5")
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall(b"GET /healthcheck HTTP/1.1\r\nHost: x\r\n\r\n")
        assert answer(client).startswith(b"HTTP/1.1 200")
        time.sleep(3)  # the timeout and some looks for those who have exceeded it
        client.sendall(b"GET /healthcheck HTTP/1.1\r\nHost: x\r\n\r\n")
        assert answer(client).startswith(b"HTTP/1.1 200")


def test_a_client_that_never_speaks_keeps_no_worker_beyond_its_time_to_leave(start: Start) -> None:
    server = start(WINEMON_LEAVE_SECONDS="1")
    wait_for(lambda: connections(server) == [0, 0])
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        wait_for(lambda: sum(connections(server)) == 1)
        stopped = time.monotonic()
        server.stop()
        assert 0.5 < time.monotonic() - stopped < 20  # after 21 s gunicorn kills it
        assert client.recv(1) == b""


def test_an_oversized_body_is_answered_though_it_is_not_read(start: Start) -> None:
    server = start()
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        assert exchange(client, post(b" " * 1_500_000)).startswith(b"HTTP/1.1 413 ")


@pytest.mark.thorough
def test_counters_never_go_down_under_load(start: Start, wine: dict[str, Any]) -> None:
    server = start()
    stop = threading.Event()
    answered = [0, 0, 0, 0]
    tried = [0, 0, 0, 0]

    def load(index: int) -> None:
        while not stop.is_set():
            tried[index] += 1
            try:
                answered[index] += server.request("POST", "/predict", wine)[0] == 200
            except (OSError, http.client.HTTPException):
                continue

    threads = [threading.Thread(target=load, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    try:
        last: Samples = {}
        scrapes = 0
        for disturb in (
            lambda: os.kill(min(server.workers), signal.SIGKILL),
            lambda: server.signal(signal.SIGHUP),
            lambda: os.kill(max(server.workers), signal.SIGTERM),
            lambda: os.kill(max(server.workers), signal.SIGKILL),
        ):
            disturb()
            until = time.monotonic() + 3
            while time.monotonic() < until:
                samples = wait_for(server.scrape)
                scrapes += 1
                for key in last:
                    if key[0].endswith(("_total", "_count", "_sum", "_bucket")):
                        assert samples[key] >= last[key], key
                last = samples
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert scrapes > 20
    # A killed worker may have counted a request whose answer was lost with it, never the other way round.
    count = value(wait_for(server.scrape), "fastapi_monitoring_http_requests_total", **PREDICTED)
    assert sum(answered) <= count <= sum(tried)
    assert sum(tried) - sum(answered) <= 4 * 4


def test_refused_artifacts_are_one_log_line_and_not_ready(tmp_path: Path, artifacts: Path) -> None:
    copy = Path(shutil.copytree(artifacts, tmp_path / "copy"))
    with (copy / "model.joblib").open("ab") as file:
        file.write(b"!")
    server = Server(tmp_path, copy)
    try:
        wait_for(lambda: server.request("GET", "/healthcheck")[0] == 200)
        status, body = server.request("GET", "/ready")
        assert status == 503
        assert "model.joblib: " in json.loads(body)["reason"]
        wait_for(lambda: value(server.scrape(), "winemon_artifact_refused_total") == 2)
        assert value(server.scrape(), "winemon_ready") == 0
        lines = [line for line in server.log.read_text().splitlines() if "Refused the artifacts" in line]
        assert len(lines) == 2
        assert all("the manifest says" in line for line in lines)
    finally:
        server.stop()


def test_serves_on_the_socket_that_systemd_holds(tmp_path: Path, artifacts: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        # As systemd does it: the socket is descriptor 3, and LISTEN_PID names the process.
        command = (
            "import os, sys; os.dup2(int(sys.argv[1]), 3); os.environ['LISTEN_PID'] = str(os.getpid());"
            "os.execv(sys.argv[2], sys.argv[2:])"
        )
        process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                command,
                str(listener.fileno()),
                GUNICORN,
                "-c",
                ROOT / "app/gunicorn.conf.py",
            ],
            pass_fds=[listener.fileno()],
            env={
                **os.environ,
                "LISTEN_FDS": "1",
                "WINEMON_BIND": "127.0.0.1:1",
                "WINEMON_WORKERS": "1",
                "WINEMON_ARTIFACTS_DIR": str(artifacts),
                "PROMETHEUS_MULTIPROC_DIR": str(tmp_path / "metrics"),
            },
            stderr=subprocess.DEVNULL,
        )
        try:
            with socket.create_connection(("127.0.0.1", port)) as connection:
                connection.sendall(b"GET /ready HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
                with connection.makefile("rb") as file:
                    assert file.readline() == b"HTTP/1.1 200 OK\r\n"
        finally:
            process.terminate()
            assert process.wait(30) == 0


def test_a_start_begins_with_no_counts_and_an_own_directory_is_removed(
    tmp_path: Path, artifacts: Path
) -> None:
    (tmp_path / "metrics").mkdir()
    for stale in ("counter_0.db", "gauge_livesum_9.db", "9.lock", "counter_0.unreadable"):
        (tmp_path / "metrics" / stale).write_bytes(b"stale")
    (tmp_path / "metrics" / "theirs").touch()
    server = Server(tmp_path, artifacts)
    server.ready()
    assert value(server.scrape(), "winemon_metrics_unreadable_total") == 0
    assert (tmp_path / "metrics" / "theirs").exists()
    server.stop()

    server = Server(tmp_path, artifacts, PROMETHEUS_MULTIPROC_DIR="", TMPDIR=str(tmp_path))
    server.ready()
    assert len(list(tmp_path.glob("winemon-metrics-*/counter_*.db"))) >= 1
    server.stop()
    assert not list(tmp_path.glob("winemon-metrics-*"))


def test_a_new_master_goes_on_with_the_counts_of_the_old(start: Start, wine: dict[str, Any]) -> None:
    server = start()
    predict(server, wine, 20)
    server.signal(signal.SIGUSR2)
    masters = wait_for(
        lambda: re.findall(r"\[(\d+)\] \[INFO\] Starting gunicorn", server.log.read_text())[1:]
    )
    new = int(masters[0])
    try:
        children = Path(f"/proc/{new}/task/{new}/children")
        wait_for(lambda: len(children.read_text().split()) == 2)
        wait_for(lambda: value(server.scrape(), "winemon_worker_starts_total") == 4)
        predict(server, wine, 20)
        assert_always_reads(server, 40)
        server.signal(signal.SIGTERM)
        server.process.wait(40)
        predict(server, wine, 20)
        assert_always_reads(server, 60)
    finally:
        os.kill(new, signal.SIGTERM)
        wait_for(lambda: not Path(f"/proc/{new}").exists())


def test_the_configuration_never_imports_the_application(tmp_path: Path) -> None:
    program = (
        "import runpy, sys; sys.path.insert(0, sys.argv[1]);"
        "runpy.run_path(sys.argv[1] + '/app/gunicorn.conf.py');"
        "sys.exit(any(name.split('.')[0] in ('app', 'sklearn', 'numpy') for name in sys.modules))"
    )
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", program, ROOT], env=environment, check=True)
