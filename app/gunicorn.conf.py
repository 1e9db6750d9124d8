"""How the API runs as processes: `gunicorn -c app/gunicorn.conf.py`, with nothing on the command line.

gunicorn's master runs this file, and nothing in it imports `app`: only so does HUP start workers on the code
that the working directory names at that moment. It reads these environment variables, the workers those that
app/settings.py documents:

    WINEMON_RELEASE           directory of the release, which may be a symlink (default: this checkout)
    WINEMON_BIND              address to listen on where systemd passes no socket (default: 127.0.0.1:5000)
    WINEMON_WORKERS           worker processes (default: one for each core)
    WINEMON_MAX_REQUESTS      requests after which a worker is replaced, more or less (default: 0, never)
    WINEMON_MAX_CONCURRENCY   requests at once in one worker, beyond it 503 (default: 256)
    WINEMON_MAX_CONNECTIONS   connections to one worker, beyond it 503 (default: 4096)
    WINEMON_REQUEST_TIMEOUT   seconds that a client may take to send one request (default: 10)
    WINEMON_LEAVE_SECONDS     how long a worker that leaves waits for its clients (default: 10)
    PROMETHEUS_MULTIPROC_DIR  where the workers share their counts (default: a temporary directory)
"""

import asyncio
import ctypes
import errno
import fcntl
import gc
import mmap
import os
import shutil
import socket
import sys
import tempfile
import time
from itertools import count
from pathlib import Path
from typing import IO, Any

# Imported before the workers are forked, so that they share one copy and start sooner. Nothing is ours, and
# other versions of it restart the service.
import fastapi  # noqa: F401
import prometheus_client  # noqa: F401
import pydantic_settings  # noqa: F401
from gunicorn.arbiter import Arbiter
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import Server
from uvicorn_worker import UvicornWorker

# One thread a worker: more would fight over the cores that the other workers use.
for _variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")

_temporary = not os.environ.get("PROMETHEUS_MULTIPROC_DIR")
if _temporary:
    # In the environment, so that reloads, and a new master after USR2, go on counting in the same place.
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = tempfile.mkdtemp(prefix="winemon-metrics-")
_metrics = Path(os.environ["PROMETHEUS_MULTIPROC_DIR"])
_metrics.mkdir(parents=True, exist_ok=True)

_MAX_CONCURRENCY = int(os.environ.get("WINEMON_MAX_CONCURRENCY", "256"))
_MAX_CONNECTIONS = int(os.environ.get("WINEMON_MAX_CONNECTIONS", "4096"))
_REQUEST_TIMEOUT = float(os.environ.get("WINEMON_REQUEST_TIMEOUT", "10"))
_LEAVE_SECONDS = float(os.environ.get("WINEMON_LEAVE_SECONDS", "10"))
_SLOTS = 128
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h

wsgi_app = "app.main:create_app()"
# Explicit, as HUP follows a symlink only here.
chdir = os.environ.get("WINEMON_RELEASE", str(Path(__file__).parent.parent))
bind = os.environ.get("WINEMON_BIND", "127.0.0.1:5000")
backlog = 1024
workers = int(os.environ.get("WINEMON_WORKERS", os.cpu_count() or 1))
worker_tmp_dir = str(_metrics)
max_requests = int(os.environ.get("WINEMON_MAX_REQUESTS", "0"))
# Workers share the load evenly, so without it all of them would leave at once.
max_requests_jitter = max_requests // 5
control_socket_disable = True
# Longer than that of any client or load balancer, so that it is never this side that closes first.
keepalive = 65
graceful_timeout = int(_LEAVE_SECONDS) + 20

_slot: IO[str]
"""The lock file of this worker's slot, held open for life so that the kernel frees the slot at any death."""


def _open_board() -> "memoryview[int]":
    """Map what all workers tell each other: by slot, 1 + their connections, or 0 for not accepting."""
    with (_metrics / "board").open("a+b") as file:
        file.truncate(_SLOTS * 8)
        return memoryview(mmap.mmap(file.fileno(), _SLOTS * 8)).cast("q")


_board = _open_board()


