"""From the rows of the ``datasets`` library to tensors, checked: what a split must hold, and in which formats."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from flatminima.errors import FlatminimaError, first_line
from flatminima.lab.data.cache import SPLITS, Decoded
from flatminima.lab.data.images import check_labels
from flatminima.lab.data.labels import classes_of
from flatminima.progress import ProgressBar

if TYPE_CHECKING:
    from PIL import Image

_IMAGE_COLUMNS = ("img", "image")
_LABEL_COLUMNS = ("label", "fine_label", "labels")
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
"""What is decoded: Pillow knows more, and starts other programs for some (Ghostscript for EPS)."""


def decode(splits: Any, source: str) -> Decoded:
    """Both splits of a ``datasets.DatasetDict``, checked."""
    for split in SPLITS:
        if split not in splits:
            raise FlatminimaError(f"{source} has no {split} split, only {', '.join(splits)}; both are needed")
    tensors: dict[str, Tensor] = {}
    for split in SPLITS:
        tensors[f"{split}_labels"] = _decode_labels(splits[split], f"{source}, {split} split")
    declared = splits["train"].features[_find_column(splits["train"], _LABEL_COLUMNS, source)]
    num_classes = classes_of(tensors["train_labels"], getattr(declared, "num_classes", None), f"{source}, train split")
    for split in SPLITS:
        check_labels(tensors[f"{split}_labels"], num_classes, f"{source}, {split} split: ")
        tensors[f"{split}_images"] = _decode_images(splits[split], f"{source}, {split} split")
    shapes = [tuple(tensors[f"{split}_images"].shape[1:]) for split in SPLITS]
    if shapes[0] != shapes[1]:
        raise FlatminimaError(
            f"{source}: training images have shape {shapes[0]}, test images {shapes[1]}; bring them to one shape"
        )
    return Decoded(tensors, num_classes)


def _find_column(rows: Any, names: tuple[str, ...], where: str) -> str:
    for name in names:
        if name in rows.column_names:
            return name
    raise FlatminimaError(
        f"{where}: no column {' or '.join(names)} among {', '.join(rows.column_names)}; rename the one that is meant"
    )


def _decode_labels(rows: Any, where: str) -> Tensor:
    """The labels of a split, ``(N,)`` int64, not yet checked for their range."""
    name = _find_column(rows, _LABEL_COLUMNS, where)
    column = rows.select_columns(name).with_format("arrow")[:].column(name)
    values = column.to_numpy()  # empty rows turn integers into floats
    if not np.issubdtype(values.dtype, np.integer):
        raise FlatminimaError(
            f"{where}: column {name} must hold an integer in every row; it has type {column.type} "
            f"and {column.null_count} empty rows"
        )
    return torch.from_numpy(values.astype(np.int64))


def decode_image(encoded: bytes | Path, name: str, where: str, formats: Sequence[str] = IMAGE_FORMATS) -> Image.Image:
    """One image, in the mode that it is stored in.

    Args:
        encoded: A file, or what is in one.
        name: What an error calls it.
        where: What an error calls the set that it is in.
        formats: Those of :data:`IMAGE_FORMATS`, in the order in which Pillow is to try them.

    Raises:
        FlatminimaError: It cannot be read, or is in no format that is decoded.
    """
    from PIL import Image, UnidentifiedImageError

    Image.init()
    try:
        with Image.open(io.BytesIO(encoded) if isinstance(encoded, bytes) else encoded, formats=list(formats)) as image:
            image.load()
            return image
    # Pillow raises OSError, SyntaxError, ValueError and more, by format.
    except Exception as error:
        reason = "no known format" if isinstance(error, UnidentifiedImageError) else root_cause(error)
        raise FlatminimaError(
            f"{where}: cannot decode {name} ({reason}); replace or drop it, or store it in one of "
            f"{', '.join(IMAGE_FORMATS)}"
        ) from error


def _decode_images(rows: Any, where: str) -> Tensor:
    """The images of a split, ``(N, C, H, W)`` uint8."""
    formats = list(IMAGE_FORMATS)
    images: list[np.ndarray[Any, np.dtype[np.uint8]]] = []
    for i, encoded in enumerate(_encoded_images(rows, where)):
        image = decode_image(encoded, f"image {i}", where, formats)
        if image.mode not in ("L", "RGB"):
            raise FlatminimaError(f"{where}: image {i} has mode {image.mode}; convert all images to RGB or L (grey)")
        pixels = np.atleast_3d(np.asarray(image))
        if not images:
            # Pillow tries its formats in this order: with the right one first, decoding takes two thirds of the time.
            formats.sort(key=lambda known: known != image.format)
        elif pixels.shape != images[0].shape:
            raise FlatminimaError(
                f"{where}: image {i} has (height, width, channels) {pixels.shape}, the first one {images[0].shape}; "
                "bring them to one shape"
            )
        images.append(pixels)
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


def _encoded_images(rows: Any, where: str) -> Iterator[bytes]:
    """Each image's file, empty where there is none, behind a progress bar."""
    import datasets

    name = _find_column(rows, _IMAGE_COLUMNS, where)
    try:
        encoded = rows.select_columns(name).cast_column(name, datasets.Image(decode=False)).with_format("arrow")
    except (TypeError, ValueError, NotImplementedError) as error:  # pyarrow's errors for a wrong type derive from these
        raise FlatminimaError(
            f"{where}: column {name} does not hold encoded images ({root_cause(error)}); "
            "store them as the datasets library's Image feature does"
        ) from error
    with ProgressBar(f"decoding {where}", len(rows)) as bar:
        for batch in encoded.iter(batch_size=1000):
            for cell in batch.column(name).to_pylist():
                yield (cell and cell["bytes"]) or b""
            bar.advance(len(batch))


def root_cause(error: BaseException) -> str:
    """What went wrong first, in one line: `datasets` wraps it in general statements."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    return first_line(cause)
