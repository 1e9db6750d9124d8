"""The hold-out as load tests draw from it."""

import csv
from pathlib import Path

import pytest

from app.contract import FEATURE_NAMES
from training import holdout
from training.dataset import prepare

WINES = Path(__file__).parents[3] / "loadtest" / "wines.csv"


def test_wines_are_the_frozen_holdout(capsys: pytest.CaptureFixture[str]) -> None:
    assert holdout.main() == 0
    assert capsys.readouterr().out == WINES.read_text()


def test_no_wine_is_trained_on() -> None:
    with WINES.open(newline="") as file:
        wines = [tuple(float(row[name]) for name in FEATURE_NAMES) for row in csv.DictReader(file)]
    assert len(wines) == 250
    assert not set(wines) & {tuple(row) for row in prepare().training.features.tolist()}
