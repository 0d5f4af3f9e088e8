"""Labels, whatever they lie in: class numbers from 0, or one line that says what they are."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from flatminima.errors import FlatminimaError, require
from flatminima.lab.data.images import check_labels

_SPARSE = 1000
"""The highest label may be this, or ten times the number of different ones, where nothing declares the classes."""


def labels_of(values: np.ndarray[Any, Any], where: str) -> Tensor:
    """The labels ``(N,)`` int64.

    Raises:
        FlatminimaError: They are no integers, or not one for each sample.
    """
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    require(
        values.ndim == 1,
        f"{where} have shape {values.shape}, not one number for each sample: pass class numbers (one-hot rows: argmax)",
    )
    if not np.issubdtype(values.dtype, np.integer):
        kind = "no numbers" if values.dtype.kind in "OUS" else str(values.dtype)
        raise FlatminimaError(
            f"{where} are {kind}, not integers: number the classes from 0 as in training (regression and empty rows "
            "have no class)"
        )
    return torch.from_numpy(values.astype(np.int64))


def classes_of(labels: Tensor, declared: int | None, where: str) -> int:
    """The number of classes: the one that is declared, else one more than the highest label.

    Raises:
        FlatminimaError: A label is outside, or far above all others.
    """
    require(len(labels) > 0, f"{where}: there are no samples")
    if declared is None:
        highest, different = int(labels.max()), len(set(labels.tolist()))
        if highest > max(_SPARSE, 10 * different):
            raise FlatminimaError(
                f"{where}: label {highest} in row {int(labels.argmax())} is far above the number of different labels, "
                f"{different}: correct it, number the classes from 0, or declare them (datasets.ClassLabel)"
            )
        declared = highest + 1
    check_labels(labels, declared, f"{where}: ")
    return declared
