"""Measure what serving costs: `python -m tests.bench [--rounds N] [--only WORD]`.

Writes build/bench/bench.json (every figure with its rounds and its bound), table.md and plot.png, and exits 1
naming what is outside its bound. CPU time is that of the server's process tree, from /proc: on a busy machine
it is steadier than requests per second. Needs wrk (`apt install wrk`) and the artifacts of `make train`.
"""

import argparse
import asyncio
import json
import os
import platform
import random
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import timeit
from array import array
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import joblib
from sklearn.ensemble import HistGradientBoostingRegressor
from sklearn.preprocessing import StandardScaler

from app.artifacts import load as load_artifacts
from app.contract import FEATURE_NAMES
from app.predictor import load_predictor
from app.schemas import EXAMPLE
from tests.bench.clients import Tally, crowd, post
from training.dataset import prepare

ROOT = Path(__file__).parents[2]
OUTPUT = ROOT / "build" / "bench"
SECONDS = 3
CONNECTIONS = 16
OURS = ("--config", "app/gunicorn.conf.py")
COUNTED = r'^fastapi_monitoring_http_requests_total{handler="/predict",method="POST",status="2xx"} (\d+)'
PLAIN = ("--workers", "2", "--no-control-socket", "--worker-class")
UVICORN = "uvicorn_worker.UvicornWorker"
SERVICES: dict[str, tuple[str, ...]] = {
    "winemon": ("app.main:create_app()", *OURS),
    "unmetered": ("tests.bench.variants:unmetered()", *OURS),
    "floor": ("tests.bench.variants:floor()", *OURS),
    "limit": ("tests.bench.variants:limit()", *OURS),
    "reference": ("tests.bench.reference:app", *PLAIN, UVICORN),
}
ALTERNATIVES: dict[str, tuple[str, ...]] = {
    "instrumentator": ("tests.bench.variants:instrumented()", *OURS),
    "uvicorn_worker": ("app.main:create_app()", *PLAIN, UVICORN),
    "asgi_worker": ("app.main:create_app()", *PLAIN, "asgi"),
}


@dataclass
class Figure:
    """One measured figure: its rounds, their median, and the bound it is held to, if any."""

    name: str
    unit: str
    rounds: list[float]
    bound: float | None = None
    at_least: bool = False
    value: float = field(init=False)
    ok: bool = field(init=False)

    def __post_init__(self) -> None:
        """Judge it."""
        self.value = statistics.median(self.rounds)
        if self.bound is None:
            self.ok = True
        else:
            self.ok = self.value >= self.bound if self.at_least else self.value <= self.bound


class Service:
    """One service under gunicorn with two workers on a port of the loopback interface."""

    def __init__(self, name: str, directory: Path, **environment: str) -> None:
        if name == "reference":
            environment["WINEMON_ARTIFACTS_DIR"] = str(train_reference(directory / "artifacts"))
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        self.metrics = directory / name
        self.metrics.mkdir()
        command = [str(Path(sys.executable).with_name("gunicorn")), *(SERVICES | ALTERNATIVES)[name]]
        if "--config" not in command:
            command += ["--bind", f"127.0.0.1:{self.port}"]
        started = time.monotonic()
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "WINEMON_WORKERS": "2",
                "WINEMON_BIND": f"127.0.0.1:{self.port}",
                "PROMETHEUS_MULTIPROC_DIR": str(self.metrics),
                **environment,
            },
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while not self.answers("/ready"):
            if time.monotonic() > started + 60 or self.process.poll() is not None:
                self.stop()
                raise SystemExit(f"{name}: not ready; see what `{' '.join(command)}` says")
            time.sleep(0.01)
        self.ready_seconds = time.monotonic() - started

    def answers(self, path: str) -> bool:
        """Whether a GET of the path is answered 200."""
        return self.get(path).startswith("HTTP/1.1 200 ")

    def get(self, path: str) -> str:
        """Return the response to a GET of the path, or nothing where there is none."""
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=5) as client:
                client.sendall(f"GET {path} HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n\r\n".encode())
                answer = b""
                while part := client.recv(65536):
                    answer += part
        except OSError:
            return ""
        return answer.decode()

    @property
    def workers(self) -> list[int]:
        """The process ids of the workers."""
        if self.process.poll() is not None:
            raise SystemExit("the service ended by itself")
        pid = self.process.pid
        return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))

    def cpu(self) -> float:
        """CPU seconds that the master and its workers have used, to the nanosecond."""
        nanoseconds = 0
        for pid in (self.process.pid, *self.workers):
            for task in Path(f"/proc/{pid}/task").iterdir():
                nanoseconds += int((task / "schedstat").read_text().split()[0])
        return nanoseconds / 1e9

    def memory(self) -> float:
        """Proportional set size of the master and its workers, in MB."""
        total = 0
        for pid in (self.process.pid, *self.workers):
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
            total += int(re.search(r"^Pss: +(\d+) kB", rollup, re.MULTILINE)[1])  # type: ignore[index]
        return total / 1000

    def connections(self) -> list[int]:
        """How many connections each worker has, from the board that the workers share."""
        return [number - 1 for number in array("q", (self.metrics / "board").read_bytes()) if number]

    def stop(self) -> None:
        """Stop it."""
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def train_reference(directory: Path) -> Path:
    """Fit the tutorial's model, with which scikit-learn is faster than with ours; return where it is."""
    directory.mkdir()
    training = prepare(None).training
    scaler = StandardScaler().fit(training.features)
    model = HistGradientBoostingRegressor(max_iter=50).fit(
        scaler.transform(training.features), training.quality
    )
    joblib.dump(scaler, directory / "scaler.joblib")
    joblib.dump(model, directory / "model.joblib")
    return directory


