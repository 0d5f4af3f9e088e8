"""Checkpoints as programs write them: right, or one line."""

from __future__ import annotations

import argparse
import copy
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from flatminima.errors import FlatminimaError
from flatminima.lab.errors import AdaptedCheckpointWarning
from flatminima.lab.networks.checkpoints import load_weights
from support.messages import one_line

State = dict[str, Any]


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Sequential(nn.Linear(4, 2)))


@pytest.fixture
def trained() -> nn.Module:
    torch.manual_seed(1)
    model = network()
    model(torch.randn(8, 3))  # moves the running statistics
    return model


def prefixed(prefix: str) -> Callable[[State], State]:
    return lambda state: {prefix + name: tensor for name, tensor in state.items()}


def without_counters(state: State) -> State:
    return {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}


def lightning(owner: str) -> Callable[[State], State]:
    def checkpoint(state: State) -> State:
        others = {"criterion.weight": torch.ones(2), "train_accuracy.correct": torch.tensor(3)}
        return {
            "epoch": 3,
            "pytorch-lightning_version": "2.5.0",
            "state_dict": {**prefixed(f"{owner}.")(state), **others},
            "optimizer_states": [{"state": {0: {"step": torch.tensor(2.0)}}, "param_groups": [{"lr": 0.1}]}],
            "hyper_parameters": {"lr": 0.1, "layers": [1, 2]},
        }

    return checkpoint


def training_script(state: State) -> State:
    """As torchvision's and timm's."""
    return {
        "model": state,
        "model_ema": {"n_averaged": torch.tensor(3), **prefixed("module.")(state)},
        "optimizer": {"state": {}, "param_groups": []},
        "args": argparse.Namespace(lr=0.1),
        "best": np.float64(0.9),
        "history": defaultdict(list),
        "scaler": OrderedDict(),
    }


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (prefixed("module."), "'module.' was taken off the names"),
        (prefixed("_orig_mod."), "'_orig_mod.' was taken off"),
        (prefixed("_orig_mod.module."), "'_orig_mod.module.' was taken off"),
        (prefixed("module._orig_mod.model."), "'module._orig_mod.model.' was taken off"),
        (lambda s: {n.replace("2.0.", "2._orig_mod.0."): t for n, t in s.items()}, "'_orig_mod' was taken off"),
        (lambda s: {n.replace("2.0.", "2.module.0."): t for n, t in s.items()}, "'module' was taken off"),
        (lambda s: {"n_averaged": torch.tensor(1), **prefixed("module.")(s)}, "n_averaged were left out"),
        (without_counters, "1.num_batches_tracked are not in it"),
        (lambda s: {"state_dict": s}, "its entry 'state_dict'"),
        (lambda s: {"epoch": 3, "model": s}, r"its entry 'model' \(beside epoch\)"),
        (lambda s: {"model": {"state_dict": prefixed("module.")(s)}}, "its entry 'state_dict'; 'module.' was taken"),
        (lightning("model"), r"criterion\.weight, train_accuracy\.correct were left out"),
        (lightning("net"), "'net.' was taken off the names"),
        (training_script, "its entry 'model'.*beside model_ema, optimizer"),
    ],
)
def test_weights_are_found_and_what_was_taken_off_is_said(
    changed: Callable[[State], State], said: str, trained: nn.Module, tmp_path: Path
) -> None:
    torch.save(changed(trained.state_dict()), tmp_path / "epoch=3.ckpt")
    model = network()
    with pytest.warns(AdaptedCheckpointWarning, match=said):
        load_weights(model, tmp_path / "epoch=3.ckpt")
    for name, tensor in trained.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor) or name.endswith("num_batches_tracked"), name


def test_a_model_that_is_wrapped_itself_takes_plain_names(trained: nn.Module, tmp_path: Path) -> None:
    safetensors.torch.save_file(trained.state_dict(), tmp_path / "plain.safetensors")
    wrapped = nn.Module()
    wrapped._orig_mod = network()
    load_weights(wrapped, tmp_path / "plain.safetensors")  # nothing is taken off the file's names
    assert torch.equal(wrapped.get_parameter("_orig_mod.0.weight"), trained.get_parameter("0.weight"))


