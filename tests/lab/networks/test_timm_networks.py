"""Networks of timm, through a stand-in: timm itself needs torchvision, which the tests do without."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from flatminima.errors import FlatminimaError
from flatminima.lab.data import Normalization, Pictures, Preparation, ReadySamples, open_data
from flatminima.lab.errors import AdaptedCheckpointWarning, UnlikeClassesWarning
from flatminima.lab.reading import Reading
from flatminima.lab.runs import LoadedNetwork, load_network
from support.images import image_set, random_images
from support.messages import one_line
from support.own_data import class_folders

CONFIG: dict[str, Any] = {"interpolation": "bilinear", "mean": (0.5,), "std": (0.25,)}


def small_network(num_classes: int, in_chans: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(in_chans, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, num_classes))


def transformed(image: Image.Image) -> Tensor:
    pixels = torch.from_numpy(np.atleast_3d(np.array(image.resize((4, 4), Image.Resampling.BILINEAR)))).permute(2, 0, 1)
    return (pixels / 255 - 0.5) / 0.25


@pytest.fixture(autouse=True)
def made(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What ``timm.create_model`` was called with."""
    calls: list[dict[str, Any]] = []

    def create_model(name: str, *, pretrained: bool, num_classes: int = 1000, in_chans: int = 3) -> nn.Module:
        calls.append({"pretrained": pretrained, "num_classes": num_classes, "in_chans": in_chans})
        if name == "unreachable":
            raise ConnectionError("no route\nto the hub")
        return small_network(num_classes, in_chans)

    def create_transform(*, is_training: bool, **config: Any) -> Any:
        assert not is_training
        assert config == {"input_size": config["input_size"], **CONFIG}
        return transformed

    timm, data = ModuleType("timm"), ModuleType("timm.data")
    known = ["small_net", "unreachable"]
    for name, value in {
        "create_model": create_model,
        "data": data,
        "__version__": "1.0",
        "is_model": known.__contains__,
        "list_models": lambda: known,
    }.items():
        setattr(timm, name, value)
    data.resolve_model_data_config = lambda model: {"input_size": (model[0].in_channels, 4, 4), **CONFIG}  # type: ignore[attr-defined]
    data.create_transform = create_transform  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "timm", timm)
    monkeypatch.setitem(sys.modules, "timm.data", data)
    return calls


@pytest.fixture
def pictures(tmp_path: Path) -> Pictures:
    data = open_data(str(class_folders(tmp_path / "photos"))).data
    assert isinstance(data, Pictures)
    return data


def of_checkpoint(folder: Path, data: Any, reading: Reading | None = None, **sizes: int) -> LoadedNetwork:
    """The network with weights that data parallel training wrote."""
    torch.manual_seed(0)
    state = small_network(**sizes or {"num_classes": 2, "in_chans": 3}).state_dict()
    torch.save({f"module.{name}": tensor for name, tensor in state.items()}, folder / "net.pt")
    with pytest.warns(AdaptedCheckpointWarning, match=r"'module\.' was taken off"):
        return load_network("timm:small_net", folder / "net.pt", data, reading)


def test_its_own_transforms_make_the_inputs(tmp_path: Path, pictures: Pictures, made: list[dict[str, Any]]) -> None:
    network = of_checkpoint(tmp_path, pictures)
    assert made == [{"pretrained": False, "num_classes": 2, "in_chans": 3}]
    inputs, labels = network.data.fetch([7, 0])
    with Image.open(tmp_path / "photos" / "dog" / "1.png") as image:
        torch.testing.assert_close(inputs[0], transformed(image))
    assert labels.tolist() == [1, 0]
    assert isinstance(network.preparation, Preparation)
    assert "timm's own transforms (input_size (3, 4, 4), interpolation bilinear" in str(network.preparation)
    assert network.preparation.is_that_of(of_checkpoint(tmp_path, pictures).preparation)


def test_images_in_memory_go_through_them_too(tmp_path: Path) -> None:
    grey = image_set(images=random_images(7, channels=1), mean=torch.zeros(1), std=torch.ones(1))
    network = of_checkpoint(tmp_path, grey, num_classes=3, in_chans=1)
    image = Image.fromarray(grey.images[3, 0].numpy())
    assert isinstance(network.data, ReadySamples)
    torch.testing.assert_close(network.data.fetch([3])[0][0], transformed(image))


def test_what_the_user_says_takes_their_place(tmp_path: Path, pictures: Pictures) -> None:
    reading = Reading(normalize="none", resize="4x4")
    network = of_checkpoint(tmp_path, open_data(pictures.source.where, reading).data, reading)
    assert isinstance(network.preparation, Normalization)


def test_without_a_checkpoint_its_own_head_is_kept(pictures: Pictures, made: list[dict[str, Any]]) -> None:
    with pytest.warns(UnlikeClassesWarning, match="has 1000 outputs, but the data have 2 classes"):
        load_network("timm:small_net", None, pictures)
    assert made == [{"pretrained": True, "num_classes": 1000, "in_chans": 3}]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("smal_net", r"timm 1\.0 has no such model \(did you mean 'small_net'\?\)"),
        ("unreachable", r"with its weights from the hub; a checkpoint .* \(ConnectionError: no route to the hub\)"),
    ],
)
def test_a_name_that_gives_no_network_is_one_line(name: str, said: str, pictures: Pictures) -> None:
    with pytest.raises(FlatminimaError, match=said) as caught:
        load_network(f"timm:{name}", None, pictures)
    assert f"model timm:{name}" in one_line(caught)


def test_without_timm_it_is_said_what_to_install(pictures: Pictures, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(FlatminimaError, match="pip install timm") as caught:
        load_network("timm:small_net", None, pictures)
    one_line(caught)
