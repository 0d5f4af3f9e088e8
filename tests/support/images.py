"""Small sets of images, and folders of parquet files with them."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flatminima.lab.data.images import ImageSet


def random_images(count: int, channels: int = 3, height: int = 5, width: int = 6, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, channels, height, width), dtype=torch.uint8, generator=generator)


def image_set(count: int = 7, num_classes: int = 3, **changes: Any) -> ImageSet:
    fields: dict[str, Any] = {
        "images": random_images(count),
        "labels": torch.arange(count) % num_classes,
        "num_classes": num_classes,
        "mean": torch.tensor([0.4, 0.5, 0.6]),
        "std": torch.tensor([0.2, 0.25, 0.3]),
    }
    return ImageSet(**(fields | changes))


TEST_SHARD = "test-00000-of-00001.parquet"


def encode(pixels: np.ndarray, image_format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, image_format, lossless=True)
    return buffer.getvalue()


def encode_all(images: Tensor, image_format: str = "PNG") -> list[bytes]:
    return [encode(image.permute(1, 2, 0).squeeze(2).numpy(), image_format) for image in images]


def write_shard(
    path: Path,
    images: list[bytes | None],
    labels: list[Any],
    *,
    image_column: str = "img",
    label_column: str = "label",
    label_feature: Any = None,
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = [None if image is None else {"bytes": image, "path": None} for image in images]
    features = datasets.Features(
        {image_column: datasets.Image(), label_column: label_feature or datasets.ClassLabel(names=["a", "b", "c"])}
    )
    if isinstance(label_feature, datasets.Value):
        convert = {"string": str, "float32": float}.get(label_feature.dtype, int)
        labels = [convert(label) for label in labels]
    rows = datasets.Dataset.from_dict({image_column: cells, label_column: labels}, features=features)
    rows.to_parquet(path)


@dataclasses.dataclass
class Folder:
    """A folder of three shards and what is in it."""

    path: Path
    train_images: Tensor
    train_labels: list[int]
    test_images: Tensor
    test_labels: list[int]


def make_folder(path: Path, *, channels: int = 3, image_format: str = "PNG", **columns: Any) -> Folder:
    train, test = random_images(7, channels), random_images(4, channels, seed=1)
    train_labels, test_labels = [0, 1, 2, 1, 0, 2, 2], [2, 1, 0, 0]
    encoded = encode_all(train, image_format)
    write_shard(path / "train-00000-of-00002.parquet", encoded[:4], train_labels[:4], **columns)
    write_shard(path / "train-00001-of-00002.parquet", encoded[4:], train_labels[4:], **columns)
    write_shard(path / TEST_SHARD, encode_all(test, image_format), test_labels, **columns)
    return Folder(path, train, train_labels, test, test_labels)


def assert_holds(folder: Folder, loaded: tuple[ImageSet, ImageSet]) -> None:
    train, test = loaded
    assert torch.equal(train.images, folder.train_images)
    assert torch.equal(test.images, folder.test_images)
    assert train.labels.tolist() == folder.train_labels
    assert test.labels.tolist() == folder.test_labels


def numbered_set(count: int, num_classes: int) -> ImageSet:
    """Image i says i in its pixels, so that a copy of it can be told."""
    number = torch.arange(count)
    pixels = torch.stack([number // 256, number % 256], dim=1).to(torch.uint8)[:, :, None, None]
    return ImageSet(pixels, number * 7 % num_classes, num_classes, torch.full((2,), 0.5), torch.ones(2))


def numbers(samples: ImageSet) -> list[int]:
    high, low = samples.images[:, :, 0, 0].long().unbind(1)
    return (high * 256 + low).tolist()