def test_of_tied_weights_one_is_enough(tmp_path: Path) -> None:
    def tied() -> nn.ModuleDict:
        model = nn.ModuleDict({"embedding": nn.Embedding(5, 3), "head": nn.Linear(3, 5, bias=False)})
        model["head"].weight = model["embedding"].weight
        return model

    torch.manual_seed(2)
    saved, loaded = tied(), tied()
    for name in saved.state_dict():
        safetensors.torch.save_file({name: saved.state_dict()[name].clone()}, tmp_path / "one.safetensors")
        load_weights(loaded, tmp_path / "one.safetensors")
        assert torch.equal(loaded["head"].weight, saved["head"].weight)
        assert loaded["head"].weight is loaded["embedding"].weight


def test_half_precision_is_taken_as_it_is_and_what_is_rounded_is_said(trained: nn.Module, tmp_path: Path) -> None:
    path, model = tmp_path / "weights.pt", network()
    torch.save(copy.deepcopy(trained).half().state_dict(), path)
    load_weights(model, path)
    assert torch.equal(model[0].weight, trained.get_parameter("0.weight").half().float())
    torch.save(copy.deepcopy(trained).double().state_dict(), path)
    with pytest.warns(AdaptedCheckpointWarning, match="weights were rounded from float64 to float32"):
        load_weights(model, path)


def looped(state: State) -> State:
    state = dict(state)
    state["model"] = state
    return state


SPARSE = torch.eye(4, 3).to_sparse()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (lambda s: {**s, "0.weight": s["0.weight"].to(torch.int8)}, "0.weight is int8 in the file and float32"),
        (lambda s: {**s, "0.weight": s["0.weight"].to(torch.float8_e4m3fn)}, "0.weight is float8_e4m3fn in the file"),
        (lambda s: {**s, "0.weight": s["0.weight"].cfloat()}, "0.weight is complex64 in the file"),
        (lambda s: {**s, "1.num_batches_tracked": torch.tensor(2.5)}, "1.num_batches_tracked is float32 in the file"),
        (lambda s: {**s, "0.weight": SPARSE}, "0.weight is .*sparse_coo; save it as a plain dense tensor"),
        (lambda s: {**s, "0.weight": torch.empty(4, 3, device="meta")}, "0.weight is without values"),
        (lambda s: {**s, 7: torch.ones(2)}, "its entry 7 is of type Tensor"),
        (lambda s: {**s, "epoch": 3}, "its entry 'epoch' is of type int"),
        (lambda s: {0: {"weight": torch.ones(2)}}, "its entry 0 is of type dict"),
        (lambda s: list(s.values()), "a value of type list"),
        (lambda s: s["0.weight"], "a value of type Tensor"),
        (lambda s: {"state_dict": [1]}, "its entry 'state_dict' is of type list"),
        (looped, "a value of type dict"),
        (lambda s: {**prefixed("model.")(s), **prefixed("net.")(s)}, "several times, under 'model.' and 'net.'"),
        (lambda s: {**prefixed("model.")(s), "model.3.weight": torch.ones(2)}, "is not of this model"),
        (lambda s: {**prefixed("tower.")(s), "other.weight": torch.ones(2)}, "is not of this model"),
        (lambda s: {}, "missing 0.bias"),
    ],
)
def test_what_is_no_checkpoint_of_the_model_is_one_line(
    changed: Callable[[State], Any], said: str, trained: nn.Module, tmp_path: Path
) -> None:
    torch.save(changed(trained.state_dict()), tmp_path / "weights.pt")
    model = network()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(FlatminimaError, match=said) as caught:
        load_weights(model, tmp_path / "weights.pt")
    assert str(tmp_path / "weights.pt") in one_line(caught)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_class_that_a_file_needs_is_named(tmp_path: Path) -> None:
    torch.save({"model": {}, "path": Path("x")}, tmp_path / "training.pt")
    with pytest.raises(FlatminimaError, match=r"never run; save .*\(it needs pathlib\."):
        load_weights(network(), tmp_path / "training.pt")


def test_a_tensor_that_is_named_like_an_entry_is_one(tmp_path: Path) -> None:
    model = nn.ParameterDict({"model": torch.arange(2.0)})
    torch.save({"model": torch.ones(2)}, tmp_path / "weights.pt")
    load_weights(model, tmp_path / "weights.pt")
    found: Tensor = model["model"]
    assert torch.equal(found, torch.ones(2))
