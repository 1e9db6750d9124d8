"""The gate lets a model pass that is no worse than the champion, and says why it refuses another."""

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import joblib
import numpy as np
import pytest
from sklearn.ensemble import ExtraTreesRegressor

from app.contract import COMPILED_FILE, FEATURES, MANIFEST_FILE, MODEL_FILE, SCALER_FILE
from delivery import archive, gate
from training import train as training
from training.compile import compile_forest
from training.dataset import CANONICAL_FILE, Array, Table, prepare
from training.evaluate import fit, mse, out_of_fold, predict
from training.model import Forest, make_model

SMALL = ExtraTreesRegressor(n_estimators=3, min_samples_leaf=2, max_features=0.5, random_state=1)


@pytest.fixture(autouse=True, scope="module")
def cross_validated_once() -> Iterator[None]:
    """Cross-validate each model on each table once: the same again takes seconds and gives the same."""
    known: dict[tuple[str, bytes], Array] = {}

    def remembered(model: Forest, table: Table) -> Array:
        key = repr(model), table.quality.tobytes()
        if key not in known:
            known[key] = out_of_fold(model, table)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gate, "out_of_fold", remembered)
        patch.setattr(training, "out_of_fold", remembered)
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function from a model and a data file to its artifacts, trained once."""

    @cache
    def artifacts(small: bool = False, data: Path | None = None) -> Path:
        output = tmp_path_factory.mktemp("artifacts")
        training.train(SMALL if small else make_model(), data, output)
        return output

    return artifacts


@pytest.fixture
def shipped(trained: Callable[..., Path], tmp_path: Path) -> Path:
    """Return a copy of the artifacts of the model that ships."""
    return Path(shutil.copytree(trained(), tmp_path / "shipped"))


def edit(directory: Path, **changes: Any) -> None:
    """Change fields of the manifest, which vouches for the other files and not for itself."""
    (directory / MANIFEST_FILE).write_text(json.dumps({**manifest_of(directory), **changes}))


def manifest_of(artifacts: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((artifacts / MANIFEST_FILE).read_text())
    return manifest


def release_of(artifacts: Path, target: Path, **replaced: bytes) -> Path:
    """Pack a release of the artifacts; what is in `replaced` is not what the release's manifest says."""
    files: dict[str, Path | bytes] = {f"artifacts/{path.name}": path for path in artifacts.iterdir()}
    files["requirements/app.txt"] = b"nothing\n"
    contents = {name: path if isinstance(path, bytes) else path.read_bytes() for name, path in files.items()}
    hashes = {name: archive.digest(content) for name, content in contents.items()}
    manifest = {
        "format": 1,
        "version": "v1",
        "lock": hashes["requirements/app.txt"],
        "model": {"version": manifest_of(artifacts)["version"]},
        "files": hashes,
    }
    files[MANIFEST_FILE] = json.dumps(manifest).encode()
    archive.write(target, files | {f"artifacts/{name}": content for name, content in replaced.items()})
    return target


