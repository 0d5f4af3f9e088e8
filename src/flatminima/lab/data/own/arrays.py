"""Arrays in a file: ``.npz`` of numpy, or ``.safetensors``; images as bytes, or inputs as numbers."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flatminima.errors import FlatminimaError, did_you_mean, first_line, require
from flatminima.lab.data.images import ImageSet, channel_statistics
from flatminima.lab.data.labels import classes_of, labels_of
from flatminima.lab.data.own.registry import Opened, source_kind
from flatminima.lab.data.ready import ReadySamples
from flatminima.lab.reading import Reading
from flatminima.network import samples_of

_SUFFIXES = (".npz", ".safetensors")
_INPUTS = ("train_images", "x_train", "X_train", "images", "inputs", "x", "X", "data", "input_ids")
_LABELS = ("train_labels", "y_train", "labels", "label", "targets", "target", "y", "Y")
"""What people call them: the first that is there is taken, and said."""


@source_kind("a file of arrays (.npz, .safetensors)", lambda source: Path(source).suffix in _SUFFIXES)
def open_arrays(source: str, reading: Reading) -> Opened:
    """Images, ``(N, H, W)``, ``(N, H, W, C)`` or ``(N, C, H, W)`` uint8, or inputs of any shape; and labels.

    Raises:
        FlatminimaError: The file cannot be read, an array is missing or no such array, or they differ in length.
    """
    path = Path(source).expanduser()
    require(path.is_file(), f"there is no file {source}")
    require(reading.split == "train", f"{source} has no parts, such as train and test: leave split out")
    require(len(reading.input_column) <= 1, f"{source}: give one input_column; two are for pairs of texts")
    arrays = _read(path, source)
    (inputs_name, label_name) = (
        _chosen(arrays, reading.input_column[0] if reading.input_column else None, _INPUTS, "input_column", source),
        _chosen(arrays, reading.label_column, _LABELS, "label_column", source),
    )
    inputs, labels = arrays[inputs_name], labels_of(arrays[label_name].numpy(), f"{source}: labels {label_name!r}")
    if inputs.ndim == 0 or len(inputs) != len(labels):
        raise FlatminimaError(
            f"{source}: {inputs_name!r} has shape {tuple(inputs.shape)}, {label_name!r} {tuple(labels.shape)}: give "
            "one label for each sample"
        )
    classes = classes_of(labels, None, source)
    taken = f"array {inputs_name!r} {tuple(inputs.shape)} {_type(inputs)}"
    about = f"labels from {label_name!r} ({classes} classes)"
    if inputs.dtype == torch.uint8:
        images = _images(inputs, f"{source}: {inputs_name!r}")
        mean, std = channel_statistics([images])
        data = ImageSet(images, labels, classes, mean, std)
        return Opened(
            data, f"{source}: images (channels, height, width) {tuple(images.shape[1:])} from {taken}, {about}"
        )
    return Opened(
        ReadySamples(samples_of((inputs, labels)), classes), f"{source}: inputs as they are from {taken}, {about}"
    )


def _read(path: Path, source: str) -> Mapping[str, Tensor]:
    """All arrays of numbers; of safetensors, pages are read as they are needed."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        with np.load(path, allow_pickle=False) as file:
            # A member of objects is pickled: it is left out here, and missed by its name.
            return {name: torch.from_numpy(array) for name in file.files if (array := _array(file, name)) is not None}
    except Exception as error:  # numpy's, zipfile's and safetensors' errors have nothing in common
        raise FlatminimaError(
            f"{source} cannot be read ({first_line(error)}): is it a whole {path.suffix} file?"
        ) from error


def _array(file: Any, name: str) -> np.ndarray[Any, Any] | None:
    try:
        array: np.ndarray[Any, Any] = file[name]
    except ValueError:
        return None
    return array if array.dtype.kind in "biuf" else None


def _chosen(arrays: Collection[str], named: str | None, known: tuple[str, ...], option: str, source: str) -> str:
    if named is not None:
        found = named if named in arrays else None
    else:
        found = next((name for name in known if name in arrays), None)
    if found is None:
        wrong = f" {named!r}{did_you_mean(named, arrays)}" if named else f" among {', '.join(known)}"
        raise FlatminimaError(
            f"{source} has no array of numbers{wrong}; it has {', '.join(arrays) or 'none'}: name it as {option}"
        )
    return found


def _images(inputs: Tensor, where: str) -> Tensor:
    """Bytes as ``(N, C, H, W)``; which dimension holds the channels is told by its size."""
    if inputs.ndim == 3:
        return inputs[:, None]
    shape = tuple(inputs.shape)
    first, last = (inputs.ndim == 4 and shape[d] in (1, 3) for d in (1, -1))
    if first == last:
        raise FlatminimaError(
            f"{where} of shape {shape} uint8 are not images (N, H, W), (N, H, W, C) or (N, C, H, W) with 1 or 3 "
            "channels: bring them to one of these, or convert inputs of another kind to floating point"
        )
    return inputs if first else inputs.permute(0, 3, 1, 2).contiguous()


def _type(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
