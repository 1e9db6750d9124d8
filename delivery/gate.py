"""Let a candidate model pass, or refuse it and say why.

    python -m delivery.gate [--champion DIR|ARCHIVE] [--artifacts DIR] [--data FILE] [--output DIR]

The candidate is what training left in `artifacts/`, the champion the model of another such directory or of a
release archive; without one, the candidate is held to the absolute bounds alone. Both predict the frozen
hold-out, which neither has seen, with the code that would serve them, and their algorithms with their
parameters are cross-validated on the same folds of the candidate's data. The limits are in
`delivery/gate.yml`.

Writes report.md, junit.xml and plots (SVG) to `build/gate/`. Exits 1 where the candidate is refused, 2 where
the question cannot be answered. Nothing is unpickled or loaded before its hash is that of its manifest.
"""

import argparse
import math
import sys
import tempfile
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Self, get_args

import matplotlib as mpl
import numpy as np
import yaml
from matplotlib.figure import Figure
from pydantic import BaseModel, ConfigDict, NonNegativeFloat, PositiveFloat, ValidationError

from app.artifacts import ArtifactError, Artifacts, load
from app.contract import COMPILED_FILE, FEATURE_NAMES, FEATURES, TARGET_MAXIMUM, TARGET_MINIMUM
from app.predictor import Predictor, load_fitted, load_predictor
from delivery import machine
from delivery.checks import Check, write_junit
from training.dataset import Array, DataError, Dataset, Table, prepare
from training.evaluate import mse, out_of_fold
from training.model import Forest

LIMITS: Final = Path(__file__).with_name("gate.yml")
ALGORITHMS: Final[dict[str, type[Forest]]] = {kind.__name__: kind for kind in get_args(Forest)}
SHUFFLES: Final = 10
"""Times that each feature is shuffled to see what it is worth."""
COLOURS: Final = ("#7b2d43", "#8a8a8a")


class InputError(Exception):
    """The question cannot be answered; the message is one line that says why."""


# --- the limits ---------------------------------------------------------------------------------------------


class Bounds(BaseModel):
    """How much more than the champion's a mean squared error may be, and how large it may be at all."""

    model_config = ConfigDict(extra="forbid")

    tolerance: NonNegativeFloat
    bound: PositiveFloat


class Limits(BaseModel):
    """The limits of `delivery/gate.yml`."""

    model_config = ConfigDict(extra="forbid")

    holdout: Bounds
    cross_validation: Bounds
    claim: NonNegativeFloat
    row_microseconds: PositiveFloat

    @classmethod
    def read(cls, path: Path = LIMITS) -> Self:
        """Read the limits from a YAML file; raises InputError naming what is wrong with it."""
        try:
            return cls.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
        except ValidationError as error:
            first = error.errors()[0]
            raise InputError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
        except (OSError, yaml.YAMLError) as error:
            raise InputError(f"{path}: {' '.join(str(error).split())}") from error


# --- the models ---------------------------------------------------------------------------------------------


@dataclass
class Model:
    """Verified artifacts and what serves them, measured on the data set."""

    name: str
    artifacts: Artifacts
    predictor: Predictor
    dataset: Dataset

    def predict(self, features: Array) -> Array:
        """Return the predicted quality, shape (n,), of `features`, shape (n, 11), as serving predicts it."""
        predictions: Array = np.array(self.predictor.predict_many(array("d", features.ravel().tolist())))
        return predictions

    def error(self, table: Table) -> float:
        """Return the mean squared error on `table`."""
        return mse(self.predict(table.features), table.quality)

    @cached_property
    def squared_errors(self) -> Array:
        """The squared error of each wine of the hold-out."""
        holdout = self.dataset.holdout
        errors: Array = (self.predict(holdout.features) - holdout.quality) ** 2
        return errors

    @cached_property
    def metrics(self) -> dict[str, float]:
        """The errors of the manifest that can be measured on the artifacts themselves."""
        return {"test_mse": self.error(self.dataset.test), "holdout_mse": float(self.squared_errors.mean())}

    @cached_property
    def row_microseconds(self) -> float:
        """The time of one wine through the model: the least of ten rounds, as a busy computer only adds."""
        row = self.dataset.holdout.features[0].tolist()
        once = timed(lambda: self.predictor.predict(row), 1)
        times = max(1, int(0.01 / once))
        return min(timed(lambda: self.predictor.predict(row), times) for _ in range(10)) * 1e6

    @cached_property
    def importances(self) -> Array:
        """How much the hold-out's error rises, shape (11, SHUFFLES), when a feature's values are shuffled.

        It asks nothing of a model but predictions, so models of any kind compare.
        """
        holdout = self.dataset.holdout
        rises = np.empty((len(FEATURES), SHUFFLES))
        for place in range(len(FEATURES)):
            random = np.random.default_rng(place)  # the same shuffles for every model
            for shuffle in range(SHUFFLES):
                features = holdout.features.copy()
                features[:, place] = random.permutation(features[:, place])
                rises[place, shuffle] = self.error(Table(features, holdout.quality))
        result: Array = rises - self.squared_errors.mean()
        return result

    @property
    def kind(self) -> tuple[str, dict[str, Any]]:
        """The algorithm and its parameters."""
        return self.artifacts.manifest.algorithm, self.artifacts.manifest.parameters

    def unfitted(self) -> Forest:
        """Return the algorithm with its parameters; raises InputError where this project has it no more."""
        algorithm, parameters = self.kind
        try:
            return ALGORITHMS[algorithm](**parameters)
        except (KeyError, TypeError):
            raise InputError(
                f"training knows no {algorithm} with these parameters (it knows {', '.join(ALGORITHMS)})"
            ) from None


