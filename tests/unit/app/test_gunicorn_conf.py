"""What gunicorn.conf.py does where the system or a client is in trouble, as no real server here is."""

import asyncio
import errno
import runpy
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from api_harness import ROOT
from uvicorn import Config


@pytest.fixture
def configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Run the file as gunicorn does; no request may take any time."""
    for name, value in (
        ("PROMETHEUS_MULTIPROC_DIR", str(tmp_path)),
        ("WINEMON_REQUEST_TIMEOUT", "0"),
        ("WINEMON_LEAVE_SECONDS", "30"),
        ("OMP_NUM_THREADS", "1"),
        ("OPENBLAS_NUM_THREADS", "1"),
    ):
        monkeypatch.setenv(name, value)
    return SimpleNamespace(**runpy.run_path(str(ROOT / "app/gunicorn.conf.py")))


class Transport:
    """Keeps what is written."""

    def __init__(self) -> None:
        self.written = b""
        self.closed = False

    def write(self, data: bytes) -> None:
        """Take it."""
        self.written += data

    def close(self) -> None:
        """Remember it."""
        self.closed = True


@pytest.mark.parametrize("leaves", [False, True])
def test_a_reply_waits_for_a_slow_reader_and_is_dropped_where_that_left(
    configuration: SimpleNamespace, leaves: bool
) -> None:
    drained: list[bool] = []
    cycle = configuration.Cycle.__new__(configuration.Cycle)

    async def drain() -> None:
        drained.append(True)
        cycle.disconnected = leaves

    cycle.flow = SimpleNamespace(write_paused=True, drain=drain)
    cycle.disconnected, cycle.keep_alive = False, True
    cycle.default_headers, cycle.transport = [(b"date", b"now")], Transport()
    cycle.message_event, cycle.on_response = asyncio.Event(), lambda: None
    asyncio.run(cycle.send({"type": "winemon.reply", "status": 200, "head": b"a: b\r\n", "body": b"c"}))
    assert drained == [True]
    assert cycle.transport.written == (b"" if leaves else b"HTTP/1.1 200 OK\r\ndate: now\r\na: b\r\n\r\nc")


def test_a_client_that_dawdles_in_the_midst_of_its_answer_gets_no_second_one(
    configuration: SimpleNamespace,
) -> None:
    connection = configuration.Connection.__new__(configuration.Connection)
    connection.scope = scope = {"type": "http"}
    connection.cycle = SimpleNamespace(
        scope=scope, more_body=True, response_started=True, response_complete=False
    )
    connection.transport = Transport()
    for _ in range(2):
        connection.close_if_stalled(1.0)
        assert not connection.transport.closed
    connection.close_if_stalled(2.0)
    assert (connection.transport.closed, connection.transport.written) == (True, b"")


@pytest.mark.parametrize(
    ("error", "pauses"),
    [
        (BlockingIOError(), []),
        (OSError(errno.EMFILE, "too many files"), [0.1]),
        (OSError(errno.EBADF, ""), None),
    ],
    ids=["taken by another", "no descriptor left", "anything else"],
)
def test_a_connection_that_cannot_be_accepted(
    configuration: SimpleNamespace, error: OSError, pauses: list[float] | None
) -> None:
    class Listener:
        def accept(self) -> None:
            raise error

    server = configuration.LeavingServer.__new__(configuration.LeavingServer)
    paused: list[float] = []
    server._pause = paused.append

    async def accept() -> None:
        server._accept(Listener())

    if pauses is None:
        with pytest.raises(OSError, match=r"\[Errno 9\]"):
            asyncio.run(accept())
    else:
        asyncio.run(accept())
        assert paused == pauses


@pytest.mark.parametrize(
    ("waited", "accepts"),
    [(0, False), (48, False), (49, True), (1000, True)],
    ids=["its turn is not yet", "nor now", "has waited 50 ms", "has waited 1 s"],
)
def test_a_worker_waits_for_one_with_fewer_connections_but_not_for_ever(
    configuration: SimpleNamespace, waited: int, accepts: bool
) -> None:
    configuration._board[0], configuration._board[1] = 5, 1
    server = configuration.LeavingServer.__new__(configuration.LeavingServer)
    server.waited, server.accepted, server.sockets = waited, set(), []
    server._protocol = asyncio.Protocol
    client, accepted = socket.socketpair()

    async def accept() -> None:
        server._accept(SimpleNamespace(accept=lambda: (accepted, None)))
        assert len(server.accepted) == accepts
        for task in list(server.accepted):
            transport, _ = await task
            transport.close()
        await asyncio.sleep(0.01)

    with client, accepted:
        asyncio.run(accept())
    assert configuration._board[0] == 5 + accepts


def test_a_pause_ends_unless_the_worker_stopped_listening(configuration: SimpleNamespace) -> None:
    server = configuration.LeavingServer.__new__(configuration.LeavingServer)

    async def pause(listening: bool) -> bool:
        with socket.create_server(("127.0.0.1", 0)) as sock:
            server.sockets, server.listening = [sock], listening
            server._pause(0)
            await asyncio.sleep(0.05)
            return asyncio.get_running_loop().remove_reader(sock.fileno())

    assert asyncio.run(pause(True))
    assert not asyncio.run(pause(False))


def test_a_worker_that_could_not_start_tells_the_master(
    configuration: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def serve(_self: Any, sockets: Any) -> None:
        pass  # and `started` stays False

    monkeypatch.setattr(configuration.LeavingServer, "serve", serve)
    worker = configuration.Worker.__new__(configuration.Worker)
    worker.wsgi, worker.sockets = None, []
    worker.config = Config(app="x", log_config=None)
    with pytest.raises(SystemExit) as stopped:
        asyncio.run(worker._serve())
    assert stopped.value.code == configuration.Arbiter.WORKER_BOOT_ERROR