class Bomb:
    """An object whose unpickling leaves a trace."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


class Run:
    """What the gate said of artifacts."""

    def __init__(self, capsys: pytest.CaptureFixture[str], output: Path, *arguments: str | Path) -> None:
        self.output = output
        self.code = gate.main([*map(str, arguments), "--output", str(output)])
        self.said, errors = capsys.readouterr()
        self.errors = [line for line in errors.splitlines() if not line.startswith("Serving with")]

    def report(self) -> str:
        """Return the report."""
        return (self.output / "report.md").read_text()

    def cases(self) -> dict[str, str]:
        """Return the verdicts in the JUnit file, by the names of the checks."""
        root = ET.parse(self.output / "junit.xml").getroot()  # noqa: S314 - our own file
        cases = {}
        for case in root:
            outcome = [element for element in case if element.tag in ("failure", "skipped")]
            cases[case.attrib["name"]] = outcome[0].tag if outcome else "passed"
        assert int(root.attrib["tests"]) == len(cases)
        assert int(root.attrib["failures"]) == list(cases.values()).count("failure")
        assert int(root.attrib["skipped"]) == list(cases.values()).count("skipped")
        return cases


@pytest.fixture
def run(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[Callable[..., Run]]:
    """Return a function from arguments to what the gate said; plots take seconds: only `drawing` has them."""
    with pytest.MonkeyPatch.context() as patch:
        if not hasattr(request, "param"):
            patch.setattr(gate.Figure, "savefig", lambda *_, **__: None)
        yield lambda *arguments: Run(capsys, tmp_path / "gate", *arguments)


drawing = pytest.mark.parametrize("run", ["drawing"], indirect=True)


def test_the_shipped_model_passes_against_none(shipped: Path, run: Callable[..., Run]) -> None:
    result = run("--artifacts", shipped)
    assert (result.code, result.errors) == (0, [])
    assert set(result.cases().values()) == {"passed"}
    version = manifest_of(shipped)["version"]
    assert f"# Gate: candidate {version} passed against no champion\n" in result.report()
    assert "champion's" not in "".join(result.cases())


@drawing
def test_the_shipped_model_passes_against_its_own_release(
    shipped: Path, run: Callable[..., Run], tmp_path: Path
) -> None:
    result = run("--artifacts", shipped, "--champion", release_of(shipped, tmp_path / "release.tar.gz"))
    assert (result.code, result.errors) == (0, [])
    assert set(result.cases().values()) == {"passed"}
    assert "hold-out error, to the champion's" in result.cases()
    report = result.report()
    metrics = manifest_of(shipped)["metrics"]
    assert f"| holdout MSE | {metrics['holdout_mse']:.4f} | {metrics['holdout_mse']:.4f} |" in report
    assert f"cross-validation error | {metrics['cv_mse']:.4f} | passed |" in report
    plots = {line[line.index("(") + 1 : -1] for line in report.splitlines() if line.startswith("![")}
    assert plots == {path.name for path in result.output.glob("*.svg")}
    assert len(plots) == 3
    first = {plot: (result.output / plot).read_bytes() for plot in plots}
    for content in first.values():
        assert ET.fromstring(content).tag.endswith("svg")  # noqa: S314 - our own file
    # The same question gives the same bytes.
    again = run("--artifacts", shipped, "--champion", shipped)
    assert {plot: (again.output / plot).read_bytes() for plot in plots} == first


@pytest.fixture(scope="module")
def shuffled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the data set with the qualities of its wines mixed up."""
    header, *rows = CANONICAL_FILE.read_text().splitlines()
    features, qualities = zip(*(row.rsplit(";", 1) for row in rows), strict=True)
    mixed = np.random.default_rng(1).permutation(qualities)
    path = tmp_path_factory.mktemp("data") / "shuffled.csv"
    path.write_text("\n".join([header, *map(";".join, zip(features, mixed, strict=True))]) + "\n")
    return path


@pytest.mark.thorough
def test_a_model_trained_on_shuffled_labels_is_refused(
    shipped: Path, trained: Callable[..., Path], shuffled: Path, run: Callable[..., Run]
) -> None:
    bad = trained(data=shuffled)
    result = run("--artifacts", bad, "--champion", shipped, "--data", shuffled)
    assert result.code == 1
    refused = {name for name, verdict in result.cases().items() if verdict == "failure"}
    assert refused == {"hold-out error", "hold-out error, to the champion's", "cross-validation error"}
    assert any("more than the champion's; 0.02 more is tolerated" in line for line in result.errors)
    assert " refused against champion " in result.report()
    for line in result.errors:
        assert f"- {line}" in result.report()
    # A champion that is as bad is no excuse.
    assert run("--artifacts", bad, "--champion", bad, "--data", shuffled).code == 1


