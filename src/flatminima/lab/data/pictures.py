"""Labelled images of any size and number, decoded when they are asked for and brought to one shape."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from flatminima.errors import FlatminimaError, require
from flatminima.lab.data.decoding import decode_image
from flatminima.lab.data.images import ImageSet, channel_statistics
from flatminima.lab.reading import Reading
from flatminima.network import index_batches
from flatminima.progress import track

if TYPE_CHECKING:
    from PIL import Image

_MODES = {1: "L", 3: "RGB"}
_CONVERTIBLE = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")
"""What Pillow makes grey or RGB of as torchvision's ImageFolder does; of more than 8 bits it would cut the rest off."""
_AT_ONCE = 100  # images that statistics are taken of: what is held is small whatever their number


class ImageSource(Protocol):
    """Where images lie."""

    @property
    def where(self) -> str:
        """What an error calls them."""
        ...

    def __len__(self) -> int: ...

    def encoded(self, indices: Sequence[int]) -> Sequence[bytes | Path | Image.Image]:
        """The files of some, what is in them, or the images themselves."""
        ...

    def name(self, index: int) -> str:
        """What an error calls one of them."""
        ...


@dataclass(frozen=True, eq=False)
class Pictures:
    """Labelled images, decoded, cropped and normalized as they are asked for.

    Attributes:
        source: Where they lie.
        labels: ``(N,)`` int64.
        num_classes: Number of classes.
        channels: 1 (grey) or 3 (RGB).
        reading: How they are brought to one shape (``size``, ``crop``) and to ``channels``, if ``in_channels``.
        chosen: ``(N,)``: which of the source's images they are.
        mean: ``(channels,)`` float32, subtracted from pixels of 0 to 1.
        std: ``(channels,)`` float32, which they are then divided by.
    """

    source: ImageSource
    labels: Tensor
    num_classes: int
    channels: int
    reading: Reading = field(default_factory=Reading)
    chosen: Tensor | None = None
    mean: Tensor | None = None
    std: Tensor | None = None
    loss: ClassVar[Literal["cross_entropy"]] = "cross_entropy"

    @classmethod
    def of(cls, source: ImageSource, labels: Tensor, num_classes: int, reading: Reading) -> Pictures:
        """Images as a user wants them read: grey or RGB, as the first one is, where nothing is said."""
        channels = reading.in_channels
        if channels is None:
            mode = _opened(source, 0).mode
            channels = {name: number for number, name in _MODES.items()}.get(mode)
            if channels is None:
                raise FlatminimaError(
                    f"{source.where}: {source.name(0)} has mode {mode}, neither RGB nor L (grey): give in_channels, 3 "
                    "or 1, to convert all images as the training did"
                )
        return cls(source, labels, num_classes, channels, reading)

    def __len__(self) -> int:
        return len(self.labels)

    def fetch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The images at ``indices`` as one batch: (B, C, H, W) normalized float32, and (B,) labels."""
        inputs = self.pixels(indices).to(torch.float32) / 255
        if self.mean is not None and self.std is not None:
            inputs = (inputs - self.mean[:, None, None]) / self.std[:, None, None]
        return inputs, self.labels[torch.as_tensor(indices)]

    def pixels(self, indices: Sequence[int]) -> Tensor:
        """The images at ``indices``, (B, C, H, W) uint8.

        Raises:
            FlatminimaError: One cannot be decoded, or has another number of channels or another shape.
        """
        places = self._places(indices)
        arrays = self._each(places, lambda image: np.atleast_3d(np.asarray(self._shaped(image))))
        for place, array in zip(places, arrays, strict=True):
            if array.shape != arrays[0].shape:
                raise FlatminimaError(
                    f"{self.source.where}: {self.source.name(place)} is {_size(array)}, {self.source.name(places[0])} "
                    f"{_size(arrays[0])}: give resize, and crop, as in the training, to bring all to one shape"
                )
        return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()

    def images(self, indices: Sequence[int], channels: int) -> list[Image.Image]:
        """The images at ``indices`` as they lie there, grey or RGB: what networks' own transforms take."""
        return self._each(self._places(indices), lambda image: _converted(image, channels))

    def encoded(self, indices: Sequence[int]) -> Sequence[bytes | Path | Image.Image]:
        """The images at ``indices`` as their source has them."""
        return self.source.encoded(self._places(indices))

    def subset(self, indices: Sequence[int] | Tensor) -> Pictures:
        """The images at ``indices``, in that order."""
        chosen = torch.as_tensor(indices)
        places = torch.tensor(self._places(chosen.tolist()), dtype=torch.long)
        return dataclasses.replace(self, chosen=places, labels=self.labels[chosen])

    def normalized(self, mean: Tensor, std: Tensor) -> Pictures:
        """The same images, with a mean subtracted, and divided by a deviation."""
        require(
            bool((std > 0).all()),
            f"{self.source.where}: a channel has the same value in every pixel (std {std.tolist()}) and cannot be "
            "normalized by it: give normalize",
        )
        return dataclasses.replace(self, mean=mean, std=std)

    def decoded(self) -> ImageSet:
        """The same images in memory, to be normalized by their own mean and deviation."""
        pixels = self.pixels(range(len(self)))
        return ImageSet(pixels, self.labels, self.num_classes, *channel_statistics([pixels]))

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel, (C,) each, over all of the images: they are read once."""
        return channel_statistics(self._parts())

    def _parts(self) -> Iterator[Tensor]:
        for some in track(index_batches(len(self), _AT_ONCE), "mean of the images"):
            yield self.pixels(some)

    def _places(self, indices: Sequence[int]) -> list[int]:
        """Where in the source they are."""
        return [int(i if self.chosen is None else self.chosen[i]) for i in indices]

    def _each(self, places: list[int], function: Callable[[Image.Image], Any]) -> list[Any]:
        """Something of every image; on all cores, as Pillow decodes without Python's lock."""
        encoded = self.source.encoded(places)

        def of(number: int) -> Any:
            place, image = places[number], encoded[number]
            if isinstance(image, (bytes, Path)):
                image = decode_image(image, self.source.name(place), self.source.where)
            try:
                return function(image)
            except _UnfitImageError as error:
                raise FlatminimaError(f"{self.source.where}: {self.source.name(place)} {error}") from None

        with ThreadPoolExecutor(os.cpu_count()) as threads:
            return list(threads.map(of, range(len(places))))

    def _shaped(self, image: Image.Image) -> Image.Image:
        wanted = _MODES[self.channels]
        if image.mode != wanted and self.reading.in_channels is None:
            raise _UnfitImageError(
                f"has mode {image.mode}, the first image {wanted}: give in_channels, 3 or 1, to convert all images as "
                "the training did"
            )
        return _cropped(_resized(_converted(image, self.channels), self.reading.size), self.reading.crop)


