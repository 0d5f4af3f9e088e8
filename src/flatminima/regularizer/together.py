"""The same of all sub-batches of one size together: by ``torch.func.vmap``, or in a compiled graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from flatminima.errors import FlatminimaError, first_line, require
from flatminima.network import batch_size, map_tensors, tensors_of
from flatminima.regularizer.sub_batches import (
    Closure,
    SubBatches,
    gradients_at,
    require_differentiable,
    sub_batch_loss,
)
from flatminima.torch_compat import (
    CustomFunctionNode,
    cannot_be_vectorized,
    dynamo_error,
    eager_stance,
    foreach_add,
    gradient_hooks,
    graph_of,
    own_buffers,
    own_parameters,
    reason_for_no_graph,
)


@dataclass
class SubBatchesTogether(SubBatches):
    """All sub-batches in one pass by ``torch.func.vmap``, each with its own copy of the weights and of the buffers.

    Tensors of the batch are (sub-batches, samples, ...), and :attr:`parameters` (sub-batches, ...). A layer's many
    products with small matrices then are one batched product, its convolutions one grouped convolution.

    Attributes:
        model: the network.
        losses: :func:`losses_together`, or that from :func:`compiled_losses_together`.
    """

    model: nn.Module
    losses: LossesTogether

    def __post_init__(self) -> None:
        for name, parameter in zip(self.weights.names, self.weights.parameters, strict=True):
            require(
                not gradient_hooks(parameter),
                f"parameter {name} has a hook on its gradient (register_hook), which its copies for sub-batches would "
                "not run: choose passes='one-by-one'",
            )
        batch = self.samples()
        self.count = batch_size(batch)
        copies = [_copies(parameter.detach(), self.count) for parameter in self.weights.parameters]
        self.parameters = [copy.requires_grad_() for copy in copies]
        originals = [*self.weights.parameters, *self.buffers.own]
        self._forward = _Forward(self.model, self.closure, batch, originals)
        self._buffers_left: list[Tensor] = []

    def scratch_buffers(self) -> AbstractContextManager[None]:
        """Nothing to do: every loss has copies of its own."""
        return nullcontext()

    def loss(self) -> Tensor:
        """Σ_i L(B_i, ·), each at its own copy of the weights."""
        with _in_one_pass():
            losses, self._buffers_left = self.losses(
                self._forward, self.parameters, self.buffers.own, tensors_of(self.samples())
            )
        loss: Tensor = losses.sum()
        require_differentiable(loss)
        return loss

    def gradients(self, loss: Tensor, *, create_graph: bool = False) -> tuple[Tensor | None, ...]:
        """g_i of every sub-batch, (sub-batches, ...).

        All that the loss uses of the weights must be the copies, or the gradient would lack a part.
        """
        if create_graph and any(isinstance(node, CustomFunctionNode) for node in graph_of([loss])):
            raise FlatminimaError(  # under vmap, those marked once_differentiable have a second derivative of zero
                "estimator='hvp' cannot tell under passes='together' whether a custom autograd.Function has second "
                "derivatives, and the model or loss uses one: choose passes='one-by-one'"
            )
        originals = self.weights.parameters
        with _in_one_pass():
            found = gradients_at([*self.parameters, *originals], loss, create_graph=create_graph)
        for name, gradient in zip(self.weights.names, found[len(originals) :], strict=True):
            require(
                gradient is None,
                f"the loss uses parameter {name} itself, not as an attribute of the model's modules (a list of "
                "parameters made before, say), where it cannot be swapped: choose passes='one-by-one'",
            )
        return found[: len(originals)]

    @contextmanager
    def moved(self, direction: list[Tensor], step: float) -> Iterator[None]:
        """Copies moved by step · direction in the place of :attr:`parameters`."""
        here, select = self.parameters, self.weights.select
        with torch.no_grad():
            there = iter(foreach_add(select(here), select(direction), alpha=step))
        self.parameters = [
            next(there).requires_grad_() if penalized else parameter
            for parameter, penalized in zip(here, self.weights.penalized, strict=True)
        ]
        yield
        self.parameters = here

    def total(self, values: list[Tensor]) -> list[Tensor]:
        """The sum over the first dimension."""
        return list(map(_sum, values))

    def buffers_left(self) -> list[Tensor]:
        """The sum over sub-batches of what the latest pass left; of integers the last."""
        left = [buffer.detach() for buffer in self._buffers_left]
        return [_sum(buffer) if buffer.is_floating_point() else buffer[-1] for buffer in left]


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
            for name, tensor in (*own_parameters(module).items(), *own_buffers(module).items())
            if id(tensor) in index
        }

    def forward(self, tensors: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The loss on a batch with these tensors, and what it leaves in the model's buffers."""
        remaining = iter(tensors)
        loss = sub_batch_loss(self.closure, map_tensors(lambda _: next(remaining), self.batch))
        return loss, list(self.model.buffers())


