"""The compiled form answers as scikit-learn does, and where it cannot be trusted scikit-learn serves."""

import json
import shutil
import subprocess
import sys
from array import array
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import joblib
import numpy as np
import pytest
from api_harness import ROOT, Client, make_artifacts, parse, value, write_manifest

from app.artifacts import load
from app.main import create_app
from app.predictor import CompiledPredictor, SklearnPredictor, load_predictor
from app.schemas import EXAMPLE
from app.selftest import main as selftest
from app.settings import Settings


@pytest.fixture
def copy(artifacts: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(artifacts, tmp_path / "copy"))


def test_the_compiled_form_is_exact(artifacts: Path) -> None:
    compiled = CompiledPredictor(artifacts / "model.so")
    fitted = SklearnPredictor(
        joblib.load(artifacts / "scaler.joblib"), joblib.load(artifacts / "model.joblib")
    )
    random = np.random.default_rng(1)
    rows = (np.array(list(EXAMPLE.values())) * random.uniform(0, 3, (2000, 11))).tolist()
    flat = array("d", chain.from_iterable(rows))
    expected = fitted.predict_many(flat)
    assert compiled.predict_many(flat) == expected
    assert array("d", map(compiled.predict, rows)) == expected
    assert fitted.predict(rows[0]) == expected[0]
    assert compiled.predict_many(array("d")) == array("d")


def test_serving_imports_no_scikit_learn(artifacts: Path, tmp_path: Path) -> None:
    program = (
        "import sys; from app.main import create_app; create_app();"
        "print({'sklearn', 'scipy', 'numpy', 'joblib'} & set(sys.modules))"
    )
    environment = {"WINEMON_ARTIFACTS_DIR": str(artifacts), "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr


def damage(directory: Path) -> None:
    (directory / "model.so").write_bytes(b"\x7fELF of another processor")


def strip(directory: Path) -> None:
    shutil.copy(shutil.which("true") or "", directory / "model.so")


def outdate(directory: Path) -> None:
    library = directory / "model.so"
    source = "const unsigned winemon_interface = 1;"
    command = ["cc", "-shared", "-nostdlib", "-x", "c", "-", "-o", str(library)]
    subprocess.run(command, input=source, text=True, check=True)


def swap(directory: Path) -> None:
    other = make_artifacts(directory.with_name("other"), seed=1)
    shutil.copy(other / "model.so", directory / "model.so")


def remove(directory: Path) -> None:
    (directory / "model.so").unlink()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (damage, "model.so: cannot be loaded: "),
        (strip, "model.so: cannot be loaded: "),
        (outdate, "model.so: interface 1 instead of 2; train again"),
        (swap, "model.joblib: predicts "),
        (remove, "training did not compile it"),
    ],
)
def test_scikit_learn_serves_where_the_compiled_form_cannot(
    copy: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, change: Callable[[Path], None], reason: str
) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    change(copy)
    write_manifest(copy, manifest)
    client = Client(create_app(Settings(artifacts_dir=copy, metrics_dir=tmp_path / "metrics")))
    assert [record.getMessage() for record in caplog.records if reason in record.getMessage()] != []
    samples = parse(client.get("/metrics").text)
    assert value(samples, "winemon_model_compiled") == 0
    assert value(samples, "winemon_ready") == 1
    sample = manifest["samples"][0]
    answer = client.post("/predict", json=sample["wine"]).json()
    assert answer["quality"] == pytest.approx(sample["quality"], abs=1e-9)


def test_a_compiled_form_that_was_tampered_with_is_refused(copy: Path) -> None:
    with (copy / "model.so").open("r+b") as file:
        file.seek(5000)
        file.write(b"tampered")
    client = Client(create_app(Settings(artifacts_dir=copy, metrics_dir=copy / "metrics")))
    ready = client.get("/ready")
    assert ready.status_code == 503
    assert "model.so: SHA-256" in ready.json()["reason"]


def test_chooses_the_compiled_form(artifacts: Path) -> None:
    assert load_predictor(load(artifacts)).compiled


def test_the_self_test_proves_both_forms(
    artifacts: Path, copy: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "app.selftest", artifacts]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout == "model 1.0.0 predicts 8 samples as training did; serves compiled\n"

    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "model.so").unlink()
    write_manifest(copy, manifest)
    assert selftest(copy) == 0
    assert capsys.readouterr().out.endswith("serves scikit-learn\n")

    shutil.copy(make_artifacts(tmp_path / "other", seed=1) / "model.joblib", copy / "model.joblib")
    write_manifest(copy, manifest)
    assert selftest(copy) == 1
    assert "model.joblib: predicts" in capsys.readouterr().err