@contextmanager
def service(name: str, **environment: str) -> Iterator[Service]:
    """Run a service for the time of a `with`."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        running = Service(name, Path(directory), **environment)
        try:
            yield running
        finally:
            running.stop()


@dataclass
class Load:
    """What one round of load saw and cost."""

    cpu_ms: float
    rate: float
    p99_ms: float


def load_with_wrk(
    target: Service, bodies: Sequence[str], path: str = "/predict", seconds: float = SECONDS
) -> Load:
    """Send these bodies in turn over 16 keep-alive connections for some seconds; a failure ends the bench."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        script, lines = Path(directory) / "script.lua", Path(directory) / "bodies"
        lines.write_text("\n".join(bodies))
        script.write_text(
            f"""local requests, last = {{}}, 0
            function init()
                for body in io.lines("{lines}") do
                    requests[#requests + 1] =
                        wrk.format("POST", nil, {{["Content-Type"] = "application/json"}}, body)
                end
            end
            function request()
                last = last % #requests + 1
                return requests[last]
            end"""
        )
        url = f"http://127.0.0.1:{target.port}{path}"
        command = ["wrk", "-t1", f"-c{CONNECTIONS}", f"-d{seconds}s", "--latency", "-s", str(script), url]
        before = target.cpu()
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        cpu = target.cpu() - before
    if "Non-2xx" in output or "Socket errors" in output:
        raise SystemExit(f"{url}: failed under load:\n{output}")
    requests = int(re.search(r"(\d+) requests in", output)[1])  # type: ignore[index]
    p99_line = re.search(r"99% +([\d.]+)(us|ms|s)\s", output)
    if p99_line is None:
        raise SystemExit(f"wrk said nothing of its 99th percentile:\n{output}")
    number, unit = p99_line.groups()
    p99 = float(number) * {"us": 0.001, "ms": 1, "s": 1000}[unit]
    rate = float(re.search(r"Requests/sec: +([\d.]+)", output)[1])  # type: ignore[index]
    return Load(cpu / requests * 1000, rate, p99)


def wines() -> list[str]:
    """Return 1,000 wines of the training data, each as JSON."""
    rows = prepare(None).training.features[:1000].tolist()
    return [json.dumps(dict(zip(FEATURE_NAMES, row, strict=True))) for row in rows]


