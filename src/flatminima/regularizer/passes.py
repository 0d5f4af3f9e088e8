"""Three ways to take the sub-batches through model and loss: one after the other, vectorized, vectorized and compiled.

The string ``passes`` of :class:`~flatminima.FisherTraceRegularizer` chooses one of them, once.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from typing import ClassVar, Literal

import torch
from torch import nn

from flatminima.choices import Estimator
from flatminima.errors import require
from flatminima.network import Buffers
from flatminima.parallel import fsdp_modules
from flatminima.regularizer.sub_batches import Closure, Indices, OneSubBatch, Samples, SubBatches, Weights
from flatminima.regularizer.together import (
    LossesTogether,
    SubBatchesTogether,
    compiled_losses_together,
    losses_together,
)
from flatminima.torch_compat import uncompiled

PassesName = Literal["one-by-one", "together", "compiled"]


class Passes(ABC):
    """How the sub-batches of a step go through model and loss, in rounds of passes.

    Args:
        model: the network.
        estimator: what the passes are for.

    Raises:
        FlatminimaError: if model or estimator do not go with these passes.
    """

    @abstractmethod
    def __init__(self, model: nn.Module, estimator: Estimator) -> None: ...

    @abstractmethod
    def rounds(self, rows: list[range]) -> list[tuple[int, Indices]]:
        """How many samples each round's sub-batches have, and what it takes from the batch, given each one's rows."""

    @abstractmethod
    def sub_batches(
        self, model: nn.Module, closure: Closure, samples: Samples, weights: Weights, buffers: Buffers
    ) -> SubBatches:
        """The sub-batches of one round; ``samples`` gives what its indices take."""


class SequentialPasses(Passes):
    """One sub-batch a round, at the model's own weights: for every model and estimator."""

    def __init__(self, model: nn.Module, estimator: Estimator) -> None: ...

    def rounds(self, rows: list[range]) -> list[tuple[int, Indices]]:
        """A round for each sub-batch, of its samples."""
        return [(len(own), slice(own.start, own.stop)) for own in rows]

    def sub_batches(
        self, model: nn.Module, closure: Closure, samples: Samples, weights: Weights, buffers: Buffers
    ) -> SubBatches:
        """The one sub-batch."""
        return OneSubBatch(closure, samples, weights, buffers)


class VectorizedPasses(Passes):
    """All sub-batches of one size a round, by ``torch.func.vmap``, each at its own copy of the weights."""

    name: ClassVar[str] = "together"

    def __init__(self, model: nn.Module, estimator: Estimator) -> None:
        require(
            not fsdp_modules(model),
            f"passes={self.name!r} gives every sub-batch its own weights, which fully_shard does not: "
            "choose passes='one-by-one'",
        )
        self._losses: LossesTogether = losses_together

    def rounds(self, rows: list[range]) -> list[tuple[int, Indices]]:
        """A round for each size, of (sub-batches, samples)."""
        return [
            (size, torch.tensor(list(map(list, same)), device="cpu")) for size, same in itertools.groupby(rows, key=len)
        ]

    def sub_batches(
        self, model: nn.Module, closure: Closure, samples: Samples, weights: Weights, buffers: Buffers
    ) -> SubBatches:
        """All sub-batches of one size."""
        return SubBatchesTogether(closure, samples, weights, buffers, model, self._losses)


class CompiledPasses(VectorizedPasses):
    """The vectorized passes in graphs of ``torch.compile``, one for each size of sub-batches."""

    name = "compiled"

    def __init__(self, model: nn.Module, estimator: Estimator) -> None:
        require(
            estimator != "hvp",
            "passes='compiled' is not for estimator='hvp', as compiled graphs have no second derivative: "
            "choose passes='together'",
        )
        super().__init__(model, estimator)
        require(
            all(uncompiled(module) is module for module in model.modules()),
            "passes='compiled' cannot trace what torch.compile has wrapped: compile in place (model.compile())",
        )
        self._losses = compiled_losses_together()


def passes_for(name: PassesName, model: nn.Module, estimator: Estimator) -> Passes:
    """The passes that the string names.

    Raises:
        FlatminimaError: if model or estimator do not go with them.
    """
    classes: dict[PassesName, type[Passes]] = {
        "one-by-one": SequentialPasses,
        "together": VectorizedPasses,
        "compiled": CompiledPasses,
    }
    return classes[name](model, estimator)
