"""The losses of sub-batches and the weights that their passes move, one by one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from flatminima.errors import FlatminimaError, require
from flatminima.network import Buffers, batch_size, map_tensors, moved, sound_batchnorm, take, taker, tensors_of
from flatminima.torch_compat import (
    TensorWeakRef,
    leaves_of,
    needs_more_than_one_sample,
    post_accumulate_hooks,
    uncompiled,
)

NOT_DIFFERENTIABLE = "the loss does not depend on a trainable parameter: is gradient recording switched off?"

Closure = Callable[[Any], Tensor]
"""``closure(batch)`` → the scalar mean loss of the model on that batch."""

Indices = Tensor | slice
"""Which of a batch's samples: a slice, (n,), or (m, n) for m sub-batches together."""

Samples = Callable[[], Any]
"""Gives a sub-batch in tensors and containers of its own: models and losses may write to what they are given."""


@dataclass(frozen=True)
class SeveralBatches:
    """What several loaders give at once, each a batch of its own size, cut into ``count`` pieces side by side.

    The piece i holds the i-th of ``count`` near-equal random parts of every batch. Pieces are what is then split.
    """

    batches: Any
    rows: dict[int, list[Tensor]]

    @classmethod
    def of(cls, batches: Any, count: int) -> SeveralBatches:
        """At most ``count`` pieces of the batches in a tuple, list or mapping; fewer if one has fewer samples.

        Raises:
            FlatminimaError: if one of them is no batch.
        """
        sizes = {i: batch_size(batch) for i, batch in enumerate(_members(batches)) if tensors_of(batch)}
        count = min(count, *sizes.values())
        return cls(batches, {i: list(torch.randperm(n, device="cpu").tensor_split(count)) for i, n in sizes.items()})

    def take(self, indices: Indices) -> Any:
        """The pieces at ``indices``, joined; in tensors and containers of its own."""
        if isinstance(indices, slice):
            indices = torch.arange(size_of(self), device="cpu")[indices]
        require(indices.dim() == 1, "batches of several loaders cannot go together: choose passes='one-by-one'")
        rows = {i: torch.cat([pieces[k] for k in indices.tolist()]) for i, pieces in self.rows.items()}
        members = enumerate(_members(self.batches))
        return _with_members(self.batches, [take(batch, rows[i]) if i in rows else batch for i, batch in members])


def size_of(batch: Any) -> int:
    """How many samples, or pieces of several batches, can be split."""
    return len(next(iter(batch.rows.values()))) if isinstance(batch, SeveralBatches) else batch_size(batch)


def whole(batch: Any) -> Any:
    """All samples in their order, in float32 and in tensors and containers of their own."""
    return _in_float32(batch.take(slice(None)) if isinstance(batch, SeveralBatches) else take(batch, slice(None)))


def shuffled(batch: Any, order: Tensor) -> Callable[[Indices], Any]:
    """What gives samples or pieces by their places in ``order``: like :func:`whole`, and as often as it is asked."""
    if isinstance(batch, SeveralBatches):
        return lambda indices: _in_float32(batch.take(order[indices]))
    return taker(_in_float32(take(batch, order)))  # in that order once, so that sub-batches are slices


def _in_float32(batch: Any) -> Any:
    half = (torch.float16, torch.bfloat16)
    return map_tensors(lambda tensor: tensor.float() if tensor.dtype in half else tensor, batch)


def _members(batches: Any) -> list[Any]:
    return list(batches.values() if isinstance(batches, Mapping) else batches)


def _with_members(batches: Any, members: list[Any]) -> Any:
    if isinstance(batches, Mapping):
        return dict(zip(batches, members, strict=True))
    return type(batches)(members)


class SingleSampleError(FlatminimaError):
    """BatchNorm has refused a sub-batch of one sample."""


