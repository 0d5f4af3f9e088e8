"""What an experiment shows, computed from its records: means, correlations, differences, the verdict in a sentence."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from flatminima.lab.experiments.experiment import INDICATORS, Experiment, Record, select, value_of
from flatminima.lab.experiments.statistics import (
    Difference,
    RankCorrelation,
    Spread,
    paired_difference,
    rank_correlation,
)
from flatminima.measures import jsonable

RIVALS = ("log_det_fisher", "spectral_radius", "frobenius_norm", "robustness")
"""The measures of the paper's figures."""

SHORT_NAMES = {
    **INDICATORS,
    "log_det_fisher": "γ̂",
    "frobenius_norm": "Frobenius²",
    "fisher_frobenius_norm": "Frobenius² (Fisher)",
    "fisher_trace": "trace",
    "log_det_fisher_normalized": "γ̂, normalized",
    "train_loss": "training loss",
    "test_error": "test error",
    "validation_error": "validation error",
}
"""Column headings."""

_ROUNDING = 1e-9

FITTED_ACCURACY = 0.99
"""Below this training accuracy a network has not fitted its data."""


def spread(records: Sequence[Record], quantity: str) -> Spread | None:
    """Mean and deviation of a quantity over records; None where any lacks it, or there is none."""
    values = [value_of(record, quantity) for record in records]
    return None if not values or any(math.isnan(value) for value in values) else Spread.of(values)


def correlation(records: Sequence[Record], indicator: str) -> RankCorrelation:
    """How an indicator orders minima by test error, over records and over cases."""
    return rank_correlation(
        [value_of(record, indicator) for record in records],
        [record["test_error"] for record in records],
        [record["case"] for record in records],
    )


def difference(records: Sequence[Record], case: str, arm: str, against: str, quantity: str) -> Difference | None:
    """One arm minus another in one case, paired by seed."""
    return _paired(select(records, case=case), arm, against, quantity)


def _paired(records: Sequence[Record], arm: str, against: str, quantity: str) -> Difference | None:
    """Paired by case and seed; minima without the quantity (a singular ξ has no γ̂) left out."""
    first, second = (
        {
            (record["case"], record["seed"]): value
            for record in select(records, name)
            if not math.isnan(value := value_of(record, quantity))
        }
        for name in (arm, against)
    )
    return paired_difference(first, second)


def plain(value: Any) -> dict[str, Any]:
    """A dataclass of numbers as JSON can hold it; NaN and infinities as None."""
    values: dict[str, Any] = jsonable(dataclasses.asdict(value))
    return values


