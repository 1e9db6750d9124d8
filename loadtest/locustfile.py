"""Users of the API, for Locust: `locust -f loadtest/locustfile.py` from the directory that holds `loadtest`.

They draw wines that no model has been trained on, wait for a while between requests (`--max-wait`), and send
a wrong value now and then, to which 422 is the right answer. `--shape` lets their number change over time.
"""

import csv
import random
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any, Final

from flask import Response, request
from locust import FastHttpUser, LoadTestShape, events, task
from locust.argument_parser import LocustArgumentParser
from locust.contrib.fasthttp import ResponseContextManager
from locust.env import Environment
from locust.html import get_html_report
from locust.stats import PERCENTILES_TO_REPORT, StatsCSV
from locust.web import WebUI

from loadtest import auth, exporter
from loadtest.shapes import SHAPES, STEADY, users_at

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
    parser.add_argument(
        "--shape",
        choices=list(SHAPES),
        default=STEADY,
        env_var="LOCUST_SHAPE",
        help="How the number of users changes over the run time; all that were asked for is the most",
    )
    parser.add_argument(
        "--report",
        type=Path,
        metavar="DIR",
        include_in_web_ui=False,
        help="Write report.html, requests.csv, failures.csv and exceptions.csv there at the end",
    )


class Shape(LoadTestShape):
    """The number of users that `--shape` wants; without a run time, for a minute."""

    abstract = True  # or Locust would use it also where none is wanted
    use_common_options = True

    def tick(self) -> tuple[int, float] | None:
        """Return the number of users now, and how many to start or stop in a second; None at the end."""
        assert self.runner  # noqa: S101 - Locust asks only when it runs
        options = self.runner.environment.parsed_options
        assert options  # noqa: S101 - as it has had a command line
        most = options.num_users or 1
        users = users_at(options.shape, most, perf_counter() - self.start_time, options.run_time or 60)
        return None if users is None else (users, most)


def choose_shape(environment: Environment, name: str) -> None:
    """Let the number of users change as the shape says, or leave it to Locust; not while a shape runs."""
    if environment.runner and not environment.runner.shape_greenlet:
        shape = Shape()  # type: ignore[no-untyped-call]  # Locust's own has no annotations
        shape.runner = environment.runner
        environment.shape_class = None if name == STEADY else shape


def prepare(environment: Environment, web_ui: WebUI | None, **_: Any) -> None:
    """Choose the shape; put the metrics and the password on the web UI, where there is one."""
    options = environment.parsed_options
    shape = options.shape if options else STEADY
    choose_shape(environment, shape)
    if web_ui and web_ui.app and environment.runner:

        def choose_at_start() -> Response | None:
            if request.path == "/swarm":
                wanted = request.form.get("shape", shape)
                if wanted not in SHAPES:
                    return Response(f"shape: not one of {', '.join(SHAPES)}\n", 400)
                choose_shape(environment, wanted)
            return None

        exporter.install(web_ui.app, environment.runner, REQUESTS)
        auth.install(web_ui.app)
        web_ui.app.before_request(choose_at_start)


def write_report(environment: Environment, **_: Any) -> None:
    """Write what was measured where `--report` says: what the web UI offers for download."""
    options = environment.parsed_options
    if not options or not options.report or not environment.runner:
        return
    options.report.mkdir(parents=True, exist_ok=True)
    table = StatsCSV(environment, PERCENTILES_TO_REPORT)
    for name in ("requests", "failures", "exceptions"):
        with (options.report / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
            getattr(table, f"{name}_csv")(csv.writer(file))
    report = get_html_report(environment, show_download_link=False)
    (options.report / "report.html").write_text(report, encoding="utf-8")


events.init_command_line_parser.add_listener(add_arguments)
events.init.add_listener(prepare)
events.quitting.add_listener(write_report)


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


class Client(FastHttpUser):
    """Somebody who asks the API now and then, over one kept-alive connection."""

    abstract = True

    def wait_time(self) -> float:
        """Return the seconds until the next request."""
        options = self.environment.parsed_options
        return random.uniform(0, options.max_wait if options else 0)  # noqa: S311 - not a secret


class Taster(Client):
    """Somebody who mostly asks for the quality of one wine."""

    weight = 9

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


class Cellar(Client):
    """Somebody who asks for a cellar of wines at once."""

    weight = 1

    @task
    def predict_batch(self) -> None:
        """Ask for a hundred wines."""
        samples = [some_wine() for _ in range(BATCH)]
        with self.client.post(PREDICT_BATCH, json={"samples": samples}, catch_response=True) as response:
            expect(response, 200, lambda body: len(body["qualities"]) == BATCH)


def some_wine() -> Wine:
    """Return a wine of the hold-out as JSON object."""
    return dict(random.choice(WINES))  # noqa: S311 - not a secret
