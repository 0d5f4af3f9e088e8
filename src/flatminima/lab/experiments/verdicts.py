"""What a summary's numbers say about the paper's claims, in sentences made from them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from flatminima.lab.experiments.experiment import INDICATORS, Record, select
from flatminima.lab.experiments.statistics import RankCorrelation, number
from flatminima.lab.experiments.summary import RIVALS, SHORT_NAMES, Contrast, Summary, TrialSummary
from flatminima.measures import CATALOGUE

_ROUNDING = 1e-9

FITTED_ACCURACY = 0.99
"""Below this training accuracy a network has not fitted its data."""


def verdict(summary: Summary) -> list[str]:
    """The sentences; what is not finished is said too."""
    if not summary.records and not (summary.answers == "choice" and summary.ruled_out):
        return ["No run is finished yet."]
    sentences = {"ranking": _ranking, "comparison": _comparison, "choice": _choice}[summary.answers](summary)
    if summary.left:
        sentences.append(f"{len(summary.left)} runs are still to come: what stands here may change.")
    return sentences


def _ranking(summary: Summary) -> list[str]:
    correlations, records = summary.correlations, summary.records
    gamma = correlations.get("log_det_fisher")
    if gamma is None or not gamma.defined:
        return ["There are not yet two settings to order."]
    cases = len({record.case for record in records})
    sentences = [
        f"γ̂ {_reading(summary, 'log_det_fisher')}{_papers(summary, 'log_det_fisher')}: "
        f"it orders the means of {cases} settings with Kendall's τ = "
        f"{number(gamma.tau_of_settings, '.2f')}, and {len(records)} single minima with {_tau(gamma)}."
    ]
    for name in [name for name in RIVALS[1:] if name in correlations]:
        rival = correlations[name]
        sentences.append(
            f"{SHORT_NAMES[name].capitalize()} {_reading(summary, name)}{_papers(summary, name)}: over settings "
            f"τ = {number(rival.tau_of_settings, '.2f')}, over minima {_tau(rival)}."
        )
    as_good = [
        INDICATORS.get(name, name)
        for name, rival in correlations.items()
        if name not in ("log_det_fisher", "train_loss") and _as_theory_has_it(name, rival.tau) >= gamma.tau
    ]
    if as_good:
        sentences.append(f"γ̂ is not alone here: at least as well are the minima ordered by {', '.join(as_good)}.")
    else:
        sentences.append("No rival orders the minima better here.")
    loss = correlations["train_loss"]
    if loss.tau >= gamma.tau:
        sentences.append(
            f"But the training loss alone orders the minima no worse ({_tau(loss)}): their losses are not similar "
            "enough to credit the measures."
        )
    errors = [means.quantities["test_error"] for means in summary.means]
    known = [error for error in errors if error is not None]
    deviations = [error.std for error in known if error.count > 1]
    least, most = min(error.mean for error in known), max(error.mean for error in known)
    if deviations and most - least < 2 * max(deviations):
        sentences.append(
            f"The settings hardly differ in test error ({100 * least:.1f} to {100 * most:.1f} %, with "
            f"standard deviations up to {100 * max(deviations):.1f}): there is little to order."
        )
    beyond = [] if summary.evaluation is None else summary.evaluation.conclusions(SHORT_NAMES)
    return sentences + beyond + _unfitted(records)


def _as_theory_has_it(name: str, tau: float) -> float:
    """Kendall's τ with the sign that says whether a measure points where its theory says."""
    known = CATALOGUE.get(name)
    return -tau if known is not None and known.larger_is_better else tau


def _comparison(summary: Summary) -> list[str]:
    scale, unit = _scale(summary.quantity)
    what, sentences = SHORT_NAMES[summary.quantity], []
    for pooled in summary.pooled:
        pair = (pooled.arm, pooled.against)
        single = [difference for difference in summary.differences if (difference.arm, difference.against) == pair]
        lower = sum(difference.mean < 0 for difference in single)
        clearly = sum(difference.high < 0 for difference in single)
        sentences.append(
            f"{pooled.arm} against {pooled.against}: {what} is lower in {lower} of {len(single)} cases "
            f"(clearly in {clearly}) and in {pooled.below} of {pooled.pairs} pairs (sign test "
            f"p = {number(pooled.p_sign, '.2g')}); on average it is {abs(scale * pooled.mean):.2g} {unit} "
            f"{'lower' if pooled.mean < 0 else 'higher'}."
        )
    if not sentences:
        return ["There is no pair to compare yet.", *_unfitted(summary.records)]
    claimed = [d for d in summary.differences if (d.arm, d.against) == summary.contrast]
    if claimed:
        sentences = [_claim(summary, claimed), *(_effect(summary, difference) for difference in claimed), *sentences]
    return sentences + _not_minima(summary) + _unfitted(summary.records)


def _claim(summary: Summary, claimed: Sequence[Contrast]) -> str:
    """Whether the regularizer lowers the quantity in every case; one in which it does not settles that."""
    clearly, lower = sum(d.high < 0 for d in claimed), sum(d.mean < 0 for d in claimed)
    every = f"number of {summary.factor}" if _counts(summary.cases) else "network"
    claim = f"the regularizer lowers the {SHORT_NAMES[summary.quantity]} for every {every}"
    if lower < len(claimed):
        return f"That {claim} does not hold here."
    if len(claimed) < len(summary.cases):
        return f"Whether {claim} cannot be said yet: {len(claimed)} of {len(summary.cases)} are compared."
    return f"That {claim} {'holds' if clearly == len(claimed) else 'holds in tendency'} here."


