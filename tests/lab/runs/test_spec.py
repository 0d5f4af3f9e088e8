from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flatminima.errors import FlatminimaError
from flatminima.lab.runs.schedules import Approach, Landing, MultiStep, OneCycle, Plateau
from flatminima.lab.runs.spec import (
    RECIPES,
    FisherPenaltySpec,
    GradientNormSpec,
    RegularizerSpec,
    RunSpec,
    SharpnessAwareSpec,
    UnitResidualSpec,
)

CIFAR_SIZE = 50_000


def learning_rates(spec: RunSpec, num_samples: int = CIFAR_SIZE) -> dict[int, float]:
    """Every iteration at which the learning rate of a multi-step recipe changes, with its new value."""
    total = spec.total_iterations(num_samples)
    changes, last = {}, 0.0
    for iteration in range(total):
        rate = spec.lr * spec.schedule.multiplier(iteration, total, [], [])
        if rate != last:
            changes[iteration] = last = rate
    return changes


# ---------------------------------------------------------------------------------------------------------------------
# Recipes: the table of the paper
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "batches", "length", "drops"),
    [
        # recipe, mini-batches in an epoch, the run's iterations, {iteration: learning rate}
        ("cnn", 390, 200 * 390, {0: 0.01, 100 * 390: 1e-3, 150 * 390: 1e-4}),
        ("resnet20", 390, 64_000, {0: 0.1, 32_000: 0.01, 48_000: 1e-3}),
        ("wrn28-2", 390, 200 * 390, {0: 0.1, 60 * 390: 0.02, 120 * 390: 4e-3, 160 * 390: 8e-4}),
        ("densenet-bc-100", 781, 300 * 781, {0: 0.1, 150 * 781: 0.01, 225 * 781: 1e-3}),
    ],
)
def test_the_learning_rate_drops_where_the_paper_says(
    name: str, batches: int, length: int, drops: dict[int, float]
) -> None:
    spec = RECIPES[name]
    assert spec.iterations_per_epoch(CIFAR_SIZE) == batches
    assert spec.total_iterations(CIFAR_SIZE) == length
    found = learning_rates(spec)
    assert list(found) == list(drops)
    assert list(found.values()) == pytest.approx(list(drops.values()))


@pytest.mark.parametrize(
    ("name", "model", "batch_size", "weight_decay", "nesterov"),
    [
        ("cnn", "cnn", 128, 1e-4, True),
        ("resnet20", "resnet20", 128, 1e-4, False),
        ("wrn28-2", "wrn28-2", 128, 5e-4, True),
        ("densenet-bc-100", "densenet-bc-100", 64, 1e-4, True),
        ("scenario", "resnet20", 128, 1e-4, False),
    ],
)
def test_recipes_are_the_papers(name: str, model: str, batch_size: int, weight_decay: float, nesterov: bool) -> None:
    spec = RECIPES[name]
    assert (spec.model, spec.batch_size, spec.weight_decay, spec.nesterov) == (
        model,
        batch_size,
        weight_decay,
        nesterov,
    )
    assert (spec.momentum, spec.augmentation, spec.label_smoothing, spec.confusion) == (0.9, "4-crop-f", 0.0, 0)
    assert spec.regularizer is None


def test_scenarios_train_200_epochs_and_divide_by_10_on_a_plateau() -> None:
    spec = RECIPES["scenario"]
    assert (spec.epochs, spec.iterations, spec.lr, spec.schedule) == (200, None, 0.1, Plateau(factor=0.1))


# ---------------------------------------------------------------------------------------------------------------------
# Duration and schedules
# ---------------------------------------------------------------------------------------------------------------------


def test_the_earlier_limit_ends_the_run() -> None:
    shortened = dataclasses.replace(RECIPES["resnet20"], epochs=2)
    assert shortened.total_iterations(CIFAR_SIZE) == 780
    assert list(learning_rates(shortened)) == [0, 390, 585]  # a shortened run keeps the shape of its schedule
    assert dataclasses.replace(shortened, iterations=100).total_iterations(CIFAR_SIZE) == 100


