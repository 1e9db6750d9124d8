"""Counts of one worker, and what a scrape makes of everyone's files."""

import asyncio
import itertools
import json
import struct
from math import inf, nextafter
from pathlib import Path
from random import Random
from typing import Any

import pytest
from api_harness import Client, make_artifacts, parse, value, write_manifest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.mmap_dict import MmapedDict
from prometheus_client.multiprocess import MultiProcessCollector
from starlette.types import Message, Receive, Scope, Send

from app.contract import FEATURE_NAMES
from app.main import create_app
from app.monitoring import Monitor
from app.predictor import MAX_BINS
from app.schemas import EXAMPLE
from app.settings import Settings


def predict(client: Client, wine: dict[str, Any]) -> float:
    response = client.post("/predict", json=wine)
    assert response.status_code == 200
    quality: float = response.json()["quality"]
    return quality


def scrape(client: Client) -> dict[Any, float]:
    return parse(client.get("/metrics").text)


def test_everything_exists_at_zero_from_the_start(client: Client, artifacts: Path) -> None:
    samples = scrape(client)
    baseline = json.loads((artifacts / "baseline.json").read_text())
    for feature in (*FEATURE_NAMES, "quality"):
        bins = baseline["quality"] if feature == "quality" else baseline["features"][feature]
        names = ["below", *map(str, range(len(bins["shares"]))), "above"]
        shares = [0, *bins["shares"], 0]
        for name, share in zip(names, shares, strict=True):
            labels = {"feature": feature, "bin": name, "baseline": "base0"}
            assert value(samples, "winemon_feature_bin_total", **labels) == 0
            assert value(samples, "winemon_baseline_ratio", **labels) == share
    for handler, status in itertools.product(("/predict", "/predict/batch"), ("2xx", "4xx", "5xx")):
        labels = {"handler": handler, "method": "POST", "status": status}
        assert value(samples, "fastapi_monitoring_http_requests_total", **labels) == 0
    for name in (
        "winemon_artifact_refused_total",
        "winemon_overload_total",
        "winemon_metrics_unreadable_total",
    ):
        assert value(samples, name) == 0
    assert value(samples, "fastapi_monitoring_regression_model_output_count") == 0
    assert value(samples, "winemon_worker_starts_total") == 1


def test_describes_the_model(client: Client, manifest: dict[str, Any]) -> None:
    samples = scrape(client)
    sha256 = manifest["artifacts"]["model.joblib"]["sha256"]
    labels = {"version": "1.0.0", "algorithm": "ExtraTreesRegressor", "sha256": sha256}
    assert value(samples, "winemon_model_info", **labels) == 1
    assert value(samples, "winemon_model_test_mse") == 0.25
    assert value(samples, "winemon_model_trained_timestamp_seconds") == 1767323045
    assert value(samples, "winemon_model_compiled") == 1
    assert value(samples, "winemon_ready") == 1


def test_counts_each_request_by_route_method_and_status(client: Client, wine: dict[str, Any]) -> None:
    for _ in range(3):
        predict(client, wine)
    client.post("/predict", json={})
    client.get("/predict")
    client.get("/nowhere/at/all")
    samples = scrape(client)

    def requests(**labels: str) -> float:
        return value(samples, "fastapi_monitoring_http_requests_total", **labels)

    assert requests(handler="/predict", method="POST", status="2xx") == 3
    assert requests(handler="/predict", method="POST", status="4xx") == 1
    assert requests(handler="/predict", method="GET", status="4xx") == 1
    assert requests(handler="none", method="GET", status="4xx") == 1
    assert value(samples, "fastapi_inprogress") == 1  # the scrape itself

    def durations(le: str) -> float:
        name = "fastapi_monitoring_http_request_duration_seconds_bucket"
        return value(samples, name, handler="/predict", method="POST", le=le)

    assert durations("+Inf") == 4
    assert durations("0.0005") <= durations("5.0") <= 4
    sizes = value(samples, "fastapi_monitoring_http_request_size_bytes_sum", handler="/predict")
    assert sizes == 3 * len(json.dumps(wine, separators=(",", ":"))) + 2
    assert value(samples, "fastapi_monitoring_http_response_size_bytes_count", handler="/predict") == 5