def _effect(summary: Summary, difference: Contrast) -> str:
    """What the regularizer does in one case."""
    scale, unit = _scale(summary.quantity)
    mean, low, high = (number(scale * value, "+.1f") for value in (difference.mean, difference.low, difference.high))
    does = "helps" if difference.high < 0 else "harms" if difference.low > 0 else "makes no clear difference"
    where = f"With {difference.case} {summary.factor}" if _counts(summary.cases) else f"{difference.case}:"
    return (
        f"{where} the regularizer {does}: {SHORT_NAMES[summary.quantity]} {mean} {unit} ({low} to {high}) against "
        f"{difference.against}."
    )


def _counts(cases: Sequence[str]) -> bool:
    """Whether the cases are numbers of something."""
    return all(case.replace(",", "").isdigit() for case in cases)


def _choice(summary: Summary) -> list[str]:
    sentences = []
    for case in summary.cases:
        arm = summary.chosen.get(case)
        errors = [record.value("validation_error") for record in select(summary.records, case=case)]
        trials = [trial for trial in summary.trials or () if trial.case == case]
        out = [arm for arm in summary.arms if f"{case} / {arm}" in summary.ruled_out]
        if arm is None:
            sentences.append(f"{case}: {_undecided(summary, case, trials, out)}")
            continue
        sentences.append(
            f"{case}: {arm} wins with {100 * min(errors):.2f} % of the held-out images wrong, the worst of "
            f"{len(errors)} has {100 * max(errors):.2f} %. Each is one run, so the best is partly luck."
            + (f" Not trained to the end, and so counted as the worst: {'; '.join(out)}." if out else "")
            + (f" {_of_trials(trials)}" if trials else "")
        )
    return sentences


def _undecided(summary: Summary, case: str, trials: Sequence[TrialSummary], out: Sequence[str]) -> str:
    """Why a case has no winner."""
    if trials:
        over = all(trial.state == "pruned" or trial.arm in out for trial in trials)
        return "no trial has finished." if over else "the search is not finished."
    over = all(arm in out for arm in summary.arms if f"{case} / {arm}" in summary.specs)
    return "every run failed." if over else "the search is not finished."


def _of_trials(trials: Sequence[TrialSummary]) -> str:
    finished, pruned, failed = (
        sum(trial.state == state for trial in trials) for state in ("finished", "pruned", "failed")
    )
    were = "was" if pruned == 1 else "were"
    text = f"Of Optuna's {len(trials)} trials, {finished} went to the end and {pruned} {were} pruned"
    return text + (f"; {failed} failed." if failed else ".")


def _not_minima(summary: Summary) -> list[str]:
    """Where the arm of the claim has not been trained to a minimum, and the other arm has."""
    ours, baseline = (select(summary.records, arm) for arm in (summary.contrast or summary.arms)[:2])
    minima = {(record.case, record.seed) for record in baseline if not record.warnings}
    off = [record for record in ours if record.warnings and (record.case, record.seed) in minima]
    if not off:
        return []
    return [
        f"{len(off)} of {len(ours)} runs of {ours[0].arm} end at a training loss too high to be called a minimum, "
        f"where those of {baseline[0].arm} do not: there the regularizer keeps the network from fitting its training "
        "images, and only γ̂ at normalized logits compares."
    ]


def _unfitted(records: Sequence[Record]) -> list[str]:
    off = [record for record in records if record.train_accuracy < FITTED_ACCURACY]
    if not off:
        return []
    return [
        f"{len(off)} of {len(records)} networks classify less than {FITTED_ACCURACY:.0%} of their training images "
        f"rightly (the least {min(record.train_accuracy for record in off):.1%}): measures are defined at minima, "
        "which these are not."
    ]


def _papers(summary: Summary, indicator: str) -> str:
    """What the paper says of an indicator, where it says something."""
    if indicator not in summary.captured:
        return ""
    return f", where the paper says it {'follows' if summary.captured[indicator] else 'fails'}"


def _reading(summary: Summary, indicator: str) -> str:
    """One yardstick for all indicators."""
    correlation = summary.correlations[indicator]
    if correlation.defined and math.isnan(correlation.low):
        reason = None if summary.evaluation is None else summary.evaluation.all[indicator].kendall.reason
        return f"cannot be judged yet ({reason or 'no interval'})"
    if correlation.high < 0:
        return "goes against the test error"
    if not correlation.low > 0:
        return "shows no clear relation to the test error"
    whole = correlation.tau_of_settings > 1 - _ROUNDING
    return "follows the test error through all settings" if whole else "follows the test error in part"


def _tau(correlation: RankCorrelation) -> str:
    if not correlation.defined:
        return "τ is undefined"
    if math.isnan(correlation.low):
        return f"τ = {number(correlation.tau, '.2f')}"
    interval = f"95 % interval {number(correlation.low, '.2f')} to {number(correlation.high, '.2f')}"
    return f"τ = {number(correlation.tau, '.2f')} ({interval})"


def _scale(quantity: str) -> tuple[float, str]:
    return (100.0, "points") if quantity.endswith("error") else (1.0, "nats")
