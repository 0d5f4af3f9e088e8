"""Texts, with labels or without: a network's tokenizer makes inputs of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flatminima.errors import FlatminimaError


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
    columns: Callable[[Sequence[int]], tuple[Sequence[str | None], ...]]
    chosen: Tensor
    labels: Tensor | None
    num_classes: int | None
    no_labels: str = ""

    def __len__(self) -> int:
        return len(self.chosen)

    def at(self, indices: Sequence[int]) -> tuple[list[str], ...]:
        """The texts at ``indices``, for one column, or for two.

        Raises:
            FlatminimaError: A row has none.
        """
        places = self.chosen[torch.as_tensor(indices)].tolist()
        found = self.columns(places)
        for column in found:
            for place, text in zip(places, column, strict=True):
                if not isinstance(text, str):
                    raise FlatminimaError(f"{self.where}: row {place} has no text: drop it")
        return tuple([str(text) for text in column] for column in found)

    def subset(self, indices: Sequence[int] | Tensor) -> Texts:
        """The texts at ``indices``, in that order."""
        chosen = torch.as_tensor(indices)
        labels = None if self.labels is None else self.labels[chosen]
        return dataclasses.replace(self, chosen=self.chosen[chosen], labels=labels)
