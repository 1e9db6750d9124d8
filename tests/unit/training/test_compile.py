"""Compiled forests answer bit for bit as scikit-learn does, above all at their thresholds."""

import ctypes
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.ensemble import ExtraTreesRegressor, RandomForestRegressor
from sklearn.preprocessing import StandardScaler

from training import train as command
from training.compile import CompileError, compile_forest, edge_wines, lay_out, unscale

RANDOM = np.random.default_rng(1)
WINES = RANDOM.gamma(2, [4, 0.2, 0.1, 1, 0.04, 7, 20, 0.5, 1.6, 0.3, 5], (300, 11))
QUALITY = WINES[:, 0] + np.sin(WINES[:, 10])


def fitted(model: Any) -> tuple[StandardScaler, Any]:
    scaler = StandardScaler().fit(WINES)
    return scaler, model.fit(scaler.transform(WINES), QUALITY)


def evaluate(path: Path, wines: Any) -> Any:
    wines = np.ascontiguousarray(wines)
    qualities = np.empty(len(wines))
    ctypes.CDLL(str(path)).winemon_predict_many(
        wines.ctypes.data_as(ctypes.c_void_p),
        qualities.ctypes.data_as(ctypes.c_void_p),
        ctypes.c_size_t(len(wines)),
    )
    return qualities


@pytest.mark.parametrize(
    "model",
    [
        ExtraTreesRegressor(n_estimators=13, random_state=1),
        RandomForestRegressor(n_estimators=8, random_state=1),
        RandomForestRegressor(n_estimators=1, max_depth=1, random_state=1),
        ExtraTreesRegressor(n_estimators=3, max_leaf_nodes=2, random_state=1),
    ],
    ids=["odd", "whole lanes", "one stump", "stumps"],
)
def test_compiled_is_exact_everywhere(tmp_path: Path, model: Any) -> None:
    scaler, model = fitted(model)
    compile_forest(scaler, model, tmp_path / "model.so")
    nodes = lay_out(scaler, model)["nodes"]
    inner = np.flatnonzero(np.isfinite(nodes["threshold"]))
    on = WINES[RANDOM.integers(0, len(WINES), len(inner))]
    on[np.arange(len(inner)), nodes["feature"][inner]] = nodes["threshold"][inner]
    beyond = on.copy()
    beyond[np.arange(len(inner)), nodes["feature"][inner]] = np.nextafter(nodes["threshold"][inner], np.inf)
    for wines in (
        WINES,
        WINES * RANDOM.uniform(0, 5, WINES.shape),
        on,
        beyond,
        np.zeros((1, 11)),
        np.full((1, 11), 1e30),
    ):
        np.testing.assert_array_equal(
            evaluate(tmp_path / "model.so", wines), model.predict(scaler.transform(wines))
        )


def test_a_tree_that_never_splits_compiles(tmp_path: Path) -> None:
    scaler = StandardScaler().fit(WINES)
    model = RandomForestRegressor(n_estimators=2, random_state=1).fit(
        scaler.transform(WINES), np.full(len(WINES), 5.0)
    )
    compile_forest(scaler, model, tmp_path / "model.so")
    assert evaluate(tmp_path / "model.so", WINES[:3]).tolist() == [5.0] * 3
    assert edge_wines(scaler, model, WINES[0]).shape == (0, 11)


def test_unscaled_thresholds_are_where_the_answer_changes() -> None:
    scaler = StandardScaler().fit(WINES)
    feature = RANDOM.integers(0, 11, 1000)
    threshold = RANDOM.normal(0, 2, 1000)

    def goes_left(values: Any) -> Any:
        return ((values - scaler.mean_[feature]) / scaler.scale_[feature]).astype(np.float32) <= threshold

    values = unscale(scaler, feature, threshold)
    assert goes_left(values).all()
    assert not goes_left(np.nextafter(values, np.inf)).any()


def test_the_same_model_compiles_to_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one.so", "two.so"):
        compile_forest(*fitted(ExtraTreesRegressor(n_estimators=3, random_state=1)), tmp_path / name)
    assert (tmp_path / "one.so").read_bytes() == (tmp_path / "two.so").read_bytes()


def test_without_a_compiler_training_says_so_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "artifacts").mkdir()
    (tmp_path / "artifacts" / "model.so").write_bytes(b"of the model before")
    monkeypatch.setattr(shutil, "which", lambda _: None)
    command.train(
        ExtraTreesRegressor(n_estimators=3, min_samples_leaf=20, random_state=1), None, tmp_path / "artifacts"
    )
    assert "scikit-learn will serve, more slowly: no C compiler: install gcc and libc6-dev" in caplog.text
    assert not (tmp_path / "artifacts" / "model.so").exists()


def test_a_failing_compiler_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.compile.SOURCES", [tmp_path / "missing.c"])
    with pytest.raises(CompileError, match=r"missing\.c"):
        compile_forest(*fitted(ExtraTreesRegressor(n_estimators=1, random_state=1)), tmp_path / "model.so")


def test_edge_wines_differ_in_one_value_each() -> None:
    edges = edge_wines(*fitted(ExtraTreesRegressor(n_estimators=13, random_state=1)), WINES[0])
    assert edges.shape == (22, 11)
    assert ((edges != WINES[0]).sum(axis=1) == 1).all()
    assert (edges[1::2].max(axis=0) > edges[::2].max(axis=0)).any()
