"""Locust on the machines of a site, with keep-alive users that pause 0 to 3 s."""

import csv
import time
from typing import Any, Final

from tests.e2e.site import ROOT, Site

USERS: Final = 50
with (ROOT / "loadtest" / "wines.csv").open(newline="") as _file:
    WINES: Final = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(_file)]


class Load:
    """Users of one URL, and what became of their requests."""

    def __init__(self, site: Site, target: str) -> None:
        self._site = site
        self._target = target
        self.url = f"http://{site.at('loadtest')}:8089"

    def _ask(self, method: str, path: str, **options: Any) -> Any:
        auth = self._site.secret("locust")
        return (
            self._site.client.request(method, self.url + path, auth=auth, **options).raise_for_status().json()
        )

    def _stats(self) -> Any:
        return self._ask("GET", "/stats/requests")

    def _total(self, stats: Any) -> Any:
        return next(row for row in stats["stats"] if row["name"] == "Aggregated")

    def start(self) -> None:
        """Start the users and wait until they make requests."""
        form = {"user_count": USERS, "spawn_rate": USERS, "host": self._target, "max_wait": 3}
        self.stop()  # what an earlier test left, and its failures
        self._site.client.post(self.url + "/stats/reset", auth=self._site.secret("locust")).raise_for_status()
        assert self._ask("POST", "/swarm", data={key: str(value) for key, value in form.items()})["success"]
        deadline = time.monotonic() + 30
        while (stats := self._stats())["user_count"] < USERS or self._total(stats)["num_requests"] < USERS:
            assert time.monotonic() < deadline, "the users do not start"
            time.sleep(0.5)

    def workers(self) -> set[str]:
        """Return the machines that the users run on."""
        found = self._stats()["workers"]
        return {worker["id"].rpartition("_")[0] for worker in found if worker["state"] != "missing"}

    def counts(self) -> tuple[int, int, list[Any]]:
        """Return how many requests there were, how many of them failed, and how."""
        stats = self._stats()
        total = self._total(stats)
        assert stats["user_count"] == USERS
        return int(total["num_requests"]), int(total["num_failures"]), stats["errors"]

    def served(self) -> int:
        """Return how many requests there were; none may have failed."""
        requests, failures, errors = self.counts()
        assert failures == 0, errors
        return requests

    def stop(self) -> None:
        """Stop the users."""
        self._site.client.post(self.url + "/stop", auth=self._site.secret("locust")).raise_for_status()
