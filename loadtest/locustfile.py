"""Users of the API, for Locust: `locust -f loadtest/locustfile.py` from the directory that holds `loadtest`.

They draw wines that no model has been trained on, wait for a while between requests (`--max-wait`), and send
a wrong value now and then, to which 422 is the right answer.
"""

import csv
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from locust import FastHttpUser, events, task
from locust.argument_parser import LocustArgumentParser
from locust.contrib.fasthttp import ResponseContextManager
from locust.env import Environment
from locust.web import WebUI

from loadtest import auth, exporter

Wine = dict[str, Any]

with (Path(__file__).parent / "wines.csv").open(newline="") as file:
    WINES: Final = tuple({name: float(value) for name, value in row.items()} for row in csv.DictReader(file))
BATCH: Final = 100
BAD_VALUES: Final[tuple[Any, ...]] = ("very fruity", None, -1, [], {})

PREDICT: Final = "/predict"
PREDICT_BAD_VALUE: Final = "/predict (bad value)"
PREDICT_BATCH: Final = "/predict/batch"
HEALTHCHECK: Final = "/healthcheck"
REQUESTS: Final = (
    (PREDICT, "POST"),
    (PREDICT_BAD_VALUE, "POST"),
    (PREDICT_BATCH, "POST"),
    (HEALTHCHECK, "GET"),
)


def add_arguments(parser: LocustArgumentParser) -> None:
    """Add the options of these users to Locust's own; they are fields of the web UI too."""
    parser.add_argument(
        "--max-wait",
        type=float,
        default=3.0,
        env_var="LOCUST_MAX_WAIT",
        help="Most seconds that a user waits between two requests; half of it is the average",
    )


def prepare_web_ui(environment: Environment, web_ui: WebUI | None, **_: Any) -> None:
    """Put the metrics and the password on the web UI, where there is one."""
    if web_ui and web_ui.app and environment.runner:
        exporter.install(web_ui.app, environment.runner, REQUESTS)
        auth.install(web_ui.app)


events.init_command_line_parser.add_listener(add_arguments)
events.init.add_listener(prepare_web_ui)


def expect(response: ResponseContextManager, status: int, right: Callable[[Any], bool]) -> None:
    """Count a response as a success if it has this status and a right JSON body, as a failure otherwise."""
    if response.status_code == 0:
        return  # There was none, and Locust knows why.
    problem = None
    if response.status_code != status:
        problem = f"status {response.status_code} instead of {status}"
    elif not is_right(response, right):
        problem = "wrong body"  # and not which: Locust keeps an entry for every different text
    if problem:
        response.failure(problem)
    else:
        response.success()


def is_right(response: ResponseContextManager, right: Callable[[Any], bool]) -> bool:
    """Tell whether a response has a JSON body that is `right`."""
    try:
        return right(response.json())
    except (ValueError, KeyError, TypeError):
        return False


class Taster(FastHttpUser):
    """Somebody who mostly asks for the quality of one wine, over one kept-alive connection."""

    def wait_time(self) -> float:
        """Return the seconds until the next request."""
        options = self.environment.parsed_options
        return random.uniform(0, options.max_wait if options else 0)  # noqa: S311 - not a secret

    @task(20)
    def predict(self) -> None:
        """Ask for one wine."""
        with self.client.post(PREDICT, json=some_wine(), catch_response=True) as response:
            expect(response, 200, lambda body: 0 <= body["quality"] <= 10)

    @task(2)
    def predict_bad_value(self) -> None:
        """Get one number wrong."""
        wine = some_wine()
        wine[random.choice(list(wine))] = random.choice(BAD_VALUES)  # noqa: S311 - not a secret
        with self.client.post(PREDICT, json=wine, name=PREDICT_BAD_VALUE, catch_response=True) as response:
            expect(response, 422, lambda body: "detail" in body)

    @task(5)
    def healthcheck(self) -> None:
        """Ask whether the API is alive."""
        self.client.get(HEALTHCHECK)

    @task(1)
    def predict_batch(self) -> None:
        """Ask for a cellar of wines at once."""
        samples = [some_wine() for _ in range(BATCH)]
        with self.client.post(PREDICT_BATCH, json={"samples": samples}, catch_response=True) as response:
            expect(response, 200, lambda body: len(body["qualities"]) == BATCH)


def some_wine() -> Wine:
    """Return a wine of the hold-out as JSON object."""
    return dict(random.choice(WINES))  # noqa: S311 - not a secret