@dataclass(frozen=True)
class Weights:
    """The trainable parameters, each once however many layers share it, and whether the penalty moves it."""

    names: list[str]
    parameters: list[Tensor]
    penalized: list[bool]

    @classmethod
    def of(cls, model: nn.Module, penalized: set[str] | None) -> Weights:
        """The model's trainable parameters; ``penalized`` holds the names of those to move, None for all.

        Raises:
            FlatminimaError: if there are none, they are in half precision, or the model is in DataParallel.
        """
        outermost = uncompiled(model)
        inner = [module for module in model.modules() if module not in (model, outermost)]
        require(
            not any(isinstance(module, nn.DataParallel) for module in (outermost, *inner)),
            "DataParallel is not supported: use DistributedDataParallel, or train on one device with the inner module",
        )
        require(
            not any(isinstance(module, DistributedDataParallel) for module in inner),
            "DistributedDataParallel must be the outermost module (but for torch.compile): wrap the whole model",
        )
        trainable: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}
        require(
            len(trainable) > 0, f"{type(model).__name__} has no trainable parameters (requires_grad is False for all)"
        )
        for name, parameter in trainable.items():
            require(
                parameter.dtype in (torch.float32, torch.float64),
                f"parameter {name} is {parameter.dtype}: keep trainable parameters in float32, use autocast for speed",
            )
        mask = [penalized is None or name in penalized for name in trainable]
        require(any(mask), "none of the penalized parameters is trainable")
        return cls(list(trainable), list(trainable.values()), mask)

    def select(self, values: list[Tensor]) -> list[Tensor]:
        """Those of ``values``, one per parameter, whose parameter is penalized."""
        return [value for value, penalized in zip(values, self.penalized, strict=True) if penalized]


@dataclass
class SubBatches(ABC):
    """What one round of passes works on: sub-batches of one size. All that it gives is the sum over them.

    Attributes:
        closure: the network's loss.
        samples: gives the samples, anew for every pass.
        weights: the network's trainable parameters.
        buffers: its buffers.
        count: how many sub-batches there are.
        parameters: what the loss depends on: the weights, wherever they are moved to.
    """

    closure: Closure
    samples: Samples
    weights: Weights
    buffers: Buffers
    count: int = field(init=False)
    parameters: list[Tensor] = field(init=False)

    @abstractmethod
    def scratch_buffers(self) -> AbstractContextManager[None]:
        """A context in which the model's own buffers stay as they are."""

    @abstractmethod
    def loss(self) -> Tensor:
        """Σ_i L(B_i, ·) at :attr:`parameters`."""

    def gradients(self, loss: Tensor, *, create_graph: bool = False) -> tuple[Tensor | None, ...]:
        """g_i of every sub-batch in the form of :attr:`parameters`; None for a parameter that the loss does not use."""
        return gradients_at(self.parameters, loss, create_graph=create_graph)

    @abstractmethod
    def moved(self, direction: list[Tensor], step: float) -> AbstractContextManager[None]:
        """Move the penalized weights by step · direction, which has the form of :attr:`parameters`, and back."""

    @abstractmethod
    def total(self, values: list[Tensor]) -> list[Tensor]:
        """Σ_i of ``values``, which have the form of :attr:`parameters`."""

    @abstractmethod
    def buffers_left(self) -> list[Tensor]:
        """What the latest pass left in the model's buffers: Σ_i of it, of integers (counters) the last."""


@dataclass
class OneSubBatch(SubBatches):
    """A sub-batch of its own, run with the model's own weights."""

    def __post_init__(self) -> None:
        self.parameters, self.count = self.weights.parameters, 1
        self._has_single_samples: bool | None = None  # known from the first pass on

    def scratch_buffers(self) -> AbstractContextManager[None]:
        """A context in which the model works on copies of its buffers."""
        return self.buffers.scratch()

    def loss(self) -> Tensor:
        """L(B_i, ·) with the model's own weights."""
        require(torch.is_grad_enabled(), NOT_DIFFERENTIABLE)
        samples = self.samples()
        if self._has_single_samples is None:
            self._has_single_samples = any(tensor.shape[:1] == (1,) for tensor in tensors_of(samples))
        if not self._has_single_samples:
            return sub_batch_loss(self.closure, samples)
        with sound_batchnorm():
            return sub_batch_loss(self.closure, samples)

    def moved(self, direction: list[Tensor], step: float) -> AbstractContextManager[None]:
        """Move the model's own weights, and back to the same bits."""
        return moved(self.weights.select(self.parameters), self.weights.select(direction), step)

    def total(self, values: list[Tensor]) -> list[Tensor]:
        """The values themselves, of the one sub-batch."""
        return values

    def buffers_left(self) -> list[Tensor]:
        """What the latest pass left in the model's buffers."""
        return [buffer.detach() for buffer in self.buffers.now()]


