"""Build Prometheus' rules for the objectives and for drift from objectives.yml: `python -m monitoring.rules`.

The other rules are written by hand beside its output. Recorded series are named level:metric:operation.
"""

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

SOURCE: Final = Path(__file__).parent / "objectives.yml"
OUTPUT: Final = Path(__file__).parents[1] / "roles/prometheus/files/rules"
RUNBOOKS: Final = "docs/runbooks.md"
HEADER: Final = "---\n# Built by `make rules` from monitoring/objectives.yml. Do not edit.\n"

EVALUATION_SECONDS: Final = 30
"""Time between two evaluations of the objectives' rules; sums over a window become rates by it."""

SECONDS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400}

Duration = str
Group = dict[str, Any]
Rule = dict[str, Any]


class _Numbers(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Objective(_Numbers):
    """A promise: at least `ratio` of all requests keep it.

    `requests` and `errors` are PromQL: all of them, and those that broke it, per second over 5 minutes.
    """

    name: str = Field(pattern=r"^[a-z_]+$")
    promise: str
    ratio: float = Field(gt=0, lt=1)
    requests: str
    errors: str


_DURATION: Final = r"^[1-9][0-9]*[smhd]$"


class BurnRate(_Numbers):
    """When to tell that an error budget burns `factor` times too fast, and how urgently."""

    factor: float = Field(gt=0)
    long: Duration = Field(pattern=_DURATION)
    short: Duration = Field(pattern=_DURATION)
    for_: Duration = Field(pattern=_DURATION, alias="for")
    severity: str = Field(pattern="^(critical|warning)$")

    @model_validator(mode="after")
    def _short_is_shorter(self) -> Self:
        if seconds(self.short) >= seconds(self.long):
            raise ValueError(f"the short window {self.short} must be shorter than the long one {self.long}")
        return self


class DriftWindow(_Numbers):
    """How far drift looks back, how often, and for how long it must last before somebody is told."""

    window: Duration = Field(pattern=_DURATION)
    for_: Duration = Field(pattern=_DURATION, alias="for")
    interval: Duration = Field(pattern=_DURATION)


class Drift(_Numbers):
    """What counts as drift: PSI and shares are ratios, `minimum_predictions` is a count in the window."""

    minimum_predictions: int = Field(gt=0)
    floor: float = Field(gt=0, lt=0.01)
    windows: tuple[DriftWindow, ...] = Field(min_length=1)
    feature_psi: float = Field(gt=0)
    prediction_psi: float = Field(gt=0)
    out_of_range_ratio: float = Field(gt=0, lt=1)


class Source(_Numbers):
    """All numbers of objectives.yml."""

    objectives: tuple[Objective, ...] = Field(min_length=1)
    period: Duration = Field(pattern=_DURATION)
    burn_rates: tuple[BurnRate, ...] = Field(min_length=1)
    minimum_requests_per_second: float = Field(gt=0)
    drift: Drift

    @model_validator(mode="after")
    def _single_error_tells_nobody(self) -> Self:
        for objective in self.objectives:
            for rate in self.burn_rates:
                allowed = (
                    budget(objective) * rate.factor * self.minimum_requests_per_second * seconds(rate.long)
                )
                if allowed < 1:
                    raise ValueError(
                        f"a single error in {rate.long} could fire the alert on {objective.name}: "
                        "raise minimum_requests_per_second or the factor"
                    )
        return self


def seconds(duration: Duration) -> int:
    """Return a duration of PromQL, such as 30m, in seconds."""
    return int(duration[:-1]) * SECONDS[duration[-1]]


def budget(objective: Objective) -> float:
    """Return the share of requests that may break the promise, without the noise of the subtraction."""
    return round(1 - objective.ratio, 12)


def read(path: Path = SOURCE) -> Source:
    """Read and check objectives.yml; ValueError says in one line what is wrong with it."""
    try:
        return Source.model_validate(yaml.safe_load(path.read_text()))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"{path}: {place + ': ' if place else ''}{first['msg']}") from None


def limit(alert: str, severity: str = "warning") -> float:
    """Return the number that a rule written by hand compares with: 0.1 for MemoryShort."""
    for path in sorted(OUTPUT.glob("*.yml")):
        for group in yaml.safe_load(path.read_text())["groups"]:
            for rule in group["rules"]:
                if rule.get("alert") == alert and rule["labels"]["severity"] == severity:
                    found = re.search(r" [<>] ([0-9.]+)", rule["expr"])
                    if found:
                        return float(found[1])
    raise LookupError(f"no rule of {OUTPUT} with severity {severity} compares with a number for {alert}")


