from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from flatminima.errors import FlatminimaError
from flatminima.lab.networks.checkpoints import load_weights
from flatminima.lab.networks.paper import build_model
from support.messages import one_line


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pt", "weights.pth"])
def test_weights_are_loaded_with_their_buffers(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    saved, loaded = network(), network()
    saved(torch.randn(8, 3))  # moves the running statistics
    path = tmp_path / name
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(saved.state_dict(), path)
    else:
        torch.save(saved.state_dict(), path)
    load_weights(loaded, path)
    for key, tensor in saved.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor), key


class Exploit:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("name", ["evil.pt", "evil.pth", "evil.safetensors"])
@pytest.mark.parametrize("how", ["torch", "old torch", "bare pickle", "hidden in a state dict"])
def test_code_in_a_checkpoint_is_refused_and_never_run(tmp_path: Path, name: str, how: str) -> None:
    marker, path = tmp_path / "was-run", tmp_path / name
    if how == "bare pickle":
        path.write_bytes(pickle.dumps(Exploit(marker)))
    elif how == "hidden in a state dict":
        torch.save({**network().state_dict(), "extra": Exploit(marker)}, path)
    else:
        torch.save(Exploit(marker), path, _use_new_zipfile_serialization=how == "torch")
    with pytest.raises(FlatminimaError) as caught:
        load_weights(network(), path)
    assert str(path) in one_line(caught)
    assert not marker.exists()
    pickle.loads(pickle.dumps(Exploit(marker)))  # the exploit is a real one
    assert marker.exists()


def test_a_whole_pickled_model_is_refused(tmp_path: Path) -> None:
    torch.save(network(), tmp_path / "model.pt")
    with pytest.raises(FlatminimaError, match=r"holds pickled code, which is never run; save model\.state_dict\(\)"):
        load_weights(network(), tmp_path / "model.pt")


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"\xff" * 100], ids=["empty", "text", "noise"])
def test_an_unreadable_checkpoint_is_refused(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)
    with pytest.raises(FlatminimaError) as caught:
        load_weights(network(), path)
    assert str(path) in one_line(caught)


def test_missing_and_unknown_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FlatminimaError, match="there is no checkpoint"):
        load_weights(network(), tmp_path / "nowhere.safetensors")
    (tmp_path / "weights.h5").write_bytes(b"")
    with pytest.raises(FlatminimaError, match=r"save it as \.safetensors"):
        load_weights(network(), tmp_path / "weights.h5")


def test_another_models_names_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file({f"x{k}": v for k, v in network().state_dict().items()}, path)
    with pytest.raises(FlatminimaError) as caught:
        load_weights(network(), path)
    assert "missing 0.bias, 0.weight, 1.bias and 6 more; unexpected x0.bias" in one_line(caught)


def test_another_class_count_is_refused_and_the_model_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    safetensors.torch.save_file(build_model("mlp", num_classes=100, in_channels=1).state_dict(), path)
    model = build_model("mlp", num_classes=10, in_channels=1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(FlatminimaError) as caught:
        load_weights(model, path)
    assert "(100, " in one_line(caught)
    assert "is its number of classes" in one_line(caught)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
