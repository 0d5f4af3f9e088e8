"""Measuring while training: which epochs, within what share of the time, and what is kept."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from flatminima import MeasureOptions, Tracker, measure, tracking
from flatminima.errors import FlatminimaError, UntrackedEpochWarning
from flatminima.losses import CrossEntropy
from flatminima.tracking import read_epochs

pytestmark = pytest.mark.filterwarnings("ignore::flatminima.errors.NotAMinimumWarning")  # `measure` itself gives it

OPTIONS = MeasureOptions(subset_size=6, trials=2, progress=False)


@pytest.fixture
def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(30, 5, generator=generator, dtype=torch.float64), torch.arange(30) % 3


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Dropout(0.5), nn.Linear(4, 3)).double()


class Clock:
    """Seconds that pass only where a test says so."""

    def __init__(self, measuring: float) -> None:
        self.now, self.measuring = 0.0, measuring

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A measurement takes two seconds."""
    clock = Clock(2.0)

    def taking_time(*args: object, **options: object) -> object:
        clock.now += clock.measuring
        return measure(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(tracking, "perf_counter", clock)
    monkeypatch.setattr(tracking, "measure", taking_time)
    return clock


def test_an_epoch_has_what_measure_finds_and_the_callers_numbers(data: tuple[Tensor, Tensor], model: nn.Module) -> None:
    tracker = Tracker(data, OPTIONS)
    metrics = tracker(model, 1, validation_error=0.25)
    expected = measure(model, data, subset_size=6, trials=2, progress=False).to_metrics()
    assert metrics == expected | {"validation_error": 0.25}
    (tracked,) = tracker.epochs
    assert (tracked.epoch, tracked.measures, tracked.others) == (1, expected, {"validation_error": 0.25})


def test_a_number_that_there_is_not_is_left_out_and_anything_else_refused_before_measuring(
    data: tuple[Tensor, Tensor], model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = Tracker(data, OPTIONS)
    assert tracker(model, 1, validation_error=None, accuracy=torch.tensor(0.5)) is not None
    assert tracker.epochs[0].others == {"accuracy": 0.5}
    monkeypatch.setattr(tracking, "measure", None)
    with pytest.raises(FlatminimaError, match=r"validation_error must be a number, or None .*, got 'x'"):
        tracker(model, 2, validation_error="x")


def test_that_a_network_still_trains_is_no_warning(
    data: tuple[Tensor, Tensor], model: nn.Module, recwarn: pytest.WarningsRecorder
) -> None:
    warnings.simplefilter("always")
    Tracker(data, OPTIONS)(model, 1)
    assert not list(recwarn)


def test_training_goes_on_as_if_nothing_had_been_measured(data: tuple[Tensor, Tensor], model: nn.Module) -> None:
    model.train()
    before, modes = torch.get_rng_state(), [module.training for module in model.modules()]
    Tracker(data, OPTIONS)(model, 1)
    assert torch.equal(torch.get_rng_state(), before)
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())


def test_only_every_kth_epoch_is_measured(data: tuple[Tensor, Tensor], model: nn.Module) -> None:
    tracker = Tracker(data, OPTIONS, every=3)
    assert [tracker(model, epoch) is not None for epoch in range(7)] == [True, False, False, True, False, False, True]
    assert [tracked.epoch for tracked in tracker.epochs] == [0, 3, 6]
    assert tracker.left_out == []


def test_measuring_keeps_to_its_share_of_the_time(data: tuple[Tensor, Tensor], model: nn.Module, clock: Clock) -> None:
    tracker = Tracker(data, OPTIONS, time_share=0.1)
    for epoch in range(1, 11):
        clock.now += 8.0  # of training
        tracker(model, epoch)
        spent = clock.measuring * len(tracker.epochs)
        assert epoch < 3 or spent <= 0.1 * clock.now + 1e-9
    assert [tracked.epoch for tracked in tracker.epochs] == [1, 5, 7, 10]
    assert tracker.left_out == [2, 3, 4, 6, 8, 9]
    assert tracker.epochs[0].seconds == 2.0


@pytest.mark.parametrize("harm", ["nan", "singular"])
def test_a_network_that_cannot_be_measured_is_left_out_with_a_warning(
    data: tuple[Tensor, Tensor], model: nn.Module, harm: str
) -> None:
    tracker = Tracker(data, OPTIONS)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan") if harm == "nan" else 0.0)
    with pytest.warns(UntrackedEpochWarning, match="epoch 1 is not tracked"):
        assert tracker(model, 1) is None
    model.load_state_dict(before)
    assert tracker(model, 2) is not None
    assert [tracked.epoch for tracked in tracker.epochs] == [2]


def test_a_tracker_goes_on_from_its_file(data: tuple[Tensor, Tensor], model: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "epochs.jsonl"
    first = Tracker(data, OPTIONS, path=path)
    for epoch in np.array([1, 2]):
        first(model, epoch, validation_error=epoch / 10)
    second = Tracker(data, OPTIONS, path=path)
    assert second.epochs == first.epochs == read_epochs(path)
    second(model, 2, validation_error=0.9)  # trained again after an interruption
    second(model, 3)
    assert [(tracked.epoch, tracked.others) for tracked in read_epochs(path)] == [
        (1, {"validation_error": 0.1}),
        (2, {"validation_error": 0.9}),
        (3, {}),
    ]
    assert [entry.name for entry in tmp_path.iterdir()] == ["epochs.jsonl"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seed": 1}, "was written with seed=0, and this tracker has seed=1: .* name another file"),
        ({"subset_size": 7}, "subset_size=6, and .* subset_size=7"),
        ({"trials": 3}, "trials=2, and .* trials=3"),
        ({"fisher": "model"}, "fisher='empirical', and .* fisher='model'"),
        ({"loss": CrossEntropy(label_smoothing=0.1)}, r'loss="?\'?CrossEntropy\(label_smoothing=0.0,'),
        ({"measures": "margin"}, r"measures=\[.* and .* measures=\[.*'margin'"),
        ({"initial": {"0.weight": torch.ones(4, 5)}}, "initial=None, and"),
    ],
)
def test_a_file_that_was_written_with_other_options_is_refused(
    data: tuple[Tensor, Tensor], model: nn.Module, tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    path = tmp_path / "epochs.jsonl"
    Tracker(data, OPTIONS, path=path)(model, 1)
    with pytest.raises(FlatminimaError, match=message):
        Tracker(data, dataclasses.replace(OPTIONS, **changed), path=path)
    neutral = dataclasses.replace(OPTIONS, memory_budget=10**9, progress=True, per_parameter=True, path="generic")
    assert len(Tracker(data, neutral, path=path, every=5, time_share=0.1).epochs) == 1


def test_a_file_of_an_earlier_version_is_gone_on_from(
    data: tuple[Tensor, Tensor], model: nn.Module, tmp_path: Path
) -> None:
    path = tmp_path / "epochs.jsonl"
    Tracker(data, OPTIONS, path=path)(model, 1)
    line = json.loads(path.read_text())
    assert line.pop("options")["subset_size"] == 6
    path.write_text(json.dumps(line) + "\n")
    (tracked,) = Tracker(data, dataclasses.replace(OPTIONS, seed=1), path=path).epochs
    assert tracked.options is None


def test_a_file_that_cannot_be_written_is_refused_before_any_epoch(
    data: tuple[Tensor, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(FlatminimaError, match=r"cannot write .*: it is a folder; name a file"):
        Tracker(data, path=tmp_path)
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(FlatminimaError, match="its folder is read-only; choose another one"):
        Tracker(data, path=tmp_path / "epochs.jsonl")
    for name, value in {"TORCHELASTIC_RUN_ID": "any", "RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert Tracker(data, path=tmp_path / "epochs.jsonl").epochs == []  # the first process's to write


@pytest.mark.parametrize("text", ["", "no json", json.dumps({"epoch": 1}), "[1]"])
def test_a_file_of_something_else_is_refused(data: tuple[Tensor, Tensor], tmp_path: Path, text: str) -> None:
    path = tmp_path / "epochs.jsonl"
    path.write_text(text)
    if text:
        with pytest.raises(FlatminimaError, match=r"epochs.jsonl is not what a tracker wrote"):
            Tracker(data, path=path)
    else:
        assert Tracker(data, path=path).epochs == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every": 0}, "every must be at least 1, got 0"),
        ({"every": 1.5}, "every must be an integer"),
        ({"time_share": 0.0}, "time_share must lie between 0 and 1"),
        ({"time_share": 5}, "time_share must lie between 0 and 1, got 5"),
        ({"time_share": "5%"}, "time_share must be a number"),
        ({"options": {"trials": 3}}, "options must be MeasureOptions, got dict"),
    ],
)
def test_wrong_arguments_are_refused(data: tuple[Tensor, Tensor], arguments: dict[str, object], message: str) -> None:
    with pytest.raises(FlatminimaError, match=message):
        Tracker(data, **arguments)  # type: ignore[arg-type]


def test_what_measure_refuses_is_refused(data: tuple[Tensor, Tensor], model: nn.Module) -> None:
    with pytest.raises(FlatminimaError, match="subset_size"):
        Tracker(data, MeasureOptions(subset_size=100, trials=2, progress=False))(model, 1)


def test_a_picture_has_measures_and_errors_over_epochs(data: tuple[Tensor, Tensor], model: nn.Module) -> None:
    tracker = Tracker(data, OPTIONS)
    with pytest.raises(FlatminimaError, match="nothing was measured yet"):
        tracker.plot()
    for epoch in (1, 2):
        tracker(model, epoch, validation_error=0.5 / epoch)
    axes = tracker.plot()
    (right,) = [other for other in axes.figure.axes if other is not axes]
    drawn = [list(line.get_ydata()) for line in axes.lines if len(line.get_xdata())]
    assert drawn[1] == [tracked.measures["residual"] for tracked in tracker.epochs]
    assert list(right.lines[-1].get_ydata()) == [50.0, 25.0]
    entries = [text.get_text() for text in axes.get_legend().get_texts()]
    assert entries == ["log_det_fisher", "residual", "sensitivity", "diversity", "training error", "validation_error"]
    with pytest.raises(FlatminimaError, match=r"unknown measure 'sensitvity' \(did you mean 'sensitivity'\?\)"):
        tracker.plot(["sensitvity"])


def test_numbers_beside_the_measures_may_have_any_name_and_leave_the_measures_theirs(
    data: tuple[Tensor, Tensor], model: nn.Module, tmp_path: Path
) -> None:
    tracker = Tracker(data, OPTIONS, path=tmp_path / "epochs.jsonl")
    tracked = tracker.track(model, 1, {"epoch": 7.0, "train_loss": 99.0, "validation_error": float("nan")})
    assert tracked is not None
    assert tracked.others == {"epoch": 7.0, "train_loss": 99.0}
    assert "NaN" not in (tmp_path / "epochs.jsonl").read_text()
    metrics = tracker(model, 2, train_loss=99.0)
    assert metrics is not None
    assert metrics["train_loss"] == tracked.measures["train_loss"]