def test_without_milestones_the_learning_rate_is_constant() -> None:
    assert learning_rates(RunSpec(epochs=3, schedule=MultiStep(milestones=()))) == {0: 0.1}


def test_multi_step_agrees_with_torch() -> None:
    schedule, total = MultiStep((0.25, 0.5, 0.9), factor=0.3), 40
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.2)
    oracle = torch.optim.lr_scheduler.MultiStepLR(optimizer, [10, 20, 36], gamma=0.3)
    for iteration in range(total):
        assert 0.2 * schedule.multiplier(iteration, total, [], []) == pytest.approx(oracle.get_last_lr()[0], rel=1e-12)
        optimizer.step()
        oracle.step()


@pytest.mark.parametrize("total", [1, 3, 11, 97])
@pytest.mark.parametrize("pct_start", [0.1, 0.3, 0.5])
def test_one_cycle_agrees_with_torch(total: int, pct_start: float) -> None:
    schedule = OneCycle(pct_start=pct_start, div_factor=20.0, final_div_factor=500.0)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    oracle = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.2, total, pct_start=pct_start, div_factor=20.0, final_div_factor=500.0, cycle_momentum=False
    )
    for iteration in range(total):
        expected = oracle.get_last_lr()[0]
        assert 0.2 * schedule.multiplier(iteration, total, [], []) == pytest.approx(expected, rel=1e-9)
        optimizer.step()
        if iteration < total - 1:
            oracle.step()


def test_one_cycle_without_time_to_rise_begins_at_the_top() -> None:
    assert OneCycle(pct_start=0.1).multiplier(0, 10, [], []) == 1.0  # where torch divides by zero


@given(
    losses=st.lists(st.floats(0, 2), max_size=40),
    patience=st.integers(0, 4),
    threshold=st.sampled_from([0.0, 1e-4, 0.1]),
)
def test_plateau_agrees_with_torch(losses: list[float], patience: int, threshold: float) -> None:
    schedule = Plateau(factor=0.5, patience=patience, threshold=threshold)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    oracle = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, factor=0.5, patience=patience, threshold=threshold, eps=0.0
    )
    for epoch in range(len(losses)):
        oracle.step(losses[epoch])
        assert schedule.multiplier(0, 1, losses[: epoch + 1], []) == oracle.get_last_lr()[0]


# ---------------------------------------------------------------------------------------------------------------------
# Identity and validation
# ---------------------------------------------------------------------------------------------------------------------

SPECS = [
    *RECIPES.values(),
    RunSpec(regularizer=SharpnessAwareSpec(rho=0.5, adaptive=True)),
    RunSpec(regularizer=RegularizerSpec(max_grad_norm=5.0), precision="bf16-mixed"),
    RunSpec(regularizer=GradientNormSpec(weight=0.1, radius=0.2)),
    RunSpec(schedule=OneCycle(pct_start=0.2, div_factor=10.0)),
    RunSpec(schedule=Landing(tolerance=0.1), stop_at_loss=0.1),
    RunSpec(regularizer=FisherPenaltySpec(weight=0.5, start_epoch=3)),
    RunSpec(regularizer=UnitResidualSpec(beta=2.0, num_sub_batches=4, max_grad_norm=5.0)),
]


def test_near_the_loss_to_stop_at_the_learning_rate_falls_for_good() -> None:
    schedule = Approach(near=3.0, factor=0.2)
    fits = [50.0, 3.1, 2.9, 3.5]
    assert [schedule.multiplier(0, 1, [], fits[:epoch]) for epoch in range(5)] == [1.0, 1.0, 1.0, 0.2, 0.2]


