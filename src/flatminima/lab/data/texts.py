"""Texts, with labels or without: a network's tokenizer makes inputs of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Texts:
    """Texts, or pairs of them, read when they are asked for.

    Attributes:
        where: What an error calls them.
        columns: The texts at some places, for one column, or for two.
        chosen: ``(N,)``: the places.
        labels: ``(N,)`` int64; None where there are none.
        num_classes: Number of classes; None where there are no labels.
        no_labels: Why there are none.
    """

    where: str
    columns: Callable[[Sequence[int]], tuple[list[str], ...]]
    chosen: Tensor
    labels: Tensor | None
    num_classes: int | None
    no_labels: str = ""

    def __len__(self) -> int:
        return len(self.chosen)

    def at(self, indices: Sequence[int]) -> tuple[list[str], ...]:
        """The texts at ``indices``, for one column, or for two."""
        return self.columns(self.chosen[torch.as_tensor(indices)].tolist())

    def subset(self, indices: Sequence[int] | Tensor) -> Texts:
        """The texts at ``indices``, in that order."""
        chosen = torch.as_tensor(indices)
        labels = None if self.labels is None else self.labels[chosen]
        return dataclasses.replace(self, chosen=self.chosen[chosen], labels=labels)
