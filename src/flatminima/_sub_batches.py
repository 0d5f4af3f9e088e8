"""How: the losses of sub-batches and the weights that their passes move, one by one or all of one size together."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.func import functional_call, vmap
from torch.nn.parallel import DistributedDataParallel

from flatminima.errors import FlatminimaError
from flatminima.network.batches import batch_size, map_tensors, tensors_of
from flatminima.network.modes import Buffers, eager_graphs, moved

Closure = Callable[[Any], Tensor]
"""``closure(batch)`` → the scalar mean loss of the model on that batch."""

Passes = Literal["one-by-one", "together", "compiled"]

_NOT_IN_ONE_PASS = re.compile("vmap|functorch|batching rule|sparse", re.IGNORECASE)


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
        _require(
            not any(isinstance(module, nn.DataParallel) for module in model.modules()),
            "DataParallel is not supported: use DistributedDataParallel, or train on one device with the inner module",
        )
        _require(
            not any(
                isinstance(module, DistributedDataParallel) for child in model.children() for module in child.modules()
            ),
            "DistributedDataParallel must be the outermost module: wrap the whole model",
        )
        trainable: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}
        _require(
            len(trainable) > 0, f"{type(model).__name__} has no trainable parameters (requires_grad is False for all)"
        )
        for name, parameter in trainable.items():
            _require(
                parameter.dtype in (torch.float32, torch.float64),
                f"parameter {name} is {parameter.dtype}: keep trainable parameters in float32, use autocast for speed",
            )
        mask = [penalized is None or name in penalized for name in trainable]
        _require(any(mask), "none of the penalized parameters is trainable")
        return cls(list(trainable), list(trainable.values()), mask)

    def select(self, values: list[Tensor]) -> list[Tensor]:
        """Those of ``values``, one per parameter, whose parameter is penalized."""
        return [value for value, penalized in zip(values, self.penalized, strict=True) if penalized]


@dataclass
class SubBatches(ABC):
    """What one round of passes works on: sub-batches of one size. All that it gives is the sum over them.

    Attributes:
        closure: the network's loss.
        batch: the samples.
        weights: the network's trainable parameters.
        buffers: its buffers.
        count: how many sub-batches there are.
        parameters: what the loss depends on: the weights, wherever they are moved to.
    """

    closure: Closure
    batch: Any
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
        return torch.autograd.grad(loss, self.parameters, create_graph=create_graph, allow_unused=True)

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

    def scratch_buffers(self) -> AbstractContextManager[None]:
        return self.buffers.scratch()

    def loss(self) -> Tensor:
        loss = _sub_batch_loss(self.closure, self.batch)
        _require_differentiable(loss)
        return loss

    def moved(self, direction: list[Tensor], step: float) -> AbstractContextManager[None]:
        return moved(self.weights.select(self.parameters), self.weights.select(direction), step)

    def total(self, values: list[Tensor]) -> list[Tensor]:
        return values

    def buffers_left(self) -> list[Tensor]:
        return [buffer.detach() for buffer in self.buffers.now()]


@dataclass
class SubBatchesTogether(SubBatches):
    """All sub-batches in one pass by ``torch.func.vmap``, each with its own copy of the weights and of the buffers.

    Tensors of ``batch`` are (sub-batches, samples, ...), and :attr:`parameters` (sub-batches, ...). A layer's many
    products with small matrices then are one batched product, its convolutions one grouped convolution.

    Attributes:
        model: the network.
        losses: :func:`losses_together`, or that from :func:`compiled_losses_together`.
    """

    model: nn.Module
    losses: LossesTogether

    def __post_init__(self) -> None:
        self.count = batch_size(self.batch)
        copies = [_copies(parameter.detach(), self.count) for parameter in self.weights.parameters]
        self.parameters = [copy.requires_grad_() for copy in copies]
        originals = [*self.weights.parameters, *self.buffers.own]
        self._forward = _Forward(self.model, self.closure, self.batch, originals)
        self._buffers_left: list[Tensor] = []

    def scratch_buffers(self) -> AbstractContextManager[None]:
        return nullcontext()  # every loss has copies of its own

    def loss(self) -> Tensor:
        with _in_one_pass():
            losses, self._buffers_left = self.losses(
                self._forward, self.parameters, self.buffers.own, tensors_of(self.batch)
            )
        loss: Tensor = losses.sum()
        _require_differentiable(loss)
        self._require_swapped_weights(loss)
        return loss

    def gradients(self, loss: Tensor, *, create_graph: bool = False) -> tuple[Tensor | None, ...]:
        if create_graph and any(isinstance(node, BackwardCFunction) for node in graph_of([loss])):
            raise FlatminimaError(  # under vmap, those marked once_differentiable have a second derivative of zero
                "estimator='hvp' cannot tell under passes='together' whether a custom autograd.Function has second "
                "derivatives, and the model or loss uses one: choose passes='one-by-one'"
            )
        with _in_one_pass():
            return SubBatches.gradients(self, loss, create_graph=create_graph)

    @contextmanager
    def moved(self, direction: list[Tensor], step: float) -> Iterator[None]:
        here, select = self.parameters, self.weights.select
        with torch.no_grad():
            there = iter(torch._foreach_add(select(here), select(direction), alpha=step))
        self.parameters = [
            next(there).requires_grad_() if penalized else parameter
            for parameter, penalized in zip(here, self.weights.penalized, strict=True)
        ]
        yield
        self.parameters = here

    def total(self, values: list[Tensor]) -> list[Tensor]:
        return _sums(values)

    def buffers_left(self) -> list[Tensor]:
        left = [buffer.detach() for buffer in self._buffers_left]
        sums = iter(_sums([buffer for buffer in left if buffer.is_floating_point()]))
        return [next(sums) if buffer.is_floating_point() else buffer[-1] for buffer in left]

    def _require_swapped_weights(self, loss: Tensor) -> None:
        """Everything that the loss uses of the weights must be the copies, or its gradient would lack a part."""
        originals = torch.autograd.grad(loss, self.weights.parameters, retain_graph=True, allow_unused=True)
        for name, gradient in zip(self.weights.names, originals, strict=True):
            _require(
                gradient is None,
                f"the loss uses parameter {name} itself, not as an attribute of the model's modules (a list of "
                "parameters made before, say), where it cannot be swapped: choose passes='one-by-one'",
            )


class _Forward(nn.Module):
    """The closure as a module's forward, so that ``functional_call`` can swap the weights that it runs with.

    Attributes:
        places: the weights and buffers of all modules by name, as the numbers of the ``originals`` that they are.
            ``functional_call`` can tie weights itself, but puts wrong tensors back where one module has two names.
    """

    def __init__(self, model: nn.Module, closure: Closure, batch: Any, originals: list[Tensor]) -> None:
        super().__init__()
        self.model = model
        self.closure = closure
        self.batch = batch
        index = {id(tensor): i for i, tensor in enumerate(originals)}
        self.places = {
            f"{prefix}.{name}": index[id(tensor)]
            for prefix, module in self.named_modules()
            for name, tensor in (*module._parameters.items(), *module._buffers.items())
            if id(tensor) in index
        }

    def forward(self, tensors: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The loss on a batch with these tensors, and what it leaves in the model's buffers."""
        remaining = iter(tensors)
        loss = _sub_batch_loss(self.closure, map_tensors(lambda _: next(remaining), self.batch))
        return loss, list(self.model.buffers())


