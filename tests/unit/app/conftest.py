"""One application in this process, and servers that the end of a test stops."""

import json
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from api_harness import Client, Server, make_artifacts

from app.contract import MANIFEST_FILE
from app.main import create_app
from app.schemas import EXAMPLE
from app.settings import Settings

# Each application keeps its files of metrics open, as a worker does; Debian lets a process have 1,024.
_soft, _hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (max(_soft, min(4096, _hard)), _hard))


@pytest.fixture(scope="session")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_artifacts(tmp_path_factory.mktemp("model") / "artifacts")


@pytest.fixture(scope="session")
def manifest(artifacts: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((artifacts / MANIFEST_FILE).read_text())
    return content


@pytest.fixture
def wine() -> dict[str, Any]:
    return dict(EXAMPLE)


@pytest.fixture
def settings(artifacts: Path, tmp_path: Path) -> Settings:
    return Settings(artifacts_dir=artifacts, metrics_dir=tmp_path / "metrics")


@pytest.fixture
def client(settings: Settings) -> Client:
    """One worker's application, in this process."""
    return Client(create_app(settings))


@pytest.fixture
def start(tmp_path: Path, artifacts: Path) -> Iterator[Callable[..., Server]]:
    """Start servers that the end of the test stops."""
    servers: list[Server] = []

    def start(artifacts: Path = artifacts, **environment: str) -> Server:
        directory = tmp_path / f"server{len(servers)}"
        directory.mkdir()
        servers.append(Server(directory, artifacts, **environment))
        servers[-1].ready()
        return servers[-1]

    yield start
    for server in servers:
        server.stop()