@pytest.mark.thorough
def test_a_bad_model_with_good_figures_in_its_manifest_is_refused(
    shipped: Path, trained: Callable[..., Path], shuffled: Path, run: Callable[..., Run], tmp_path: Path
) -> None:
    bad = Path(shutil.copytree(trained(data=shuffled), tmp_path / "bad"))
    good = manifest_of(shipped)
    edit(bad, data=good["data"], metrics=good["metrics"])
    result = run("--artifacts", bad)
    assert result.code == 1
    assert result.cases()["errors of the candidate's manifest"] == "failure"
    assert result.cases()["hold-out error"] == "failure"


def test_a_weaker_algorithm_is_refused_by_cross_validation(
    shipped: Path, trained: Callable[..., Path], run: Callable[..., Run]
) -> None:
    result = run("--artifacts", trained(small=True), "--champion", shipped)
    assert result.code == 1
    assert result.cases()["cross-validation error, to the champion's"] == "failure"
    # The other way round it is an improvement.
    assert run("--artifacts", shipped, "--champion", trained(small=True)).code == 0


def test_a_champion_of_an_unknown_algorithm_is_compared_on_the_hold_out_alone(
    shipped: Path, run: Callable[..., Run], tmp_path: Path
) -> None:
    champion = Path(shutil.copytree(shipped, tmp_path / "champion"))
    edit(champion, algorithm="PerceptronOfOldRegressor")
    result = run("--artifacts", shipped, "--champion", champion)
    assert result.code == 0
    assert result.cases()["cross-validation error, to the champion's"] == "skipped"
    assert result.cases()["hold-out error, to the champion's"] == "passed"
    assert "training knows no PerceptronOfOldRegressor" in result.report()
    # Of a candidate it must be known what it is.
    edit(shipped, parameters={"n_estimators": 50, "no_such_parameter": 1})
    result = run("--artifacts", shipped)
    assert (result.code, result.cases()["cross-validation error"]) == (1, "failure")


def test_predictions_beyond_the_scale_are_refused(
    shipped: Path, run: Callable[..., Run], tmp_path: Path
) -> None:
    dataset = prepare()
    scaler, model = fit(SMALL, dataset.training)
    for tree in model.estimators_:
        tree.tree_.value[:] *= 2
    artifacts = tmp_path / "doubled"
    artifacts.mkdir()
    shutil.copy(shipped / "baseline.json", artifacts)
    joblib.dump(scaler, artifacts / SCALER_FILE)
    joblib.dump(model, artifacts / MODEL_FILE)
    compile_forest(scaler, model, artifacts / COMPILED_FILE)
    measured = {
        f"{name}_mse": mse(predict(scaler, model, table.features), table.quality)
        for name, table in (("test", dataset.test), ("holdout", dataset.holdout))
    }
    manifest = training.make_manifest(artifacts, dataset, scaler, model, measured)
    (artifacts / MANIFEST_FILE).write_text(json.dumps(manifest))
    result = run("--artifacts", artifacts)
    assert result.code == 1
    assert result.cases()["predictions within 0 to 10"] == "failure"
    assert any("outside 0 to 10, for {'fixed_acidity':" in line for line in result.errors)


def test_a_model_that_only_scikit_learn_can_serve_is_too_slow(shipped: Path, run: Callable[..., Run]) -> None:
    artifacts = manifest_of(shipped)["artifacts"]
    del artifacts[COMPILED_FILE]
    edit(shipped, artifacts=artifacts)
    result = run("--artifacts", shipped)
    assert result.code == 1
    assert [name for name, verdict in result.cases().items() if verdict == "failure"] == ["time of one wine"]
    assert "as it has no model.so that works; the budget is 30 us" in result.errors[0]


def test_another_unit_is_another_contract(shipped: Path, run: Callable[..., Run], tmp_path: Path) -> None:
    champion = Path(shutil.copytree(shipped, tmp_path / "champion"))
    features = manifest_of(champion)["features"]
    features[4]["unit"] = "mg/dm3"
    edit(champion, features=features)
    result = run("--artifacts", shipped, "--champion", champion)
    assert result.code == 1
    assert result.errors == ["the feature chlorides in g/dm3 is not the champion's chlorides in mg/dm3"]


