"""How pixels become inputs: (pixel / 255 − mean) / std, channel by channel; a network is trained with one of these."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from flatminima.errors import FlatminimaError, did_you_mean
from flatminima.lab.data.images import ImageSet
from flatminima.lab.data.pictures import Pictures

ImageData = ImageSet | Pictures

FROM_DATA = "data"
"""The name of what these images themselves have: mean 0 and standard deviation 1 in the training set."""
_KNOWN: dict[str, tuple[Sequence[float], Sequence[float]]] = {
    "none": ((0.0,), (1.0,)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
"""Mean and standard deviation by name, of pixels from 0 to 1: one for all channels, or one for each."""
NORMALIZATIONS = (FROM_DATA, *_KNOWN)
"""What a normalization may be called; any other is given as MEAN/STD."""


@dataclass(frozen=True)
class Normalization:
    """The mean that is subtracted from pixels of 0 to 1, and what they are then divided by."""

    name: str
    """One of :data:`NORMALIZATIONS`, MEAN/STD as it was given, or where it comes from."""
    mean: tuple[float, ...]
    """By channel."""
    std: tuple[float, ...]
    """By channel."""

    @classmethod
    def of(cls, images: ImageData, name: str = FROM_DATA) -> Normalization:
        """The one that a set of images has."""
        mean, std = images.statistics()
        return cls(name, tuple(mean.tolist()), tuple(std.tolist()))

    @classmethod
    def named(cls, name: str, images: ImageData) -> Normalization:
        """A normalization by its name, or as MEAN/STD (``0.5/0.5``, ``0.49,0.48,0.45/0.25,0.24,0.26``).

        Raises:
            FlatminimaError: There is none of that name, or not one number for each channel of the images.
        """
        if name == FROM_DATA:
            return cls.of(images)
        channels = images.channels
        mean, std = _KNOWN[name] if name in _KNOWN else _numbers(name)
        if not {len(mean), len(std)} <= {1, channels}:
            raise FlatminimaError(
                f"normalize {name!r} has {len(mean)} means and {len(std)} standard deviations, but the images have "
                f"{channels} channel{'' if channels == 1 else 's'}: give one number for all, or one for each"
            )
        return cls(name, _by_channel(mean, channels), _by_channel(std, channels))

    def apply(self, images: ImageData) -> ImageData:
        """The same images, normalized in this way."""
        return images.normalized(torch.tensor(self.mean), torch.tensor(self.std))

    def is_that_of(self, other: object) -> bool:
        """Whether both make the same inputs, whatever they are called."""
        return isinstance(other, Normalization) and (self.mean, self.std) == (other.mean, other.std)

    def as_json(self) -> dict[str, Any]:
        """For a report."""
        return dataclasses.asdict(self)

    def as_text(self) -> str:
        """As :meth:`named` takes it, to the last bit."""
        return "/".join(",".join(map(repr, values)) for values in (self.mean, self.std))

    def __str__(self) -> str:
        mean, std = (", ".join(f"{value:.4g}" for value in values) for values in (self.mean, self.std))
        return f"{self.name} (mean {mean}; std {std})"


def _by_channel(values: Sequence[float], channels: int) -> tuple[float, ...]:
    return tuple(values) * (channels if len(values) == 1 else 1)


def _numbers(text: str) -> tuple[Sequence[float], Sequence[float]]:
    try:
        mean, std = ([float(number) for number in part.split(",")] for part in text.split("/"))
    except ValueError:
        mean, std = [], []
    if not mean or not all(map(math.isfinite, (*mean, *std))) or min(std) <= 0:
        raise FlatminimaError(
            f"normalize cannot be {text!r}{did_you_mean(text, NORMALIZATIONS)}: give one of "
            f"{', '.join(NORMALIZATIONS)}, or MEAN/STD of pixels from 0 to 1, as 0.5/0.5"
        )
    return mean, std