def serving(rounds: int) -> list[Figure]:
    """Compare the services under load, rounds interleaved, and their memory and start."""
    loads: dict[str, list[Load]] = {name: [] for name in SERVICES}
    singles, batch = wines(), '{"samples": [' + ", ".join(wines()) + "]}"
    batches: list[Load] = []
    memory: dict[str, list[float]] = {name: [] for name in SERVICES}
    ready: list[float] = []
    for number in range(rounds):
        for name, seen in loads.items():
            with service(name) as running:
                load_with_wrk(running, singles, seconds=1)
                seen.append(load_with_wrk(running, singles))
                memory[name].append(running.memory())
                say(f"round {number + 1}: {name} {seen[-1].cpu_ms:.3f} ms CPU, {seen[-1].rate:.0f}/s")
                if name == "winemon":
                    ready.append(running.ready_seconds)
                    batches.append(load_with_wrk(running, [batch], "/predict/batch"))

    def ratio(above: str, below: str, get: Callable[[Load], float] = lambda load: load.cpu_ms) -> list[float]:
        return [get(a) / get(b) for a, b in zip(loads[above], loads[below], strict=True)]

    winemon = loads["winemon"]
    return [
        *(
            Figure(f"cpu_ms_{name}", "ms/request", [load.cpu_ms for load in seen])
            for name, seen in loads.items()
        ),
        *(Figure(f"rate_{name}", "requests/s", [load.rate for load in seen]) for name, seen in loads.items()),
        *(Figure(f"p99_ms_{name}", "ms", [load.p99_ms for load in seen]) for name, seen in loads.items()),
        Figure("cpu_winemon_to_limit", "ratio", ratio("winemon", "limit"), 1.15),
        Figure("cpu_winemon_to_floor", "ratio", ratio("winemon", "floor")),
        Figure("cpu_winemon_to_reference", "ratio", ratio("winemon", "reference"), 1 / 6),
        Figure(
            "p99_winemon_to_reference",
            "ratio",
            ratio("winemon", "reference", lambda load: load.p99_ms),
            1 / 4,
        ),
        Figure(
            "batch_rows_per_cpu_to_single",
            "ratio",
            [one.cpu_ms * 1000 / many.cpu_ms for one, many in zip(winemon, batches, strict=True)],
            30,
            at_least=True,
        ),
        Figure("batch_cpu_us_per_row", "us", [many.cpu_ms for many in batches]),
        *(
            Figure(f"memory_pss_{name}", "MB", seen, 120 if name == "winemon" else None)
            for name, seen in memory.items()
        ),
        Figure("ready_seconds", "s", ready, 1.5),
    ]


def paired(names: Sequence[str], rounds: int) -> dict[str, list[Load]]:
    """Load services at the same time, four times a round, so that what else the machine does slows them all.

    Each round has new ones: where its memory came to lie makes a process faster or slower for life.
    """
    singles = wines()
    loads: dict[str, list[Load]] = {name: [] for name in names}
    for _ in range(rounds):
        with ExitStack() as stack:
            threads = stack.enter_context(ThreadPoolExecutor(len(names)))
            services = [stack.enter_context(service(name)) for name in names]
            list(threads.map(lambda running: load_with_wrk(running, singles, seconds=1), services))
            for _ in range(4):
                seen = threads.map(lambda running: load_with_wrk(running, singles, seconds=2), services)
                for name, load in zip(names, seen, strict=True):
                    loads[name].append(load)
    return loads


def metrics(rounds: int) -> list[Figure]:
    """Compare metrics on with metrics off, under load and in this process."""
    loads = paired(["winemon", "unmetered"], 2 * rounds)
    pairs = zip(loads["winemon"], loads["unmetered"], strict=True)
    calls = {name: application(name) for name in ("winemon", "unmetered")}
    least = {name: [min(call() for _ in range(200)) for _ in range(rounds)] for name, call in calls.items()}
    return [
        Figure("cpu_metrics_on_to_off", "ratio", [on.cpu_ms / off.cpu_ms for on, off in pairs], 1.06),
        *(Figure(f"application_us_{name}", "us", seen) for name, seen in least.items()),
    ]


def application(name: str) -> Callable[[], float]:
    """Return what times the application alone, in microseconds a request: the mean of 100 in this process."""
    module, _, function = SERVICES[name][0].removesuffix("()").partition(":")
    directory = tempfile.TemporaryDirectory(dir="/dev/shm")
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = directory.name
    app = getattr(import_module(module), function)()
    body = json.dumps(EXAMPLE).encode()
    scope = {"type": "http", "method": "POST", "path": "/predict", "winemon.reply": True}
    scope["headers"] = [(b"content-type", b"application/json")]

    async def receive() -> dict[str, object]:
        return {"type": "http.request", "body": body}

    async def send(message: dict[str, object]) -> None:
        assert message["status"] == 200

    async def requests() -> float:
        started = time.perf_counter()
        for _ in range(100):
            await app(scope, receive, send)
        return (time.perf_counter() - started) / 100 * 1e6

    return lambda _keep=directory: asyncio.run(requests())  # type: ignore[misc]  # kept as long as this


def alternatives(rounds: int) -> list[Figure]:
    """Compare what serves with what could: other servers, and other metrics of HTTP."""
    loads = paired(["winemon", "unmetered", *ALTERNATIVES], rounds)
    return [
        Figure(
            f"cpu_{name}_to_winemon",
            "ratio",
            [other.cpu_ms / ours.cpu_ms for other, ours in zip(loads[name], loads["winemon"], strict=True)],
        )
        for name in ("unmetered", *ALTERNATIVES)
    ]


