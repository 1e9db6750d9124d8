"""Small artifacts of our own, and a real server of several processes."""

import asyncio
import hashlib
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import joblib
import numpy as np
from prometheus_client.parser import text_string_to_metric_families
from sklearn.ensemble import ExtraTreesRegressor
from sklearn.preprocessing import StandardScaler

from app.contract import ARTIFACT_FILES, BASELINE_FILE, COMPILED_FILE, FEATURE_NAMES, FEATURES, MANIFEST_FILE
from app.schemas import EXAMPLE
from training.compile import compile_forest

ROOT = Path(__file__).parents[3]
GUNICORN = Path(sys.executable).with_name("gunicorn")
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def make_artifacts(directory: Path, *, version: str = "1.0.0", seed: int = 0, compiled: bool = True) -> Path:
    """Train a small forest on invented wines and write it as training does."""
    directory.mkdir(parents=True)
    random = np.random.default_rng(seed)
    center = np.array(list(EXAMPLE.values()))
    wines = center * random.uniform(0.5, 1.5, (200, len(FEATURES)))
    quality = 5 + wines[:, 10] / center[10] - wines[:, 1] / center[1] + random.normal(0, 0.1, 200)
    scaler = StandardScaler().fit(wines)
    model = ExtraTreesRegressor(n_estimators=10, random_state=seed).fit(scaler.transform(wines), quality)
    predictions = model.predict(scaler.transform(wines))
    joblib.dump(scaler, directory / "scaler.joblib")
    joblib.dump(model, directory / "model.joblib")
    if compiled:
        compile_forest(scaler, model, directory / COMPILED_FILE)
    columns = {**dict(zip(FEATURE_NAMES, wines.T, strict=True)), "quality": predictions}
    bins = {name: quartiles(column) for name, column in columns.items()}
    baseline = {"id": f"base{seed}", "quality": bins.pop("quality"), "features": bins}
    (directory / BASELINE_FILE).write_text(json.dumps(baseline))
    manifest = {
        "format": 1,
        "version": version,
        "code_version": "test",
        "trained_at": "2026-01-02T03:04:05Z",
        "algorithm": "ExtraTreesRegressor",
        "parameters": {"n_estimators": 10},
        "python": "3",
        "libraries": {"scikit-learn": "1"},
        "data": {"sha256": "0" * 64},
        "features": [
            {
                "name": feature.name,
                "unit": feature.unit,
                "minimum": float(column.min()),
                "maximum": float(column.max()),
            }
            for feature, column in zip(FEATURES, wines.T, strict=True)
        ],
        "metrics": {"test_mse": 0.25, "holdout_mse": 0.5, "cv_mse": 0.5},
        "samples": [
            {"wine": dict(zip(FEATURE_NAMES, row, strict=True)), "quality": q}
            for row, q in zip(wines[:8].tolist(), predictions[:8].tolist(), strict=True)
        ],
    }
    write_manifest(directory, manifest)
    return directory


def quartiles(column: Any) -> dict[str, list[float]]:
    edges = np.unique(np.quantile(column, [0, 0.25, 0.5, 0.75, 1])).tolist()
    if len(edges) == 1:
        edges *= 2
    return {"edges": edges, "shares": [1 / (len(edges) - 1)] * (len(edges) - 1)}


def write_manifest(directory: Path, manifest: dict[str, Any]) -> None:
    """Write a manifest that vouches for the artifacts as they are now."""
    manifest["artifacts"] = {
        name: {
            "sha256": hashlib.sha256((directory / name).read_bytes()).hexdigest(),
            "size": (directory / name).stat().st_size,
        }
        for name in (*ARTIFACT_FILES, COMPILED_FILE)
        if (directory / name).exists()
    }
    (directory / MANIFEST_FILE).write_text(json.dumps(manifest))


def parse(exposition: str) -> Samples:
    """Read an exposition into {(sample name, labels): value}; a series that is there twice fails."""
    samples: Samples = {}
    for family in text_string_to_metric_families(exposition):
        for sample in family.samples:
            key = (sample.name, frozenset(sample.labels.items()))
            assert key not in samples, f"duplicate series {key}"
            samples[key] = sample.value
    return samples


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples[name, frozenset(labels.items())]


class Client:
    """Calls an application in this process."""

    def __init__(self, app: Any) -> None:
        self.app = app

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        """Answer one request, a 500 where the application raises."""

        async def request() -> httpx.Response:
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                return await client.request(method, path, **options)

        return asyncio.run(request())

    def get(self, path: str, **options: Any) -> httpx.Response:
        """Answer a GET."""
        return self.request("GET", path, **options)

    def post(self, path: str, **options: Any) -> httpx.Response:
        """Answer a POST."""
        return self.request("POST", path, **options)


class Server:
    """gunicorn with its workers on a free port of the loopback interface."""

    def __init__(self, directory: Path, artifacts: Path, **environment: str) -> None:
        self.metrics = directory / "metrics"
        self.log = directory / "log"
        environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("WINEMON", "PROM"))},
            "WINEMON_ARTIFACTS_DIR": str(artifacts),
            "WINEMON_BIND": "127.0.0.1:0",
            "WINEMON_WORKERS": "2",
            "WINEMON_LEAVE_SECONDS": "4",
            "PROMETHEUS_MULTIPROC_DIR": str(self.metrics),
            **environment,
        }
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [GUNICORN, "-c", ROOT / "app/gunicorn.conf.py"],
                env=environment,
                stderr=log,
                stdout=log,
            )
        self.port = int(wait_for(lambda: re.search(r"http://127.0.0.1:(\d+) ", self.log.read_text()))[1])

    def request(self, method: str, path: str, body: Any = None) -> tuple[int, bytes]:
        """One request on a connection of its own."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            content = None if body is None else json.dumps(body)
            connection.request(method, path, content, {"Content-Type": "application/json"})
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def ready(self) -> None:
        """Wait until a worker serves a model."""
        wait_for(lambda: self.request("GET", "/ready")[0] == 200)

    def scrape(self) -> Samples:
        """Read /metrics from whichever worker answers."""
        status, body = self.request("GET", "/metrics")
        assert status == 200
        return parse(body.decode())

    @property
    def workers(self) -> set[int]:
        """Process ids of the workers, those that are leaving too."""
        pid = self.process.pid
        return set(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))

    def signal(self, number: signal.Signals) -> None:
        """Signal the master."""
        self.process.send_signal(number)

    def stop(self) -> None:
        """Stop gracefully, and see that it does."""
        self.process.terminate()
        try:
            assert self.process.wait(40) == 0
        finally:
            self.process.kill()


def wait_for(condition: Callable[[], Any], seconds: float = 60) -> Any:
    """Return the first true result of `condition`; a refused or reset connection counts as false."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            if result := condition():
                return result
        except (ConnectionError, http.client.HTTPException) as error:
            last: object = error
        else:
            last = result
        assert time.monotonic() < deadline, f"still {last!r} after {seconds} s"
        time.sleep(0.05)