def timed(call: Callable[[], object], times: int) -> float:
    """Return the seconds that one call takes, on average of so many."""
    start = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - start) / times


@contextmanager
def directory_of(source: Path) -> Iterator[Path]:
    """Yield the directory of artifacts that `source` is, or that the release archive `source` holds.

    Raises InputError where it is neither, and where the archive is not what its manifest says.
    """
    if source.is_dir():
        yield source
        return
    if not source.is_file():
        raise InputError(f"{source}: no such directory of artifacts or release archive")
    with tempfile.TemporaryDirectory() as directory:
        try:
            machine.unpack(source, Path(directory))
            machine.verified(Path(directory))
        except machine.InputError as error:
            raise InputError(f"{source}: {error}") from error
        yield Path(directory, "artifacts")


# --- the checks ---------------------------------------------------------------------------------------------


def check_all(candidate: Model, champion: Model | None, limits: Limits) -> Iterator[Check]:
    """Yield every check of the candidate, with and without a champion."""
    yield check_contract(candidate, champion)
    yield check_claims(candidate, limits.claim)
    if champion is not None:
        yield check_claims(champion, limits.claim)
    yield check_range(candidate)
    yield check_time(candidate, champion, limits.row_microseconds)
    yield from check_holdout(candidate, champion, limits.holdout)
    yield from check_cross_validation(candidate, champion, limits.cross_validation)


def check_contract(candidate: Model, champion: Model | None) -> Check:
    """Compare the features, their units and their order with the API's and with the champion's."""
    wanted = {"the API's": [(feature.name, feature.unit) for feature in FEATURES]}
    if champion is not None:
        wanted["the champion's"] = features_of(champion)
    has = features_of(candidate)
    for whose, features in wanted.items():
        for mine, other in zip(has, features, strict=True):
            if mine != other:
                problem = f"the feature {' in '.join(mine)} is not {whose} {' in '.join(other)}"
                return Check("feature contract", f"{len(has)} features", problem)
    return Check("feature contract", f"{len(has)} features, as {' and '.join(wanted)}")


def features_of(model: Model) -> list[tuple[str, str]]:
    """Return name and unit of each feature."""
    return [(feature.name, feature.unit) for feature in model.artifacts.manifest.features]


def check_claims(model: Model, tolerance: float) -> Check:
    """Compare what the manifest says of the errors with what is measured on the same wines.

    A champion whose own figures differ was kept from another hold-out, and may have seen wines of this one.
    """
    name = f"errors of the {model.name}'s manifest"
    said = model.artifacts.manifest.metrics
    found = ", ".join(f"{key} {value:.4f}" for key, value in model.metrics.items())
    for key, value in model.metrics.items():
        if not abs(said.get(key, math.nan) - value) <= tolerance:
            claimed = f"{said[key]:.4f}" if key in said else "nothing"
            problem = f"its manifest says {claimed} for {key}, measured on the same wines it is {value:.4f}"
            return Check(name, found, problem)
    return Check(name, f"{found}: as measured")


