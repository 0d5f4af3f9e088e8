"""Augmentation, held-out images and confusion sets (Jia & Su, Sec. 7.1)."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from flatminima.errors import FlatminimaError
from flatminima.lab.data.images import ImageSet, check_images
from flatminima.lab.names import AUGMENTATIONS

_HELD_OUT_SEED = -1  # no run's: those are not negative

_CROP_PADDING = {"flip-only": 0, "1-crop-f": 1, "4-crop-f": 4}


def augment(images: Tensor, scheme: str, generator: torch.Generator) -> Tensor:
    """Each image cropped at random out of its zero-padded self and, half of the time, mirrored left to right.

    Args:
        images: ``(B, C, H, W)`` uint8.
        scheme: One of :data:`AUGMENTATIONS`: ``"1-crop-f"`` and ``"4-crop-f"`` pad 1 and 4 pixels on each side,
            ``"flip-only"`` does not crop, ``"no-aug"`` returns the images as they are and draws nothing.
        generator: Source of the randomness, on any device; the same state gives the same result on every device.

    Returns:
        ``(B, C, H, W)`` uint8, on the device of ``images``.

    Raises:
        FlatminimaError: The scheme is unknown, or the images are not uint8 ``(B, C, H, W)``.
    """
    check_images(images)
    if scheme not in AUGMENTATIONS:
        raise FlatminimaError(f"unknown augmentation {scheme!r}; use one of {', '.join(AUGMENTATIONS)}")
    if scheme == "no-aug":
        return images
    padding = _CROP_PADDING[scheme]
    batch, channels, height, width = images.shape

    highs = (2 * padding + 1, 2 * padding + 1, 2)
    drawn = [torch.randint(high, (batch, 1), generator=generator, device=generator.device) for high in highs]
    # One copy, and to a GPU one that does not wait for the work before it.
    top, left, mirrored = torch.stack(drawn).to(images.device, non_blocking=images.is_cuda)  # (B, 1) each
    rows = top + torch.arange(height, device=images.device)  # (B, H)
    columns = left + torch.arange(width, device=images.device)  # (B, W)
    columns = torch.where(mirrored == 1, columns.flip(1), columns)
    padded = F.pad(images, (padding, padding, padding, padding))
    # One gather over flat pixels is five times as fast as indexing the four axes.
    pixels = rows[:, :, None] * padded.shape[3] + columns[:, None, :]  # (B, H, W)
    pixels = pixels.reshape(batch, 1, height * width).expand(batch, channels, -1)
    return padded.flatten(2).gather(2, pixels).reshape(images.shape)


def hold_out(train: ImageSet, count: int) -> tuple[ImageSet, ImageSet]:
    """``count`` images drawn at random, the same on every call: whoever compares runs compares them on the same images.

    Args:
        train: The set to draw from.
        count: Images to hold out.

    Returns:
        The images that are left, in their order, and those held out.

    Raises:
        FlatminimaError: The count is negative, or leaves none.
    """
    if not 0 <= count < len(train):
        raise FlatminimaError(f"cannot hold out {count} of {len(train)} training images; leave at least 1 to train on")
    drawn = torch.randperm(len(train), generator=torch.Generator().manual_seed(_HELD_OUT_SEED))
    kept = train.subset(drawn[count:].sort().values) if count else train  # without a copy
    return kept, train.subset(drawn[:count])


def confuse(train: ImageSet, *, num_clean: int | None, num_confused: int, seed: int) -> tuple[ImageSet, ImageSet]:
    """Scenario I: images drawn at random, and others beside them whose labels say nothing.

    Args:
        train: The set to draw from.
        num_clean: Images that keep their labels; None for all that are not confused.
        num_confused: Further images, whose labels are drawn uniformly from all classes, the true one included.
        seed: The same seed draws the same images and labels.

    Returns:
        The clean set, on which the measures are evaluated, and the set to train on: the clean one followed by the
        confused one.

    Raises:
        FlatminimaError: A count is negative, the clean set is empty, or both together exceed ``train``.
    """
    if num_clean is None:
        num_clean = len(train) - num_confused
    if num_clean < 1 or num_confused < 0 or num_clean + num_confused > len(train):
        raise FlatminimaError(
            f"cannot draw {num_clean} clean and {num_confused} confused images from {len(train)}; "
            "ask for at least 1 clean, at least 0 confused, and no more than there are"
        )
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(len(train), generator=generator)
    labels = torch.randint(train.num_classes, (num_confused,), generator=generator)
    clean = train.subset(drawn[:num_clean])
    if num_confused == 0:
        return clean, clean
    confused = train.subset(drawn[num_clean : num_clean + num_confused])
    return clean, dataclasses.replace(
        clean,
        images=torch.cat([clean.images, confused.images]),
        labels=torch.cat([clean.labels, labels.to(clean.labels.device)]),
    )
