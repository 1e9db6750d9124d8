"""Hold what Locust measured to limits, by default those of `loadtest/limits.yml`.

    python -m loadtest.limits DIRECTORY --users N --seconds S [--shape NAME] [--limits FILE]

reads requests.csv and failures.csv as Locust writes them, prints what was found, and writes junit.xml beside
them. Exits 1 where a limit does not hold, 2 where there is nothing to judge.
"""

import argparse
import csv
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Final, Self

import yaml

from delivery.checks import Check, write_junit
from loadtest.shapes import SHAPES, STEADY, mean_users

LIMITS: Final = Path(__file__).with_name("limits.yml")
BEYOND: Final = 10
"""Fewest requests beyond a percentile that make it more than luck."""
ASKED: Final = 20
"""Fewest requests that a rate has to ask for, in the whole test, to be judged."""

Row = Mapping[str, str]


class InputError(Exception):
    """There is nothing to judge; the message is one line that says why."""


@dataclass(frozen=True, slots=True)
class Limit:
    """What the requests of one name are held to; docs in `loadtest/limits.yml`."""

    failure_ratio: float
    p95_ms: float
    p99_ms: float
    rps_per_user: float

    @classmethod
    def read(cls, path: Path = LIMITS) -> dict[str, Self]:
        """Return the limits by the names of the requests; raises InputError naming what is wrong."""
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError) as error:
            raise InputError(f"{path}: {' '.join(str(error).split())}") from error
        wanted = {field.name for field in fields(cls)}
        if not isinstance(content, dict) or not content:
            raise InputError(f"{path}: names no requests")
        for name, limit in content.items():
            if not isinstance(limit, dict) or set(limit) != wanted:
                raise InputError(f"{path}: {name}: must have {', '.join(sorted(wanted))} and nothing else")
            for key, value in limit.items():
                if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
                    raise InputError(f"{path}: {name}: {key}: {value!r} is not a number from 0 on")
        return {name: cls(**limit) for name, limit in content.items()}


def check(
    name: str, limit: Limit, row: Row | None, load: tuple[float, float], reasons: Sequence[str] = ()
) -> Iterator[Check]:
    """Yield the checks of one name's row of requests.csv, without which nothing was requested.

    `load` is how many users ran on average, and for how many seconds; `reasons` are why requests failed.
    """
    users, seconds = load
    requests = int(row["Request Count"]) if row else 0
    failures = int(row["Failure Count"]) if row else 0
    problem = None
    if failures > limit.failure_ratio * requests:
        problem = f"{name}: {failures} of {requests} failed ({'; '.join(reasons) or 'no reason given'})"
    yield Check(f"{name} failures", f"{failures} of {requests}", problem)

    for percent, bound in ((95, limit.p95_ms), (99, limit.p99_ms)):
        title = f"{name} p{percent}"
        if requests * (100 - percent) < BEYOND * 100 or row is None:
            needed = BEYOND * 100 // (100 - percent)
            yield Check(title, "", skipped=f"{requests} requests; {needed} would tell")
            continue
        took = float(row[f"{percent}%"])
        problem = f"{name}: p{percent} is {took:g} ms, the limit is {bound:g} ms" if took > bound else None
        yield Check(title, f"{took:g} ms", problem)

    asked = limit.rps_per_user * users * seconds
    found = f"{requests / seconds:.2f} per second"
    if asked < ASKED:
        yield Check(f"{name} rate", found, skipped=f"{found}; a longer test or more users would tell")
        return
    problem = None
    if requests < asked:
        problem = f"{name}: {found}, {users:g} users should make at least {asked / seconds:.2f}"
    yield Check(f"{name} rate", found, problem)


def read(path: Path) -> list[Row]:
    """Return the rows of a CSV file of Locust; raises InputError where there is none."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}: run `make loadtest`") from error


def judge(directory: Path, users: float, seconds: float, path: Path = LIMITS) -> tuple[str, list[Check]]:
    """Sum up the CSV files in `directory` on one line, and return every check of them.

    Raises InputError where there are none, or no requests in them.
    """
    limits = Limit.read(path)
    rows = {row["Name"]: row for row in read(directory / "requests.csv")}
    if unlimited := set(rows) - set(limits) - {"Aggregated"}:
        raise InputError(f"{path}: no limits for {', '.join(sorted(unlimited))}")
    total = rows.get("Aggregated")
    if total is None or not int(total["Request Count"]):
        raise InputError(f"{directory}: nothing was requested")
    summary = (
        f"{total['Request Count']} requests, {total['Failure Count']} failed, "
        f"median {total['50%']} ms, 99 % under {total['99%']} ms"
    )
    failures = read(directory / "failures.csv")
    return summary, [
        found
        for name, limit in limits.items()
        for found in check(
            name,
            limit,
            rows.get(name),
            (users, seconds),
            [f"{row['Occurrences']}x {row['Error']}" for row in failures if row["Name"] == name],
        )
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m loadtest.limits", description="Judge a load test.")
    parser.add_argument("directory", type=Path, help="with Locust's requests.csv and failures.csv")
    parser.add_argument("--users", type=int, required=True, help="the most that ran at once")
    parser.add_argument("--seconds", type=float, required=True, help="how long")
    parser.add_argument("--shape", choices=SHAPES, default=STEADY)
    parser.add_argument("--limits", type=Path, metavar="FILE", default=LIMITS)
    arguments = parser.parse_args(argv)
    try:
        users = mean_users(arguments.shape, arguments.users)
        summary, checks = judge(arguments.directory, users, arguments.seconds, arguments.limits)
    except InputError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    write_junit(arguments.directory / "junit.xml", "loadtest", checks)
    sys.stdout.write(f"{summary}\n")
    for found in checks:
        if not found.skipped:
            sys.stdout.write(f"{found.verdict:8} {found.name}: {found.found}\n")
    if skipped := sum(found.skipped is not None for found in checks):
        sys.stdout.write(f"{skipped} limits not judged: too few requests to tell\n")
    problems = [found.problem for found in checks if found.problem]
    sys.stderr.write("".join(f"{problem}\n" for problem in problems))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
