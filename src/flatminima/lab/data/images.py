"""Labelled images as uint8 tensors, and what they must be like."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from flatminima.errors import FlatminimaError


@dataclass(frozen=True, eq=False, repr=False)
class ImageSet(Dataset[tuple[Tensor, Tensor]]):
    """Labelled images, held as uint8 and handed out normalized.

    Attributes:
        images: ``(N, C, H, W)`` uint8.
        labels: ``(N,)`` int64, each in ``0..num_classes-1``.
        num_classes: Number of classes.
        mean: ``(C,)`` float32, mean of each channel over the whole training split, in units where white is 1.
        std: ``(C,)`` float32, standard deviation of each channel, likewise.

    Raises:
        FlatminimaError: A tensor has the wrong type or shape, a label is out of range, or a channel never varies.
    """

    images: Tensor
    labels: Tensor
    num_classes: int
    mean: Tensor
    std: Tensor
    loss: ClassVar[Literal["cross_entropy"]] = "cross_entropy"

    def __post_init__(self) -> None:
        check_images(self.images)
        count, channels = self.images.shape[:2]
        if self.labels.dtype != torch.int64 or self.labels.shape != (count,):
            raise FlatminimaError(
                f"labels must be int64 of shape ({count},), one for each image; "
                f"got {self.labels.dtype} of shape {tuple(self.labels.shape)}"
            )
        if self.mean.shape != (channels,) or self.std.shape != (channels,):
            raise FlatminimaError(
                f"mean and std need one value for each of {channels} channels, "
                f"got shapes {tuple(self.mean.shape)} and {tuple(self.std.shape)}"
            )
        if not bool((self.std > 0).all()):
            raise FlatminimaError(
                f"a channel has the same value in every training pixel (std {self.std.tolist()}) and cannot be "
                "normalized; drop that channel"
            )
        check_labels(self.labels, self.num_classes)

    def __repr__(self) -> str:
        shape = "×".join(map(str, self.images.shape[1:]))
        return f"ImageSet({len(self)} images {shape}, {self.num_classes} classes, on {self.images.device})"

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def channels(self) -> int:
        """C."""
        return self.images.shape[1]

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel, as given: of the whole training split."""
        return self.mean, self.std

    def normalized(self, mean: Tensor, std: Tensor) -> ImageSet:
        """The same images, handed out with another mean subtracted, and divided by another deviation."""
        return dataclasses.replace(self, mean=mean, std=std)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """The normalized image ``(C, H, W)`` and its label, a scalar tensor."""
        return self.normalize(self.images[index]), self.labels[index]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """What ``[self[i] for i in indices]`` gives, normalized in one go; a ``DataLoader`` asks for it."""
        images, labels = self.subset(indices).tensors()
        return list(zip(images, labels, strict=True))

    def fetch(self, indices: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
        """The images at ``indices`` as one batch: (B, C, H, W) normalized float32, and (B,) labels."""
        chosen = torch.as_tensor(indices, device=self.labels.device)
        return self.normalize(self.images[chosen]), self.labels[chosen]

    def normalize(self, images: Tensor) -> Tensor:
        """Images ``(..., C, H, W)`` uint8 to float32, each channel with the training split's mean 0 and std 1."""
        return (images.to(torch.float32) / 255 - self.mean[:, None, None]) / self.std[:, None, None]

    def tensors(self) -> tuple[Tensor, Tensor]:
        """All images, normalized ``(N, C, H, W)`` float32, and all labels ``(N,)``."""
        return self.normalize(self.images), self.labels

    def subset(self, indices: Sequence[int] | Tensor) -> ImageSet:
        """The images at ``indices``, in that order, with the same normalization."""
        # An empty list would become a float tensor, which does not index.
        index = torch.as_tensor(indices, device=self.labels.device) if len(indices) else slice(0)
        return dataclasses.replace(self, images=self.images[index], labels=self.labels[index])

    def to(self, device: torch.device | str) -> ImageSet:
        """The same data on ``device``."""
        return dataclasses.replace(
            self,
            images=self.images.to(device),
            labels=self.labels.to(device),
            mean=self.mean.to(device),
            std=self.std.to(device),
        )


def channel_statistics(parts: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and (population) standard deviation of each channel, from exact counts of the 256 values.

    Args:
        parts: Images ``(B, C, H, W)`` uint8, some at a time.

    Returns:
        ``(C,)`` float32 each, in units where white is 1.
    """
    counts = sum(
        torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in part.unbind(1)]) for part in parts
    )
    assert isinstance(counts, Tensor)
    weights = counts.double() / counts.sum(1, keepdim=True)
    values = torch.arange(256, dtype=torch.float64) / 255
    mean = weights @ values
    variance = (weights * (values - mean[:, None]) ** 2).sum(1)
    return mean.float(), variance.sqrt().float()


def check_images(images: Tensor) -> None:
    """Refuse anything but uint8 images (N, C, H, W)."""
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise FlatminimaError(
            f"images must be uint8 of shape (N, C, H, W), got {images.dtype} of shape {tuple(images.shape)}"
        )


def check_labels(labels: Tensor, num_classes: int, where: str = "") -> None:
    """Refuse labels outside 0..K − 1; names the first row."""
    bad = ((labels < 0) | (labels >= num_classes)).nonzero().flatten()
    if len(bad):
        row = int(bad[0])
        raise FlatminimaError(
            f"{where}label {int(labels[row])} in row {row} is outside 0..{num_classes - 1} ({len(bad)} such rows); "
            "correct or drop them"
        )
