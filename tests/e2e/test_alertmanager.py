"""One cause is told once: which of the alerts that fire at the same time the machine's Alertmanager tells.

Their labels are those that the rule tests assert. Prometheus knows nothing of these alerts.
"""

import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest

from tests.e2e.site import Site

Labels = dict[str, str]

DRIFT = {"severity": "warning", "window": "1h", "feature": "alcohol_pct_vol", "baseline": "x"}
BUDGET = {"severity": "critical", "window": "1h", "objective": "availability"}
SLOW = BUDGET | {"alertname": "ErrorBudgetBurning", "severity": "warning", "window": "3d"}
DISK = {"severity": "critical", "job": "node", "instance": "a", "mountpoint": "/"}
API = {"severity": "critical", "job": "fastapi", "instance": "a"}

CAUSES: dict[str, tuple[Labels, list[Labels], list[Labels]]] = {
    "a critical alert, its warning": (
        DISK | {"alertname": "DiskFilling"},
        [DISK | {"alertname": "DiskFilling", "severity": "warning"}],
        [
            DISK | {"alertname": "DiskFilling", "severity": "warning", "mountpoint": "/srv"},
            {"alertname": "MemoryShort", "severity": "warning", "job": "node", "instance": "a"},
        ],
    ),
    "a budget that burns fast, and slowly": (
        BUDGET | {"alertname": "ErrorBudgetBurning"},
        [SLOW],
        [SLOW | {"objective": "latency"}],
    ),
    "drift of the hour, and of the day": (
        DRIFT | {"alertname": "FeatureDrift"},
        [DRIFT | {"alertname": "FeatureDrift", "window": "24h"}],
        [
            DRIFT | {"alertname": "FeatureDrift", "window": "24h", "feature": "ph"},
            DRIFT | {"alertname": "PredictionDrift", "window": "24h", "feature": "quality"},
        ],
    ),
    "drift, and values out of range": (
        DRIFT | {"alertname": "FeatureDrift"},
        [DRIFT | {"alertname": "FeatureOutOfRange"}],
        [DRIFT | {"alertname": "FeatureOutOfRange", "feature": "ph"}],
    ),
    "a machine, and what runs on it": (
        {"alertname": "MachineDown", "severity": "critical", "job": "node", "instance": "a"},
        [
            API | {"alertname": "ApiDown"},
            {"alertname": "TargetMissing", "severity": "warning", "job": "node", "instance": "a"},
        ],
        [API | {"alertname": "ApiDown", "instance": "b"}],
    ),
    "an artifact, and the API without it": (
        API | {"alertname": "ArtifactRefused"},
        [API | {"alertname": "ApiNotReady"}],
        [API | {"alertname": "ApiNotReady", "instance": "b"}],
    ),
    "an API that is not ready, and what follows": (
        API | {"alertname": "ApiNotReady"},
        [
            API | {"alertname": "ApiOverloaded", "severity": "warning"},
            API | {"alertname": "WorkerChurn", "severity": "warning"},
            API | {"alertname": "ModelNotCompiled", "severity": "warning"},
            BUDGET | {"alertname": "ErrorBudgetBurning"},
        ],
        [
            API | {"alertname": "WorkerChurn", "severity": "warning", "instance": "b"},
            DRIFT | {"alertname": "FeatureDrift"},
        ],
    ),
}


class Alertmanager:
    """The machine's, as it sees the alerts of one test."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.mark = f"inhibition-{time.time_ns()}"
        self.alerts: list[Labels] = []

    def ask(self, method: str, **options: Any) -> httpx.Response:
        """Send a request about alerts."""
        url = f"http://{self.site.address}:9093/api/v2/alerts"
        answer = self.site.client.request(method, url, auth=self.site.secret("alertmanager"), **options)
        return answer.raise_for_status()

    def fire(self, *alerts: Labels, seconds: float = 60) -> None:
        """Have alerts fire for some seconds."""
        self.alerts += alerts
        ends = (datetime.now(UTC) + timedelta(seconds=seconds)).isoformat()
        starts = (datetime.now(UTC) - timedelta(minutes=1)).isoformat()
        self.ask(
            "POST",
            json=[
                {"labels": labels | {"test": self.mark}, "startsAt": starts, "endsAt": ends}
                for labels in alerts
            ],
        )

    def told(self) -> dict[str, bool]:
        """Return of each alert whether somebody would be told."""
        found = self.ask("GET", params={"filter": f'test="{self.mark}"'}).json()
        return {name(alert["labels"]): not alert["status"]["inhibitedBy"] for alert in found}

    def await_told(self, *alerts: Labels, silent: list[Labels]) -> None:
        """Wait until these are told and those are not."""
        expected = dict.fromkeys(map(name, alerts), True) | dict.fromkeys(map(name, silent), False)
        deadline = time.monotonic() + 10
        while (found := self.told()) != expected:
            assert time.monotonic() < deadline, found
            time.sleep(0.2)


def name(labels: Labels) -> str:
    """Name an alert by all its labels but the mark."""
    return " ".join(f"{key}={value}" for key, value in sorted(labels.items()) if key != "test")


@pytest.fixture
def alertmanager(site: Site) -> Iterator[Alertmanager]:
    """End a test's alerts, which would silence those of the next."""
    alertmanager = Alertmanager(site)
    yield alertmanager
    alertmanager.fire(*alertmanager.alerts, seconds=-1)


@pytest.mark.parametrize(("cause", "effects", "others"), CAUSES.values(), ids=CAUSES.keys())
def test_of_a_cause_and_its_effects_the_cause_is_told(
    alertmanager: Alertmanager, cause: Labels, effects: list[Labels], others: list[Labels]
) -> None:
    alertmanager.fire(*effects, *others)
    alertmanager.await_told(*effects, *others, silent=[])
    alertmanager.fire(cause)
    alertmanager.await_told(cause, *others, silent=effects)
