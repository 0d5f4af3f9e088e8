"""Samples that are a network's inputs already: a user's own data sets, arrays, what networks' own transforms make."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from flatminima.lab.data.images import ImageSet
from flatminima.lab.data.pictures import Pictures
from flatminima.lab.data.texts import Texts
from flatminima.losses import Loss
from flatminima.network import Inputs, Samples


class TrainingData(Protocol):
    """What a network is measured on."""

    def __len__(self) -> int: ...

    @property
    def loss(self) -> Loss:
        """The loss of its training."""
        ...

    @property
    def num_classes(self) -> int | None:
        """Number of classes; None where it is not known."""
        ...

    def fetch(self, indices: Sequence[int]) -> tuple[Inputs, Tensor]:
        """The samples at ``indices`` as one batch (inputs, targets)."""
        ...


@dataclass(frozen=True, eq=False)
class ReadySamples:
    """Samples that go into a network as they are."""

    samples: Samples
    num_classes: int | None = None
    loss: Loss = "cross_entropy"
    channels: int | None = None

    def __len__(self) -> int:
        return len(self.samples)

    def fetch(self, indices: Sequence[int]) -> tuple[Inputs, Tensor]:
        """The samples at ``indices`` as one batch (inputs, targets)."""
        return self.samples.fetch(indices)

    def subset(self, indices: Sequence[int] | Tensor) -> ReadySamples:
        """The samples at ``indices``, in that order."""
        return dataclasses.replace(self, samples=_Chosen(self.samples, torch.as_tensor(indices).tolist()))


OwnData = ImageSet | Pictures | Texts | ReadySamples
"""What data can be before a network is known: images and texts are not its inputs yet."""


@dataclass(frozen=True)
class Preparation:
    """How samples became inputs where it was not normalization alone."""

    name: str
    """What did it, in words."""
    settings: str = ""
    """All that decides what it makes of a sample."""

    def is_that_of(self, other: object) -> bool:
        """Whether both make the same inputs, whatever they are called."""
        return isinstance(other, Preparation) and self.settings == other.settings

    def as_json(self) -> dict[str, Any]:
        """For a report."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Prepared:
    """Samples of others through a network's own transforms, as :class:`~flatminima.network.Samples`."""

    count: int
    prepare: Callable[[Sequence[int]], tuple[Inputs, Tensor]]

    def __len__(self) -> int:
        return self.count

    def fetch(self, indices: Sequence[int]) -> tuple[Inputs, Tensor]:
        """The samples at ``indices`` as one batch (inputs, targets)."""
        return self.prepare(indices)


@dataclass(frozen=True)
class _Chosen:
    samples: Samples
    places: list[int]

    def __len__(self) -> int:
        return len(self.places)

    def fetch(self, indices: Sequence[int]) -> tuple[Inputs, Tensor]:
        return self.samples.fetch([self.places[i] for i in indices])