def test_before_an_epoch_that_would_leap_past_the_loss_the_learning_rate_falls_in_proportion() -> None:
    schedule = Landing(near=10.0, factor=0.1, tolerance=0.05)
    fits = [12.0, 9.0, 6.0, 6.5, 2.0, 1.2]
    leap = 0.1 * math.log(2.0 / 0.95) / math.log(6.5 / 2.0)
    again = leap * math.log(1.2 / 0.95) / math.log(2.0 / 1.2)
    multipliers = [schedule.multiplier(0, 1, [], fits[:epoch]) for epoch in range(7)]
    assert multipliers == pytest.approx([1.0, 1.0, 0.1, 0.1, 0.1, leap, again])


@given(near=st.floats(5.0, 10.0), fall=st.floats(0.02, 1.6))
def test_a_loss_that_falls_in_proportion_to_the_learning_rate_lands(near: float, fall: float) -> None:
    schedule = Landing(near=10.0, factor=0.1, tolerance=0.05)
    fits = [near]
    while fits[-1] > 1.0:
        fits.append(fits[-1] * math.exp(-fall * schedule.multiplier(0, 1, [], fits) / 0.1))
    assert fits[-1] >= 0.95 * (1 - 1e-9)
    assert len(fits) < 3 + math.log(near) / fall


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.key)
def test_json_round_trips(spec: RunSpec) -> None:
    again = RunSpec.from_json(spec.to_json())
    assert again == spec
    assert again.key == spec.key
    assert "\n" not in spec.to_json()


def test_every_field_changes_the_key() -> None:
    changed: dict[str, Any] = {
        "model": "cnn",
        "data": "digits",
        "train_size": 10,
        "confusion": 1,
        "validation": 1,
        "augmentation": "no-aug",
        "batch_size": 64,
        "epochs": 3,
        "iterations": 5,
        "stop_at_loss": 0.1,
        "lr": 0.2,
        "schedule": Plateau(),
        "momentum": 0.8,
        "nesterov": True,
        "weight_decay": 0.0,
        "label_smoothing": 0.1,
        "regularizer": RegularizerSpec(),
        "evaluate_every": 2,
        "precision": "bf16-mixed",
        "seed": 1,
    }
    assert changed.keys() == {field.name for field in dataclasses.fields(RunSpec) if field.compare}
    keys = {dataclasses.replace(RunSpec(), **{name: value}).key for name, value in changed.items()}
    assert len(keys | {RunSpec().key}) == len(changed) + 1


COUNTS = RunSpec(
    model="mlp",
    data="digits",
    train_size=100,
    confusion=30,
    validation=50,
    augmentation="flip-only",
    batch_size=32,
    epochs=None,
    iterations=10,
    lr=1,
    schedule=MultiStep((0.25, 0.5), factor=0.2),
    momentum=0,
    weight_decay=0,
    label_smoothing=0.1,
    evaluate_every=2,
    seed=2**63 - 1,
    data_folder="/data",
)
REGULARIZED = RunSpec(
    model="wrn28-2",
    data="cifar100",
    regularizer=RegularizerSpec(
        alpha=1,
        beta=3,
        num_sub_batches=4,
        max_grad_norm=5,
        start_epoch=2,
        estimator="hvp",
        main_gradient="sub-batches",
        every=3,
    ),
    precision="bf16-mixed",
)


@pytest.mark.parametrize(
    ("spec", "key"),
    [
        (RunSpec(), "3df6075f8b5c"),
        (RECIPES["cnn"], "8576cdc47d3a"),
        (RECIPES["resnet20"], "e46f7e0b8413"),
        (RECIPES["wrn28-2"], "0571d6b15081"),
        (RECIPES["densenet-bc-100"], "5c694ff74d69"),
        (RECIPES["scenario"], "53640bd05cc4"),
        (RECIPES["digits"], "ef71b3e66a79"),
        (RunSpec(regularizer=SharpnessAwareSpec(rho=0.5, adaptive=True), precision="tf32"), "7ce8a4b79b9a"),
        (
            RunSpec(model="cnn", data="./flowers", schedule=Plateau(0.5, 0, 0.0), nesterov=True, weight_decay=5e-4),
            "d674c0359867",
        ),
        (REGULARIZED, "d939b624ce6c"),
        (COUNTS, "18c0256059b6"),
    ],
)
def test_the_key_does_not_change_between_versions(spec: RunSpec, key: str) -> None:
    # A changed key orphans every run folder there is: raise this only with a reason to.
    assert spec.key == key