LossesTogether = Callable[[_Forward, list[Tensor], list[Tensor], list[Tensor]], tuple[Tensor, list[Tensor]]]


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
    with eager_stance():
        return _losses_together(forward, weights, buffers, tensors)


def compiled_losses_together() -> LossesTogether:
    """:func:`losses_together` compiled into one graph and its backward, which both passes share.

    Every size of sub-batches has a graph of its own (``vmap`` of a loss fixes the size). ``torch.compile`` keeps eight
    for each piece of code, so this makes a copy of the code: one model's graphs do not use up the limit of another's.
    """
    error_type = dynamo_error()
    own = FunctionType(_losses_together.__code__.replace(), globals(), "losses_together")
    compiled: LossesTogether = torch.compile(own, fullgraph=True, dynamic=False)

    def losses(
        forward: _Forward, weights: list[Tensor], buffers: list[Tensor], tensors: list[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        try:
            return compiled(forward, weights, buffers, tensors)
        except error_type as error:
            raise FlatminimaError(
                "torch.compile cannot make one graph of this model and loss "
                f"({reason_for_no_graph(error) or first_line(error)}): choose passes='one-by-one'"
            ) from error

    return losses


def _losses_together(
    forward: _Forward, weights: list[Tensor], buffers: list[Tensor], tensors: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    def of_one(*tensors: Tensor) -> tuple[Tensor, list[Tensor]]:
        swapped = {name: tensors[i] for name, i in forward.places.items()}
        found: tuple[Tensor, list[Tensor]] = functional_call(
            forward, swapped, (list(tensors[first:]),), tie_weights=False
        )
        return found

    scratch = [_copies(b, len(tensors[0])) if b.is_floating_point() else b.clone() for b in buffers]
    copies = [*weights, *(buffer.detach() for buffer in scratch)]
    first = len(copies)  # tensor of the batch
    dims = [0 if copy.is_floating_point() else None for copy in copies]  # of integers, counters, there is one for all
    every = vmap(of_one, (*dims, *[0] * len(tensors)), randomness="different")  # nested arguments take it far longer
    found: tuple[Tensor, list[Tensor]] = every(*copies, *tensors)
    return found


def _copies(tensor: Tensor, count: int) -> Tensor:
    return tensor.expand(count, *tensor.shape).clone(memory_format=torch.contiguous_format)


def _sum(values: Tensor) -> Tensor:
    """Over the first dimension; along the memory, as ten times slower for the transposed gradients of linear layers."""
    if values.dim() > 2 and values.mT.is_contiguous():
        return values.mT.sum(0).mT
    return values.sum(0)


@contextmanager
def _in_one_pass() -> Iterator[None]:
    """Say of an operation that ``vmap`` cannot run for all sub-batches at once what to do."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        if isinstance(error, FlatminimaError) or not cannot_be_vectorized(error):
            raise
        raise FlatminimaError(
            f"the sub-batches cannot go through this model and loss together ({first_line(error)}): "
            "choose passes='one-by-one'"
        ) from error
