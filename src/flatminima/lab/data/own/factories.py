"""``package.module:factory``: a data set or loader of the user's own, with the transforms that it has."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from flatminima.errors import FlatminimaError
from flatminima.lab.data.images import ImageSet
from flatminima.lab.data.own.registry import Opened, source_kind
from flatminima.lab.data.pictures import Pictures
from flatminima.lab.data.ready import ReadySamples
from flatminima.lab.reading import Reading
from flatminima.lab.user_code import made_by_factory, others_errors
from flatminima.network import samples_of


@source_kind(
    "package.module:factory",
    lambda source: re.fullmatch(r"[\w.]*:\w*", source) is not None,
)
def open_factory(source: str, reading: Reading) -> Opened:
    """What a function without arguments returns: anything that :func:`flatminima.measure` takes as data.

    Raises:
        FlatminimaError: There is no such function, it fails, or what it returns is no fixed set of samples.
    """
    made = made_by_factory(source, "data", {"split": reading.split})
    if isinstance(made, (ImageSet, Pictures)):
        return Opened(made)
    with others_errors(f"data {source}: reading its first samples failed"):
        try:
            samples = samples_of(made)
            inputs, _ = samples.fetch([0])
        except FlatminimaError as error:
            raise FlatminimaError(f"data {source}: {error}") from error
    data = ReadySamples(samples, _num_classes(made), channels=_channels(inputs))
    return Opened(data, f"{source}: {len(samples)} samples as its {type(made).__name__} gives them")


def _num_classes(made: Any) -> int | None:
    """What torchvision's data sets call ``classes``, or ``num_classes``; of a ``TensorDataset`` by its labels."""
    dataset = getattr(made, "dataset", made)
    classes, number = getattr(dataset, "classes", None), getattr(dataset, "num_classes", None)
    if isinstance(classes, (list, tuple)):
        return len(classes)
    if isinstance(dataset, TensorDataset) and len(dataset.tensors) == 2:
        labels = dataset.tensors[1]
        return int(labels.max()) + 1 if labels.dtype == torch.int64 and labels.dim() == 1 else None
    return number if isinstance(number, int) else None


def _channels(inputs: Any) -> int | None:
    return int(inputs.shape[1]) if isinstance(inputs, Tensor) and inputs.dim() == 4 else None
