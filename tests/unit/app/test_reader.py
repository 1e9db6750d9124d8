"""What the compiled code reads of a body by itself is what Pydantic reads, and all else it leaves to that."""

import ctypes
import json
import mmap
from array import array
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from random import Random
from typing import Any

import pytest
from api_harness import Client, parse
from pydantic import ValidationError

from app.predictor import CompiledPredictor
from app.schemas import EXAMPLE, MAX_BATCH, Batch, Wine

PROT_NONE = 0
Read = Callable[[Any], list[float] | None]
NUMBERS = (
    *("0", "1", "9.4", "0.9978", "14", "100", "0.0", "1e30", "1e2", "1E-2", "5e-324", "-1", "-0", "+1"),
    *("00", "01", "1.", ".5", "1,2", "1 2", "", "NaN", "Infinity", "null", "true", '"1"', "[]", "{}"),
    *("9.533333333333333", "10.033333333333333", "14.000000000000002", "9007199254740993.0"),
    *("18446744073709551615", "9999999999999999999", "0.1234567890123456789", "0.12345678901234567890"),
    *("1" * 20, "1" * 400, "0." + "0" * 19, "0." + "0" * 30 + "1"),
)


@pytest.fixture
def read(artifacts: Path) -> Read:
    """Return the values that the compiled code read of a batch, wine after wine; None where it left it."""
    predictor = CompiledPredictor(artifacts / "model.so")
    serving: Any = predictor.counting()

    def read(body: Any) -> list[float] | None:
        qualities = serving.read_many(body)
        if not qualities:
            return None
        values: array[float] = serving._wines[: 11 * len(qualities)]
        assert qualities == predictor.predict_many(values)
        return values.tolist()

    return read


def validated(body: bytes) -> list[float] | None:
    """Return what Pydantic makes of it; None where it is no batch."""
    try:
        batch = Batch.model_validate_json(body)
    except ValidationError:
        return None
    return [value for wine in batch.samples for value in wine.model_dump().values()]


def batch(*wines: str) -> bytes:
    return f'{{"samples": [{", ".join(wines)}]}}'.encode()


def test_reads_a_plain_batch_by_itself(read: Read) -> None:
    random = Random(1)  # noqa: S311 - tests, not secrets
    for indent in (None, 0, 1, "\t"):
        for count in (1, 7, 8, 9, MAX_BATCH):
            rows = [{name: random.uniform(0.001, 14) for name in EXAMPLE} for _ in range(count)]
            shuffled = [dict(random.sample(sorted(row.items()), 11)) for row in rows]
            body = json.dumps({"samples": shuffled}, indent=indent).encode()
            assert read(body) == list(chain.from_iterable(row.values() for row in rows))
    assert read(json.dumps({"samples": [EXAMPLE] * (MAX_BATCH + 1)}).encode()) is None


def test_reads_every_decimal_as_any_correct_parser_does(read: Read) -> None:
    random = Random(2)  # noqa: S311 - tests, not secrets
    for _ in range(200):
        texts = []
        for _ in range(1100):
            fraction = "".join(random.choices("0123456789", k=random.randrange(1, 19)))
            texts.append(f"{random.randrange(10)}.{fraction}")
        rows = [zip(EXAMPLE, texts[first : first + 11], strict=True) for first in range(0, 1100, 11)]
        wines = ["{" + ", ".join(f'"{name}": {text}' for name, text in row) + "}" for row in rows]
        assert read(batch(*wines)) == list(map(float, texts))


def test_rounds_ties_to_even(read: Read) -> None:
    wine = json.dumps(EXAMPLE)
    halfway = (2**53 + 1, 2**53 + 3, 2**54 + 2, 2**54 + 6, 2**63 + 2**10, 2**63 + 3 * 2**10)
    for digits in chain.from_iterable((half - 1, half, half + 1) for half in halfway):
        # The decimals of 2^-k end in 5 and are long, so only with few of them can a tie be written.
        for text in (f"{digits}", f"{digits}"[:-1] + ".5", f"{digits}"[:-2] + ".75"):
            body = batch(wine.replace("0.9978", text))
            assert read(body) == validated(body)
            assert f"{float(text)!r}" in f"{read(body)}"