def summarize(
    experiment: Experiment,
    records: Sequence[Record],
    failures: Mapping[str, str],
    left: Sequence[str],
    trials: Sequence[Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """What the records show so far, JSON-able; NaN as None.

    Args:
        experiment: what was asked.
        records: the finished minima.
        failures: why runs failed, by their names.
        left: names of the runs still to come.
        trials: how far every trial is, if a choice is searched for by trials instead of over all settings.
    """
    ours = experiment.arms[1] if len(experiment.arms) > 1 else experiment.arms[0]
    summary: dict[str, Any] = {
        **{name: getattr(experiment, name) for name in ("name", "title", "question", "answers", "factor", "quantity")},
        "cases": experiment.cases,
        "arms": experiment.arms,
        "seeds": list(experiment.seeds),
        "specs": {f"{s.case} / {s.arm}": s.spec.identity() for s in experiment.settings},
        "measuring": None if experiment.measuring is None else dataclasses.asdict(experiment.measuring),
        "published": [
            {"case": case, "arm": arm, "mean": mean, "std": std}
            for (case, arm), (mean, std) in experiment.published.items()
            if case in experiment.cases
        ],
        "captured": dict(experiment.captured),
        "records": list(records),
        "failures": dict(failures),
        "left": list(left),
        "means": [_means(records, case, arm) for case in experiment.cases for arm in experiment.arms],
    }
    if experiment.answers == "ranking":
        summary["correlations"] = {
            name: plain(correlation(records, name)) for name in INDICATORS if len({r["case"] for r in records}) > 1
        }
    if experiment.answers == "comparison":
        summary["differences"] = [
            {"case": case, "arm": ours, "against": other, **plain(found)}
            for case in experiment.cases
            for other in experiment.arms
            if other != ours and (found := difference(records, case, ours, other, experiment.quantity)) is not None
        ]
        summary["pooled"] = [
            {"arm": ours, "against": other, **plain(found)}
            for other in experiment.arms
            if other != ours and (found := _paired(records, ours, other, experiment.quantity)) is not None
        ]
    if experiment.answers == "choice":
        if trials is not None:
            summary["trials"] = [dict(trial) for trial in trials]
        contenders = {case: _contenders(experiment, case, trials) for case in experiment.cases}
        summary["chosen"] = {
            case: best
            for case, arms in contenders.items()
            if (best := _best(arms, select(records, case=case), experiment.quantity))
        }
    summary["verdict"] = verdict(summary)
    return summary


def verdict(summary: dict[str, Any]) -> list[str]:
    """What the numbers say about the paper's claim, in sentences made from them."""
    if not summary["records"]:
        return ["No run is finished yet."]
    found = {"ranking": _ranking_verdict, "comparison": _comparison_verdict, "choice": _choice_verdict}[
        summary["answers"]
    ](summary)
    if summary["left"]:
        found.append(f"{len(summary['left'])} runs are still to come: what stands here may change.")
    return found


def _ranking_verdict(summary: dict[str, Any]) -> list[str]:
    correlations, records = summary["correlations"], summary["records"]
    gamma = correlations.get("log_det_fisher")
    if gamma is None or gamma["tau"] is None:
        return ["There are not yet two settings to order."]
    cases = len({record["case"] for record in records})
    found = [
        f"γ̂ {_reading(gamma)}, where the paper says it follows: it orders the means of {cases} settings with Kendall's "
        f"τ = {_number(gamma['tau_of_settings'])}, and {len(records)} single minima with {_tau(gamma)}."
    ]
    for name in RIVALS[1:]:
        said = "follows" if summary["captured"][name] else "fails"
        rival = correlations[name]
        found.append(
            f"{SHORT_NAMES[name].capitalize()} {_reading(rival)}, where the paper says it {said}: over settings "
            f"τ = {_number(rival['tau_of_settings'])}, over minima {_tau(rival)}."
        )
    loss = correlations["train_loss"]
    if loss["tau"] is not None and loss["tau"] >= gamma["tau"]:
        found.append(
            f"But the training loss alone orders the minima no worse ({_tau(loss)}): their losses are not similar "
            "enough to credit the measures."
        )
    errors = [entry["quantities"]["test_error"] for entry in summary["means"] if entry["quantities"]["test_error"]]
    deviations = [error["std"] for error in errors if error["std"] is not None]
    means = [error["mean"] for error in errors]
    if deviations and max(means) - min(means) < 2 * max(deviations):
        found.append(
            f"The settings hardly differ in test error ({100 * min(means):.1f} to {100 * max(means):.1f} %, with "
            f"standard deviations up to {100 * max(deviations):.1f}): there is little to order."
        )
    return found + _unfitted(records)


def _comparison_verdict(summary: dict[str, Any]) -> list[str]:
    scale, unit = _scale(summary["quantity"])
    what, found = SHORT_NAMES[summary["quantity"]], []
    for pooled in summary["pooled"]:
        single = [d for d in summary["differences"] if d["against"] == pooled["against"]]
        lower = sum(d["mean"] < 0 for d in single)
        clearly = sum(d["high"] is not None and d["high"] < 0 for d in single)
        found.append(
            f"{pooled['arm']} against {pooled['against']}: {what} is lower in {lower} of {len(single)} cases "
            f"(clearly in {clearly}) and in {pooled['below']} of {pooled['pairs']} pairs (sign test "
            f"p = {_p(pooled['p_sign'])}); on average it is {abs(scale * pooled['mean']):.2g} {unit} "
            f"{'lower' if pooled['mean'] < 0 else 'higher'}."
        )
    if summary["pooled"]:
        single = [d for d in summary["differences"] if d["against"] == summary["arms"][0]]
        clearly = sum(d["high"] is not None and d["high"] < 0 for d in single)
        lower = sum(d["mean"] < 0 for d in single)
        holds = "holds" if clearly == len(single) else "holds in tendency" if lower == len(single) else "does not hold"
        found.insert(0, f"That the regularizer lowers the {what} for every network {holds} here.")
    return (found or ["There is no pair to compare yet."]) + _unfitted(summary["records"])


def _choice_verdict(summary: dict[str, Any]) -> list[str]:
    found = []
    for case in summary["cases"]:
        arm = summary["chosen"].get(case)
        errors = [record["validation_error"] for record in select(summary["records"], case=case)]
        trials = [trial for trial in summary.get("trials", ()) if trial["case"] == case]
        if arm is None:
            open_ = not trials or any(trial["state"] == "left" for trial in trials)
            found.append(f"{case}: " + ("the search is not finished." if open_ else "no trial has finished."))
            continue
        found.append(
            f"{case}: {arm} wins with {100 * min(errors):.2f} % of the held-out images wrong, the worst of "
            f"{len(errors)} has {100 * max(errors):.2f} %. Each is one run, so the best is partly luck."
            + (f" {_trials_in_a_sentence(trials)}" if trials else "")
        )
    return found


def _trials_in_a_sentence(trials: Sequence[Mapping[str, Any]]) -> str:
    finished, pruned, failed = (
        sum(trial["state"] == state for trial in trials) for state in ("finished", "pruned", "failed")
    )
    text = f"Of Optuna's {len(trials)} trials, {finished} went to the end and {pruned} {_was(pruned)} pruned"
    return text + (f"; {failed} failed." if failed else ".")


def _was(number: int) -> str:
    return "was" if number == 1 else "were"


def _unfitted(records: Sequence[Record]) -> list[str]:
    off = [record for record in records if record["train_accuracy"] < FITTED_ACCURACY]
    if not off:
        return []
    return [
        f"{len(off)} of {len(records)} networks classify less than {FITTED_ACCURACY:.0%} of their training images "
        f"rightly (the least {min(record['train_accuracy'] for record in off):.1%}): measures are defined at minima, "
        "which these are not."
    ]


def _means(records: Sequence[Record], case: str, arm: str) -> dict[str, Any]:
    chosen = select(records, arm, case)
    quantities = ["test_error", "validation_error", "train_accuracy", *INDICATORS]
    found = {quantity: spread(chosen, quantity) for quantity in quantities}
    return {
        "case": case,
        "arm": arm,
        "runs": len(chosen),
        "quantities": {name: None if value is None else plain(value) for name, value in found.items()},
    }


def _contenders(experiment: Experiment, case: str, trials: Sequence[Mapping[str, Any]] | None) -> list[str | None]:
    """The arms that a case's best is chosen from; None for trials that are not begun."""
    if trials is None:
        return [setting.arm for setting in experiment.settings if setting.case == case]
    return [trial["arm"] for trial in trials if trial["case"] == case and trial["state"] in ("finished", "left")]


def _best(arms: Sequence[str | None], records: Sequence[Record], quantity: str) -> str | None:
    """The arm with the least quantity, once all arms are there; of equals the first."""
    means = {arm: None if arm is None else spread(select(records, arm), quantity) for arm in arms}
    known = {arm: value.mean for arm, value in means.items() if value is not None}
    return min(known, key=known.__getitem__) if known and len(known) == len(means) else None


def _reading(correlation: dict[str, Any]) -> str:
    """One yardstick for all indicators."""
    if correlation["low"] is None or correlation["low"] <= 0 <= correlation["high"]:
        return "shows no clear relation to the test error"
    if correlation["high"] < 0:
        return "goes against the test error"
    whole = correlation["tau_of_settings"] > 1 - _ROUNDING
    return "follows the test error through all settings" if whole else "follows the test error in part"


def _tau(correlation: dict[str, Any]) -> str:
    if correlation["tau"] is None:
        return "τ is undefined"
    interval = f"95 % interval {_number(correlation['low'])} to {_number(correlation['high'])}"
    return f"τ = {_number(correlation['tau'])} ({interval})"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _p(value: float | None) -> str:
    return "–" if value is None else f"{value:.2g}"


def _scale(quantity: str) -> tuple[float, str]:
    return (100.0, "points") if quantity.endswith("error") else (1.0, "nats")
