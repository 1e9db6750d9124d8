"""Drift that is real: wines of another kind are asked about, and somebody is told of exactly that."""

import json
import math
import socket
import threading
import time
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from shutil import copytree
from typing import Any

import httpx
import pytest
import yaml

from app.contract import FEATURE_NAMES, TARGET
from monitoring import rules
from tests.e2e.load import WINES
from tests.e2e.site import Site, until

LIMITS = rules.read().drift
WINDOW, FOR = "15s", 6
"""How far drift looks back here, and how many seconds it must last, so that a test can wait for it."""

Wine = dict[str, float]
Message = dict[str, Any]
Bins = dict[str, list[float]]

STRONG = [wine | {"alcohol_pct_vol": wine["alcohol_pct_vol"] + 2} for wine in WINES]
# On average, white vinho verde has 35 mg/dm3 free and 138 mg/dm3 total sulfur dioxide, the red 16 and 46.
WHITE = [
    wine
    | {
        "free_sulfur_dioxide": 2.2 * wine["free_sulfur_dioxide"],
        "total_sulfur_dioxide": 3 * wine["total_sulfur_dioxide"],
    }
    for wine in WINES
]


class Receiver(ThreadingHTTPServer):
    """Whoever is told of alerts: keeps what Alertmanager posts, in memory and as received in a file."""

    def __init__(self, address: str, file: Path) -> None:
        super().__init__((address, 0), _Post)
        self.messages: list[Message] = []
        self.file = file
        file.unlink(missing_ok=True)

    def told(self, status: str, name: str) -> dict[str, Message]:
        """Return the alerts of one name that messages of one status were about, by feature."""
        alerts = [alert for message in [*self.messages] for alert in message["alerts"]]
        found = [a for a in alerts if (a["status"], a["labels"]["alertname"]) == (status, name)]
        return {alert["labels"].get("feature", TARGET): alert for alert in found}