def objective_rules(source: Source) -> list[Group]:
    """Return the groups that record how the promises are kept and tell when their budgets burn too fast."""
    minimum = source.minimum_requests_per_second
    share = "{{ $value | humanizePercentage }}"
    longs = sorted({rate.long for rate in source.burn_rates}, key=seconds)
    windows = sorted({rate.short for rate in source.burn_rates} | {*longs, source.period}, key=seconds)
    recorded: list[Rule] = []
    for objective in source.objectives:
        labels = {"objective": objective.name}
        recorded += [
            _record("objective:requests:rate5m", objective.requests, labels),
            _record("objective:errors:rate5m", objective.errors, labels),
            _record("objective:error_budget:ratio", f"vector({budget(objective):g})", labels),
        ]
    recorded += [_record(f"objective:errors:ratio_rate{window}", _error_ratio(window)) for window in windows]
    recorded += [
        # Over the whole window, so that the first minutes of a new machine do not pass for a busy day.
        _record(
            f"objective:requests:rate{window}",
            f"sum_over_time(objective:requests:rate5m[{window}]) * {EVALUATION_SECONDS} / {seconds(window)}",
        )
        for window in longs
    ]
    recorded.append(
        _record(
            f"objective:error_budget_left:ratio{source.period}",
            f"1 - objective:errors:ratio_rate{source.period} / objective:error_budget:ratio",
        )
    )
    alerts = [
        _alert(
            "ErrorBudgetBurning",
            f"objective:errors:ratio_rate{rate.long} > {rate.factor:g} * objective:error_budget:ratio\n"
            f"and objective:errors:ratio_rate{rate.short} > {rate.factor:g} * objective:error_budget:ratio\n"
            f"and objective:requests:rate{rate.long} >= {minimum:g}",
            rate.for_,
            {"severity": rate.severity, "window": rate.long},
            summary="The API breaks one of its promises too often.",
            description=f"In the last {rate.long} {share} of the requests broke the promise of "
            f"{{{{ $labels.objective }}}}: this uses up the error budget of {source.period} within "
            f"{_in_words(seconds(source.period) / rate.factor)}.",
        )
        for rate in source.burn_rates
    ]
    return [
        {"name": "objectives-recording", "interval": f"{EVALUATION_SECONDS}s", "rules": recorded},
        {"name": "objectives-alerts", "rules": alerts},
    ]


def drift_rules(source: Source) -> list[Group]:
    """Return the groups that compare what is served with the baseline of the live model, and tell of drift.

    PSI is the sum over bins of (served - expected) * ln(served / expected). Counts are added over workers and
    machines first; only a baseline that some API exposes now is looked at, each on its own.
    """
    drift = source.drift
    groups: list[Group] = [
        {
            "name": "drift-baseline",
            "rules": [
                _record(
                    "feature_bin:expected_values:ratio",
                    "max by (feature, bin, baseline) (winemon_baseline_ratio)",
                )
            ],
        }
    ]
    for window in drift.windows:
        w = window.window
        served = f"clamp_min(feature_bin:served_values:ratio{w}, {drift.floor:g})"
        expected = f"clamp_min(feature_bin:expected_values:ratio, {drift.floor:g})"
        recorded = [
            _record(
                f"feature_bin:served_values:increase{w}",
                f"sum by (feature, bin, baseline) (increase(winemon_feature_bin_total[{w}]))\n"
                "and on (feature, bin, baseline) winemon_baseline_ratio",
            ),
            _record(
                f"feature:served_values:increase{w}",
                f"sum by (feature, baseline) (feature_bin:served_values:increase{w})",
            ),
            _record(
                f"feature_bin:served_values:ratio{w}",
                f"feature_bin:served_values:increase{w}\n"
                "/ on (feature, baseline) group_left ()\n"
                f"(feature:served_values:increase{w} >= {drift.minimum_predictions})",
            ),
            _record(
                f"feature:drift_psi:{w}",
                f"sum by (feature, baseline) (\n  ({served} - {expected})\n  * ln({served} / {expected})\n)",
            ),
            _record(
                f"feature:out_of_range:ratio{w}",
                f'sum by (feature, baseline) (feature_bin:served_values:ratio{w}{{bin=~"below|above"}})',
            ),
        ]
        groups.append({"name": f"drift-recording-{w}", "interval": window.interval, "rules": recorded})
    alerts = [alert for window in drift.windows for alert in _drift_alerts(drift, window)]
    return [*groups, {"name": "drift-alerts", "rules": alerts}]