def test_puts_each_value_into_its_bin(client: Client, artifacts: Path, wine: dict[str, Any]) -> None:
    edges = json.loads((artifacts / "baseline.json").read_text())["features"]["ph"]["edges"]
    first, second, *_, last = edges
    expected = {
        nextafter(first, -inf): "below",
        first: "0",
        nextafter(second, -inf): "0",
        second: "1",
        last: str(len(edges) - 2),
        nextafter(last, inf): "above",
    }
    for ph, name in expected.items():
        labels = {"feature": "ph", "bin": name, "baseline": "base0"}
        before = value(scrape(client), "winemon_feature_bin_total", **labels)
        predict(client, {**wine, "ph": ph})
        assert value(scrape(client), "winemon_feature_bin_total", **labels) == before + 1, (ph, name)


@pytest.mark.parametrize("count", [MAX_BINS - 2, MAX_BINS - 1])
def test_counts_into_as_many_bins_as_a_baseline_has(tmp_path: Path, wine: dict[str, Any], count: int) -> None:
    """With `below` and `above` the first fills the compiled code's tables, the second does not fit."""
    artifacts = make_artifacts(tmp_path / "artifacts")
    baseline = json.loads((artifacts / "baseline.json").read_text())
    edges = [3 + number / 100 for number in range(count + 1)]
    baseline["features"]["ph"] = {"edges": edges, "shares": [1 / count] * count}
    (artifacts / "baseline.json").write_text(json.dumps(baseline))
    write_manifest(artifacts, json.loads((artifacts / "manifest.json").read_text()))
    client = Client(create_app(Settings(artifacts_dir=artifacts, metrics_dir=tmp_path / "metrics")))
    values = [2.9, *edges, nextafter(edges[-1], inf)]
    client.post("/predict/batch", json={"samples": [{**wine, "ph": ph} for ph in values]})
    samples = scrape(client)
    counted = [
        value(samples, "winemon_feature_bin_total", feature="ph", bin=name, baseline="base0")
        for name in ("below", *map(str, range(count)), "above")
    ]
    assert counted == [1] * count + [2, 1]
    assert value(samples, "winemon_model_compiled") == 1


def test_a_constant_feature_has_one_bin(client: Client, wine: dict[str, Any]) -> None:
    predict(client, wine)
    predict(client, {**wine, "citric_acid": 0.1})
    samples = scrape(client)
    labels = {"feature": "citric_acid", "baseline": "base0"}
    assert [
        value(samples, "winemon_feature_bin_total", bin=name, **labels) for name in ("below", "0", "above")
    ] == [0, 1, 1]


def test_counts_every_wine_of_a_batch(client: Client, wine: dict[str, Any]) -> None:
    quality = predict(client, wine)
    client.post("/predict/batch", json={"samples": [wine] * 7})
    samples = scrape(client)
    for feature in (*FEATURE_NAMES, "quality"):
        total = sum(
            count
            for (name, labels), count in samples.items()
            if name == "winemon_feature_bin_total" and ("feature", feature) in labels
        )
        assert total == 8
    assert value(samples, "fastapi_monitoring_regression_model_output_sum") == pytest.approx(8 * quality)
    bucket = "fastapi_monitoring_regression_model_output_bucket"
    assert value(samples, bucket, le="0.0") == 0
    assert value(samples, bucket, le="10.0") == value(samples, bucket, le="+Inf") == 8


def test_namespace_and_subsystem_are_settings(artifacts: Path, tmp_path: Path) -> None:
    settings = Settings(
        artifacts_dir=artifacts, metrics_dir=tmp_path, metrics_namespace="wine", metrics_subsystem="api"
    )
    samples = scrape(Client(create_app(settings)))
    assert value(samples, "wine_api_regression_model_output_count") == 0
    assert value(samples, "wine_inprogress") == 1