class Cycle(RequestResponseCycle):
    """One request and its response, which the application may send whole: one message, one system call."""

    async def send(self, message: Any) -> None:
        """Send a message of ASGI, or one of type `winemon.reply`: status, header lines and body."""
        if message["type"] != "winemon.reply":
            await super().send(message)
            return
        if self.flow.write_paused and not self.disconnected:
            await self.flow.drain()
        if self.disconnected:
            return
        head = message["head"]
        ((_, date), *leaving) = self.default_headers
        closes = leaving or not self.keep_alive
        self.transport.write(
            b"%bdate: %b\r\n%b%b\r\n%b"
            % (
                STATUS_LINE[message["status"]],
                date,
                head,
                b"connection: close\r\n" if closes and b"connection: close" not in head else b"",
                message["body"],
            )
        )
        self.response_started = self.response_complete = True
        self.message_event.set()
        if closes or b"connection: close" in head:
            self.transport.close()
        self.on_response()


class Connection(HttpToolsProtocol):
    """One client: told on the board, refused quickly where there are too many, closed where it dawdles."""

    slot = 0
    accepting = True
    stalled: object = None
    stalled_since = 0.0

    def connection_made(self, transport: Any) -> None:
        """Join the connections of this worker."""
        super().connection_made(transport)
        self._tell()
        if len(self.connections) > _MAX_CONNECTIONS:
            self.app = self._overloaded

    def connection_lost(self, exc: Exception | None) -> None:
        """Leave them."""
        super().connection_lost(exc)
        self._tell()

    def _tell(self) -> None:
        if Connection.accepting:
            _board[Connection.slot] = len(self.connections) + 1

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        cycle.__class__ = Cycle  # uvicorn names the class itself
        scope: Any = cycle.scope
        scope["winemon.reply"] = True
        # What one turn of the event loop received is all started before any of it is served.
        super()._start_asgi_task(cycle, app if len(self.tasks) < _MAX_CONCURRENCY else self._overloaded)

    async def _overloaded(self, scope: Any, receive: Any, send: Any) -> None:
        """Mark the request for the application, which counts and refuses it."""
        scope["winemon.overload"] = True
        await self.config.loaded_app(scope, receive, send)

    def close_if_stalled(self, now: float) -> None:
        """Answer 408 to a client that has been at the same unfinished request for too long."""
        unfinished: object = None
        scope: Any = self.scope  # None until the first request, whatever its type says
        if scope is None:
            unfinished = self
        elif self.cycle is None or self.cycle.scope is not scope or self.cycle.more_body:
            unfinished = scope
        if unfinished is None or unfinished is not self.stalled:
            self.stalled, self.stalled_since = unfinished, now
        elif now - self.stalled_since > (_REQUEST_TIMEOUT if scope else keepalive):
            if scope and (
                self.cycle is None or not self.cycle.response_started or self.cycle.response_complete
            ):
                self.transport.write(
                    b"HTTP/1.1 408 Request Timeout\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
                )
            self.transport.close()