def check_range(candidate: Model) -> Check:
    """Require that every prediction is finite and a quality, for known wines and impossible ones."""
    dataset = candidate.dataset
    samples = np.array([sample.row for sample in candidate.artifacts.manifest.samples])
    top = [1e6 if feature.maximum is None else feature.maximum for feature in FEATURES]
    random = np.random.default_rng(1).uniform(
        [feature.minimum for feature in FEATURES], top, (1000, len(top))
    )
    wines = np.vstack([dataset.training.features, dataset.test.features, samples, random])
    predictions = candidate.predict(wines)
    found = f"{predictions.min():.2f} to {predictions.max():.2f} for {len(wines)} wines"
    wrong = ~((predictions >= TARGET_MINIMUM) & (predictions <= TARGET_MAXIMUM))  # NaN compares as false
    problem = None
    if wrong.any():
        place = int(np.flatnonzero(wrong)[0])
        problem = (
            f"predicts {predictions[place]:g}, outside {TARGET_MINIMUM:g} to {TARGET_MAXIMUM:g}, "
            f"for {dict(zip(FEATURE_NAMES, wines[place].tolist(), strict=True))}"
        )
    return Check("predictions within 0 to 10", found, problem)


def check_time(candidate: Model, champion: Model | None, budget: float) -> Check:
    """Hold one wine's time to the budget."""
    took = candidate.row_microseconds
    found = f"{took:.1f} us" + (f", the champion {champion.row_microseconds:.1f} us" if champion else "")
    problem = None
    if took > budget:
        form = "" if candidate.predictor.compiled else f", as it has no {COMPILED_FILE} that works"
        problem = f"a wine takes {took:.1f} us{form}; the budget is {budget:g} us"
    return Check("time of one wine", found, problem)


def check_holdout(candidate: Model, champion: Model | None, bounds: Bounds) -> Iterator[Check]:
    """Hold the error on the hold-out to its bound and, wine by wine, to the champion's."""
    error = candidate.metrics["holdout_mse"]
    yield bounded("hold-out error", error, bounds.bound)
    if champion is not None:
        differences = candidate.squared_errors - champion.squared_errors
        spread = float(differences.std(ddof=1)) / math.sqrt(len(differences))
        yield compared("hold-out error", error, champion.metrics["holdout_mse"], bounds.tolerance, spread)


def check_cross_validation(candidate: Model, champion: Model | None, bounds: Bounds) -> Iterator[Check]:
    """Hold the algorithm with its parameters to the bound and to the champion's, on the same folds."""
    table = candidate.dataset.training
    errors: dict[str, float] = {}
    for model in [candidate, champion] if champion else [candidate]:
        name = "cross-validation error"
        try:
            same = model is champion and champion.kind == candidate.kind
            # Every tree has its own seed: the same again would give the same numbers.
            errors[model.name] = (
                errors[candidate.name] if same else mse(out_of_fold(model.unfitted(), table), table.quality)
            )
        except InputError as error:
            if model is candidate:
                yield Check(name, "not measured", str(error))
            else:
                yield Check(f"{name}, to the champion's", "not measured", skipped=str(error))
            return
        if model is candidate:
            yield bounded(name, errors[model.name], bounds.bound)
        else:
            yield compared(name, errors[candidate.name], errors[model.name], bounds.tolerance)


def bounded(name: str, error: float, bound: float) -> Check:
    """Check an error against its absolute bound."""
    problem = f"the {name} is {error:.4f}, the bound is {bound:g}" if not error <= bound else None
    return Check(name, f"{error:.4f}", problem)


def compared(
    name: str, error: float, champions: float, tolerance: float, spread: float | None = None
) -> Check:
    """Check an error against the champion's; `spread` is the standard error of the difference."""
    difference = error - champions
    about = f" (standard error {spread:.4f})" if spread is not None else ""
    found = f"{error:.4f} and {champions:.4f}: {difference:+.4f}{about}"
    problem = None
    if not difference <= tolerance:
        problem = (
            f"the {name} is {error:.4f}, {difference:.4f} more than the champion's; "
            f"{tolerance:g} more is tolerated"
        )
    return Check(f"{name}, to the champion's", found, problem)


# --- the report ---------------------------------------------------------------------------------------------


