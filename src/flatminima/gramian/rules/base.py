"""How one use of a parameter turns (input, output gradient) into its rows of J.

Rules are attached to the *functions* that modules call (``F.linear``, ``F.conv2d``, ...), not to module types, so a
parameter used without its module (a tied embedding, ``F.linear(x, self.weight)``) is seen like any other. A rule reads
the call's arguments and returns one :class:`ParameterUse` per parameter in it, or None for a call it does not cover;
parameters without a covering rule take the generic path of :mod:`flatminima.gramian`. What is taken out of a parameter
without looking at the samples (:data:`EXTRACTS`) counts as a parameter itself.

Throughout, N is the number of samples and a tensor's first dimension is N, or N·T with the T positions of one
sample side by side (a model that folds time or windows into the batch).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

Rows = Callable[[Tensor, int, int], Tensor]


Product = Callable[[Tensor, int, int], Tensor]


PutBack = Callable[[Tensor], Tensor]


Rule = Callable[..., "list[ParameterUse] | None"]


@dataclass
class ParameterUse:
    """One use of one parameter in the forward pass.

    Attributes:
        parameter: the parameter (any tensor stands here while a rule runs; the recorder keeps the trainable ones).
        rows: ``rows(grad, start, stop)`` → this use's part of J for ``parameter[start:stop]``: (N, stop − start, ...).
            ``grad`` is the gradient at the call's output.
        reads: the activation that ``rows`` will read, if any; overwriting it in place before then is an error.
        product: ``product(grad, start, stop)`` → (N, N), the JJᵀ of those rows without forming them, where that is
            cheaper. Only valid when the parameter has no other use.
        added: ``added(total, grad, start, stop)`` → ``total + rows(grad, start, stop)``, where few rows are not zero.
    """

    parameter: Tensor
    rows: Rows
    reads: Tensor | None = None
    product: Product | None = None
    added: Callable[[Tensor, Tensor, int, int], Tensor] | None = None


def bias_use(bias: Tensor | None, n: int, *, channel_last: bool) -> list[ParameterUse]:
    """A bias that is added along the channels: its rows are the output gradient, summed over positions."""
    if bias is None:
        return []

    def rows(grad: Tensor, start: int, stop: int) -> Tensor:
        if channel_last:
            return positions(grad, n)[:, :, start:stop].sum(1)
        return sum_channels(grad[:, start:stop], n)

    return [ParameterUse(bias, rows)]


def positions(values: Tensor, n: int) -> Tensor:
    """(N, T, features): every leading dimension but the samples' folded into T."""
    return values.reshape(n, -1, values.shape[-1])


def sum_positions(rows: Tensor, n: int) -> Tensor:
    """(N·T, ...) → (N, ...): the sum over the T positions of each sample."""
    return rows if rows.shape[0] == n else rows.reshape(n, -1, *rows.shape[1:]).sum(1)


def sum_channels(values: Tensor, n: int) -> Tensor:
    """(N·T, C, ...) → (N, C): the sum over everything but samples and channels."""
    return sum_positions(values.flatten(2).sum(2) if values.dim() > 2 else values, n)