def predictor(rounds: int) -> list[Figure]:
    """Time one row through the model, in this process."""
    artifacts = load_artifacts(ROOT / os.environ.get("WINEMON_ARTIFACTS_DIR", "artifacts"))
    loaded = load_predictor(artifacts)
    rows = [sample.row for sample in artifacts.manifest.samples]

    def once() -> None:
        for row in rows:
            loaded.predict(row)

    times = [min(timeit.repeat(once, number=200, repeat=5)) / 200 / len(rows) * 1e6 for _ in range(rounds)]
    return [Figure("predict_one_row_us", "us", times, 8)]


def scraping(rounds: int, recycles: int) -> list[Figure]:
    """Measure a scrape when the service is fresh and after many workers have come and gone."""

    def cost(running: Service) -> float:
        before = running.cpu()
        for _ in range(200):
            if not running.answers("/metrics"):
                raise SystemExit("/metrics failed")
        return (running.cpu() - before) / 200 * 1000

    with service("winemon") as running:
        load_with_wrk(running, wines(), seconds=1)
        fresh = [cost(running) for _ in range(rounds)]
        dead = 0
        while dead < recycles:
            before = running.workers
            for pid in before:
                os.kill(pid, signal.SIGKILL)
            dead += len(before)
            while set(before) & set(running.workers) or len(running.connections()) < 2:
                time.sleep(0.01)
        load_with_wrk(running, wines(), seconds=1)
        worn = [cost(running) for _ in range(rounds)]
        old = set(running.workers)
        running.process.send_signal(signal.SIGHUP)
        while old & set(running.workers):
            time.sleep(0.05)
        reloaded = [cost(running) for _ in range(rounds)]
        files = len(list(running.metrics.glob("*.db")))
    return [
        Figure("scrape_cpu_ms", "ms", fresh),
        Figure("scrape_worn_to_fresh", "ratio", [w / statistics.median(fresh) for w in worn], 1.2),
        Figure("scrape_reloaded_to_fresh", "ratio", [r / statistics.median(fresh) for r in reloaded], 1.2),
        Figure("metric_files_after_recycles", "files", [files], 20),
        Figure("recycles", "workers", [dead]),
    ]


def spreading(bursts: int) -> list[Figure]:
    """Open bursts of 16 connections, and see that each worker gets its share of every one."""
    least = []
    with service("winemon") as running:
        for _ in range(bursts):
            while running.connections() != [0, 0]:
                time.sleep(0.01)
            burst = [socket.create_connection(("127.0.0.1", running.port)) for _ in range(CONNECTIONS)]
            while sum(running.connections()) < CONNECTIONS:
                time.sleep(0.01)
            least.append(min(running.connections()))
            for connection in burst:
                connection.close()
    return [
        Figure("least_connections_of_a_worker", "of 16", [min(least)], 4, at_least=True),
        Figure("bursts", "bursts", [bursts]),
    ]


def leaving(recycles: int, reloads: int, kills: int) -> list[Figure]:
    """Replace workers under load; count the requests that failed, and those counted wrongly.

    Whoever leaves tells its clients, which pause 0 to 3 s. Whoever is killed cannot, and its clients never
    pause, so that each may have a request in hand.
    """

    def reload(running: Service) -> None:
        old = set(running.workers)
        running.process.send_signal(signal.SIGHUP)
        while old & set(running.workers):
            time.sleep(0.05)

    def recycle(running: Service) -> None:
        old = set(running.workers)
        while not set(running.workers) - old:
            time.sleep(0.05)

    def kill(running: Service) -> None:
        time.sleep(0.5)
        victim = random.choice(running.workers)  # noqa: S311 - no secret
        os.kill(victim, signal.SIGKILL)
        while victim in running.workers or len(running.connections()) < 2:
            time.sleep(0.05)

    figures = []
    for name, disturb, times, clients, pause, environment in (
        ("reloads", reload, reloads, 200, 3.0, {}),
        ("recycles", recycle, recycles, 200, 3.0, {"WINEMON_MAX_REQUESTS": "100"}),
        ("kills", kill, kills, CONNECTIONS, 0.0, {}),
    ):
        with service("winemon", **environment) as running:
            tally = asyncio.run(disturbed(running, partial(disturb, running), times, clients, pause))
            counted = int(re.search(COUNTED, running.get("/metrics"), re.MULTILINE)[1])  # type: ignore[index]
        failed, beyond = len(tally.failures), counted - tally.answered
        # A killed worker may have counted an answer that was lost with it, never the other way round.
        lost = f"of {tally.answered + failed}"
        figures += [
            Figure(f"failed_requests_over_{name}", lost, [failed], clients * times if pause == 0 else 0),
            Figure(f"miscounted_requests_over_{name}", lost, [max(-beyond, beyond - failed, 0)], 0),
            Figure(name, "times", [times]),
        ]
    return figures


