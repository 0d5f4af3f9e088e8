from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from flatminima.lab.experiments.costs import cost, prices, remaining, seconds
from flatminima.lab.experiments.experiment import Setting, Task
from flatminima.lab.runs.measuring import Measuring
from flatminima.lab.runs.spec import (
    FisherPenaltySpec,
    GradientNormSpec,
    Regularizer,
    RegularizerSpec,
    RunSpec,
    SharpnessAwareSpec,
    UnitResidualSpec,
)
from support.records import record_of

SPEC = RunSpec(model="mlp", data="digits", train_size=100, batch_size=50, epochs=10, evaluate_every=20)
EVALUATION = (500 + 100) / 3
UPDATES = 1000


def task(spec: RunSpec, measuring: Measuring | None = None, root: Path = Path("nowhere")) -> Task:
    return Task(Setting("case", "arm", spec), measuring, root)


@pytest.mark.parametrize(
    ("regularizer", "factor"),
    [
        (None, 1),
        (SharpnessAwareSpec(), 2),
        (RegularizerSpec(), 3),
        (RegularizerSpec(main_gradient="sub-batches"), 2),
        (RegularizerSpec(every=4), 1.5),
        (RegularizerSpec(start_epoch=5), 2),
        (RegularizerSpec(start_epoch=50), 1),
        (RegularizerSpec(estimator="hvp"), 6),
        (GradientNormSpec(), 2),
        (FisherPenaltySpec(), 6),
        (UnitResidualSpec(), 3),
    ],
)
def test_updates_cost_what_their_gradients_do(regularizer: Regularizer | None, factor: float) -> None:
    found = cost(task(replace(SPEC, regularizer=regularizer)))
    assert found.training == pytest.approx(factor * UPDATES + EVALUATION)
    assert found.measuring == 0


def test_evaluations_and_held_out_images_are_counted() -> None:
    often = replace(SPEC, evaluate_every=1, validation=200)
    assert cost(task(often)).training == pytest.approx(UPDATES + (10 * 700 + 100) / 3)
    everything = replace(SPEC, train_size=None, validation=200, confusion=97)
    assert cost(task(everything)).training == pytest.approx(21 * 50 * 10 + (700 + 1097) / 3)


def test_a_run_that_stops_by_its_fit_looks_at_it_after_every_epoch() -> None:
    stopping = replace(SPEC, stop_at_loss=0.1)
    assert cost(task(stopping)).training == pytest.approx(UPDATES + EVALUATION + 10 * 100 / 3)


def test_measuring_is_counted_twice_and_robustness_once() -> None:
    how = Measuring(subset_size=10, trials=3, robustness_samples=4)
    assert cost(task(SPEC, how)).measuring == pytest.approx(2 * 3 * 10 * 2 + 3 * 4 * 10 / 3)


def test_price_is_that_of_finished_runs_or_else_timed() -> None:
    known, other = task(SPEC), task(replace(SPEC, batch_size=25))
    record = record_of("case", "arm", 0, 0.1, run=known.folder.path.name, seconds=5.0)
    price = prices([known, other], [record])
    assert price["mlp", 50] == pytest.approx(5 / cost(known).training)
    assert 0 < price["mlp", 25] < 0.1
    assert seconds(known, price) == pytest.approx(5)


def test_a_trained_run_costs_its_measures_alone() -> None:
    measured = task(SPEC, Measuring())
    assert remaining(measured, trained=True).total == cost(measured).measuring
    assert remaining(measured) == cost(measured)


def test_a_users_own_network_is_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nets_to_be_timed.py").write_text(
        "from torch import nn\n\ndef build(num_classes):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    own = task(replace(SPEC, model="nets_to_be_timed:build"))
    (price,) = prices([own], []).values()
    assert price > 0
