"""The training command: what it logs, what it writes, what it leaves alone."""

import hashlib
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
from sklearn.ensemble import ExtraTreesRegressor

from app.contract import (
    ARTIFACT_FILES,
    BASELINE_FILE,
    COMPILED_FILE,
    FEATURE_NAMES,
    MANIFEST_FILE,
    MANIFEST_FORMAT,
    MODEL_FILE,
    SCALER_FILE,
)
from training import train as command
from training.dataset import CANONICAL_FILE, prepare
from training.evaluate import predict

ROOT = Path(__file__).parents[3]
FILES = {*ARTIFACT_FILES, COMPILED_FILE, MANIFEST_FILE}
SMALL = ExtraTreesRegressor(n_estimators=3, min_samples_leaf=20, random_state=1)


def read(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def manifest_of(directory: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((directory / MANIFEST_FILE).read_text())
    return manifest


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Return the artifacts and the log of `python -m training.train` as a person runs it."""
    output = tmp_path_factory.mktemp("train") / "artifacts"
    run = subprocess.run(
        [sys.executable, "-m", "training.train", "--output", output],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return output, run.stderr


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the artifacts of a small model, which no test changes."""
    output = tmp_path_factory.mktemp("small") / "artifacts"
    command.train(SMALL, None, output)
    return output


@pytest.fixture
def small(trained: Path, tmp_path: Path) -> Path:
    """Return a copy of the artifacts of a small model."""
    return Path(shutil.copytree(trained, tmp_path / "artifacts"))


def test_log_is_the_tutorials_with_two_more_errors(shipped: tuple[Path, str]) -> None:
    number = r"0\.\d+"
    assert re.fullmatch(
        "INFO:__main__:Preparing dataset...\n"
        "INFO:__main__:Training model...\n"
        f"INFO:__main__:Test MSE: {number}\n"
        rf"INFO:__main__:Hold-out MSE: {number} \(the 250 of 320 test rows without a twin in training\)\n"
        rf"INFO:__main__:Grouped CV MSE: {number} \(equal rows never straddle a fold\)\n"
        "INFO:__main__:Saving artifacts...\n",
        shipped[1],
    )


def test_shipped_model_is_as_good_as_promised(shipped: tuple[Path, str]) -> None:
    manifest = manifest_of(shipped[0])
    metrics = manifest["metrics"]
    assert metrics["test_mse"] <= 0.31
    assert metrics["cv_mse"] <= 0.405
    assert manifest["parameters"]["n_estimators"] <= 150
    # The hold-out is the test set without its twins, so its error has to be the larger one.
    assert metrics["test_mse"] < metrics["holdout_mse"]
    assert manifest["parameters"]["n_jobs"] is None
    assert [f"MSE: {metrics[name]}" in shipped[1] for name in ("test_mse", "holdout_mse", "cv_mse")] == [
        True
    ] * 3


def test_model_card_states_the_numbers_of_a_run(shipped: tuple[Path, str]) -> None:
    manifest = manifest_of(shipped[0])
    card = (ROOT / "docs" / "model-card.md").read_text()
    stated = dict(re.findall(r"^\| `(\w+)` \| ([\d.]+) \|", card, re.MULTILINE))
    assert stated == {name: f"{value:.3f}" for name, value in manifest["metrics"].items()}
    parameters = manifest["parameters"]
    assert (
        f"`{manifest['algorithm']}` with {parameters['n_estimators']} trees, "
        f"`min_samples_leaf={parameters['min_samples_leaf']}` and `max_features={parameters['max_features']}`"
    ) in " ".join(card.split())
    assert manifest["data"]["sha256"] in card


def test_manifest_vouches_for_the_artifacts(small: Path) -> None:
    manifest = manifest_of(small)
    files = read(small)
    assert set(files) == FILES
    assert manifest["artifacts"] == {
        name: {"sha256": hashlib.sha256(files[name]).hexdigest(), "size": len(files[name])}
        for name in FILES - {MANIFEST_FILE}
    }
    assert manifest["format"] == MANIFEST_FORMAT
    identity = hashlib.sha256(files[SCALER_FILE] + files[MODEL_FILE]).hexdigest()[:8]
    assert manifest["version"] == f"{command.project_version()}+{identity}"
    trained_at = datetime.strptime(manifest["trained_at"], "%Y-%m-%dT%H:%M:%S%z")
    assert 0 <= (datetime.now(UTC) - trained_at).total_seconds() < 60
    assert manifest["algorithm"] == "ExtraTreesRegressor"
    assert manifest["libraries"]["joblib"] == joblib.__version__
    assert manifest["data"] == {
        "file": "winequality-red.csv",
        "sha256": hashlib.sha256(CANONICAL_FILE.read_bytes()).hexdigest(),
        "rows": 1599,
        "training_rows": 1279,
        "holdout_rows": 250,
        "duplicate_rows": 240,
    }
    ph = manifest["features"][8]
    assert [feature["name"] for feature in manifest["features"]] == list(FEATURE_NAMES)
    assert ph == {"name": "ph", "unit": "", "minimum": 2.74, "maximum": 4.01}
    assert files[MANIFEST_FILE].endswith(b"}\n")


def test_samples_are_the_predictions_of_the_saved_artifacts(small: Path) -> None:
    samples = manifest_of(small)["samples"]
    wines = np.array([[sample["wine"][name] for name in FEATURE_NAMES] for sample in samples])
    scaler, model = joblib.load(small / SCALER_FILE), joblib.load(small / MODEL_FILE)
    assert predict(scaler, model, wines).tolist() == [sample["quality"] for sample in samples]
    # One row at a time, as it is served.
    assert [predict(scaler, model, wine[None])[0] for wine in wines] == [s["quality"] for s in samples]
    data = prepare()
    assert wines[:8].tolist() == data.holdout.features[:8].tolist()
    assert wines[8].tolist() == data.training.features.min(axis=0).tolist()
    assert wines[9].tolist() == data.training.features.max(axis=0).tolist()
    assert wines[10].tolist() == [0.0] * 11
    assert wines[11].tolist() == [1e30] * 8 + [14.0, 1e30, 100.0]


def test_same_data_code_and_seed_give_the_same_bytes(small: Path, tmp_path: Path) -> None:
    # Another process and another hash seed.
    script = (
        "import sys; from pathlib import Path; from training import train; "
        "from sklearn.ensemble import ExtraTreesRegressor as Model; "
        "train.train(Model(3, min_samples_leaf=20, random_state=1), None, Path(sys.argv[1]))"
    )
    environment = {"PYTHONHASHSEED": "7", "PATH": "/usr/bin:/bin"}
    again = tmp_path / "again"
    subprocess.run([sys.executable, "-c", script, again], cwd=ROOT, env=environment, check=True, timeout=60)
    for name in (SCALER_FILE, MODEL_FILE, BASELINE_FILE):
        assert (again / name).read_bytes() == (small / name).read_bytes(), name
    assert manifest_of(again)["version"] == manifest_of(small)["version"]


def test_bad_data_is_one_line_and_exit_code_2_and_old_artifacts_stay(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = read(small)
    bad = tmp_path / "bad.csv"
    bad.write_text(CANONICAL_FILE.read_text().replace(";0.9978;", ";NaN;", 1))
    assert command.main(["--data", str(bad), "--output", str(small)]) == 2
    assert capsys.readouterr().err == f"{bad}:2: column 'density': NaN is not a finite number\n"
    assert read(small) == before


def test_missing_file_is_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert command.main(["--data", "no-such-file.csv", "--output", str(tmp_path / "new")]) == 2
    assert capsys.readouterr().err == "[Errno 2] No such file or directory: 'no-such-file.csv'\n"
    assert not (tmp_path / "new").exists()


def test_command_trains_the_shipped_model_on_the_given_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = CANONICAL_FILE.read_text().splitlines()
    (tmp_path / "half.csv").write_text("\n".join(lines[:800]))
    monkeypatch.setattr(command, "make_model", lambda: SMALL)
    assert command.main(["--data", str(tmp_path / "half.csv"), "--output", str(tmp_path / "new")]) == 0
    manifest = manifest_of(tmp_path / "new")
    assert manifest["data"]["file"] == "half.csv"
    assert manifest["data"]["rows"] == 799
    assert manifest["data"]["training_rows"] < 799
    assert manifest["data"]["holdout_rows"] == 250


def test_failure_while_saving_leaves_the_old_artifacts(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = read(small)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(command, "make_manifest", fail)
    with pytest.raises(OSError, match="No space left"):
        command.train(ExtraTreesRegressor(n_estimators=1, random_state=2), None, small)
    assert read(small) == before


def test_a_signal_waits_until_the_whole_set_is_renamed(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = tmp_path / "new"
    new.mkdir()
    for name in FILES:
        (new / name).write_text("new")
    replace = Path.replace

    def interrupted(path: Path, target: Path) -> Path:
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            command.publish(new, small)
    finally:
        signal.signal(signal.SIGINT, before)
    assert read(small) == dict.fromkeys(FILES, b"new")


def test_code_version_is_gits_or_the_projects(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text('[project]\nversion = "9.8.7"\n')
    monkeypatch.setattr(command, "ROOT", tmp_path)
    assert command.code_version() == "9.8.7"
    git = ["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@example.org"]
    subprocess.run([*git, "init", "--quiet"], check=True)
    subprocess.run([*git, "add", "pyproject.toml"], check=True)
    subprocess.run([*git, "commit", "--quiet", "--message", "a"], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout
    assert commit.startswith(command.code_version())
    with monkeypatch.context() as hook:
        hook.setenv("GIT_INDEX_FILE", str(tmp_path / "another"))
        assert commit.startswith(command.code_version())
    (tmp_path / "pyproject.toml").write_text('[project]\nversion = "9.8.8"\n')
    assert command.code_version().endswith("-dirty")