LossesTogether = Callable[[_Forward, list[Tensor], list[Tensor], list[Tensor]], tuple[Tensor, list[Tensor]]]


def losses_of(passes: Passes) -> LossesTogether | None:
    """What computes the losses of all sub-batches of one size; None if they run one by one."""
    if passes == "one-by-one":
        return None
    return losses_together if passes == "together" else compiled_losses_together()


def losses_together(
    forward: _Forward, weights: list[Tensor], buffers: list[Tensor], tensors: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """Every sub-batch's loss, and what it leaves in the buffers.

    Args:
        forward: computes them for one.
        weights: (sub-batches, ...), those of every sub-batch.
        buffers: those that all of them start from; they stay as they are.
        tensors: (sub-batches, samples, ...), those of the batch.
    """
    with eager_graphs():
        return _losses_together(forward, weights, buffers, tensors)


def compiled_losses_together() -> LossesTogether:
    """:func:`losses_together` compiled into one graph and its backward, which both passes share.

    Every size of sub-batches has a graph of its own (``vmap`` of a loss fixes the size). ``torch.compile`` keeps eight
    for each piece of code, so this makes a copy of the code: one model's graphs do not use up the limit of another's.
    """
    from torch._dynamo.exc import TorchDynamoException  # importing it takes a second

    own = FunctionType(_losses_together.__code__.replace(), globals(), "losses_together")
    compiled: LossesTogether = torch.compile(own, fullgraph=True, dynamic=False)

    def losses(
        forward: _Forward, weights: list[Tensor], buffers: list[Tensor], tensors: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        try:
            return compiled(forward, weights, buffers, tensors)
        except TorchDynamoException as error:
            raised = re.search("raised exception (.+)", str(error))  # by the model or the loss
            raise FlatminimaError(
                "torch.compile cannot make one graph of this model and loss "
                f"({raised[1] if raised else _first_line(error)}): choose passes='one-by-one'"
            ) from error

    return losses


def _losses_together(
    forward: _Forward, weights: list[Tensor], buffers: list[Tensor], tensors: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    def of_one(copies: list[Tensor], tensors: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        swapped = {name: copies[i] for name, i in forward.places.items()}
        found: tuple[Tensor, list[Tensor]] = functional_call(forward, swapped, (tensors,), tie_weights=False)
        return found

    scratch = [_copies(b, len(tensors[0])) if b.is_floating_point() else b.clone() for b in buffers]
    copies = [*weights, *(buffer.detach() for buffer in scratch)]
    dims = [0 if copy.is_floating_point() else None for copy in copies]  # of integers, counters, there is one for all
    found: tuple[Tensor, list[Tensor]] = vmap(of_one, (dims, 0), randomness="different")(copies, tensors)
    return found


def _copies(tensor: Tensor, count: int) -> Tensor:
    return tensor.expand(count, *tensor.shape).clone(memory_format=torch.contiguous_format)


def _sums(values: list[Tensor]) -> list[Tensor]:
    """The sum over the first dimension of each, which all have in common; a few launches for all of one type."""
    sums: dict[int, Tensor] = {}
    for kind in {(value.dtype, value.device) for value in values}:
        numbers = [i for i, value in enumerate(values) if (value.dtype, value.device) == kind]
        flat = [values[i].reshape(len(values[i]), -1) for i in numbers]
        parts = torch.split(torch.cat(flat, 1).sum(0), [value.shape[1] for value in flat])
        sums |= {i: part.view(values[i].shape[1:]) for i, part in zip(numbers, parts, strict=True)}
    return [sums[i] for i in range(len(values))]


@contextmanager
def _in_one_pass() -> Iterator[None]:
    """Say of an operation that ``vmap`` cannot run for all sub-batches at once what to do."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        if isinstance(error, FlatminimaError) or not _NOT_IN_ONE_PASS.search(str(error)):
            raise
        raise FlatminimaError(
            f"the sub-batches cannot go through this model and loss together ({_first_line(error)}): "
            "choose passes='one-by-one'"
        ) from error


def _first_line(error: Exception) -> str:
    """What the error says, without the pages that follow; the second line where the first only announces it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


def graph_of(results: Iterable[Tensor]) -> Iterator[Any]:
    """Every node of the autograd graph that ``results`` come from."""
    seen: set[Any] = {None}
    waiting: list[Any] = [result.grad_fn for result in results]
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            waiting.extend(following for following, _ in node.next_functions)
            yield node


def scalar_loss(closure: Closure, batch: Any) -> Tensor:
    """The loss on ``batch``.

    Raises:
        FlatminimaError: if it is not a scalar that depends on a trainable parameter.
    """
    loss = _scalar(closure(batch))
    _require_differentiable(loss)
    return loss


def _sub_batch_loss(closure: Closure, batch: Any) -> Tensor:
    try:
        return _scalar(closure(batch))
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise FlatminimaError(
            f"BatchNorm has no statistics on a sub-batch of {batch_size(batch)} sample(s): "
            "lower num_sub_batches, or drop the last, short batch"
        ) from error


def _scalar(loss: Any) -> Tensor:
    returned = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
    if returned != "shape ()":
        raise FlatminimaError(f"loss_fn must return a scalar tensor, the mean over the samples; got {returned}")
    assert isinstance(loss, Tensor)
    return loss


def _require_differentiable(loss: Tensor) -> None:
    _require(
        loss.requires_grad,
        "the loss does not depend on a trainable parameter: is gradient recording switched off?",
    )


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise FlatminimaError(message)
