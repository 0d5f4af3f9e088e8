from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flatminima.errors import FlatminimaError, NonFiniteError
from flatminima.lab.data.sources import load_data
from flatminima.lab.errors import DamagedRunWarning, ResumedElsewhereWarning
from flatminima.lab.runs import sets, training
from flatminima.lab.runs.folder import RunFolder
from flatminima.lab.runs.records import RunResult
from flatminima.lab.runs.schedules import MultiStep
from flatminima.lab.runs.sets import load_run
from flatminima.lab.runs.spec import (
    FisherPenaltySpec,
    GradientNormSpec,
    Regularizer,
    RegularizerSpec,
    SharpnessAwareSpec,
    UnitResidualSpec,
)
from flatminima.lab.runs.training import train
from support.runs import EVERYTHING, PLAIN, bits, reading_late, stopped_in_the_middle

pytest_plugins = ("support.run_fixtures",)
pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_finished_run_is_returned_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = train(PLAIN, tmp_path)
    monkeypatch.setattr(training, "load_sets", lambda *args, **kwargs: pytest.fail("it was trained again"))
    assert train(PLAIN, tmp_path) == first
    assert isinstance(first, RunResult)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def scribble(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) * 3 // 4] ^= 0x10
    path.write_bytes(content)


DAMAGE = pytest.mark.parametrize("damage", [truncate, scribble, Path.unlink], ids=["truncated", "altered", "missing"])


@DAMAGE
@pytest.mark.parametrize("name", ["spec.json", "state.safetensors", "history.jsonl"])
def test_a_damaged_unfinished_run_never_mixes(name: str, damage: Any, tmp_path: Path, uninterrupted: Path) -> None:
    folder = stopped_in_the_middle(PLAIN, tmp_path)
    damage(folder.path / name)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(PLAIN, tmp_path)
    messages = [str(warning.message) for warning in caught if warning.category is DamagedRunWarning]
    harmless = name == "history.jsonl" or (name, damage) == ("state.safetensors", Path.unlink)
    assert len(messages) == (0 if harmless else 1)
    assert all("this run starts over: " in message and "\n" not in message for message in messages)
    assert bits(tmp_path, PLAIN) == bits(uninterrupted, PLAIN)


@DAMAGE
@pytest.mark.parametrize("name", ["result.json", "checkpoint.safetensors"])
def test_a_damaged_finished_run_is_trained_again(name: str, damage: Any, tmp_path: Path, uninterrupted: Path) -> None:
    folder = RunFolder(train(PLAIN, tmp_path).folder)
    folder.write_measures("of the damaged checkpoint")
    if (name, damage) == ("result.json", scribble):
        (folder.path / name).write_text("{}")  # one changed digit of a JSON file cannot be told
    else:
        damage(folder.path / name)
    if (name, damage) == ("result.json", Path.unlink):  # unfinished, as far as anybody can tell
        folder.clear()
        train(PLAIN, tmp_path)
    else:
        with pytest.warns(DamagedRunWarning, match="this run starts over"):
            train(PLAIN, tmp_path)
    assert folder.read_measures() is None
    assert bits(tmp_path, PLAIN) == bits(uninterrupted, PLAIN)


def test_a_folder_with_another_run_is_refused(tmp_path: Path) -> None:
    folder = stopped_in_the_middle(PLAIN, tmp_path)
    folder.write_spec(EVERYTHING)
    with pytest.raises(FlatminimaError, match="holds another run than its name says"):
        train(PLAIN, tmp_path)


def test_changed_data_start_the_run_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def altered(source: str, *, cache_dir: Path | None) -> Any:
        full, test = load_data(source, cache_dir=cache_dir)
        return replace(full, images=255 - full.images), test

    stopped_in_the_middle(PLAIN, tmp_path / "changed")
    monkeypatch.setattr(sets, "load_data", altered)
    with pytest.warns(DamagedRunWarning, match="the data 'digits' have changed since"):
        train(PLAIN, tmp_path / "changed")
    train(PLAIN, tmp_path / "from the start")
    assert bits(tmp_path / "changed", PLAIN) == bits(tmp_path / "from the start", PLAIN)