def write_report(output: Path, models: Sequence[Model], checks: Sequence[Check]) -> None:
    """Write report.md and its plots about the candidate, and the champion where there is one, to `output`."""
    mpl.rcParams["svg.hashsalt"] = "winemon"  # the same plot is the same bytes
    plots = {
        "predictions": ("Predicted against actual quality on the hold-out", plot_predictions),
        "errors": ("Error by quality on the hold-out", plot_errors),
        "importance": ("Rise of the hold-out error when a feature is shuffled", plot_importances),
    }
    for name, (_, plot) in plots.items():
        plot(models).savefig(output / f"{name}.svg", metadata={"Date": None})

    columns = [facts(model) for model in models]
    qualities = [errors_by_quality(model) for model in models]
    sections = [
        [f"# {verdict(models, checks)}"],
        [f"- {check.problem}" for check in checks if check.problem],
        ["## Checks"],
        markdown(
            ["check", "found", "verdict"],
            [[check.name, check.skipped or check.found, check.verdict] for check in checks],
        ),
        ["## Side by side"],
        markdown(
            ["", *[model.name for model in models]],
            [[fact, *[column[fact] for column in columns]] for fact in columns[0]],
        ),
        ["## Mean squared error by quality"],
        markdown(
            ["quality", "wines", *[model.name for model in models]],
            [
                [f"{quality:g}", str(count), *[f"{errors[quality][1]:.3f}" for errors in qualities]]
                for quality, (count, _) in qualities[0].items()
            ],
        ),
        *([f"![{title}]({name}.svg)"] for name, (title, _) in plots.items()),
    ]
    text = "\n\n".join("\n".join(section) for section in sections if section)
    (output / "report.md").write_text(text + "\n", encoding="utf-8")


def verdict(models: Sequence[Model], checks: Sequence[Check]) -> str:
    """Say on one line what came of it."""
    versions = [f"{model.name} {model.artifacts.manifest.version}" for model in models]
    against = versions[1] if len(versions) > 1 else "no champion"
    outcome = "refused" if any(check.problem for check in checks) else "passed"
    return f"Gate: {versions[0]} {outcome} against {against}"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table."""
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]


def facts(model: Model) -> dict[str, str]:
    """Return what there is to know about a model."""
    manifest = model.artifacts.manifest
    data = manifest.data
    algorithm, parameters = model.kind
    try:
        shown = " ".join(repr(model.unfitted()).split())  # which leaves out what is as by default
    except InputError:
        shown = f"{algorithm}({', '.join(f'{key}={value}' for key, value in parameters.items())})"
    return {
        "version": manifest.version,
        "code": manifest.code_version,
        "trained": f"{manifest.trained_at:%Y-%m-%d %H:%M} UTC",
        "algorithm": shown,
        "data": f"{data['file']}, {data['training_rows']} rows, SHA-256 {data['sha256'][:12]}",
        "scikit-learn": manifest.libraries.get("scikit-learn", ""),
        "serves": "compiled" if model.predictor.compiled else "scikit-learn",
        "one wine": f"{model.row_microseconds:.1f} us",
        **{key.replace("_mse", " MSE"): f"{value:.4f}" for key, value in model.metrics.items()},
        "size": f"{sum(digest.size for digest in manifest.artifacts.values()) / 1e6:.1f} MB",
    }


def errors_by_quality(model: Model) -> dict[float, tuple[int, float]]:
    """Return for each quality of the hold-out how many wines have it, and their mean squared error."""
    actual = model.dataset.holdout.quality
    return {
        float(quality): (
            int((actual == quality).sum()),
            float(model.squared_errors[actual == quality].mean()),
        )
        for quality in np.unique(actual)
    }


def plot_predictions(models: Sequence[Model]) -> Figure:
    """Draw each wine: its actual quality across, its predicted one up."""
    figure = Figure(figsize=(4 * len(models), 4), layout="constrained")
    for axes, model, colour in zip(
        figure.subplots(1, len(models), squeeze=False, sharey=True)[0], models, COLOURS, strict=False
    ):
        holdout = model.dataset.holdout
        beside = np.random.default_rng(1).uniform(-0.2, 0.2, len(holdout))  # qualities are whole: spread them
        axes.plot([3, 8], [3, 8], color="black", linewidth=0.8)
        axes.scatter(holdout.quality + beside, model.predict(holdout.features), s=10, color=colour, alpha=0.6)
        axes.set(title=f"{model.name}, MSE {model.metrics['holdout_mse']:.3f}", xlabel="actual quality")
        axes.label_outer()
    figure.axes[0].set_ylabel("predicted quality")
    return figure


def plot_errors(models: Sequence[Model]) -> Figure:
    """Draw the distribution of predicted less actual quality, for each quality."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(models)
    for place, (model, colour) in enumerate(zip(models, COLOURS, strict=False)):
        holdout = model.dataset.holdout
        errors = model.predict(holdout.features) - holdout.quality
        qualities = np.unique(holdout.quality)
        axes.boxplot(
            [errors[holdout.quality == quality] for quality in qualities],
            positions=qualities + (place - (len(models) - 1) / 2) * width,
            widths=0.8 * width,
            patch_artist=True,
            boxprops={"facecolor": colour, "alpha": 0.6},
            medianprops={"color": "black"},
            flierprops={"markersize": 3},
            manage_ticks=False,
            label=model.name,
        )
    counts = errors_by_quality(models[0])
    axes.set_xticks(list(counts), [f"{quality:g}\nn = {count}" for quality, (count, _) in counts.items()])
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(xlabel="actual quality", ylabel="predicted less actual")
    axes.legend(frameon=False)
    return figure