class LeavingServer(Server):
    """Accepts its share of the connections, and before it ends tells its clients to go elsewhere."""

    listening = False
    waited = 0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start without uvicorn's listeners, which accept all there is however idle the other workers are."""
        await super().startup(sockets=[])
        self.sockets = list(sockets or [])
        self.accepted: set[asyncio.Task[Any]] = set()
        self.listening = True
        Connection.slot = int(os.environ["WINEMON_SLOT"]) % _SLOTS
        _board[Connection.slot] = 1
        self._resume()

    def _resume(self) -> None:
        if self.listening:
            for sock in self.sockets:
                asyncio.get_running_loop().add_reader(sock.fileno(), self._accept, sock)

    def _pause(self, seconds: float) -> None:
        for sock in self.sockets:
            asyncio.get_running_loop().remove_reader(sock.fileno())
        asyncio.get_running_loop().call_later(seconds, self._resume)

    def _accept(self, sock: socket.socket) -> None:
        """Accept one connection, unless a worker with fewer of them is about to."""
        loop = asyncio.get_running_loop()
        mine = _board[Connection.slot]
        if not any(0 < others < mine for others in _board):
            self.waited = 0
        elif self.waited < 1000:
            # The same event woke it. Should it be busy, it gets 50 ms for each connection, and 1 s for all.
            self.waited += 1
            if self.waited % 50:
                self._pause(0.001)
                return
        try:
            connection, _ = sock.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                raise
            self._pause(0.1)
            return
        connection.setblocking(False)
        if connection.family != socket.AF_UNIX:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if Connection.accepting:
            _board[Connection.slot] += 1
        task = loop.create_task(loop.connect_accepted_socket(self._protocol, connection))
        self.accepted.add(task)
        task.add_done_callback(self.accepted.discard)

    def _protocol(self) -> Connection:
        return Connection(self.config, self.server_state, self.lifespan.state)

    def _stop_listening(self) -> None:
        self.listening = False
        for sock in self.sockets:
            asyncio.get_running_loop().remove_reader(sock.fileno())

    async def on_tick(self, counter: int) -> bool:
        """Look after slow clients once a second."""
        if counter % 10 == 0:
            self.waited = 0 if counter % 50 == 0 else self.waited
            now = time.monotonic()
            connections: set[Any] = self.server_state.connections
            for connection in list(connections):
                connection.close_if_stalled(now)
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Leave: answer with `Connection: close` until no client is left or the time is over, then shut down.

        It goes on accepting until another worker does, so that a reload has no gap; but not in the last third
        of the time, which the clients that came last have for their request.
        """
        ends = time.monotonic() + _LEAVE_SECONDS
        Connection.accepting = False
        _board[Connection.slot] = 0
        self.server_state.default_headers = [*self.server_state.default_headers, (b"connection", b"close")]
        while time.monotonic() < ends and not self.force_exit:
            if any(_board) or time.monotonic() > ends - _LEAVE_SECONDS / 3:
                self._stop_listening()
            if not self.server_state.connections and not self.accepted:
                break
            await asyncio.sleep(0.05)
        self._stop_listening()
        await super().shutdown(sockets=sockets)
        # Else uvicorn ends the process by the signal that told it to leave, instead of returning.
        self._captured_signals.clear()


class Worker(UvicornWorker):  # type: ignore[misc]  # the library has no types
    """A uvicorn worker with the server and the connections above."""

    # Nothing here asks who the client is, so no layer has to look whether a proxy says it.
    CONFIG_KWARGS = {  # noqa: RUF012 - uvicorn's
        "loop": "uvloop",
        "http": Connection,
        "server_header": False,
        "proxy_headers": False,
    }

    async def _serve(self) -> None:
        self.config.app = self.wsgi
        server = LeavingServer(self.config)
        self._install_sigquit_handler()
        await server.serve(sockets=self.sockets)
        if not server.started:
            sys.exit(Arbiter.WORKER_BOOT_ERROR)


worker_class = Worker


def on_starting(_server: Any) -> None:
    """Begin with no counts, unless this master takes over from a running one (USR2)."""
    if "GUNICORN_PID" not in os.environ:
        for pattern in ("*.db", "*.lock", "*.unreadable"):
            for path in _metrics.glob(pattern):
                path.unlink()
        for slot in range(_SLOTS):
            _board[slot] = 0


def post_fork(_server: Any, worker: Any) -> None:
    """Take the first free slot; it names this worker's metric files, which its next holder continues."""
    global _slot  # noqa: PLW0603 - the lock must live as long as the process
    for slot in count():  # pragma: no branch - it never ends by itself
        lock = (_metrics / f"{slot}.lock").open("a+")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            continue
        break
    _slot = lock
    _forget(slot)
    lock.truncate(0)
    lock.write(str(worker.pid))
    lock.flush()
    os.environ["WINEMON_SLOT"] = str(slot)


def pre_fork(_server: Any, _worker: Any) -> None:
    """Keep the collector's hands off what workers share, or it would make each a copy of it."""
    gc.freeze()


def post_worker_init(_worker: Any) -> None:
    """Leave what was loaded out of later collections: a batch makes thousands of objects, none in a cycle."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)
    # Keep the heap that batches came and went in, else it is given back and asked for anew page by page.
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_TRIM_THRESHOLD, 8 * 1024 * 1024)
    libc.mallopt(_M_MMAP_THRESHOLD, 2 * 1024 * 1024)


def child_exit(_server: Any, worker: Any) -> None:
    """Forget what the worker that ended said about itself; its counts stay."""
    for lock in _metrics.glob("*.lock"):
        if lock.read_text() == str(worker.pid):
            _forget(int(lock.stem))


def on_exit(server: Any) -> None:
    """Remove the temporary directory, unless a new master (USR2) goes on with it."""
    if _temporary and not server.reexec_pid:
        shutil.rmtree(_metrics, ignore_errors=True)


def _forget(slot: int) -> None:
    _board[slot % _SLOTS] = 0
    for path in _metrics.glob(f"gauge_*_{slot}.db"):
        path.unlink(missing_ok=True)
