"""Verdicts on made-up records: what must be said, also where the claim fails."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from flatminima.errors import FlatminimaError
from flatminima.lab.experiments.analysis import summarize
from flatminima.lab.experiments.experiment import Experiment
from flatminima.lab.experiments.paper import PLAIN, REGULARIZED, SAM, scenario_3, search, table_1
from flatminima.lab.experiments.presets import PRESETS
from flatminima.lab.experiments.summary import Summary, TrialSummary, Unfinished
from support.records import record_of


def ranking(gamma: float, robustness: float, *, seeds: int = 5) -> Summary:
    """Four settings whose test error rises; two measures rise or fall with it."""
    experiment = scenario_3(PRESETS["paper"], {})
    records = []
    for k, case in enumerate(experiment.cases):
        for seed in range(seeds):
            error = 0.1 * k + 0.01 * seed
            records.append(
                record_of(case, PLAIN, seed, error, log_det_fisher=gamma * error, robustness=robustness * error)
            )
    return summarize(experiment, records)


def test_all_measures_are_judged_by_one_yardstick() -> None:
    both = ranking(1, 1).verdict
    assert both[0].startswith("γ̂ follows the test error through all settings, where the paper says it follows")
    assert any(line.startswith("Robustness follows the test error through all settings, where") for line in both)
    against = ranking(-1, 1).verdict
    assert against[0].startswith("γ̂ goes against the test error")
    assert any(line.startswith("Frobenius² shows no clear relation") and "undefined" in line for line in both)


def test_one_whole_seed_is_no_evidence_either_way() -> None:
    found = ranking(1, 1, seeds=1).verdict[0]
    assert found.startswith("γ̂ cannot be judged yet (no interval: resampling takes at least 3 seeds, not 1), where")


def test_settings_that_do_not_differ_are_called_so() -> None:
    experiment = scenario_3(PRESETS["paper"], {})
    records = [
        record_of(case, PLAIN, seed, 0.1 * (seed + 1) + 0.001 * k, log_det_fisher=k)
        for k, case in enumerate(experiment.cases)
        for seed in range(5)
    ]
    assert any("there is little to order" in line for line in summarize(experiment, records).verdict)


@pytest.mark.parametrize(("gain", "said"), [(-0.01, "holds here"), (0.01, "does not hold here")])
def test_comparisons_say_whether_the_claim_holds(gain: float, said: str) -> None:
    experiment: Experiment = table_1(PRESETS["paper"], {})
    records = [
        record_of(case, arm, seed, 0.1 + 0.001 * seed + (gain * (1 + 0.01 * seed) if arm == REGULARIZED else 0))
        for case in experiment.cases
        for arm in (PLAIN, REGULARIZED)
        for seed in range(5)
    ]
    summary = summarize(experiment, records, Unfinished(left=("one more",)))
    assert summary.verdict[0] == f"That the regularizer lowers the test error for every network {said}."
    assert summary.verdict[-1].startswith("1 runs are still to come")
    (pooled,) = summary.pooled
    assert pooled.pairs == 35
    assert pooled.p_sign == pytest.approx(2 / 2**35)


@pytest.mark.parametrize(
    ("gain", "said"),
    [(-0.01, "Whether {} cannot be said yet: 1 of 7 are compared."), (0.01, "That {} does not hold here.")],
)
def test_a_claim_about_every_case_waits_for_all_unless_one_settles_it(gain: float, said: str) -> None:
    experiment = table_1(PRESETS["paper"], {})
    records = [
        record_of(experiment.cases[0], arm, seed, 0.1 + 0.001 * seed + (gain if arm == REGULARIZED else 0))
        for arm in (PLAIN, REGULARIZED)
        for seed in range(3)
    ]
    verdict = summarize(experiment, records, Unfinished(left=("one more",))).verdict
    assert verdict[0] == said.format("the regularizer lowers the test error for every network")


def test_every_way_of_training_stands_against_the_regularizer_and_against_plain_training() -> None:
    experiment = table_1(PRESETS["paper"], {})
    case = experiment.cases[0]
    gains = {PLAIN: 0.0, REGULARIZED: -0.01, SAM: -0.04}
    records = [
        record_of(case, arm, seed, 0.1 + 0.001 * seed * (1 + gain) + gain)
        for arm, gain in gains.items()
        for seed in range(3)
    ]
    summary = summarize(experiment, records)
    means = {(d.case, d.arm, d.against): d.mean for d in (*summary.differences, *summary.pooled)}
    pairs = {(REGULARIZED, PLAIN): -0.01, (REGULARIZED, SAM): 0.03, (SAM, PLAIN): -0.04}
    assert set(means) == {(where, *pair) for where in (case, None) for pair in pairs}
    for (where, *pair), mean in means.items():
        assert mean == pytest.approx(pairs[pair[0], pair[1]], abs=1e-4), where
    assert any(line.startswith("SAM against plain: test error is lower in 1 of 1 cases") for line in summary.verdict)
    assert summary.verdict[1].startswith(f"{case}: the regularizer helps: test error -1.0 points")


def test_networks_that_have_not_fitted_are_counted() -> None:
    experiment = scenario_3(PRESETS["paper"], {})
    records = [record_of(case, PLAIN, 0, 0.1 * k, log_det_fisher=k) for k, case in enumerate(experiment.cases)]
    records[1] = replace(records[1], train_accuracy=0.5)
    assert any("1 of 4 networks classify less than 99%" in v for v in summarize(experiment, records).verdict)


def test_what_the_regularizer_has_kept_from_a_minimum_is_counted() -> None:
    experiment, off = table_1(PRESETS["paper"], {}), [(REGULARIZED, 1), (REGULARIZED, 0), (PLAIN, 0)]  # both at 0
    records = [
        record_of(experiment.cases[0], arm, seed, 0.1, warnings=("the loss is too high",) if (arm, seed) in off else ())
        for arm in (PLAIN, REGULARIZED)
        for seed in range(3)
    ]
    verdict = summarize(experiment, records).verdict
    assert any(line.startswith("1 of 3 runs of +reg end at a training loss too high") for line in verdict)


def test_a_rival_that_orders_as_well_is_named() -> None:
    equal, worse = (ranking(1, robustness).verdict for robustness in (1, -1))
    assert "γ̂ is not alone here: at least as well are the minima ordered by robustness." in equal
    assert "No rival orders the minima better here." in worse


def searched(*, missing: int = 0, failed: int = 0, ruled_out: bool = True) -> Summary:
    """A grid of 12 whose errors fall, so that the last setting is the best; some of the last have no record."""
    experiment = search(PRESETS["small"], {})
    (case,) = experiment.cases
    records = [
        replace(record_of(case, arm, 0, 0.5), validation_error=0.5 - 0.01 * k) for k, arm in enumerate(experiment.arms)
    ]
    left, lost = experiment.arms[12 - missing :], experiment.arms[12 - missing - failed : 12 - missing]
    unfinished = Unfinished(
        failures=dict.fromkeys(lost, "no such luck"),
        left=tuple(left),
        ruled_out=tuple(f"{case} / {arm}" for arm in lost) if ruled_out else (),
    )
    return summarize(experiment, [record for record in records if record.arm not in (*left, *lost)], unfinished)


def test_what_failed_for_good_is_the_worst_of_a_search() -> None:
    whole, some = searched(), searched(failed=2)
    (case,), arms = whole.cases, whole.arms
    assert whole.chosen == {case: arms[-1]}
    assert some.chosen == {case: arms[-3]}
    assert some.verdict[0].endswith(f"Not trained to the end, and so counted as the worst: {arms[-2]}; {arms[-1]}.")
    every = searched(failed=12)
    assert (every.chosen, every.verdict) == ({}, (f"{case}: every run failed.",))


@pytest.mark.parametrize("lacking", [{"missing": 1}, {"missing": 1, "failed": 1}, {"failed": 1, "ruled_out": False}])
def test_a_search_waits_for_runs_that_may_still_come(lacking: dict[str, Any]) -> None:
    summary = searched(**lacking)
    assert summary.chosen == {}
    assert summary.verdict[0].endswith(": the search is not finished.")


@pytest.mark.parametrize(("ruled_out", "wins"), [(True, True), (False, False)])
def test_a_failed_trial_loses_only_if_it_would_fail_again(ruled_out: bool, wins: bool) -> None:
    experiment = search(PRESETS["small"], {})
    (case,), (first, second, third, *_) = experiment.cases, experiment.arms
    trials = [
        TrialSummary(case, 0, first, "finished", None, 0.1),
        TrialSummary(case, 1, second, "failed", None, None),
        TrialSummary(case, 2, third, "pruned", 3, 0.9),
    ]
    record = replace(record_of(case, first, 0, 0.5), validation_error=0.1)
    unfinished = Unfinished(ruled_out=(f"{case} / {second}",) if ruled_out else ())
    summary = summarize(experiment, [record], unfinished, trials)
    assert summary.chosen == ({case: first} if wins else {})
    assert summary.verdict[0].endswith("is not finished.") != wins


def test_an_arm_of_a_choice_waits_for_all_its_seeds() -> None:
    experiment = replace(search(PRESETS["small"], {}), seeds=(0, 1))
    (case,) = experiment.cases
    records = [
        replace(record_of(case, arm, seed, 0.5), validation_error=0.1)
        for arm in experiment.arms
        for seed in experiment.seeds
    ]
    assert summarize(experiment, records).chosen == {case: experiment.arms[0]}
    assert summarize(experiment, records[:-1]).chosen == {}


def test_a_contrast_of_other_arms_is_refused() -> None:
    with pytest.raises(FlatminimaError, match="names other arms than"):
        replace(table_1(PRESETS["paper"], {}), contrast=("+reg", "none"))
