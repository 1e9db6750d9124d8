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
    ("method", "path", "mode", "share"),
    [
        ("POST", "/predict", GOOD, 1),
        ("POST", "/predict", BAD, 1),
        ("POST", "/predict/batch", GOOD, 3),  # each takes as long as many of the others
        ("POST", "/predict/batch", BAD, 3),
        ("GET", "/healthcheck", GOOD, 1),
        ("GET", "/ready", GOOD, 1),
        ("GET", "/model", GOOD, 1),
    ],
)
def test_answers_as_documented(schema: Any, method: str, path: str, mode: GenerationMode, share: int) -> None:
    tried, cases = 0, effort().max_examples // share

    @effort(max_examples=cases)
    @given(case=schema[path][method].as_strategy(generation_mode=mode))
    def check(case: schemathesis.Case) -> None:
        nonlocal tried
        tried += 1
        case.call_and_validate()

    check()
    # There is one way to ask without a body.
    assert tried >= (cases if method == "POST" else 1)
