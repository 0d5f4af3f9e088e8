from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from flatminima.errors import FlatminimaError
from flatminima.lab.data.images import ImageSet
from flatminima.lab.data.sources import load_data
from flatminima.lab.networks.foreign import open_network, resolve_device
from flatminima.lab.networks.paper import build_model

NETWORKS = """
from torch import nn

made = []

def with_classes(num_classes):
    made.append(num_classes)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))

def with_both(num_classes=3, in_channels=3):
    made.append((num_classes, in_channels))
    return nn.Sequential(nn.Flatten(), nn.Linear(64 * in_channels, num_classes))

def handing_on(*, weights=None, **options):
    made.append(options)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, options["num_classes"]))

def without():
    made.append(None)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

def wrong_size():
    return nn.Linear(63, 10)

def double():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).double()

def broken():
    raise OSError("no such\\nfile")

def number():
    return 3

class Mute(Exception):
    def __str__(self):
        raise RuntimeError

def mute():
    raise Mute

def leaving():
    raise SystemExit(0)

class Leaving(nn.Linear):
    def forward(self, x):
        raise SystemExit(0)

def leaves():
    return Leaving(64, 10)

def interrupted():
    raise KeyboardInterrupt
"""


def load_model(source: str, checkpoint: Path | None, data: ImageSet) -> nn.Module:
    return open_network(source, checkpoint, data).model


@pytest.fixture(scope="module")
def digits() -> ImageSet:
    return load_data("digits")[0]


@pytest.fixture(autouse=True)
def networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "loading_networks.py").write_text(NETWORKS)
    (tmp_path / "loading_unreadable.py").write_text("def net(:")
    (tmp_path / "loading_script.py").write_text("import sys\nsys.exit(0)\n")
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.parametrize(
    ("factory", "given"),
    [
        ("with_classes", 10),
        ("with_both", (10, 1)),
        ("handing_on", {"num_classes": 10}),
        ("without", None),
    ],
)
def test_a_factory_is_given_what_it_takes(factory: str, given: object, digits: ImageSet) -> None:
    model = load_model(f"loading_networks:{factory}", None, digits)
    import loading_networks

    assert loading_networks.made[-1] == given
    assert not model.training


def test_the_checkpoint_is_loaded(tmp_path: Path, digits: ImageSet) -> None:
    saved = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    save_file(saved.state_dict(), tmp_path / "weights.safetensors")
    loaded = load_model("loading_networks:without", tmp_path / "weights.safetensors", digits)
    assert torch.equal(loaded[1].weight, saved[1].weight)
    ours = build_model("mlp", num_classes=10, in_channels=1)
    save_file(ours.state_dict(), tmp_path / "ours.safetensors")
    again = load_model("mlp", tmp_path / "ours.safetensors", digits)
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in ours.state_dict().items())


def test_a_network_in_float64_is_taken_as_it_is(digits: ImageSet) -> None:
    assert next(load_model("loading_networks:double", None, digits).parameters()).dtype == torch.float64


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("loading_networks:nets", "has no function or class 'nets'"),
        ("loading_networks:", "has no function or class ''"),
        ("loading_networks:nn", "has no function or class 'nn'"),
        ("loading_nowhere:net", "cannot import 'loading_nowhere'"),
        ("loading_unreadable:net", r"cannot import 'loading_unreadable' \(SyntaxError"),
        (":net", "cannot import ''"),
        ("loading_networks:broken", r"calling it failed \(OSError: no such file\)"),
        ("loading_networks:mute", r"calling it failed \(Mute\)"),
        ("loading_networks:leaving", r"calling it failed \(SystemExit: 0\)"),
        ("loading_networks:leaves", r"does not take images of shape \(1, 8, 8\) \(0\)"),
        ("loading_script:net", r"cannot import 'loading_script' \(SystemExit: 0\)"),
        ("loading_networks:number", "it returned int, not a torch.nn.Module"),
        ("loading_networks:wrong_size", r"does not take images of shape \(1, 8, 8\)"),
        ("resnet99", "unknown model 'resnet99'"),
        ("mlp", "random weights without a checkpoint"),
    ],
)
def test_what_cannot_be_loaded_is_named(source: str, said: str, digits: ImageSet) -> None:
    with pytest.raises(FlatminimaError, match=said):
        load_model(source, None, digits)


def test_ctrl_c_in_a_factory_is_no_failure_of_its(digits: ImageSet) -> None:
    with pytest.raises(KeyboardInterrupt):
        load_model("loading_networks:interrupted", None, digits)


def test_devices() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(FlatminimaError, match="device 'abacus' cannot be used here") as caught:
        resolve_device("abacus")
    assert "\n" not in str(caught.value)
