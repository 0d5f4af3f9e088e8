"""Rows of J by plain autograd, one sample at a time: for what no rule covers, and for batch statistics."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flatminima.errors import FlatminimaError
from flatminima.gramian.accumulator import ROWS_BUDGET_BYTES, Accumulator, slices
from flatminima.gramian.parts import Part
from flatminima.gramian.planning import (
    row_bytes,
)
from flatminima.losses import FactoredLoss, LogitGradient, Loss, logit_gradient
from flatminima.network import Inputs, call_model, call_model_without_graph, depended_on, take

Group = list[tuple[nn.Parameter, int, int]]
"""Slices of parameters' first dimensions: (parameter, start, stop)."""


@dataclass(frozen=True)
class Batch:
    """The samples of one ξ, and what is differentiated at them.

    The loss's gradient at the logits is formed anew wherever it is needed: a language model's, kept for all samples,
    would be larger than most other things.
    """

    model: nn.Module
    inputs: Inputs
    targets: Tensor
    loss: Loss | FactoredLoss
    logit_normalization: float | None

    def logits(self, rows: slice) -> Tensor:
        """The model's logits of these samples."""
        return call_model(self.model, take(self.inputs, rows))

    def gradient_at(self, logits: Tensor, rows: slice) -> LogitGradient:
        """The loss's gradient at the logits of these samples."""
        return logit_gradient(self.loss, logits, self.targets[rows], logit_normalization=self.logit_normalization)


def used_parameters(batch: Batch, candidates: Mapping[str, nn.Parameter], chunk: int) -> set[str]:
    """The names of those candidates that plain autograd finds in the graph of some chunk of samples."""
    found: set[str] = set()
    for start in range(0, len(batch.targets), chunk):
        found |= depended_on(batch.logits(slice(start, start + chunk)), candidates)
    return found


def note_losses(xi: Accumulator, batch: Batch, chunk: int) -> None:
    """Keep the losses of all samples and the norms of their gradients at the logits."""
    for start in range(0, len(xi), chunk):
        rows = slice(start, min(start + chunk, len(xi)))
        logits = call_model_without_graph(batch.model, take(batch.inputs, rows))
        xi.note(rows, batch.gradient_at(logits, rows))


def add_one_by_one(xi: Accumulator, batch: Batch, parts: Mapping[str, Part]) -> None:
    """Add JJᵀ of ``parts`` by plain autograd, sample by sample, as many at once as the budget holds."""
    for group in groups(parts.values(), len(xi)):
        add_gradients(xi, group, [_gradients(batch, i, group) for i in range(len(xi))])


def add_with_batch_statistics(xi: Accumulator, batch: Batch, parts: Mapping[str, Part], chunk: int) -> None:
    """Add JJᵀ where a sample's loss depends on its whole chunk: one backward pass per sample through the chunk."""
    if chunk < 2 or len(xi) % chunk:
        raise FlatminimaError(
            f"batchnorm={chunk} cannot be used with {len(xi)} samples: it must be at least 2 and divide the subset_size"
        )
    for group in groups(parts.values(), len(xi)):
        gradients = []
        for start in range(0, len(xi), chunk):
            rows = slice(start, start + chunk)
            logits = batch.logits(rows)
            delta = batch.gradient_at(logits, rows)
            xi.note(rows, delta)
            for i in range(chunk):
                one = torch.zeros_like(logits)
                one[i] = delta.direction[i]
                gradients.append(gradient_of(logits, one, group, keep=i + 1 < chunk))
        add_gradients(xi, group, gradients)


def add_gradients(xi: Accumulator, group: Group, gradients: Sequence[Sequence[Tensor]]) -> None:
    """Add JJᵀ of a group of slices, given each sample's gradients of them."""
    for (parameter, start, stop), rows in zip(group, zip(*gradients, strict=True), strict=True):
        xi.add_rows(parameter, torch.stack(rows), start, stop)


def groups(parts: Iterable[Part], n: int) -> Iterator[Group]:
    """Consecutive slices of the parts whose rows for n samples fit the budget together.

    Every process has as many groups, as each takes passes through the model: shorter parts end in empty slices.
    """
    group: Group = []
    left = ROWS_BUDGET_BYTES
    for part in parts:
        for start, stop in slices(part.parameter, n, 0, part.longest):
            size = (stop - start) * n * row_bytes(part.parameter)
            if group and size > left:
                yield group
                group, left = [], ROWS_BUDGET_BYTES
            group.append((part.parameter, *part.range(start, stop)))
            left -= size
    if group:
        yield group


def _gradients(batch: Batch, sample: int, group: Group) -> list[Tensor]:
    """One row of J over a group of slices, by plain autograd on that sample alone."""
    one = slice(sample, sample + 1)
    logits = batch.logits(one)
    return gradient_of(logits, batch.gradient_at(logits, one).direction, group)


def gradient_of(logits: Tensor, direction: Tensor, group: Group, *, keep: bool = False) -> list[Tensor]:
    """The gradients of a group of slices by plain autograd, for this gradient at the logits."""
    parameters = [parameter for parameter, _, _ in group]
    whole = torch.autograd.grad(
        logits, parameters, direction, retain_graph=keep, allow_unused=True, materialize_grads=True
    )
    # Copied, so that a slice does not keep the whole gradient.
    return [_with_rows(g)[start:stop].clone() for (_, start, stop), g in zip(group, whole, strict=True)]


def _with_rows(values: Tensor) -> Tensor:
    """A scalar parameter as one of a single entry, and a sparse gradient (an embedding's) as a dense one."""
    values = values.to_dense() if values.is_sparse else values
    return values if values.dim() else values.unsqueeze(0)