def test_the_text_of_a_spec_does_not_change_between_versions() -> None:
    assert COUNTS.to_json() == (
        '{"augmentation": "flip-only", "batch_size": 32, "confusion": 30, "data": "digits", "data_folder": "/data", '
        '"epochs": null, "evaluate_every": 2, "iterations": 10, "label_smoothing": 0.1, "lr": 1.0, "model": "mlp", '
        '"momentum": 0.0, "nesterov": false, "precision": "32-true", "regularizer": null, "schedule": {"factor": 0.2, '
        '"kind": "MultiStep", "milestones": [0.25, 0.5]}, "seed": 9223372036854775807, "train_size": 100, '
        '"validation": 50, "weight_decay": 0.0}'
    )


def test_where_the_data_lie_makes_no_other_run() -> None:
    here, there = (RunSpec(data="cifar10", data_folder=folder) for folder in ("/here", "/there"))
    assert here == there
    assert here.key == there.key == RunSpec(data="cifar10").key
    assert RunSpec.from_json(here.to_json()).source == "/here"


def test_an_int_where_a_float_belongs_is_the_same_run() -> None:
    assert RunSpec(lr=1).key == RunSpec(lr=1.0).key


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "resnet2"}, "unknown model 'resnet2' (did you mean 'resnet20'?)"),
        ({"augmentation": "4-crop"}, "did you mean '4-crop-f'"),
        ({"precision": "16"}, "RunSpec.precision must be"),
        ({"data": ""}, "data must name"),
        ({"train_size": 0}, "train_size must be >= 1"),
        ({"confusion": -1}, "confusion must not be negative"),
        ({"validation": -1}, "validation must not be negative"),
        ({"evaluate_every": 0}, "evaluate_every must be >= 1"),
        ({"batch_size": 0}, "batch_size must be >= 1"),
        ({"batch_size": 64.0}, "RunSpec.batch_size must be int, got 64.0"),
        ({"epochs": 0}, "epochs must be >= 1"),
        ({"epochs": None}, "give at least one"),
        ({"epochs": True}, "RunSpec.epochs must be int | None, got True"),
        ({"iterations": 0}, "iterations must be >= 1"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"lr": float("nan")}, "RunSpec.lr must be float, got nan"),
        ({"lr": "0.1"}, "RunSpec.lr must be float, got '0.1'"),
        ({"momentum": 1.0}, "momentum must be in [0, 1)"),
        ({"momentum": 0.0, "nesterov": True}, "nesterov needs a positive momentum"),
        ({"weight_decay": -1e-4}, "weight_decay must not be negative"),
        ({"label_smoothing": 1.0}, "label_smoothing must be in [0, 1)"),
        ({"seed": -1}, "seed must be in"),
        ({"schedule": None}, "RunSpec.schedule must be"),
    ],
)
def test_a_bad_field_is_named_in_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FlatminimaError) as caught:
        dataclasses.replace(RunSpec(), **changes)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: MultiStep((0.75, 0.5)), "schedule.milestones must increase between 0 and 1"),
        (lambda: MultiStep((100, 150)), "schedule.milestones must increase between 0 and 1"),
        (lambda: MultiStep(0.5), "MultiStep.milestones must be tuple"),  # type: ignore[arg-type]
        (lambda: MultiStep(factor=0.0), "schedule.factor must be positive"),
        (lambda: Plateau(factor=-0.1), "schedule.factor must be positive"),
        (lambda: Plateau(patience=-1), "schedule.patience must not be negative"),
        (lambda: Plateau(threshold=1.0), "schedule.threshold must be in [0, 1)"),
        (lambda: Approach(near=1.0), "schedule.near must be > 1"),
        (lambda: OneCycle(pct_start=0.0), "schedule.pct_start must be positive"),
        (lambda: OneCycle(div_factor=1.0), "schedule.div_factor must be > 1"),
        (lambda: Landing(tolerance=1.0), "schedule.tolerance must be in [0, 1)"),
        (lambda: Landing(tolerance=0.0), "schedule.tolerance must be positive"),
        (lambda: RunSpec(schedule=Approach()), "schedule Approach needs a loss to stop at: set stop_at_loss"),
        (lambda: RunSpec(schedule=Landing()), "schedule Landing needs a loss to stop at: set stop_at_loss"),
        (lambda: RegularizerSpec(alpha=0.0), "regularizer.alpha must be positive"),
        (lambda: RegularizerSpec(beta=-1.0), "regularizer.beta must not be negative"),
        (lambda: RegularizerSpec(num_sub_batches=0), "regularizer.num_sub_batches must be >= 1"),
        (lambda: RegularizerSpec(max_grad_norm=0.0), "regularizer.max_grad_norm must be positive"),
        (lambda: SharpnessAwareSpec(rho=0.0), "sam.rho must be positive"),
        (lambda: SharpnessAwareSpec(max_grad_norm=0.0), "sam.max_grad_norm must be positive"),
        (lambda: SharpnessAwareSpec(start_epoch=-1), "sam.start_epoch must not be negative"),
        (lambda: GradientNormSpec(weight=0.0), "gradient_norm.weight must be positive"),
        (lambda: GradientNormSpec(radius=0.0), "gradient_norm.radius must be positive"),
        (lambda: FisherPenaltySpec(weight=-1.0), "fisher_penalty.weight must be positive"),
        (lambda: UnitResidualSpec(beta=-1.0), "unit_residuals.beta must not be negative"),
        (lambda: UnitResidualSpec(num_sub_batches=0), "unit_residuals.num_sub_batches must be >= 1"),
        (lambda: RegularizerSpec(every=0), "regularizer.every must be >= 1"),
        (lambda: RegularizerSpec(estimator="exact"), "RegularizerSpec.estimator must be"),  # type: ignore[arg-type]
        (lambda: RegularizerSpec(start_epoch=-1), "regularizer.start_epoch must not be negative"),
    ],
)
def test_a_bad_nested_field_is_named_in_one_line(build: Any, message: str) -> None:
    with pytest.raises(FlatminimaError) as caught:
        build()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda values: values | {"optimizer": "adam"}, "RunSpec has no field optimizer"),
        (lambda values: values | {"un\nknown": 1}, "RunSpec has no field un\\nknown"),
        (lambda values: values | {"schedule": {"kind": "Cosine"}}, "unknown schedule.kind 'Cosine'"),
        (lambda values: values | {"schedule": {"kind": "Plateau", "steps": 3}}, "Plateau has no field steps"),
        (lambda values: values | {"regularizer": {"beta": 1.0}}, "unknown regularizer.kind None"),
        (lambda values: values | {"regularizer": 3}, "RunSpec.regularizer must be"),
        (lambda values: [values], "not a run specification"),
        (lambda values: {}, "RunSpec has no value for its field model"),
        (lambda values: {n: v for n, v in values.items() if n != "lr"}, "RunSpec has no value for its field lr"),
        (lambda values: values | {"schedule": {"kind": "Plateau"}}, "RunSpec.schedule has no value for its field"),
        (lambda values: values | {"regularizer": {"kind": "SharpnessAwareSpec"}}, "no value for its field rho"),
    ],
)
def test_a_bad_file_is_named_in_one_line(edit: Any, message: str) -> None:
    with pytest.raises(FlatminimaError) as caught:
        RunSpec.from_json(json.dumps(edit(json.loads(RunSpec().to_json()))))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_text_that_is_not_json_is_refused() -> None:
    with pytest.raises(FlatminimaError, match="not a run specification"):
        RunSpec.from_json('{"model": "resn')


def test_a_training_set_smaller_than_one_batch_is_refused() -> None:
    with pytest.raises(FlatminimaError, match="batch_size 128 is larger than the training set of 100 images"):
        RunSpec().total_iterations(100)
