"""A load test fails where a limit does not hold, and nowhere else."""

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from loadtest import limits
from loadtest.shapes import SHAPES, mean_users, users_at

NAMES = ("/predict", "/predict (bad value)", "/predict/batch", "/healthcheck")


def row(name: str, requests: int, failures: int = 0, p95: float = 5, p99: float = 9) -> dict[str, Any]:
    """Return a row as Locust writes it, of the columns that are read; without requests there are no times."""
    times: dict[str, Any] = {"50%": 2, "95%": p95, "99%": p99}
    if not requests:
        times = dict.fromkeys(times, "N/A")
    return {"Name": name, "Request Count": requests, "Failure Count": failures, **times}


GOOD = (
    row("/predict", 1300),
    row("/predict (bad value)", 130),
    row("/predict/batch", 200),
    row("/healthcheck", 330),
    row("Aggregated", 1960),
)


@pytest.fixture
def judged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Return a function from rows to exit code and output of a test with 50 users for 60 seconds."""

    def judge(
        *rows: dict[str, Any], failures: Sequence[tuple[str, str, int]] = (), options: Sequence[str] = ()
    ) -> tuple[int, str, str]:
        with (tmp_path / "requests.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, GOOD[0])
            writer.writeheader()
            writer.writerows(rows)
        with (tmp_path / "failures.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("Name", "Error", "Occurrences"), *failures])
        code = limits.main([str(tmp_path), "--users=50", "--seconds=60", *options])
        return code, *capsys.readouterr()

    return judge


def changed(name: str, **changes: Any) -> list[dict[str, Any]]:
    """Return the good rows with one of them changed."""
    return [{**good, **changes} if good["Name"] == name else good for good in GOOD]


def test_what_is_within_every_limit_passes(
    judged: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    code, output, errors = judged(*GOOD)
    assert (code, errors) == (0, "")
    assert output.startswith("1960 requests, 0 failed, median 2 ms, 99 % under 9 ms\n")
    assert "passed   /predict p99: 9 ms\n" in output
    assert "passed   /predict rate: 21.67 per second\n" in output
    root = ET.parse(tmp_path / "junit.xml").getroot()  # noqa: S314 - our own file
    assert (root.attrib["tests"], root.attrib["failures"]) == ("16", "0")
    assert {case.attrib["name"].rpartition(" ")[0] for case in root} == set(NAMES)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"95%": 101}, "/predict: p95 is 101 ms, the limit is 100 ms"),
        ({"99%": 1000}, "/predict: p99 is 1000 ms, the limit is 250 ms"),
        (
            {"Request Count": 659},
            "/predict: 10.98 per second, 50 users should make at least 11.00",
        ),
        ({"Failure Count": 3}, "/predict: 3 of 1300 failed (3x status 500 instead of 200)"),
    ],
)
def test_each_limit_refuses_and_says_by_how_much(
    judged: Callable[..., tuple[int, str, str]], tmp_path: Path, changes: dict[str, Any], problem: str
) -> None:
    failures = [("/predict", "status 500 instead of 200", 3), ("/healthcheck", "another", 1)]
    code, output, errors = judged(*changed("/predict", **changes), failures=failures)
    assert (code, errors) == (1, f"{problem}\n")
    assert output.count("refused ") == 1
    root = ET.parse(tmp_path / "junit.xml").getroot()  # noqa: S314 - our own file
    assert [failure.attrib["message"] for failure in root.iter("failure")] == [problem]


def test_a_name_that_was_never_asked_for_is_refused(judged: Callable[..., tuple[int, str, str]]) -> None:
    code, _, errors = judged(*[good for good in GOOD if good["Name"] != "/predict/batch"])
    assert code == 1
    assert errors == "/predict/batch: 0.00 per second, 50 users should make at least 1.65\n"


def test_few_requests_are_held_to_what_they_can_tell(judged: Callable[..., tuple[int, str, str]]) -> None:
    slow = [row(name, 9, p95=5000, p99=5000) for name in NAMES]
    options = ("--users=10", "--seconds=5")
    code, output, errors = judged(*slow, row("Aggregated", 36), options=options)
    assert (code, errors) == (0, "")
    assert "12 limits not judged: too few requests to tell" in output
    slow[0]["Failure Count"] = 1
    assert judged(*slow, row("Aggregated", 36), options=options)[0] == 1
    # 200 requests tell about p95, and 199 do not.
    assert judged(*changed("/healthcheck", **{"Request Count": 199, "95%": 5000}))[0] == 0
    assert judged(*changed("/healthcheck", **{"Request Count": 200, "95%": 5000}))[0] == 1


def test_a_shape_asks_for_the_rate_of_its_users(judged: Callable[..., tuple[int, str, str]]) -> None:
    half = [{**good, "Request Count": good["Request Count"] // 3} for good in GOOD]
    assert judged(*half)[0] == 1
    assert judged(*half, options=["--shape=spike"])[0] == 0


def test_nothing_to_judge_is_no_pass(judged: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    code, _, errors = judged(row("Aggregated", 0))
    assert (code, errors) == (2, f"{tmp_path}: nothing was requested\n")
    code, _, errors = judged(*GOOD, row("/elsewhere", 5))
    assert code == 2
    assert "limits.yml: no limits for /elsewhere" in errors
    assert limits.main([str(tmp_path / "none"), "--users=10", "--seconds=5"]) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "names no requests"),
        ("/predict: {p95_ms: 1}\n", "/predict: must have failure_ratio, p95_ms, p99_ms, rps_per_user"),
        (
            "/predict: {failure_ratio: 0, p95_ms: fast, p99_ms: 1, rps_per_user: 1}\n",
            "/predict: p95_ms: 'fast' is not a number from 0 on",
        ),
        ("/predict: [", "while parsing"),
    ],
)
def test_limits_that_cannot_be_read_are_named(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "limits.yml"
    path.write_text(content)
    with pytest.raises(limits.InputError) as caught:
        limits.Limit.read(path)
    assert str(caught.value).startswith(str(path))
    assert message in str(caught.value)


def test_shapes_are_as_long_as_they_should_be_and_their_mean_is_what_runs() -> None:
    for shape in SHAPES:
        ran = [users_at(shape, 50, second, 60) for second in range(62)]
        assert ran[60:] == [None, None]
        numbers = [number for number in ran if number is not None]
        assert max(numbers) == 50
        assert sum(numbers) / 60 == pytest.approx(mean_users(shape, 50))
    assert [users_at("step", 3, second, 5) for second in range(5)] == [1, 1, 2, 2, 3]