class TrainedOutside:
    """Notices what the losses of sub-batches train beside the model: a main gradient of these passes lacks it.

    What a loss makes for itself (a leaf to differentiate by, say) may live on for a while, but is another tensor in
    every pass: a parameter, or what all passes have in common, is trained. References are weak, as most are gone.

    Args:
        matters: whether these passes are to give the main gradient; if not, nothing is looked at.
    """

    def __init__(self, *, matters: bool) -> None:
        self._matters = matters
        self._passes: list[list[Any]] = []

    def note(self, loss: Tensor) -> None:
        """The loss of some sub-batches, with its graph."""
        if self._matters:
            self._passes.append([TensorWeakRef(leaf) for leaf in leaves_of(loss)])

    def refuse(self, known: list[Tensor]) -> None:
        """Look at what is left of all passes, once their graphs are freed.

        Args:
            known: what the passes give gradients of.

        Raises:
            FlatminimaError: if there is anything else.
        """
        others, own = Counter[int](), {id(tensor) for tensor in known}
        alive = {}
        for references in self._passes:
            here = {id(leaf): leaf for leaf in (reference() for reference in references) if leaf is not None}
            alive.update(here)
            others.update(here.keys() - own)
        often = min(2, len(self._passes))
        found = [alive[key] for key, count in others.items() if count >= often or isinstance(alive[key], nn.Parameter)]
        if found:
            shapes = ", ".join(f"{type(leaf).__name__} of shape {tuple(leaf.shape)}" for leaf in found[:5])
            raise FlatminimaError(
                f"the loss also trains what is no parameter of the model ({shapes}), and main_gradient='sub-batches' "
                "has no gradient of it: choose main_gradient='whole-batch', or a model that holds it"
            )


def refuse_accumulation_hooks(model: nn.Module) -> None:
    """Refuse hooks that run when a backward pass has accumulated in ``.grad``, for steps without such a pass.

    Raises:
        FlatminimaError: by name for a parameter that has one.
    """
    for name, parameter in model.named_parameters():
        require(
            not post_accumulate_hooks(parameter),
            f"parameter {name} has a hook for accumulated gradients (register_post_accumulate_grad_hook), which "
            "main_gradient='sub-batches' would not run: choose main_gradient='whole-batch'",
        )


def gradients_at(tensors: list[Tensor], loss: Tensor, *, create_graph: bool) -> tuple[Tensor | None, ...]:
    """∂loss/∂t of each tensor; None for one that the loss does not use."""
    if not loss.requires_grad:  # a constant
        return (None,) * len(tensors)
    # A function marked once_differentiable shows that it is one where the gradient that comes to it has a history.
    seed = torch.ones_like(loss, requires_grad=True) if create_graph else None
    return torch.autograd.grad(loss, tensors, seed, create_graph=create_graph, allow_unused=True)


def scalar_loss(closure: Closure, batch: Any) -> Tensor:
    """The loss on ``batch``.

    Raises:
        FlatminimaError: if it is not a scalar that depends on a trainable parameter.
    """
    loss = _scalar(closure(batch))
    require_differentiable(loss)
    return loss


def sub_batch_loss(closure: Closure, batch: Any) -> Tensor:
    """The scalar loss of one sub-batch; says what to do where BatchNorm refuses a single sample."""
    try:
        return _scalar(closure(batch))
    except ValueError as error:
        if not needs_more_than_one_sample(error):
            raise
        raise SingleSampleError(
            "BatchNorm has no statistics on a sub-batch of 1 sample(s): "
            "lower num_sub_batches, or drop the last, short batch"
        ) from error


def _scalar(loss: Any) -> Tensor:
    returned = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
    if returned != "shape ()":
        raise FlatminimaError(f"loss_fn must return a scalar tensor, the mean over the samples; got {returned}")
    assert isinstance(loss, Tensor)
    return loss


def require_differentiable(loss: Tensor) -> None:
    """Refuse a loss that no trainable parameter has a part in."""
    require(loss.requires_grad, NOT_DIFFERENTIABLE)