def _drift_alerts(drift: Drift, window: DriftWindow) -> list[Rule]:
    w = window.window
    labels = {"severity": "warning", "window": w}
    psi, share, feature = (
        '{{ $value | printf "%.2f" }}',
        "{{ $value | humanizePercentage }}",
        "{{ $labels.feature }}",
    )
    return [
        _alert(
            "PredictionDrift",
            f'feature:drift_psi:{w}{{feature="quality"}} > {drift.prediction_psi:g}',
            window.for_,
            labels,
            summary="The model predicts other qualities than it did in training.",
            description=f"The predictions of the last {w} have a PSI of {psi} against those of training, "
            f"of which {drift.prediction_psi:g} is accepted.",
        ),
        _alert(
            "FeatureDrift",
            f'feature:drift_psi:{w}{{feature!="quality"}} > {drift.feature_psi:g}',
            window.for_,
            labels,
            summary="The wines that are asked about differ from those of training.",
            description=f"The values of {feature} of the last {w} have a PSI of {psi} against those of "
            f"training, of which {drift.feature_psi:g} is accepted.",
        ),
        _alert(
            "FeatureOutOfRange",
            f'feature:out_of_range:ratio{w}{{feature!="quality"}} > {drift.out_of_range_ratio:g}',
            window.for_,
            labels,
            summary="The model is asked about values that it has never seen the like of.",
            description=f"Of the values of {feature} of the last {w}, {share} lie outside the range of "
            f"training, of which {drift.out_of_range_ratio:.0%} is accepted.",
        ),
    ]


def _error_ratio(window: Duration) -> str:
    if window == "5m":
        return "objective:errors:rate5m / (objective:requests:rate5m > 0)"
    return (
        f"sum_over_time(objective:errors:rate5m[{window}])\n"
        f"/ (sum_over_time(objective:requests:rate5m[{window}]) > 0)"
    )


def _in_words(number: float) -> str:
    hours = number / 3600
    return f"{hours / 24:.0f} days" if hours >= 72 else f"{hours:.0f} hours"


def _record(name: str, expr: str, labels: Mapping[str, str] | None = None) -> Rule:
    return {"record": name, "expr": expr} | ({"labels": dict(labels)} if labels else {})


def _alert(
    name: str, expr: str, for_: Duration, labels: Mapping[str, str], *, summary: str, description: str
) -> Rule:
    return {
        "alert": name,
        "expr": expr,
        "for": for_,
        "labels": dict(labels),
        "annotations": {
            "summary": summary,
            "description": description,
            "runbook_url": f"{RUNBOOKS}#{name.lower()}",
        },
    }


class _Dumper(yaml.SafeDumper):
    """YAML as a person would write it: expressions of several lines as they are, lists indented."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:  # noqa: ARG002 - PyYAML's
        """Indent lists inside mappings."""
        super().increase_indent(flow, False)


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)


def render(groups: Sequence[Group]) -> str:
    """Return a rule file."""
    return HEADER + yaml.dump({"groups": list(groups)}, Dumper=_Dumper, sort_keys=False, width=120)


def build(source: Source) -> dict[str, str]:
    """Return the rule files by name."""
    return {"objectives.yml": render(objective_rules(source)), "drift.yml": render(drift_rules(source))}


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the rule files; return 2 after saying in one line why not."""
    parser = argparse.ArgumentParser(description="Build Prometheus' rules from objectives.yml.")
    parser.add_argument("--source", type=Path, default=SOURCE, help="the numbers, by default %(default)s")
    parser.add_argument(
        "--output", type=Path, default=OUTPUT, help="the directory to write to, by default %(default)s"
    )
    options = parser.parse_args(arguments)
    try:
        files = build(read(options.source))
        for name, text in files.items():
            (options.output / name).write_text(text)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)  # noqa: T201 - the command's own output
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
