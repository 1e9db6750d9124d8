"""What the OpenAPI document promises, tried with generated requests, good and bad."""

from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import given
from hypothesis import settings as effort
from schemathesis import GenerationMode

from app.main import create_app
from app.settings import Settings


@pytest.fixture(scope="module")
def schema(artifacts: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    metrics = tmp_path_factory.mktemp("schema")
    app = create_app(Settings(artifacts_dir=artifacts, metrics_dir=metrics))
    return schemathesis.openapi.from_asgi("/openapi.json", app)


GOOD, BAD = GenerationMode.POSITIVE, GenerationMode.NEGATIVE


@pytest.mark.generated
@pytest.mark.parametrize(
    ("method", "path", "mode"),
    [
        ("POST", "/predict", GOOD),
        ("POST", "/predict", BAD),
        ("POST", "/predict/batch", GOOD),
        ("POST", "/predict/batch", BAD),
        ("GET", "/healthcheck", GOOD),
        ("GET", "/ready", GOOD),
        ("GET", "/model", GOOD),
    ],
)
def test_answers_as_documented(schema: Any, method: str, path: str, mode: GenerationMode) -> None:
    tried = 0

    @given(case=schema[path][method].as_strategy(generation_mode=mode))
    def check(case: schemathesis.Case) -> None:
        nonlocal tried
        tried += 1
        case.call_and_validate()

    check()
    # There is one way to ask without a body.
    assert tried >= (effort().max_examples if method == "POST" else 1)