@pytest.mark.parametrize("number", NUMBERS)
def test_takes_a_number_as_pydantic_does_or_leaves_it(read: Read, number: str) -> None:
    for feature, value in (("ph", "3.51"), ("chlorides", "0.076")):
        body = batch(json.dumps(EXAMPLE).replace(f'"{feature}": {value}', f'"{feature}": {number}'))
        assert read(body) in (None, validated(body))


def test_leaves_what_is_right_but_not_plain(read: Read) -> None:
    wine = json.dumps(EXAMPLE)
    for odd in (
        wine.replace('"ph"', '"\\u0070h"'),
        wine.replace("3.51", "351e-2"),
        wine.replace("0.7,", "-0,"),
        wine[:-1] + ', "ph": 3.0}',
    ):
        assert validated(batch(odd)) is not None
        assert read(batch(odd)) is None


@pytest.mark.parametrize("count", [1, 3])
def test_never_disagrees_with_pydantic_and_never_reads_beyond_the_body(
    read: Read, artifacts: Path, count: int
) -> None:
    """Spoiled bodies, each right before memory that ends the process when it is read."""
    size = mmap.PAGESIZE
    area = mmap.mmap(-1, 2 * size)
    start = ctypes.addressof(ctypes.c_char.from_buffer(area))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(start + size), size, PROT_NONE) == 0
    read_one = CompiledPredictor(artifacts / "model.so").counting().read_one
    random = Random(count)  # noqa: S311 - tests, not secrets
    plain = batch(*[json.dumps(EXAMPLE)] * count)
    parts = [
        *map(str.encode, NUMBERS),
        *b'{}[],:"\\ \0\xff',
        plain[:12],
        plain[13:40],
        b'"ph": 3.1',
        bytes(32),
    ]
    pieces = [bytes([part]) if isinstance(part, int) else part for part in parts]
    taken = 0
    for _ in range(20_000):
        body = plain
        for _ in range(random.choice((0, 1, 1, 1, 2, 3))):
            first, last = sorted(random.choices(range(len(body) + 1), k=2))
            last = random.choice((first, first + 1, last))
            body = (
                body[:first] + random.choice((b"", random.choice(pieces), body[first:last] * 2)) + body[last:]
            )
        body = body[: size - 1]
        area[size - len(body) - 1 : size] = body + b"\0"
        placed = (ctypes.c_char * len(body)).from_address(start + size - len(body) - 1)
        values = read(placed)
        taken += values is not None
        assert values is None or values == validated(body), body
        wine = body[13:-2]
        area[size - len(wine) - 1 : size] = wine + b"\0"
        placed = (ctypes.c_char * len(wine)).from_address(start + size - len(wine) - 1)
        if (quality := read_one(placed)) == quality:
            Wine.model_validate_json(wine)
    assert 1000 < taken < 15_000


def test_both_ways_answer_and_count_alike(client: Client) -> None:
    plain = json.dumps(EXAMPLE)
    odd = plain.replace('"ph"', '"\\u0070h"')
    answers, counted = [], []
    for wine in (plain, odd):
        before = parse(client.get("/metrics").text)
        for path, body in (("/predict", wine.encode()), ("/predict/batch", batch(wine, plain, wine))):
            answer = client.post(path, content=body, headers={"Content-Type": "application/json"})
            answers.append((answer.status_code, answer.content, answer.headers))
        after = parse(client.get("/metrics").text)
        names = ("winemon_feature_bin_total", "fastapi_monitoring_regression_model_output_bucket")
        counted.append({key: after[key] - before[key] for key in after if key[0] in names})
    assert answers[:2] == answers[2:]
    assert counted[0] == counted[1]
    assert sum(counted[0].values()) > 4 * 12