def test_a_run_whose_data_were_moved_goes_on_and_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_folder(source: str, *, cache_dir: Path | None) -> Any:
        assert Path(source).is_dir()
        return load_data("digits")

    monkeypatch.setattr(sets, "load_data", load_folder)
    images = tmp_path / "images"
    images.mkdir()
    spec = replace(PLAIN, data="cifar10", data_folder=str(images))
    stopped_in_the_middle(spec, tmp_path / "runs")
    moved = images.rename(tmp_path / "moved")
    result = train(replace(spec, data_folder=str(moved)), tmp_path / "runs")
    assert load_run(result.folder)[0].source == str(moved)

    again = moved.rename(tmp_path / "moved again")
    assert train(replace(spec, data_folder=str(again)), tmp_path / "runs").test_error == result.test_error
    assert load_run(result.folder)[0].source == str(again)


def test_another_environment_is_named(tmp_path: Path) -> None:
    stopped_in_the_middle(PLAIN, tmp_path)
    torch.set_num_threads(2)
    with pytest.warns(ResumedElsewhereWarning, match="threads 1 and goes on with .* threads 2"):
        train(PLAIN, tmp_path)


@pytest.mark.parametrize(
    "regularizer",
    [
        None,
        RegularizerSpec(num_sub_batches=4),
        SharpnessAwareSpec(),
        GradientNormSpec(),
        FisherPenaltySpec(),
        UnitResidualSpec(num_sub_batches=4),
    ],
)
def test_a_loss_that_is_not_finite_fails_the_run(tmp_path: Path, regularizer: Regularizer | None) -> None:
    spec = replace(PLAIN, lr=1e20, schedule=MultiStep(()), regularizer=regularizer)
    with pytest.raises(NonFiniteError) as caught:
        train(spec, tmp_path)
    message = str(caught.value)
    assert message.startswith("training failed in epoch 1, iteration ")
    assert "lower lr (it is 1e+20)" in message
    assert "\n" not in message
    folder = RunFolder.of(tmp_path, spec)
    assert folder.status == "failed"
    assert not (folder.path / "checkpoint.safetensors").exists()
    with pytest.raises(FlatminimaError) as again:
        train(spec, tmp_path)
    assert str(again.value) == f"this run failed before: {message} (delete {folder.path} to train it again)"


@pytest.mark.parametrize("checkpoint_seconds", [0.0, 1e9])
def test_a_loss_that_is_read_late_fails_the_run_at_its_own_update(tmp_path: Path, checkpoint_seconds: float) -> None:
    """With the message it has where it is read at once; nothing that came after it is kept."""
    spec = replace(PLAIN, lr=1e15, schedule=MultiStep(()))
    with pytest.raises(NonFiniteError) as soon:
        train(spec, tmp_path / "soon")
    with reading_late(), pytest.raises(NonFiniteError) as late:
        train(spec, tmp_path / "late", checkpoint_seconds=checkpoint_seconds)
    assert str(late.value) == str(soon.value)
    assert "in epoch 1, iteration 4" not in str(late.value)  # the last one of its epoch
    folder = RunFolder.of(tmp_path / "late", spec)
    assert folder.status == "failed"
    assert {path.name for path in folder.path.iterdir()} == {
        *("spec.json", "failure.json", "history.jsonl", "lock", "tensorboard"),
    }


def test_a_network_ruined_by_its_last_update_fails_the_run(tmp_path: Path) -> None:
    spec = replace(PLAIN, lr=1e38, iterations=1)
    with pytest.raises(NonFiniteError, match="NaN or infinite logits"):
        train(spec, tmp_path)
    assert RunFolder.of(tmp_path, spec).status == "failed"


def test_too_small_a_training_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FlatminimaError, match="batch_size 64 is larger than the training set of 50 images"):
        train(replace(PLAIN, train_size=50, batch_size=64), tmp_path)