def test_is_compressed_when_asked(client: Client) -> None:
    plain = client.get("/metrics", headers={"Accept-Encoding": "identity"})
    assert "content-encoding" not in plain.headers
    assert plain.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    packed = client.get("/metrics", headers={"Accept-Encoding": "gzip;q=1"})
    assert packed.headers["content-encoding"] == "gzip"
    assert int(packed.headers["content-length"]) < len(plain.content) / 5
    assert set(parse(plain.text)) <= set(parse(packed.text))


def test_a_request_whose_handler_raises_is_a_500(
    settings: Settings, wine: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    client = Client(create_app(settings))
    monkeypatch.setattr("app.main.JsonRoute.reply", lambda *_: 1 / 0)
    assert client.post("/predict", json=wine).status_code == 500
    samples = scrape(client)
    labels = {"handler": "/predict", "method": "POST", "status": "5xx"}
    assert value(samples, "fastapi_monitoring_http_requests_total", **labels) == 1
    assert value(samples, "fastapi_inprogress") == 1


def test_an_incredible_content_length_does_not_spoil_the_sum(client: Client) -> None:
    for claim in ("99999999999999999999", "-5", "7"):
        client.get("/healthcheck", headers={"Content-Length": claim})
    samples = scrape(client)
    assert value(samples, "fastapi_monitoring_http_request_size_bytes_sum", handler="/healthcheck") == 7
    assert value(samples, "fastapi_monitoring_http_request_size_bytes_count", handler="/healthcheck") == 3


def worker(settings: Settings, slot: int) -> Client:
    """Another worker over the same directory; it is the one that this process counts for from now on."""
    return Client(create_app(settings.model_copy(update={"slot": slot})))


def test_any_worker_shows_the_counts_of_all(settings: Settings, wine: dict[str, Any]) -> None:
    first, second = worker(settings, 0), worker(settings, 1)
    for client, times in ((first, 3), (second, 4)):
        for _ in range(times):
            predict(client, wine)
    labels = {"handler": "/predict", "method": "POST", "status": "2xx"}
    for client in (first, second):
        samples = scrape(client)
        assert value(samples, "fastapi_monitoring_http_requests_total", **labels) == 7
        assert value(samples, "winemon_worker_starts_total") == 2


def test_the_next_worker_of_a_slot_continues_its_counts(
    settings: Settings, wine: dict[str, Any], tmp_path: Path
) -> None:
    client = worker(settings, 0)
    predict(client, wine)
    before = scrape(client)
    new = make_artifacts(tmp_path / "new", version="2.0.0", seed=1)
    client = worker(settings.model_copy(update={"artifacts_dir": new}), 0)
    predict(client, wine)
    after = scrape(client)
    labels = {"handler": "/predict", "method": "POST", "status": "2xx"}
    assert value(after, "fastapi_monitoring_http_requests_total", **labels) == 2
    counters = [key for key in before if key[0].endswith(("_total", "_count", "_bucket", "_sum"))]
    assert all(after[key] >= before[key] for key in counters)
    assert [dict(labels)["version"] for name, labels in after if name == "winemon_model_info"] == ["2.0.0"]
    assert len(list(settings.metrics_dir.glob("*.db"))) == 5


def test_ready_and_compiled_are_those_of_the_worst_worker(settings: Settings, tmp_path: Path) -> None:
    good = worker(settings, 0)
    worker(settings.model_copy(update={"artifacts_dir": tmp_path / "none"}), 1)
    samples = scrape(good)
    assert value(samples, "winemon_ready") == 0
    assert value(samples, "winemon_artifact_refused_total") == 1


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(struct.pack("i", 5000) + b"\x7f" * 5000),
        lambda path: path.write_bytes(b"\1"),
        lambda path: path.write_bytes(path.read_bytes()[:100]),
        lambda path: path.write_bytes(path.read_bytes().replace(b'["', b"[\xff", 3)),
        lambda path: path.write_bytes(path.read_bytes().replace(b'["', b"[[", 3)),
    ],
    ids=["wrong lengths", "one byte", "cut short", "not UTF-8", "not JSON"],
)
def test_a_damaged_file_costs_only_its_own_counts(
    settings: Settings, wine: dict[str, Any], damage: Any
) -> None:
    other = worker(settings, 0)
    predict(other, wine)
    client = worker(settings, 1)
    predict(client, wine)
    damage(settings.metrics_dir / "counter_0.db")
    labels = {"handler": "/predict", "method": "POST", "status": "2xx"}
    samples = scrape(client)
    assert value(samples, "fastapi_monitoring_http_requests_total", **labels) == 1
    assert value(scrape(client), "winemon_metrics_unreadable_total") >= 1

    client = worker(settings, 0)
    assert (settings.metrics_dir / "counter_0.unreadable").exists()
    predict(client, wine)
    samples = scrape(client)
    assert value(samples, "fastapi_monitoring_http_requests_total", **labels) == 2
    assert value(samples, "winemon_metrics_unreadable_total") >= 2