class _Post(BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(204)
        self.end_headers()
        with self.server.file.open("ab") as file:
            file.write(body.rstrip() + b"\n")
        self.server.messages.append(json.loads(body))

    def log_message(self, *_: object) -> None:
        """Say nothing: what arrives is in the file."""


def psi(baseline: Bins, values: Sequence[float]) -> float:
    """Return the population stability index of values against one feature of the baseline."""
    edges, shares = baseline["edges"], baseline["shares"]
    counts = [0] * (len(shares) + 2)  # with those below and above
    for value in values:
        counts[-1 if value > edges[-1] else min(bisect_right(edges, value), len(shares))] += 1
    pairs = [
        (max(count / len(values), LIMITS.floor), max(share, LIMITS.floor))
        for count, share in zip(counts, [0, *shares, 0], strict=True)
    ]
    return sum((served - expected) * math.log(served / expected) for served, expected in pairs)


class Sender(threading.Thread):
    """Somebody who asks about the same wines, 500 a second, until they are others."""

    def __init__(self, url: str, baseline: dict[str, Any]) -> None:
        super().__init__()
        self.url = url
        self.baseline = baseline
        self.wines: Sequence[Wine] = WINES
        self.client = httpx.Client(trust_env=False)
        self.leave = threading.Event()
        self.ask()

    def run(self) -> None:
        """Ask until `leave` is set."""
        while not self.leave.wait(len(self.wines) / 500):
            self.ask()
        self.client.close()

    def ask(self) -> None:
        """Ask once; an answer that is none fails the test."""
        answer = self.client.post(self.url, json={"samples": self.wines}).raise_for_status()
        self.qualities = answer.json()["qualities"]

    def drift(self) -> dict[str, float]:
        """Return the PSI of every feature and of the prediction for the wines as they are now."""
        of_features = {
            name: psi(bins, [wine[name] for wine in self.wines])
            for name, bins in self.baseline["features"].items()
        }
        return of_features | {TARGET: psi(self.baseline[TARGET], self.qualities)}


@pytest.fixture(scope="module")
def receiver(site: Site) -> Iterator[Receiver]:
    """Have the machine look back for seconds instead of hours, and tell us; put it back in the end."""
    play, numbers, directory = (site.build / name for name in ("watch.yml", "objectives.yml", "rules"))
    play.write_text(
        json.dumps([{"hosts": "monitoring", "become": True, "roles": ["alertmanager", "prometheus"]}])
    )
    source = yaml.safe_load(rules.SOURCE.read_text())
    source["drift"]["windows"] = [{"window": WINDOW, "for": f"{FOR}s", "interval": "2s"}]
    numbers.write_text(yaml.safe_dump(source))
    copytree(rules.OUTPUT, directory, dirs_exist_ok=True)
    assert rules.main(["--source", str(numbers), "--output", str(directory)]) == 0
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((site.address, 9))  # sends nothing, but chooses the address that the machine sees
        address = probe.getsockname()[0]
    with Receiver(address, site.build / "notifications.jsonl") as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://{address}:{server.server_port}"
        variables = {
            "prometheus_rules_directory": str(directory),
            "prometheus_scrape_interval": "2s",
            "prometheus_evaluation_interval": "2s",
            "alertmanager_receivers": [
                {"name": "test", "webhook_url": url},
                {"name": "oncall", "webhook_url": url, "severities": ["critical"]},
            ],
            "alertmanager_group_wait": "1s",
            "alertmanager_group_interval": "2s",
        }
        try:
            site.play(str(play), "-e", json.dumps(variables))
            yield server
        finally:
            try:
                site.play(str(play))
            finally:
                server.shutdown()  # not before: a notification that fails is an alert of its own
    assert drift_windows(site) == {window.window for window in LIMITS.windows}


@pytest.fixture(scope="module")
def sender(site: Site) -> Iterator[Sender]:
    """Have wines of the hold-out asked about, unless a test changes them."""
    baseline = json.loads(site.run("cat /opt/winemon/current/artifacts/baseline.json"))
    thread = Sender(site.api("/predict/batch"), baseline)
    thread.start()
    yield thread
    thread.leave.set()
    thread.join()


def drift_windows(site: Site) -> set[str]:
    """Return the windows of the drift alerts that Prometheus evaluates."""
    url = f"http://{site.address}:9090/api/v1/rules?type=alert"
    groups = site.client.get(url, auth=site.secret("prometheus")).json()["data"]["groups"]
    alerts = [rule for group in groups for rule in group["rules"]]
    return {rule["labels"]["window"] for rule in alerts if rule["name"] == "FeatureDrift"}


def settle(site: Site, sender: Sender) -> dict[str, float]:
    """Wait until Prometheus' PSI is that which Python computes for the wines that are sent; return it."""
    deadline = time.monotonic() + 60
    while True:
        result = site.query(f"feature:drift_psi:{WINDOW}")
        found = {sample["metric"]["feature"]: float(sample["value"][1]) for sample in result}
        if found == pytest.approx(sender.drift(), rel=0.02, abs=0.002):
            return found
        assert time.monotonic() < deadline, (found, sender.drift())
        time.sleep(1)


def since(site: Site, state: str) -> dict[str, float]:
    """Return when Prometheus first had each feature's alert in a state within the last minute."""
    series = site.query(f'ALERTS{{alertname="FeatureDrift", alertstate="{state}", window="{WINDOW}"}}[1m]')
    return {one["metric"]["feature"]: one["values"][0][0] for one in series}


@pytest.mark.usefixtures("receiver")
@pytest.mark.parametrize(
    ("labels", "told"),
    [
        ("alertname=ApiDown severity=critical", "test,oncall"),
        ("alertname=FeatureDrift severity=warning", "test"),
        ("alertname=ModelStale severity=info", "nobody"),
        ("alertname=Watchdog severity=critical", "nobody"),
    ],
)
def test_an_alert_is_told_to_those_who_take_its_severity(site: Site, labels: str, told: str) -> None:
    routes = "amtool config routes test --config.file=/etc/prometheus/alertmanager.yml"
    assert site.run(f"{routes} {labels}") == told


def test_wines_like_those_of_training_drift_nowhere(site: Site, receiver: Receiver, sender: Sender) -> None:
    found = settle(site, sender)
    assert found.keys() == {*FEATURE_NAMES, TARGET}
    assert all(found[name] < LIMITS.feature_psi for name in FEATURE_NAMES), found
    assert found[TARGET] < LIMITS.prediction_psi
    assert site.query(f'count_over_time(ALERTS{{window="{WINDOW}"}}[5m])') == []
    assert not [message for message in receiver.messages if "Drift" in message["groupLabels"]["alertname"]]


@pytest.mark.parametrize(
    ("wines", "features"),
    [
        pytest.param(STRONG, {"alcohol_pct_vol"}, id="alcohol"),
        pytest.param(WHITE, {"free_sulfur_dioxide", "total_sulfur_dioxide"}, id="sulfur dioxide"),
    ],
)
def test_shifted_wines_drift_in_exactly_what_was_shifted_until_they_end(
    site: Site,
    receiver: Receiver,
    sender: Sender,
    wines: list[Wine],
    features: set[str],
) -> None:
    receiver.messages.clear()
    sender.wines = wines
    found = settle(site, sender)
    assert {name for name in FEATURE_NAMES if found[name] > LIMITS.feature_psi} == features

    until(lambda: receiver.told("firing", "FeatureDrift").keys() == features, "drift is told")
    pending, firing = since(site, "pending"), since(site, "firing")
    assert all(firing[name] - pending[name] >= FOR for name in features)
    for name, alert in receiver.told("firing", "FeatureDrift").items():
        assert alert["labels"]["severity"] == "warning"
        assert alert["annotations"]["runbook_url"] == "docs/runbooks.md#featuredrift"
        assert alert["annotations"]["description"].startswith(
            f"The values of {name} of the last {WINDOW} have a PSI of "
        )
    predictions = {TARGET} if found[TARGET] > LIMITS.prediction_psi else set()
    until(lambda: receiver.told("firing", "PredictionDrift").keys() == predictions, "of predictions too")
    # Values beyond the training range have the same cause, and it has been told.
    assert receiver.told("firing", "FeatureOutOfRange") == {}

    sender.wines = WINES
    until(lambda: receiver.told("resolved", "FeatureDrift").keys() == features, "its end is told")