async def disturbed(
    running: Service, disturb: Callable[[], None], times: int, clients: int, pause: float
) -> Tally:
    """Disturb the service some times while clients use it; return what they saw."""
    stop = asyncio.Event()
    load = asyncio.create_task(crowd(running.port, post(json.dumps(EXAMPLE).encode()), clients, pause, stop))
    for _ in range(times):
        await asyncio.to_thread(disturb)
    stop.set()
    return await load


def say(line: str) -> None:
    """Tell a person who waits."""
    sys.stderr.write(f"{line}\n")


def machine() -> dict[str, str]:
    """Describe where the figures are from."""
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    packages = (
        "fastapi",
        "pydantic",
        "starlette",
        "uvicorn",
        "gunicorn",
        "uvloop",
        "httptools",
        "scikit-learn",
    )
    return {
        "processor": model[1] if model else platform.machine(),
        "cores": str(os.cpu_count()),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_average": " ".join(f"{load:.2f}" for load in os.getloadavg()),
        **{package: version(package) for package in packages},
    }


def write(figures: list[Figure], where: dict[str, str]) -> str:
    """Write the three files; return the table."""
    OUTPUT.mkdir(parents=True, exist_ok=True)
    content = {"machine": where, "figures": {figure.name: asdict(figure) for figure in figures}}
    (OUTPUT / "bench.json").write_text(json.dumps(content, indent=2) + "\n")
    lines = ["| figure | median | rounds | bound | |", "| --- | --- | --- | --- | --- |"]
    for figure in figures:
        spread = f"{min(figure.rounds):.3g} to {max(figure.rounds):.3g}"
        bound = (
            ""
            if figure.bound is None
            else f"{'at least' if figure.at_least else 'at most'} {figure.bound:.3g}"
        )
        verdict = "" if figure.bound is None else ("holds" if figure.ok else "**outside**")
        lines.append(f"| {figure.name} | {figure.value:.4g} {figure.unit} | {spread} | {bound} | {verdict} |")
    table = "\n".join(lines) + "\n"
    (OUTPUT / "table.md").write_text(table)
    plot(figures)
    return table


def plot(figures: list[Figure]) -> None:
    """Draw CPU time a request of the services, each round a dot."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    shown = [figure for figure in figures if figure.name.startswith("cpu_ms_")]
    axes = plt.figure(figsize=(8, 3.5), layout="constrained").subplots()
    for place, figure in enumerate(shown):
        axes.barh(place, figure.value, color="#7b2d43", alpha=0.75)
        axes.plot(figure.rounds, [place] * len(figure.rounds), ".", color="black", markersize=4)
    axes.set_yticks(range(len(shown)), [figure.name.removeprefix("cpu_ms_") for figure in shown])
    axes.invert_yaxis()
    axes.set_xlabel("CPU time of the server, ms/request")
    plt.savefig(OUTPUT / "plot.png", dpi=120)


def main() -> int:
    """Run the command; return its exit code."""
    parts: dict[str, Callable[[argparse.Namespace], list[Figure]]] = {
        "predictor": lambda given: predictor(given.rounds),
        "serving": lambda given: serving(given.rounds),
        "metrics": lambda given: metrics(given.rounds),
        "alternatives": lambda given: alternatives(given.rounds),
        "spreading": lambda _: spreading(100),
        "scraping": lambda given: scraping(given.rounds, given.recycles),
        "leaving": lambda _: leaving(100, 20, 20),
    }
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description="Measure what serving costs.")
    parser.add_argument("--rounds", type=int, default=5, help="of each service (default: %(default)s)")
    parser.add_argument("--recycles", type=int, default=1000, help="workers killed (default: %(default)s)")
    parser.add_argument("--only", choices=parts)
    arguments = parser.parse_args()
    if shutil.which("wrk") is None:
        raise SystemExit("wrk is not installed: apt install wrk")
    where = machine()
    figures: list[Figure] = []
    table = ""
    for name, measure in parts.items():
        if arguments.only in (None, name):
            figures += measure(arguments)
            table = write(figures, where)  # now, lest a later part fails
    sys.stdout.write(table)
    outside = [figure.name for figure in figures if not figure.ok]
    if outside:
        say(f"outside their bound: {', '.join(outside)}")
    return 1 if outside else 0


if __name__ == "__main__":
    sys.exit(main())
