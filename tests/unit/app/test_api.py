"""What a client sees of each route."""

import asyncio
import gzip
import json
import re
from array import array
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from api_harness import Client, make_artifacts, parse, value
from starlette.types import Message

from app.contract import FEATURE_NAMES
from app.main import MAX_PROBLEMS, create_app
from app.settings import Settings


def post(client: Client, body: Any, path: str = "/predict", **headers: str) -> Any:
    content = body if isinstance(body, (bytes, str)) else json.dumps(body)
    return client.post(path, content=content, headers={"Content-Type": "application/json", **headers})


def problem(response: Any) -> tuple[list[Any], str]:
    """Where and what the first problem of a 422 is."""
    assert response.status_code == 422, response.text
    first = response.json()["detail"][0]
    return first["loc"], first["type"]


def test_predicts_what_training_predicted(client: Client, manifest: dict[str, Any]) -> None:
    for sample in manifest["samples"]:
        response = post(client, sample["wine"])
        assert response.status_code == 200
        assert response.json() == {"quality": pytest.approx(sample["quality"], abs=1e-9)}
        assert float(response.headers["X-Model-Score"]) == response.json()["quality"]
        assert response.headers["X-Model-Version"] == "1.0.0"
        assert response.headers["Content-Type"] == "application/json"


def test_predicts_a_batch_in_its_order(client: Client, manifest: dict[str, Any]) -> None:
    response = post(client, {"samples": [s["wine"] for s in manifest["samples"]]}, "/predict/batch")
    assert response.json()["qualities"] == pytest.approx([s["quality"] for s in manifest["samples"]])
    assert response.headers["X-Model-Version"] == "1.0.0"


def test_accepts_a_thousand_wines_and_no_more(client: Client, wine: dict[str, Any]) -> None:
    assert len(post(client, {"samples": [wine] * 1000}, "/predict/batch").json()["qualities"]) == 1000
    refused = post(client, {"samples": [wine] * 1001}, "/predict/batch")
    assert problem(refused) == (["body", "samples"], "too_long")
    assert problem(post(client, {"samples": []}, "/predict/batch")) == (["body", "samples"], "too_short")


def test_names_the_wine_of_a_batch_that_is_wrong(client: Client, wine: dict[str, Any]) -> None:
    bad = {**wine, "ph": 15}
    response = post(client, {"samples": [wine, bad]}, "/predict/batch")
    assert problem(response) == (["body", "samples", 1, "ph"], "less_than_equal")


def test_names_a_bounded_number_of_problems(client: Client) -> None:
    response = post(client, {"samples": [{}] * 1000}, "/predict/batch")
    assert len(response.json()["detail"]) == MAX_PROBLEMS


@pytest.mark.parametrize("feature", FEATURE_NAMES)
def test_requires_every_feature(client: Client, wine: dict[str, Any], feature: str) -> None:
    del wine[feature]
    assert problem(post(client, wine)) == (["body", feature], "missing")


@pytest.mark.parametrize(
    ("literal", "kind"),
    [
        ("NaN", "finite_number"),
        ("Infinity", "finite_number"),
        ("-Infinity", "finite_number"),
        ("1e400", "finite_number"),
        ("true", "float_type"),
        ('"7.4"', "float_type"),
        ("null", "float_type"),
        ("[7.4]", "float_type"),
        ("{}", "float_type"),
        ("-0.1", "greater_than_equal"),
        ("1e31", "less_than_equal"),
    ],
)
def test_refuses_a_value_that_is_no_measurement(
    client: Client, wine: dict[str, Any], literal: str, kind: str
) -> None:
    body = json.dumps(wine).replace('"chlorides": 0.076', f'"chlorides": {literal}')
    assert problem(post(client, body)) == (["body", "chlorides"], kind)


def test_refuses_a_feature_that_is_not_in_the_contract(client: Client, wine: dict[str, Any]) -> None:
    assert problem(post(client, {**wine, "price": 9})) == (["body", "price"], "extra_forbidden")
    assert problem(post(client, {**wine, "\ud800": 9}))[1] == "json_invalid"


