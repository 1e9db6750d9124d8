"""How the API runs as processes: `gunicorn -c app/gunicorn.conf.py`, with nothing on the command line.

gunicorn's master runs this file, and nothing in it imports `app`: only so does HUP start workers on the code
that the working directory names at that moment. It reads these environment variables, the workers those that
app/settings.py documents:

    WINEMON_RELEASE           directory of the release, which may be a symlink (default: this checkout)
    WINEMON_BIND              address to listen on where systemd passes no socket (default: 127.0.0.1:5000)
    WINEMON_WORKERS           worker processes (default: one for each core)
    WINEMON_MAX_REQUESTS      requests after which a worker is replaced (default: 0, never)
    PROMETHEUS_MULTIPROC_DIR  where the workers share their counts (default: a temporary directory)
"""

import fcntl
import os
import shutil
import tempfile
from itertools import count
from pathlib import Path
from typing import IO, Any

# One thread a worker: more would fight over the cores that the other workers use.
for _variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")

_temporary = not os.environ.get("PROMETHEUS_MULTIPROC_DIR")
if _temporary:
    # In the environment, so that reloads, and a new master after USR2, go on counting in the same place.
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = tempfile.mkdtemp(prefix="winemon-metrics-")
_metrics = Path(os.environ["PROMETHEUS_MULTIPROC_DIR"])
_metrics.mkdir(parents=True, exist_ok=True)

wsgi_app = "app.main:create_app()"
# Explicit, as HUP follows a symlink only here.
chdir = os.environ.get("WINEMON_RELEASE", str(Path(__file__).parent.parent))
bind = os.environ.get("WINEMON_BIND", "127.0.0.1:5000")
workers = int(os.environ.get("WINEMON_WORKERS", os.cpu_count() or 1))
worker_class = "uvicorn_worker.UvicornWorker"
worker_tmp_dir = str(_metrics)
max_requests = int(os.environ.get("WINEMON_MAX_REQUESTS", "0"))
control_socket_disable = True
graceful_timeout = 30

_slot: IO[str]
"""The lock file of this worker's slot, held open for life so that the kernel frees the slot at any death."""


def on_starting(_server: Any) -> None:
    """Begin with no counts, unless this master takes over from a running one (USR2)."""
    if "GUNICORN_PID" not in os.environ:
        for pattern in ("*.db", "*.lock", "*.unreadable"):
            for path in _metrics.glob(pattern):
                path.unlink()


def post_fork(_server: Any, worker: Any) -> None:
    """Take the first free slot; it names this worker's metric files, which its next holder continues."""
    global _slot  # noqa: PLW0603 - the lock must live as long as the process
    for slot in count():
        lock = (_metrics / f"{slot}.lock").open("a+")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            continue
        break
    _slot = lock
    _forget_gauges(slot)
    lock.truncate(0)
    lock.write(str(worker.pid))
    lock.flush()
    os.environ["WINEMON_SLOT"] = str(slot)


def child_exit(_server: Any, worker: Any) -> None:
    """Forget what the worker that ended said about itself; its counts stay."""
    for lock in _metrics.glob("*.lock"):
        if lock.read_text() == str(worker.pid):
            _forget_gauges(int(lock.stem))


def on_exit(server: Any) -> None:
    """Remove the temporary directory, unless a new master (USR2) goes on with it."""
    if _temporary and not server.reexec_pid:
        shutil.rmtree(_metrics, ignore_errors=True)


def _forget_gauges(slot: int) -> None:
    for path in _metrics.glob(f"gauge_*_{slot}.db"):
        path.unlink(missing_ok=True)
