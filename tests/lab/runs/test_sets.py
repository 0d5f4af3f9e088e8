from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch

from flatminima.errors import FlatminimaError
from flatminima.lab.networks.paper import build_model
from flatminima.lab.runs import sets
from flatminima.lab.runs.folder import RunFolder
from flatminima.lab.runs.records import RunResult
from flatminima.lab.runs.sets import load_run, load_sets
from flatminima.lab.runs.spec import RunSpec
from flatminima.lab.runs.training import train
from flatminima.measures.evaluation import evaluate

SPEC = RunSpec(
    model="mlp", data="digits", train_size=200, confusion=40, augmentation="no-aug", batch_size=40, epochs=2, seed=3
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    return train(SPEC, tmp_path_factory.mktemp("runs"), progress=False)


def test_a_run_is_loaded_as_it_was_trained(finished: RunResult) -> None:
    spec, model, clean, test = load_run(finished.folder)
    assert spec == SPEC
    assert not model.training
    assert (len(clean), len(test)) == (200, 500)
    assert evaluate(model, test).error == finished.test_error
    everything = evaluate(model, load_sets(SPEC).train)
    assert (everything.loss, everything.accuracy) == (finished.train_loss, finished.train_accuracy)


def test_measures_see_the_clean_part_only() -> None:
    sets = load_sets(SPEC)
    assert (len(sets.clean), len(sets.train)) == (200, 240)
    assert torch.equal(sets.train.images[:200], sets.clean.images)
    assert torch.equal(sets.train.labels[:200], sets.clean.labels)


def test_the_whole_set_keeps_its_order_whatever_the_seed() -> None:
    sets = [load_sets(RunSpec(data="digits", augmentation="no-aug", seed=seed)) for seed in (0, 1)]
    assert torch.equal(sets[0].train.images, sets[1].train.images)
    assert sets[0].clean is sets[0].train


def test_held_out_images_are_never_trained_on_and_do_not_depend_on_the_seed() -> None:
    sets = [load_sets(replace(SPEC, validation=300, seed=seed)) for seed in (0, 1)]
    assert torch.equal(sets[0].validation.images, sets[1].validation.images)
    everything = replace(SPEC, train_size=None, validation=300, confusion=0)
    rest, whole = load_sets(everything), load_sets(replace(everything, validation=0))
    assert len(whole.validation) == 0
    assert (len(rest.train), len(rest.validation)) == (len(whole.train) - 300, 300)
    # a digit may be there twice, so count them
    together = torch.cat([rest.train.images, rest.validation.images]).flatten(1)
    assert torch.equal(
        *(images.unique(dim=0, return_counts=True)[1] for images in (together, whole.train.images.flatten(1)))
    )
    with pytest.raises(FlatminimaError, match="from 997"):
        load_sets(replace(SPEC, validation=300, train_size=998))
    assert rest.digest() != whole.digest()


def test_an_unfinished_run_cannot_be_loaded(tmp_path: Path) -> None:
    RunFolder(tmp_path).write_spec(SPEC)
    with pytest.raises(FlatminimaError, match="is not finished; train it to the end first"):
        load_run(tmp_path)


def test_a_run_on_other_data_cannot_be_loaded(finished: RunResult, monkeypatch: pytest.MonkeyPatch) -> None:
    def altered(source: str, *, cache_dir: Path | None) -> object:
        train_set, test_set = load(source, cache_dir=cache_dir)
        return train_set, replace(test_set, images=255 - test_set.images)

    load = sets.load_data
    monkeypatch.setattr(sets, "load_data", altered)
    with pytest.raises(FlatminimaError, match="the data 'digits' have changed since"):
        load_run(finished.folder)


def test_the_checkpoint_is_plain_safetensors(finished: RunResult) -> None:
    weights = safetensors.torch.load_file(finished.folder / "checkpoint.safetensors")
    assert weights.keys() == build_model("mlp", in_channels=1).state_dict().keys()


def test_the_result_is_plain_json(finished: RunResult) -> None:
    values = json.loads((finished.folder / "result.json").read_text())
    assert values["test_error"] == finished.test_error
    assert set(values["environment"]) == {"flatminima", "torch", "device", "threads"}
