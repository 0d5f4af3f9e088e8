"""From records to a summary: means, rank correlations, paired differences, the best arm."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from flatminima.lab.experiments import costs
from flatminima.lab.experiments.experiment import INDICATORS, OF_RECORD, Experiment, Record, select
from flatminima.lab.experiments.ledger import evaluation_of
from flatminima.lab.experiments.statistics import Difference, Spread, paired_difference, rank_correlation
from flatminima.lab.experiments.summary import Contrast, Published, SettingMeans, Summary, TrialSummary, Unfinished
from flatminima.lab.experiments.verdicts import verdict


def summarize(
    experiment: Experiment,
    records: Sequence[Record],
    unfinished: Unfinished | None = None,
    trials: Sequence[TrialSummary] | None = None,
    *,
    judged: bool = True,
) -> Summary:
    """What the records show so far.

    Args:
        experiment: what is asked.
        records: the finished minima.
        unfinished: the other runs (None: there are no others).
        trials: how far every trial is, if a choice is searched for by trials instead of over all settings.
        judged: with what the protocols say of measures, and the verdict, which take a second or two.
    """
    unfinished = unfinished or Unfinished()
    ranks = experiment.answers == "ranking" and len({record.case for record in records}) > 1
    compares = experiment.answers == "comparison"
    source = experiment.settings[0].spec.source
    evaluation = evaluation_of(records, costs.sizes_of(source).test) if ranks and judged else None
    found = {} if evaluation is None else evaluation.all
    summary = Summary(
        name=experiment.name,
        title=experiment.title,
        question=experiment.question,
        answers=experiment.answers,
        factor=experiment.factor,
        quantity=experiment.quantity,
        cases=tuple(experiment.cases),
        arms=tuple(experiment.arms),
        seeds=experiment.seeds,
        specs={s.name: s.spec.identity() for s in experiment.settings},
        measuring=experiment.measuring,
        published=tuple(
            Published(case, arm, mean, std)
            for (case, arm), (mean, std) in experiment.published.items()
            if case in experiment.cases
        ),
        captured=experiment.captured,
        records=tuple(records),
        failures=unfinished.failures,
        left=unfinished.left,
        means=tuple(_means(records, case, arm) for case in experiment.cases for arm in experiment.arms),
        seconds_left=unfinished.seconds_left,
        workers=unfinished.workers,
        verdict=(),
        unfinished=unfinished.labels,
        contrast=experiment.contrast,
        drawn=experiment.drawn,
        correlations={name: rank_correlation(evidence) for name, evidence in found.items()},
        evaluation=evaluation,
        differences=_contrasts(experiment, records, experiment.quantity) if compares else (),
        pooled=_contrasts(experiment, records, experiment.quantity, pooled=True) if compares else (),
        beside={
            name: _contrasts(experiment, records, name)
            for name in experiment.drawn
            if compares and name != experiment.quantity
        },
        trials=None if trials is None else tuple(trials),
        chosen=_chosen(experiment, records, trials, unfinished.ruled_out) if experiment.answers == "choice" else {},
        ruled_out=unfinished.ruled_out,
    )
    return dataclasses.replace(summary, verdict=tuple(verdict(summary))) if judged else summary


def spread(records: Sequence[Record], quantity: str) -> Spread | None:
    """Mean and deviation of a quantity over records; None where any lacks it, or there is none."""
    values = [record.value(quantity) for record in records]
    return None if not values or any(math.isnan(value) for value in values) else Spread.of(values)


def _contrasts(
    experiment: Experiment, records: Sequence[Record], quantity: str, *, pooled: bool = False
) -> tuple[Contrast, ...]:
    """By case or over all of them, the contrast's first arm minus every other, then all others minus its second."""
    ours, baseline = experiment.contrast or experiment.arms[:2]
    others = [arm for arm in experiment.arms if arm not in (ours, baseline)]
    pairs = [(ours, baseline), *((ours, other) for other in others), *((other, baseline) for other in others)]
    return tuple(
        Contrast(**vars(found), arm=arm, against=against, case=case)
        for case in ([None] if pooled else experiment.cases)
        for arm, against in pairs
        if (found := _paired(select(records, case=case), arm, against, quantity)) is not None
    )


def _paired(records: Sequence[Record], arm: str, against: str, quantity: str) -> Difference | None:
    """Paired by case and seed; minima without the quantity (a singular ξ has no γ̂) left out."""
    first, second = (
        {
            (record.case, record.seed): value
            for record in select(records, name)
            if not math.isnan(value := record.value(quantity))
        }
        for name in (arm, against)
    )
    return paired_difference(first, second)


def _means(records: Sequence[Record], case: str, arm: str) -> SettingMeans:
    of_setting = select(records, arm, case)
    quantities = dict.fromkeys([*OF_RECORD, *INDICATORS, *(name for record in records for name in record.indicators)])
    return SettingMeans(case, arm, len(of_setting), {name: spread(of_setting, name) for name in quantities})


def _chosen(
    experiment: Experiment,
    records: Sequence[Record],
    trials: Sequence[TrialSummary] | None,
    ruled_out: Sequence[str],
) -> dict[str, str]:
    best = {
        case: _best(
            [arm for arm in _contenders(experiment, case, trials) if f"{case} / {arm}" not in ruled_out],
            select(records, case=case),
            experiment,
        )
        for case in experiment.cases
    }
    return {case: arm for case, arm in best.items() if arm is not None}


def _contenders(experiment: Experiment, case: str, trials: Sequence[TrialSummary] | None) -> list[str | None]:
    """The arms that a case's best is chosen from; None for trials that are not begun."""
    if trials is None:
        return [setting.arm for setting in experiment.settings if setting.case == case]
    return [trial.arm for trial in trials if trial.case == case and trial.state != "pruned"]


def _best(arms: Sequence[str | None], records: Sequence[Record], experiment: Experiment) -> str | None:
    """The arm with the least quantity, once all runs of all arms are there; of equals the first."""
    of_arms = {arm: [] if arm is None else select(records, arm) for arm in arms}
    if any(len(found) < len(experiment.seeds) for found in of_arms.values()):
        return None
    means = {arm: spread(found, experiment.quantity) for arm, found in of_arms.items()}
    known = {arm: value.mean for arm, value in means.items() if value is not None}
    return min(known, key=known.__getitem__, default=None)
