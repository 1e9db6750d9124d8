"""Cross-validation, the baseline and the search."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.ensemble import ExtraTreesRegressor

from app.contract import FEATURE_NAMES
from training import search
from training.baseline import make_baseline
from training.dataset import Table, prepare
from training.evaluate import REPEATS, mse, out_of_fold
from training.model import candidates, make_model
from training.search import NOISE, Result, choose


def noise(wines: int, copies: int) -> Table:
    """Return wines that occur several times each and whose quality cannot be learned, only remembered."""
    random = np.random.default_rng(0)
    features = np.repeat(random.normal(size=(wines, 11)), copies, axis=0)
    return Table(features, np.repeat(random.choice([0.0, 10.0], size=wines), copies))


def test_equal_rows_never_straddle_a_fold() -> None:
    table = noise(wines=60, copies=4)
    memory = ExtraTreesRegressor(n_estimators=20, random_state=1)
    # A model that had seen a twin would remember its quality and be off by nothing.
    assert mse(out_of_fold(memory, table), table.quality) > 20


def test_every_row_is_predicted_once_a_repeat() -> None:
    table = noise(wines=60, copies=2)
    predictions = out_of_fold(ExtraTreesRegressor(n_estimators=2, random_state=1), table)
    assert predictions.shape == (REPEATS, 120)
    assert ((predictions >= 0) & (predictions <= 10)).all()
    assert not np.array_equal(predictions[0], predictions[1])


def index_of(value: float, bins: dict[str, list[float]]) -> int:
    """Return the bin of a value, by the documented rule."""
    last = len(bins["shares"]) - 1
    return next((i for i in range(last) if bins["edges"][i] <= value < bins["edges"][i + 1]), last)


def check(bins: dict[str, list[float]], values: Any) -> None:
    edges, shares = bins["edges"], bins["shares"]
    assert len(edges) == len(shares) + 1 <= 11
    assert (edges[0], edges[-1]) == (min(values), max(values))
    assert sum(shares) == pytest.approx(1)
    counted = np.bincount([index_of(value, bins) for value in values], minlength=len(shares))
    assert (counted / len(values)).tolist() == shares
    assert all(shares)


def test_baseline_bins_hold_their_share_of_the_training_rows() -> None:
    table = prepare().training
    predictions = np.random.default_rng(0).normal(5.6, 0.5, size=(3, 400))
    baseline = make_baseline(table.features, predictions)
    assert list(baseline) == ["id", "features", "quality"]
    assert list(baseline["features"]) == list(FEATURE_NAMES)
    for bins, values in zip(baseline["features"].values(), table.features.T, strict=True):
        check(bins, values)
        assert bins["edges"] == sorted(set(bins["edges"]))
    check(baseline["quality"], predictions.ravel())
    assert baseline["quality"]["shares"] == pytest.approx([0.1] * 10, abs=0.002)


def test_ties_and_constants_collapse_bins() -> None:
    features = np.zeros((100, 11))
    features[:5, 0] = [1, 2, 3, 4, 5]
    features[:60, 1] = 7.5
    baseline = make_baseline(features, np.full(100, 5.5))
    assert baseline["features"]["fixed_acidity"] == {"edges": [0.0, 5.0], "shares": [1.0]}
    assert baseline["features"]["volatile_acidity"] == {"edges": [0.0, 7.5], "shares": [1.0]}
    assert baseline["quality"] == {"edges": [5.5, 5.5], "shares": [1.0]}


def test_baseline_id_is_of_its_content() -> None:
    table = prepare().training
    predictions = np.linspace(4, 7, 50)
    one = make_baseline(table.features, predictions)
    assert one == make_baseline(table.features, predictions)
    assert one["id"] != make_baseline(table.features, predictions + 0.001)["id"]
    assert json.loads(json.dumps(one)) == one


def test_choice_is_the_cheapest_of_the_near_equals() -> None:
    best, near, far = (
        Result(make_model(), cv_mse=0.39, visits=2000),
        Result(make_model(), cv_mse=0.39 + NOISE / 2, visits=900),
        Result(make_model(), cv_mse=0.39 + NOISE * 2, visits=10),
    )
    assert choose([far, best, near]) is near


def test_candidates_are_few_trees_and_include_the_shipped_model() -> None:
    models = list(candidates())
    assert max(model.n_estimators for model in models) <= 150
    assert repr(make_model()) in map(repr, models)


def test_search_command_orders_by_error_and_names_its_choice(capsys: pytest.CaptureFixture[str]) -> None:
    stump = ExtraTreesRegressor(n_estimators=2, min_samples_leaf=600, random_state=1)
    better = ExtraTreesRegressor(n_estimators=5, min_samples_leaf=5, random_state=1)
    assert search.main([], [stump, better]) == 0
    first, second, _, choice = capsys.readouterr().out.splitlines()
    assert "n_estimators=5" in first
    assert "n_estimators=2" in second
    assert choice == f"choice: {first}"
    # Two stumps of one node, or of three, visit at most four nodes a wine.
    assert 2 <= float(second.split()[1]) <= 4


def test_search_refuses_bad_data(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "empty.csv").touch()
    assert search.main(["--data", str(tmp_path / "empty.csv")]) == 2
    assert capsys.readouterr().err == f"{tmp_path}/empty.csv:1: the file is empty\n"
