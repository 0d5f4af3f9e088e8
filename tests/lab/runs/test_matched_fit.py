"""Runs that end once they fit their training set well enough."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from flatminima.errors import FlatminimaError
from flatminima.lab.errors import TrainingStopped, UnreachedLossError
from flatminima.lab.runs import Approach, Landing, MultiStep, RunSpec, train
from flatminima.lab.runs.folder import RunFolder
from flatminima.lab.runs.sets import load_run
from flatminima.measures import evaluate

pytest_plugins = ("support.run_fixtures",)
pytestmark = pytest.mark.usefixtures("one_thread")

SPEC = RunSpec(
    model="mlp",
    data="digits",
    train_size=100,
    augmentation="flip-only",
    batch_size=20,
    epochs=30,
    lr=0.05,
    schedule=MultiStep(()),
    evaluate_every=100,
    stop_at_loss=0.2,
)


def test_a_run_ends_with_the_first_epoch_that_fits(tmp_path: Path) -> None:
    result = train(SPEC, tmp_path, progress=False)
    history = RunFolder(result.folder).read_history()
    fits = [record.fit for record in history]
    assert all(fit > 0.2 for fit in fits[:-1])
    assert result.epochs == len(history) < 30
    assert result.train_loss == fits[-1] <= 0.2
    _, model, clean, _ = load_run(result.folder)  # un-augmented, in evaluation mode
    assert evaluate(model, clean).loss == pytest.approx(fits[-1], rel=1e-6)
    assert result.test_error == history[-1].test_error


def test_the_learning_rate_falls_from_the_epoch_on_that_follows_a_near_fit(tmp_path: Path) -> None:
    spec = replace(SPEC, schedule=Approach(near=2.0, factor=0.1))
    history = RunFolder(train(spec, tmp_path, progress=False).folder).read_history()
    near = [record.fit is not None and record.fit <= 0.4 for record in history]
    falls = near.index(True) + 1
    assert 0 < falls < len(history)
    assert [record.lr for record in history] == pytest.approx([0.05] * falls + [0.005] * (len(history) - falls))


def test_a_landing_run_slows_down_and_ends_close_below_its_loss(tmp_path: Path) -> None:
    approach, landing = Approach(near=10.0, factor=1.0), Landing(near=10.0, factor=1.0, tolerance=0.02)
    spec = replace(SPEC, schedule=landing, epochs=60)
    history = RunFolder(train(spec, tmp_path, progress=False).folder).read_history()
    fits = [record.fit / 0.2 for record in history if record.fit is not None]
    rates = [0.05 * landing.multiplier(0, 1, [], fits[:epoch]) for epoch in range(len(history))]
    assert [record.lr for record in history] == pytest.approx(rates)
    assert rates[-1] < 0.05
    leapt = train(replace(spec, schedule=approach), tmp_path, progress=False).train_loss
    assert leapt < 0.2 * fits[-1] <= 0.2


def test_it_is_the_run_without_a_target_cut_off(tmp_path: Path) -> None:
    stopped = train(SPEC, tmp_path, progress=False)
    plain = replace(SPEC, stop_at_loss=None, iterations=stopped.iterations)
    limited = train(plain, tmp_path, progress=False)
    weights = [load_run(result.folder)[1].state_dict() for result in (stopped, limited)]
    assert all(tensor.equal(weights[1][name]) for name, tensor in weights[0].items())


def test_it_goes_on_to_the_same_end_after_a_stop(tmp_path: Path) -> None:
    whole = train(SPEC, tmp_path / "whole", progress=False)
    with pytest.raises(TrainingStopped):
        train(SPEC, tmp_path / "parts", progress=False, stop=lambda epoch, *_: epoch == 2)
    parts = train(SPEC, tmp_path / "parts", progress=False)
    assert (parts.epochs, parts.train_loss) == (whole.epochs, whole.train_loss)


def test_a_run_that_never_fits_has_failed_and_says_so_again(tmp_path: Path) -> None:
    spec = replace(SPEC, epochs=2, stop_at_loss=1e-3)
    with pytest.raises(UnreachedLossError, match=r"after 2 epochs with a loss of .*, above stop_at_loss 0.001"):
        train(spec, tmp_path, progress=False)
    with pytest.raises(FlatminimaError, match="allow more epochs"):
        train(spec, tmp_path, progress=False)


def test_runs_without_a_target_keep_the_names_of_before() -> None:
    assert "stop_at_loss" not in replace(SPEC, stop_at_loss=None).identity()
    assert replace(SPEC, stop_at_loss=0.1).key != SPEC.key != replace(SPEC, stop_at_loss=None).key
    assert RunSpec.from_json(SPEC.to_json()) == SPEC