def as_pictures(images: ImageSet, where: str, reading: Reading) -> Pictures:
    """Images that lie in memory, to be prepared like others."""
    return Pictures.of(_InMemory(images.images, where), images.labels, images.num_classes, reading)


@dataclass(frozen=True)
class _InMemory:
    pixels: Tensor
    where: str

    def __len__(self) -> int:
        return len(self.pixels)

    def encoded(self, indices: Sequence[int]) -> list[Image.Image]:
        from PIL import Image

        require(self.pixels.shape[1] in _MODES, f"{self.where}: images of {self.pixels.shape[1]} channels are no RGB")
        chosen = self.pixels[torch.as_tensor(indices)].permute(0, 2, 3, 1)
        return [Image.fromarray(pixels.squeeze(2).contiguous().numpy()) for pixels in chosen]

    def name(self, index: int) -> str:
        return f"image {index}"


class _UnfitImageError(Exception):
    """An image is not as it has to be; the message says what it is."""


def _opened(source: ImageSource, index: int) -> Image.Image:
    (image,) = source.encoded([index])
    return decode_image(image, source.name(index), source.where) if isinstance(image, (bytes, Path)) else image


def _converted(image: Image.Image, channels: int) -> Image.Image:
    if image.mode not in _CONVERTIBLE:
        raise _UnfitImageError(
            f"has mode {image.mode}, more than 8 bits a pixel: store it as the training saw it, in 8 bits or as arrays"
        )
    return image.convert(_MODES[channels])


def _resized(image: Image.Image, size: tuple[int, ...] | None) -> Image.Image:
    """As torchvision's ``Resize`` does: bilinear, one number for the shorter side."""
    from PIL import Image

    if size is None:
        return image
    width, height = image.size
    if len(size) == 1:
        shorter = min(width, height)
        size = (int(size[0] * height / shorter), int(size[0] * width / shorter))
    return image.resize((size[1], size[0]), Image.Resampling.BILINEAR)


def _cropped(image: Image.Image, side: int | None) -> Image.Image:
    """As torchvision's ``CenterCrop`` does."""
    if side is None:
        return image
    width, height = image.size
    if side > min(width, height):
        raise _UnfitImageError(f"is {height}×{width} after resizing, smaller than crop={side}: give a larger resize")
    left, top = round((width - side) / 2), round((height - side) / 2)
    return image.crop((left, top, left + side, top + side))


def _size(array: np.ndarray[Any, Any]) -> str:
    return "×".join(map(str, array.shape[:2]))