def plot_importances(models: Sequence[Model]) -> Figure:
    """Draw how much the error rises when a feature is shuffled: the mean, and one standard deviation."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    order = np.argsort(models[0].importances.mean(axis=1))
    height = 0.8 / len(models)
    for place, (model, colour) in enumerate(zip(models, COLOURS, strict=False)):
        rises = model.importances[order]
        axes.barh(
            np.arange(len(order)) - (place - (len(models) - 1) / 2) * height,
            rises.mean(axis=1),
            height,
            xerr=rises.std(axis=1),
            color=colour,
            label=model.name,
            error_kw={"linewidth": 0.8},
        )
    axes.set_yticks(np.arange(len(order)), [FEATURE_NAMES[place] for place in order])
    axes.set_xlabel("rise of the mean squared error")
    axes.legend(frameon=False)
    return figure


# --- the command --------------------------------------------------------------------------------------------


def open_model(name: str, directory: Path, dataset: Dataset) -> Model:
    """Return the model in a directory of artifacts, proved on its own samples; raises ArtifactError."""
    artifacts = load(directory)
    return Model(name, artifacts, load_predictor(artifacts), dataset)


def judge(candidate: Path, champion: Path | None, data: Path | None, output: Path) -> int:
    """Compare the artifacts in `candidate` with those of `champion`, write to `output`; return the exit code.

    Raises InputError, DataError and OSError where there is nothing to compare.
    """
    limits = Limits.read()
    dataset = prepare(data)
    output.mkdir(parents=True, exist_ok=True)
    for old in (*output.glob("*.svg"), output / "report.md"):
        old.unlink(missing_ok=True)
    models: list[Model] = []
    checks: list[Check] = []
    with directory_of(champion) if champion else nullcontext() as directory:
        try:
            models.append(open_model("candidate", candidate, dataset))
            load_fitted(models[0].artifacts)  # what serves where the compiled form cannot
            trained_on = models[0].artifacts.manifest.data
            if trained_on["sha256"] != dataset.sha256:
                raise InputError(
                    f"{candidate}: trained on {trained_on['file']}, which is not this {dataset.file}: "
                    "name that file (make gate DATA=FILE)"
                )
            if directory:
                models.append(open_model("champion", directory, dataset))
        except ArtifactError as error:
            name = "champion" if models else "candidate"
            checks.append(Check(f"artifacts of the {name}", "not read", f"{name}: {error}"))
            line = f"Gate: {name} cannot be read"
            (output / "report.md").write_text(f"# {line}\n\n- {error}\n", encoding="utf-8")
        else:
            checks += check_all(models[0], models[1] if directory else None, limits)
            write_report(output, models, checks)
            line = verdict(models, checks)
    write_junit(output / "junit.xml", "gate", checks)
    for check in checks:
        sys.stdout.write(f"{check.verdict:8} {check.name}: {check.skipped or check.found}\n")
    sys.stdout.write(f"{line}; see {output / 'report.md'}\n")
    problems = [check.problem for check in checks if check.problem]
    sys.stderr.write("".join(f"{problem}\n" for problem in problems))
    return 1 if problems else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m delivery.gate", description="Pass or refuse a model.")
    parser.add_argument("--champion", metavar="DIR|ARCHIVE|none", default="none", help="default: %(default)s")
    parser.add_argument("--artifacts", type=Path, metavar="DIR", default="artifacts", help="the candidate's")
    parser.add_argument("--data", type=Path, metavar="FILE", help="what the candidate was trained on")
    parser.add_argument("--output", type=Path, metavar="DIR", default="build/gate")
    arguments = parser.parse_args(argv)
    champion = None if arguments.champion == "none" else Path(arguments.champion)
    try:
        return judge(arguments.artifacts, champion, arguments.data, arguments.output)
    except (InputError, DataError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 2


if __name__ == "__main__":
    sys.exit(main())