def test_a_file_that_is_only_being_made_is_not_damage(settings: Settings) -> None:
    client = worker(settings, 0)
    (settings.metrics_dir / "counter_7.db").touch()
    assert value(scrape(client), "winemon_metrics_unreadable_total") == 0
    assert value(scrape(client), "winemon_metrics_unreadable_total") == 0


def test_counts_go_on_where_a_file_outgrows_its_mapping(settings: Settings) -> None:
    monitor = Monitor(settings)
    for _ in range(2):
        for number in range(400):
            monitor.route("none", f"M{number}")(200, 0.1, 0, 0)
    assert (settings.metrics_dir / "counter_0.db").stat().st_size > 65536
    samples = parse(monitor.scrape().decode())
    for number in range(400):
        labels = {"handler": "none", "method": f"M{number}", "status": "2xx"}
        assert value(samples, "fastapi_monitoring_http_requests_total", **labels) == 2


def test_our_stores_are_what_the_client_library_reads(settings: Settings) -> None:
    Monitor(settings).overload.inc()
    Monitor(settings).route("none", "GET")(404, 0.1, 0, 0)
    content = {
        tuple(json.loads(key)[:2]): number
        for key, number, *_ in MmapedDict.read_all_values_from_file(settings.metrics_dir / "counter_0.db")
        if number
    }
    assert content == {
        ("winemon_overload", "winemon_overload_total"): 1,
        ("winemon_worker_starts", "winemon_worker_starts_total"): 2,
        ("fastapi_monitoring_http_requests", "fastapi_monitoring_http_requests_total"): 1,
    }


