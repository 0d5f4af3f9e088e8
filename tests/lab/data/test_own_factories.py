"""A user's own data sets and loaders, as ``package.module:factory``."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flatminima.errors import FlatminimaError, ShuffledLoaderWarning
from flatminima.lab.data import ReadySamples, open_data
from flatminima.lab.reading import Reading
from support.messages import one_line

SETS = """
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

INPUTS, LABELS = torch.arange(24.0).reshape(6, 4), torch.tensor([0, 1, 2, 2, 1, 0])

class Folder(Dataset):
    classes = ["a", "b", "c", "d"]
    def __len__(self): return 6
    def __getitem__(self, i): return INPUTS[i].reshape(1, 2, 2), int(LABELS[i])

class Augmented(Folder):
    def __getitem__(self, i): return torch.rand(4), 0

class Broken(Folder):
    def __getitem__(self, i): raise OSError("no such\\nfile")

def tensors(): return TensorDataset(INPUTS, LABELS)
def pair(): return INPUTS, LABELS
def loader(): return DataLoader(tensors(), batch_size=4)
def shuffled(): return DataLoader(tensors(), shuffle=True)
def of_split(split): return TensorDataset(INPUTS, LABELS + (split == "val"))
def nothing(): return None
def failing(): raise RuntimeError("no disk")
"""


@pytest.fixture(autouse=True)
def _sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sets_of_a_stranger.py").write_text(SETS)
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.parametrize(
    ("factory", "classes", "channels"),
    [("tensors", 3, None), ("loader", 3, None), ("pair", None, None), ("Folder", 4, 1)],
)
def test_a_factory_gives_its_samples_as_they_are(factory: str, classes: int | None, channels: int | None) -> None:
    data = open_data(f"sets_of_a_stranger:{factory}").data
    assert isinstance(data, ReadySamples)
    assert (len(data), data.num_classes, data.channels) == (6, classes, channels)
    inputs, labels = data.fetch([5, 1])
    assert torch.equal(inputs.flatten(1), torch.arange(24.0).reshape(6, 4)[[5, 1]])
    assert labels.tolist() == [0, 1]
    assert open_data(f"sets_of_a_stranger:{factory}", Reading(train_size=2)).data.fetch([0, 1])[1].shape == (2,)  # type: ignore[union-attr]


def test_a_factory_is_told_the_split_if_it_asks() -> None:
    data = open_data("sets_of_a_stranger:of_split", Reading(split="val")).data
    assert isinstance(data, ReadySamples)
    assert data.fetch([0])[1].tolist() == [1]


def test_a_loaders_shuffling_is_ignored_and_said() -> None:
    with pytest.warns(ShuffledLoaderWarning):
        open_data("sets_of_a_stranger:shuffled")


@pytest.mark.parametrize(
    ("factory", "said"),
    [
        ("Augmented", "the data set differs between two passes"),
        ("Broken", r"reading its first samples failed \(OSError: no such file\)"),
        ("nothing", "data of type NoneType is not understood"),
        ("failing", r"calling it failed \(RuntimeError: no disk\)"),
        ("tensor", r"has no function or class 'tensor' \(did you mean 'tensors'\?\)"),
    ],
)
def test_a_factory_that_is_wrong_is_one_line(factory: str, said: str) -> None:
    with pytest.raises(FlatminimaError, match=said) as caught:
        open_data(f"sets_of_a_stranger:{factory}")
    assert f"data sets_of_a_stranger:{factory}: " in one_line(caught)


def test_its_images_are_not_prepared_once_more() -> None:
    with pytest.raises(FlatminimaError, match="normalize, crop: only images of 8 bits"):
        open_data("sets_of_a_stranger:Folder", Reading(normalize="none", crop=2))
