"""The scale and shift of normalization layers."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor

from flatminima.gramian.rules.base import ParameterUse, rule, sum_channels, sum_positions
from flatminima.torch_compat import batch_norm_backward


@rule(F.batch_norm)
def batch_norm(
    n: int,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> list[ParameterUse] | None:
    """Batch normalization with running statistics (eval mode): an affine map per channel."""
    if training or running_mean is None or running_var is None:
        return None
    samples, channels = input.shape[:2]
    formed: list[tuple[weakref.ref[Tensor], Tensor, Tensor]] = []

    def both_rows(grad: Tensor) -> tuple[Tensor, Tensor]:
        """Those of weight and bias: one sweep gives both, and whichever is asked for second finds its own here."""
        if not formed or formed[0][0]() is not grad:
            # Samples as further channels: then the gradients, fused sums per channel, are a row per sample.
            x, g = (values.reshape(1, samples * channels, -1) for values in (input, grad))
            mean, variance = running_mean.repeat(samples), running_var.repeat(samples)
            _, *rows = batch_norm_backward(g, x, None, mean, variance, None, None, False, eps, [False, True, True])
            of_weight, of_bias = (sum_positions(row.view(samples, channels), n) for row in rows)
            formed[:] = [(weakref.ref(grad), of_weight, of_bias)]
        return formed[0][1:]

    uses = []
    if weight is not None:
        uses.append(ParameterUse(weight, lambda grad, start, stop: both_rows(grad)[0][:, start:stop], input))
    if bias is not None:
        uses.append(ParameterUse(bias, lambda grad, start, stop: both_rows(grad)[1][:, start:stop], input))
    return uses


@rule(F.group_norm)
def group_norm(
    n: int, input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> list[ParameterUse]:
    """Group normalization: the affine map after it, per channel."""
    return _affine_uses(
        input, weight, bias, lambda: F.group_norm(input, num_groups, eps=eps), lambda values: sum_channels(values, n)
    )


@rule(F.instance_norm)
def instance_norm(
    n: int,
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> list[ParameterUse] | None:
    """Instance normalization by the input's own statistics: the affine map after it, per channel."""
    if not use_input_stats:
        return batch_norm(n, input, running_mean, running_var, weight, bias, eps=eps)
    return _affine_uses(
        input, weight, bias, lambda: F.instance_norm(input, eps=eps), lambda values: sum_channels(values, n)
    )


@rule(F.layer_norm, positionwise=True)
def layer_norm(
    n: int,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> list[ParameterUse]:
    """Layer normalization: the affine map after it, per element of ``normalized_shape``."""
    shape = list(normalized_shape)
    return _affine_uses(
        input,
        weight,
        bias,
        lambda: F.layer_norm(input, shape, eps=eps),
        lambda values: values.reshape(n, -1, *shape).sum(1),
    )


@rule(F.rms_norm, positionwise=True)
def rms_norm(
    n: int, input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> list[ParameterUse]:
    """Root-mean-square normalization: the scale after it, per element of ``normalized_shape``."""
    shape = list(normalized_shape)
    return _affine_uses(
        input,
        weight,
        None,
        lambda: F.rms_norm(input, shape, eps=eps),
        lambda values: values.reshape(n, -1, *shape).sum(1),
    )


def _affine_uses(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    normalized: Callable[[], Tensor],
    reduce: Callable[[Tensor], Tensor],
) -> list[ParameterUse]:
    """The scale and shift after a normalization.

    ``normalized()`` is what they are applied to, ``reduce`` sums over what they are broadcast over.
    """
    uses = []
    if weight is not None:
        uses.append(ParameterUse(weight, lambda grad, start, stop: reduce(grad * normalized())[:, start:stop], input))
    if bias is not None:
        uses.append(ParameterUse(bias, lambda grad, start, stop: reduce(grad)[:, start:stop]))
    return uses