def test_an_answer_that_breaks_off_is_counted_once(settings: Settings) -> None:
    async def application(_scope: Scope, _receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise ConnectionError

    async def send(_message: Message) -> None:
        pass

    monitor = Monitor(settings)
    scope = {"type": "http", "method": "GET", "headers": []}
    with pytest.raises(ConnectionError):
        asyncio.run(monitor.watch(application, scope, asyncio.Queue().get, send))
    samples = parse(monitor.scrape().decode())
    labels = {"handler": "none", "method": "GET"}
    name = "fastapi_monitoring_http_requests_total"
    assert value(samples, name, status="2xx", **labels) == 1
    assert value(samples, name, status="5xx", **labels) == 0


def test_what_the_server_marks_as_too_much_is_refused_and_counted(settings: Settings) -> None:
    app = create_app(settings)
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/predict", "headers": [], "winemon.overload": True}
    asyncio.run(app(scope, asyncio.Queue().get, send))
    assert [message.get("status") for message in sent] == [503, None]
    assert (b"retry-after", b"1") in sent[0]["headers"]
    samples = scrape(Client(app))
    assert value(samples, "winemon_overload_total") == 1
    labels = {"handler": "none", "method": "POST", "status": "5xx"}
    assert value(samples, "fastapi_monitoring_http_requests_total", **labels) == 1


def test_a_worker_without_a_model_counts_its_refusals(tmp_path: Path, wine: dict[str, Any]) -> None:
    client = Client(create_app(Settings(artifacts_dir=tmp_path / "none", metrics_dir=tmp_path)))
    assert client.post("/predict", json=wine).status_code == 503
    labels = {"handler": "/predict", "method": "POST", "status": "5xx"}
    assert value(scrape(client), "fastapi_monitoring_http_requests_total", **labels) == 1


def test_scikit_learn_counts_into_the_same_bins_as_compiled_code(tmp_path: Path) -> None:
    random = Random(1)  # noqa: S311 - wines, not secrets
    wines = [{name: number * random.uniform(0, 2) for name, number in EXAMPLE.items()} for _ in range(200)]
    counts = []
    for name, compiled in (("compiled", True), ("plain", False)):
        directory = make_artifacts(tmp_path / name, compiled=compiled)
        client = Client(
            create_app(Settings(artifacts_dir=directory, metrics_dir=tmp_path / f"{name}-metrics"))
        )
        assert client.post("/predict/batch", json={"samples": wines}).status_code == 200
        predict(client, wines[0])
        samples = scrape(client)
        assert value(samples, "winemon_model_compiled") == compiled
        counts.append({key: count for key, count in samples.items() if key[0] == "winemon_feature_bin_total"})
    assert counts[0] == counts[1]
    assert sum(counts[0].values()) == 201 * 12


def test_a_reply_is_sent_whole_where_the_server_can(settings: Settings, wine: dict[str, Any]) -> None:
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.request", "body": json.dumps(wine).encode()}

    async def send(message: Message) -> None:
        sent.append(message)

    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/predict", "headers": headers, "winemon.reply": True}
    asyncio.run(create_app(settings)(scope, receive, send))
    (reply,) = sent
    assert (reply["type"], reply["status"]) == ("winemon.reply", 200)
    assert b"content-length: %d\r\n" % len(reply["body"]) in reply["head"]


def test_a_page_that_raises_is_a_500(settings: Settings) -> None:
    async def application(_scope: Scope, _receive: Receive, _send: Send) -> None:
        raise ZeroDivisionError

    monitor = Monitor(settings)
    scope = {"type": "http", "method": "GET", "headers": []}
    with pytest.raises(ZeroDivisionError):
        asyncio.run(monitor.watch(application, scope, asyncio.Queue().get, asyncio.Queue().put))
    labels = {"handler": "none", "method": "GET", "status": "5xx"}
    name = "fastapi_monitoring_http_requests_total"
    assert value(parse(monitor.scrape().decode()), name, **labels) == 1


def test_adds_up_as_the_client_library_does(settings: Settings, wine: dict[str, Any]) -> None:
    for slot, times in ((0, 3), (1, 5), (10, 2)):
        client = worker(settings, slot)
        for _ in range(times):
            predict(client, wine)
            client.get(f"/{slot}")
    ours = parse(Monitor(settings.model_copy(update={"slot": 11})).scrape().decode())
    registry = CollectorRegistry()
    MultiProcessCollector(registry, str(settings.metrics_dir))
    assert ours == parse(generate_latest(registry).decode())
    labels = {"handler": "/predict", "method": "POST", "status": "2xx"}
    assert value(ours, "fastapi_monitoring_http_requests_total", **labels) == 10


def test_a_file_that_goes_away_during_a_scrape_is_no_damage(settings: Settings) -> None:
    client = worker(settings, 0)
    (settings.metrics_dir / "gauge_livemin_7.db").symlink_to("gone")
    assert value(scrape(client), "winemon_metrics_unreadable_total") == 0
    assert value(scrape(client), "winemon_metrics_unreadable_total") == 0