def test_takes_the_bounds_themselves(client: Client, wine: dict[str, Any]) -> None:
    for extreme in ({"ph": 14, "alcohol_pct_vol": 100}, {"ph": 0, "density": 0}, {"density": 1e30}):
        assert post(client, {**wine, **extreme}).status_code == 200


def test_takes_the_last_of_duplicate_keys(client: Client, wine: dict[str, Any]) -> None:
    doubled = json.dumps(wine)[:-1] + ', "ph": 3.0}'
    assert post(client, doubled).json() == post(client, {**wine, "ph": 3.0}).json()


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"\xff\xfe", b'{"ph": "\xff"}', b"[" * 100_000, b'{"a":' * 100_000, b"not json"],
    ids=["empty", "cut short", "broken UTF-8", "broken UTF-8 inside", "deep array", "deep object", "words"],
)
def test_refuses_what_is_not_json(client: Client, body: bytes) -> None:
    assert problem(post(client, body))[1] == "json_invalid"


@pytest.mark.parametrize("body", ["[]", "7", '"wine"', "null"])
def test_refuses_json_that_is_not_an_object(client: Client, body: str) -> None:
    assert problem(post(client, body))[0] == ["body"]


@pytest.mark.parametrize("media_type", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_refuses_another_media_type(client: Client, wine: dict[str, Any], media_type: str) -> None:
    response = post(client, wine, **{"Content-Type": media_type})
    assert (response.status_code, response.json()) == (415, {"detail": "send the body as application/json"})


def test_accepts_parameters_of_the_media_type(client: Client, wine: dict[str, Any]) -> None:
    assert post(client, wine, **{"Content-Type": "Application/JSON; charset=utf-8"}).status_code == 200


def test_never_decompresses(client: Client) -> None:
    bomb = gzip.compress(b" " * 10_000_000)
    response = post(client, bomb, **{"Content-Encoding": "gzip"})
    assert (response.status_code, response.json()["detail"]) == (
        415,
        "send the body without a content encoding",
    )


def test_refuses_an_oversized_body(client: Client, wine: dict[str, Any]) -> None:
    response = post(client, json.dumps(wine) + " " * 1024 * 1024)
    assert response.status_code == 413
    assert response.json() == {"detail": "the body is longer than 1048576 bytes"}
    assert response.headers["Connection"] == "close"


def test_is_alive_and_ready(client: Client) -> None:
    assert client.get("/healthcheck").json() == {"status": "ok"}
    response = client.get("/ready")
    assert (response.status_code, response.json()) == (
        200,
        {"ready": True, "version": "1.0.0", "reason": None},
    )


def test_shows_the_model_card(client: Client, manifest: dict[str, Any]) -> None:
    card = client.get("/model").json()
    for key in ("version", "algorithm", "metrics", "data", "trained_at", "parameters"):
        assert card[key] == manifest[key]
    assert [feature["name"] for feature in card["features"]] == list(FEATURE_NAMES)
    assert card["features"][8]["maximum"] == 14
    assert card["features"][8]["trained_maximum"] == manifest["features"][8]["maximum"]


def test_without_a_model_it_lives_and_says_why(tmp_path: Path, wine: dict[str, Any]) -> None:
    settings = Settings(artifacts_dir=tmp_path / "nowhere", metrics_dir=tmp_path / "metrics")
    client = Client(create_app(settings))
    assert client.get("/healthcheck").status_code == 200
    ready = client.get("/ready")
    assert (ready.status_code, ready.json()["ready"], ready.json()["version"]) == (503, False, None)
    assert "nowhere/manifest.json: No such file or directory; run `make train`" in ready.json()["reason"]
    for response in (
        post(client, wine),
        post(client, {"samples": [wine]}, "/predict/batch"),
        client.get("/model"),
    ):
        assert response.status_code == 503
        assert "No such file" in response.json()["detail"]
    samples = parse(client.get("/metrics").text)
    assert value(samples, "winemon_ready") == 0
    assert value(samples, "winemon_artifact_refused_total") == 1
    assert not any(name == "winemon_model_info" for name, _ in samples)


def test_documents_what_it_does(client: Client) -> None:
    document = client.get("/openapi.json").json()
    assert set(document["paths"]) == {"/predict", "/predict/batch", "/healthcheck", "/ready", "/model"}
    predict = document["paths"]["/predict"]["post"]
    assert set(predict["responses"]) == {"200", "413", "415", "422", "503"}
    assert set(predict["responses"]["200"]["headers"]) == {"X-Model-Score", "X-Model-Version"}
    schema = document["components"]["schemas"]["Wine"]
    assert schema["required"] == list(FEATURE_NAMES)
    assert schema["additionalProperties"] is False
    assert schema["properties"]["ph"]["maximum"] == 14


def test_the_documentation_needs_no_internet(client: Client) -> None:
    for page in ("/docs", "/redoc"):
        html = client.get(page).text
        named = re.findall(r'(?:src|href)="([^"]+)"', html)
        assert named
        for asset in named:
            assert asset.startswith("docs/assets/")
            assert client.get(f"/{asset}").status_code == 200


def test_the_page_takes_nothing_from_elsewhere_and_cannot_be_broken_out_of(settings: Settings) -> None:
    hostile = {"</script><script>alert(1)</script>": "http://x/"}
    response = Client(create_app(settings.model_copy(update={"consoles": hostile}))).get("/")
    assert "</script><script>alert" not in response.text
    assert response.headers["content-security-policy"].startswith("default-src 'none'")
    assert "src=" not in response.text


def test_without_a_model_the_page_says_why(settings: Settings) -> None:
    response = Client(create_app(settings.model_copy(update={"artifacts_dir": settings.metrics_dir}))).get(
        "/"
    )
    assert response.status_code == 200
    assert "No such file or directory" in response.text


def test_ready_notices_a_model_that_changed_its_mind(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = Client(create_app(settings))
    monkeypatch.setattr(
        "app.predictor.CompiledPredictor.predict_many",
        lambda _, wines: array("d", [float("nan")] * (len(wines) // 11)),
    )
    response = client.get("/ready")
    assert response.status_code == 503
    assert "predicts nan for a sample for which training predicted" in response.json()["reason"]


def test_serves_the_artifacts_that_training_made_last(tmp_path: Path) -> None:
    settings = Settings(
        artifacts_dir=make_artifacts(tmp_path / "other", version="2.0.0", seed=1),
        metrics_dir=tmp_path / "metrics",
    )
    assert Client(create_app(settings)).get("/ready").json()["version"] == "2.0.0"


def test_starts_and_stops_with_its_server(settings: Settings) -> None:
    messages = iter([{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}])
    sent: list[str] = []

    async def receive() -> Message:
        return next(messages)

    async def send(message: Message) -> None:
        sent.append(message["type"])

    asyncio.run(create_app(settings)({"type": "lifespan"}, receive, send))
    assert sent == ["lifespan.startup.complete", "lifespan.shutdown.complete"]


@pytest.mark.parametrize("parts", [[], [b'{"ph":'], [b" " * 1024 * 1024, b" "]])
def test_a_client_that_goes_away_gets_no_answer(settings: Settings, parts: list[bytes]) -> None:
    messages = iter(
        [
            *({"type": "http.request", "body": part, "more_body": True} for part in parts),
            {"type": "http.disconnect"},
        ]
    )

    async def receive() -> Message:
        return next(messages)

    async def send(message: Message) -> None:
        raise AssertionError(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/predict",
        "headers": [(b"content-type", b"application/json")],
    }
    asyncio.run(create_app(settings)(scope, receive, send))


def test_a_body_that_arrives_in_parts_is_read_whole(settings: Settings, wine: dict[str, Any]) -> None:
    async def parts() -> AsyncIterator[bytes]:
        for byte in json.dumps(wine).encode():
            yield bytes([byte])

    client = Client(create_app(settings))
    response = client.post("/predict", content=parts(), headers={"Content-Type": "application/json"})
    assert response.status_code == 200


def test_a_body_without_end_is_refused(settings: Settings) -> None:
    async def forever() -> AsyncIterator[bytes]:
        while True:
            yield b" " * 65536

    client = Client(create_app(settings))
    response = client.post("/predict", content=forever(), headers={"Content-Type": "application/json"})
    assert response.status_code == 413