def test_a_champion_that_was_kept_from_another_hold_out_does_not_count(
    shipped: Path, run: Callable[..., Run], tmp_path: Path
) -> None:
    champion = Path(shutil.copytree(shipped, tmp_path / "champion"))
    edit(champion, metrics={**manifest_of(champion)["metrics"], "holdout_mse": 0.3})
    result = run("--artifacts", shipped, "--champion", champion)
    assert result.code == 1
    assert result.cases()["errors of the champion's manifest"] == "failure"


@pytest.mark.parametrize("whose", ["candidate", "champion"])
def test_nothing_is_unpickled_that_is_not_what_the_manifest_says(
    shipped: Path, run: Callable[..., Run], tmp_path: Path, whose: str
) -> None:
    bad = Path(shutil.copytree(shipped, tmp_path / "bad"))
    (bad / MODEL_FILE).write_bytes(pickle.dumps(Bomb(tmp_path / "trace")))
    candidate, champion = (bad, shipped) if whose == "candidate" else (shipped, bad)
    result = run("--artifacts", candidate, "--champion", champion)
    assert result.code == 1
    assert result.cases() == {f"artifacts of the {whose}": "failure"}
    assert f"{whose}: model.joblib: " in result.errors[0]
    assert "the manifest says" in result.report()
    assert not (tmp_path / "trace").exists()
    # It would have: the same file with its hash in the manifest is loaded.
    content = (bad / MODEL_FILE).read_bytes()
    digest = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
    edit(bad, artifacts={**manifest_of(bad)["artifacts"], MODEL_FILE: digest})
    assert run("--artifacts", bad).code == 1
    assert (tmp_path / "trace").exists()


def test_a_release_archive_must_be_what_its_manifest_says(
    shipped: Path, run: Callable[..., Run], tmp_path: Path
) -> None:
    champion = release_of(shipped, tmp_path / "release.tar.gz", **{MODEL_FILE: b"another"})
    result = run("--artifacts", shipped, "--champion", champion)
    assert result.code == 2
    assert "release.tar.gz: " in result.errors[0]
    assert MODEL_FILE in result.errors[0]


def test_what_cannot_be_answered_is_said_in_one_line(
    shipped: Path, run: Callable[..., Run], shuffled: Path, tmp_path: Path
) -> None:
    for arguments, message in [
        (("--champion", tmp_path / "nowhere"), "nowhere: no such directory of artifacts or release archive"),
        (("--data", shuffled), "trained on winequality-red.csv, which is not this shuffled.csv"),
        (("--data", tmp_path / "nowhere.csv"), "No such file or directory"),
    ]:
        result = run("--artifacts", shipped, *arguments)
        assert result.code == 2
        assert len(result.errors) == 1
        assert message in result.errors[0]


def test_without_artifacts_the_gate_refuses_and_says_what_to_do(
    run: Callable[..., Run], tmp_path: Path
) -> None:
    result = run("--artifacts", tmp_path)
    assert result.code == 1
    assert "run `make train`" in result.errors[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("holdout: {tolerance: 0.02}\n", "holdout.bound: Field required"),
        ("holdout: {tolerance: low, bound: 1}\n", "holdout.tolerance: Input should be a valid number"),
        ("a: [", "while parsing a flow node"),
    ],
)
def test_limits_that_cannot_be_read_are_named(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "gate.yml"
    path.write_text(content)
    with pytest.raises(gate.InputError) as caught:
        gate.Limits.read(path)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("error", "passes"), [(0.3, True), (0.42, True), (0.421, False), (float("nan"), False)]
)
def test_the_tolerance_ends_where_it_says(error: float, passes: bool) -> None:
    assert (gate.compared("error", error, 0.4, 0.02 + 1e-12).problem is None) is passes
    assert (gate.bounded("error", error, 0.42).problem is None) is passes


def test_the_contract_of_the_tests_is_the_contract() -> None:
    assert (FEATURES[4].name, FEATURES[4].unit) == ("chlorides", "g/dm3")
