from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from flatminima.errors import FlatminimaError
from flatminima.lab.data.augmentation import augment
from support.images import image_set
from support.messages import one_line


def test_items_are_normalized_pixels_and_labels() -> None:
    samples = image_set()
    image, label = samples[4]
    assert image.dtype == torch.float32
    assert image.shape == (3, 5, 6)
    assert label.shape == ()
    assert label == 1
    for channel in range(3):
        expected = (samples.images[4, channel].double() / 255 - samples.mean[channel]) / samples.std[channel]
        torch.testing.assert_close(image[channel].double(), expected, rtol=1e-6, atol=1e-6)


def test_every_way_to_fetch_gives_the_same_bits() -> None:
    samples = image_set()
    inputs, labels = samples.tensors()
    indices = [5, 0, 5, -1]
    batch = samples.__getitems__(indices)
    assert len(batch) == 4
    for position, index in enumerate(indices):
        for image, label in (samples[index], batch[position], samples.subset(indices)[position]):
            assert torch.equal(image, inputs[index])
            assert torch.equal(label, labels[index])


def test_data_loader_batches_equal_the_tensors() -> None:
    samples = image_set()
    batches = list(DataLoader(samples, batch_size=3))
    assert [len(labels) for _, labels in batches] == [3, 3, 1]
    inputs, labels = samples.tensors()
    assert torch.equal(torch.cat([x for x, _ in batches]), inputs)
    assert torch.equal(torch.cat([y for _, y in batches]), labels)


def test_iteration_ends() -> None:
    samples = image_set()
    assert len(samples) == 7
    with pytest.raises(IndexError):
        samples[7]


@pytest.mark.parametrize(
    "indices", [[2, 0], torch.tensor([2, 0]), range(2, -1, -2), np.array([2, 0])], ids=["list", "tensor", "range", "np"]
)
def test_subset_keeps_order_and_normalization(indices: Any) -> None:
    samples = image_set()
    part = samples.subset(indices)
    assert torch.equal(part.images, samples.images[[2, 0]])
    assert part.labels.tolist() == [2, 0]
    assert torch.equal(part.mean, samples.mean)
    assert part.num_classes == 3


def test_subset_by_mask_and_of_nothing() -> None:
    samples = image_set()
    assert samples.subset(samples.labels == 1).labels.tolist() == [1, 1]
    assert len(samples.subset([])) == 0
    assert samples.__getitems__([]) == []


@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
)
def test_to_moves_every_tensor(device: str) -> None:
    samples = image_set()
    moved = samples.to(device)
    assert {t.device.type for t in (moved.images, moved.labels, moved.mean, moved.std)} == {device}
    assert torch.equal(moved.tensors()[0].cpu(), samples.tensors()[0])
    assert torch.equal(moved.subset([3, 1]).labels.cpu(), samples.labels[[3, 1]])
    crops = augment(moved.images, "4-crop-f", torch.Generator().manual_seed(0))
    assert torch.equal(crops.cpu(), augment(samples.images, "4-crop-f", torch.Generator().manual_seed(0)))


def test_repr_is_short() -> None:
    assert repr(image_set()) == "ImageSet(7 images 3×5×6, 3 classes, on cpu)"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": torch.zeros(7, 3, 5, 6)}, "images must be uint8"),
        ({"images": torch.zeros(7, 5, 6, dtype=torch.uint8)}, "images must be uint8 of shape"),
        ({"labels": torch.zeros(7)}, "labels must be int64"),
        ({"labels": torch.zeros(6, dtype=torch.int64)}, r"labels must be int64 of shape \(7,\)"),
        ({"labels": torch.tensor([0, 1, 2, 3, 3, 0, 0])}, r"label 3 in row 3 is outside 0\.\.2 \(2 such rows\)"),
        ({"labels": torch.tensor([0, -1, 2, 0, 0, 0, 0])}, "label -1 in row 1"),
        ({"mean": torch.zeros(1)}, "one value for each of 3 channels"),
        ({"std": torch.tensor([0.2, 0.0, 0.3])}, "same value in every training pixel"),
        ({"std": torch.tensor([0.2, float("nan"), 0.3])}, "cannot be normalized"),
    ],
)
def test_inconsistent_sets_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FlatminimaError, match=message) as caught:
        image_set(**changes)
    one_line(caught)


def test_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        image_set().num_classes = 4  # type: ignore[misc]
