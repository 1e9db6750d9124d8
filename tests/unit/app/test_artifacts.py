"""Artifacts are served only as their manifest describes them."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from api_harness import make_artifacts, write_manifest

from app.artifacts import ArtifactError, load
from app.contract import FEATURE_NAMES
from app.predictor import load_predictor


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return artifacts without a compiled form."""
    return make_artifacts(tmp_path_factory.mktemp("plain") / "artifacts", compiled=False)


@pytest.fixture
def copy(plain: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(plain, tmp_path / "copy"))


def refusal(directory: Path) -> str:
    """Return the one line that says why the artifacts are not served."""
    with pytest.raises(ArtifactError) as caught:
        load_predictor(load(directory))
    message = str(caught.value)
    assert "\n" not in message
    return message


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.path,)


def test_loads_what_training_wrote(artifacts: Path) -> None:
    loaded = load(artifacts)
    assert list(loaded.baseline.bins) == [*FEATURE_NAMES, "quality"]
    assert (
        load_predictor(loaded).predict(loaded.manifest.samples[0].row) == loaded.manifest.samples[0].quality
    )


def test_nothing_of_a_tampered_file_runs(copy: Path, tmp_path: Path) -> None:
    original = (copy / "model.joblib").read_bytes()
    bomb = pickle.dumps(Bomb(tmp_path / "exploded"))
    (copy / "model.joblib").write_bytes(bomb + b"\0" * (len(original) - len(bomb)))
    assert "model.joblib: SHA-256" in refusal(copy)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("name", ["scaler.joblib", "model.joblib", "baseline.json"])
def test_refuses_a_changed_byte(copy: Path, name: str) -> None:
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    assert f"{name}: SHA-256" in refusal(copy)


@pytest.mark.parametrize("name", ["scaler.joblib", "model.joblib", "baseline.json"])
def test_refuses_another_size(copy: Path, name: str) -> None:
    with (copy / name).open("ab") as file:
        file.write(b" ")
    assert f"{name}: " in refusal(copy)
    assert "bytes, the manifest says" in refusal(copy)


@pytest.mark.parametrize("name", ["scaler.joblib", "model.joblib", "baseline.json", "manifest.json"])
def test_refuses_a_missing_file(copy: Path, name: str) -> None:
    (copy / name).unlink()
    assert refusal(copy).endswith(f"{name}: No such file or directory; run `make train`")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "manifest.json: format 2, this release reads 1"),
        ({"version": None}, "manifest.json: version: Input should be a valid string"),
        ({"samples": []}, "manifest.json: samples: List should have at least 1 item"),
        (
            {"samples": [{"wine": {"ph": 3.0}, "quality": 5}]},
            "manifest.json: a sample does not have the features",
        ),
        ({"features": []}, "manifest.json: features  are not those of the API"),
        ({"artifacts": {}}, "scaler.joblib: not in the manifest"),
        ({"trained_at": "2026-01-01T00:00:00"}, "manifest.json: trained_at: "),
        ({"metrics": {}}, "manifest.json: no test_mse among its metrics"),
    ],
)
def test_refuses_a_manifest_it_does_not_understand(copy: Path, change: dict[str, Any], message: str) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps({**manifest, **change}))
    assert message in refusal(copy)


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[" * 100_000])
def test_refuses_a_manifest_that_is_not_json(copy: Path, content: bytes) -> None:
    (copy / "manifest.json").write_bytes(content)
    assert "manifest.json: " in refusal(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": {}}, "its features are not those of the API"),
        ({"quality": {"edges": [1], "shares": [1]}}, "quality.edges: List should have at least 2 items"),
        ({"quality": {"edges": [1, 2], "shares": [0.5, 0.5]}}, "2 edges need 1 shares"),
        ({"quality": {"edges": [3, 2, 1], "shares": [0.5, 0.5]}}, "edges do not rise"),
    ],
)
def test_refuses_a_baseline_it_cannot_count_by(copy: Path, change: dict[str, Any], message: str) -> None:
    baseline = json.loads((copy / "baseline.json").read_text())
    (copy / "baseline.json").write_text(json.dumps({**baseline, **change}))
    write_manifest(copy, json.loads((copy / "manifest.json").read_text()))
    assert message in refusal(copy)
    assert refusal(copy).startswith("baseline.json: ")


def test_refuses_what_the_libraries_cannot_read(copy: Path) -> None:
    (copy / "model.joblib").write_bytes(b"not a pickle")
    write_manifest(copy, json.loads((copy / "manifest.json").read_text()))
    assert "model.joblib: cannot be unpickled: " in refusal(copy)


def test_refuses_a_model_that_cannot_predict(copy: Path) -> None:
    shutil.copy(copy / "scaler.joblib", copy / "model.joblib")
    write_manifest(copy, json.loads((copy / "manifest.json").read_text()))
    assert "model.joblib: cannot predict: AttributeError" in refusal(copy)


def test_refuses_a_model_that_does_not_predict_as_training_did(copy: Path) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["samples"][3]["quality"] += 1e-8
    (copy / "manifest.json").write_text(json.dumps(manifest))
    assert "model.joblib: predicts " in refusal(copy)
