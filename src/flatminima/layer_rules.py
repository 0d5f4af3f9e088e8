"""What: how one use of a parameter turns (input, output gradient) into its rows of J.

Rules are attached to the *functions* that modules call (``F.linear``, ``F.conv2d``, ...), not to module types, so a
parameter used without its module (a tied embedding, ``F.linear(x, self.weight)``) is seen like any other. A rule reads
the call's arguments and returns one :class:`ParameterUse` per parameter in it, or None for a call it does not cover;
parameters without a covering rule take the generic path of :mod:`flatminima.gramian`.

Throughout, N is the number of samples and a tensor's first dimension is N, or N·T with the T positions of one
sample side by side (a model that folds time or windows into the batch).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Rows = Callable[[Tensor, int, int], Tensor]
Product = Callable[[Tensor], Tensor]
Rule = Callable[..., "list[ParameterUse] | None"]


@dataclass
class ParameterUse:
    """One use of one parameter in the forward pass.

    Attributes:
        parameter: the parameter (any tensor stands here while a rule runs; the recorder keeps the trainable ones).
        rows: ``rows(grad, start, stop)`` → this use's part of J for ``parameter[start:stop]``: (N, stop − start, ...).
            ``grad`` is the gradient at the call's output.
        reads: the activation that ``rows`` will read, if any; overwriting it in place before then is an error.
        product: ``product(grad)`` → (N, N), this use's JJᵀ without forming J, where that is cheaper. Only valid when
            the parameter has no other use.
    """

    parameter: Tensor
    rows: Rows
    reads: Tensor | None = None
    product: Product | None = None


def linear(n: int, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> list[ParameterUse]:
    """``y = x Wᵀ + b``: one outer product per position, summed over a sample's positions."""
    x = _positions(input, n)

    def weight_rows(grad: Tensor, start: int, stop: int) -> Tensor:
        return torch.bmm(_positions(grad, n)[:, :, start:stop].transpose(1, 2), x)

    def weight_product(grad: Tensor) -> Tensor:
        return (g := _positions(grad, n)[:, 0]) @ g.T * (x[:, 0] @ x[:, 0].T)

    single_position = x.shape[1] == 1
    return [
        ParameterUse(weight, weight_rows, input, weight_product if single_position else None),
        *_bias_use(bias, n, channel_last=True),
    ]


def matmul(n: int, input: Tensor, other: Tensor) -> list[ParameterUse] | None:
    """``y = x W`` with a two-dimensional W of shape (in, out)."""
    if other.dim() != 2 or input.dim() < 2:
        return None
    x = _positions(input, n)

    def rows(grad: Tensor, start: int, stop: int) -> Tensor:
        return torch.bmm(x[:, :, start:stop].transpose(1, 2), _positions(grad, n))

    return [ParameterUse(other, rows, input)]


def addmm(
    n: int, input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1
) -> list[ParameterUse] | None:
    """``y = b + x W`` (transformers' ``Conv1D``)."""
    if beta != 1 or alpha != 1 or input.dim() != 1:
        return None
    return [*(matmul(n, mat1, mat2) or []), *_bias_use(input, n, channel_last=True)]


def convolution(
    n: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> list[ParameterUse] | None:
    """Convolution in 1, 2 or 3 dimensions, any stride, zero padding, dilation and groups."""
    spatial = weight.dim() - 2
    if input.dim() != spatial + 2:
        return None
    kernel = tuple(weight.shape[2:])
    strides, dilations = _tuple(stride, spatial), _tuple(dilation, spatial)
    pads = _padding(padding, kernel, dilations)

    def weight_rows(grad: Tensor, start: int, stop: int) -> Tensor:
        rows = convolution_weight_rows(input, grad, kernel, strides, pads, dilations, groups, (start, stop))
        return _sum_positions(rows, n)

    return [ParameterUse(weight, weight_rows, input), *_bias_use(bias, n, channel_last=False)]


def convolution_weight_rows(
    input: Tensor,
    grad: Tensor,
    kernel: tuple[int, ...],
    strides: tuple[int, ...],
    pads: Sequence[tuple[int, int]],
    dilations: tuple[int, ...],
    groups: int,
    channels: tuple[int, int],
) -> Tensor:
    """Per-sample weight gradients of a convolution, for some of its output channels.

    Nothing is unfolded. The padded input is cut into its stride phases (at stride 1: itself), each laid out on one
    grid, flattened, and the output gradient is laid out on the same grid: every kernel tap is then *one offset* into
    the flat input, and its gradient one batched matrix product of views.

    Args:
        input: (N, C_in, *spatial).
        grad: (N, C_out, *output spatial).
        kernel: kernel size per spatial dimension.
        strides: stride per spatial dimension.
        pads: (before, after) zero padding per spatial dimension.
        dilations: dilation per spatial dimension.
        groups: number of groups that channels are split into.
        channels: (start, stop), the output channels wanted.

    Returns:
        (N, stop − start, C_in / groups, *kernel).
    """
    n, c_in = input.shape[:2]
    start, stop = channels
    per_group_out, per_group_in = grad.shape[1] // groups, c_in // groups
    first, last = start // per_group_out, (stop - 1) // per_group_out + 1
    out_size = grad.shape[2:]
    # A grid must hold each output position plus the tap's offset in its phase.
    reach = [d * (k - 1) // s for k, s, d in zip(kernel, strides, dilations, strict=True)]
    grid = [o + r for o, r in zip(out_size, reach, strict=True)]
    phases = _stride_phases(
        input[:, first * per_group_in : last * per_group_in],
        grid,
        strides,
        pads,
        needed=_phases_used(kernel, strides, dilations),
    )
    g = grad[:, start:stop]
    if grid[1:] != list(out_size[1:]):  # the leading dimension needs no room: offsets only run forward along it
        room = [(0, r) for r in reach[1:]]
        g = F.pad(g, [side for pair in reversed(room) for side in pair])
    g = g.flatten(2)
    # The last row of the gradient's grid ends in zeros that no tap may run past the end with.
    length = g.shape[2] - sum(r * math.prod(grid[i + 2 :]) for i, r in enumerate(reach[1:]))
    taps = []
    for tap in itertools.product(*map(range, kernel)):
        shifts = [t * d for t, d in zip(tap, dilations, strict=True)]
        phase = tuple(shift % s for shift, s in zip(shifts, strides, strict=True))
        offset = sum(
            shift // s * math.prod(grid[i + 1 :]) for i, (shift, s) in enumerate(zip(shifts, strides, strict=True))
        )
        taps.append((phases[phase], offset))
    rows = g.new_empty(len(taps), n, stop - start, per_group_in)
    for row, (x, offset) in zip(rows, taps, strict=True):
        window = x[:, :, offset : offset + length]
        if groups == 1:
            torch.bmm(g[:, :, :length], window.transpose(1, 2), out=row)
        else:
            _grouped_product(g[:, :, :length], window, row, per_group_out, per_group_in, start)
    return rows.permute(1, 2, 3, 0).view(n, stop - start, per_group_in, *kernel)


def _grouped_product(
    grad: Tensor, window: Tensor, out: Tensor, per_group_out: int, per_group_in: int, start: int
) -> None:
    """``out[:, o] = grad[:, o] · window[:, channels of o's group]`` for grouped convolutions."""
    n, channels = grad.shape[:2]
    if start % per_group_out == 0 and channels % per_group_out == 0:
        groups = channels // per_group_out
        g = grad.reshape(n, groups, per_group_out, -1)
        x = window.reshape(n, groups, per_group_in, -1)
        out.copy_(torch.matmul(g, x.transpose(2, 3)).flatten(1, 2))
        return
    for channel in range(channels):  # a chunk of rows that cuts through a group
        group = (start + channel) // per_group_out - start // per_group_out
        x = window[:, group * per_group_in : (group + 1) * per_group_in]
        out[:, channel] = torch.bmm(x, grad[:, channel, :, None])[:, :, 0]


def _phases_used(kernel: tuple[int, ...], strides: tuple[int, ...], dilations: tuple[int, ...]) -> set[tuple[int, ...]]:
    per_dimension = [{t * d % s for t in range(k)} for k, s, d in zip(kernel, strides, dilations, strict=True)]
    return set(itertools.product(*per_dimension))


def _stride_phases(
    input: Tensor,
    grid: list[int],
    strides: tuple[int, ...],
    pads: Sequence[tuple[int, int]],
    needed: set[tuple[int, ...]],
) -> dict[tuple[int, ...], Tensor]:
    """``{phase: (N, C, prod(grid))}``: the zero-padded input at the positions ``phase + stride · i``, i on the grid."""
    span = [size * s for size, s in zip(grid, strides, strict=True)]
    widths = [
        (before, max(length - before - size, 0))
        for (before, _), length, size in zip(pads, span, input.shape[2:], strict=True)
    ]
    if any(before or after for before, after in widths):
        input = F.pad(input, [side for pair in reversed(widths) for side in pair])
    phases = {}
    for phase in needed:
        index = tuple(slice(p, length, s) for p, length, s in zip(phase, span, strides, strict=True))
        phases[phase] = input[(slice(None), slice(None), *index)].flatten(2)
    return phases


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
    shape = (1, -1) + (1,) * (input.dim() - 2)

    def normalized() -> Tensor:
        return (input - running_mean.view(shape)) * (running_var.view(shape) + eps).rsqrt()

    return _affine_uses(n, input, weight, bias, normalized, channel_dim=1)


def group_norm(
    n: int, input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> list[ParameterUse]:
    """Group normalization: the affine map after it, per channel."""
    return _affine_uses(n, input, weight, bias, lambda: F.group_norm(input, num_groups, eps=eps), channel_dim=1)


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
    return _affine_uses(n, input, weight, bias, lambda: F.instance_norm(input, eps=eps), channel_dim=1)


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
    return _affine_uses(n, input, weight, bias, lambda: F.layer_norm(input, shape, eps=eps), tail=len(shape))


def rms_norm(
    n: int, input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> list[ParameterUse]:
    """Root-mean-square normalization: the scale after it, per element of ``normalized_shape``."""
    shape = list(normalized_shape)
    return _affine_uses(n, input, weight, None, lambda: F.rms_norm(input, shape, eps=eps), tail=len(shape))


def embedding(
    n: int,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> list[ParameterUse] | None:
    """Look-up table: the output gradients, summed by index."""
    if max_norm is not None or scale_grad_by_freq:
        return None
    indices = input.reshape(n, -1)
    padding = None if padding_idx is None else padding_idx % len(weight)

    def rows(grad: Tensor, start: int, stop: int) -> Tensor:
        g = _positions(grad, n)
        chosen = (indices >= start) & (indices < stop)
        if padding is not None:
            chosen = chosen & (indices != padding)
        sample = torch.arange(n, device=indices.device)[:, None].expand_as(indices)[chosen]
        out = g.new_zeros(n * (stop - start), g.shape[2])
        out.index_add_(0, sample * (stop - start) + indices[chosen] - start, g[chosen])
        return out.view(n, stop - start, -1)

    return [ParameterUse(weight, rows, input)]


def add(n: int, input: Tensor, other: Tensor, *, alpha: float = 1) -> list[ParameterUse] | None:
    """``y = x + p`` with a broadcast parameter."""
    if alpha != 1:
        return None
    return _broadcast_use(n, input, other, lambda grad: grad)


def expand(n: int, input: Tensor, *sizes: Any) -> list[ParameterUse] | None:
    """``p.expand(N, ...)``: one copy of the parameter per sample (class tokens)."""
    shape = input.expand(*sizes)
    return _broadcast_use(n, shape, input, lambda grad: grad) if shape.shape[0] == n else None


def multiply(n: int, input: Tensor, other: Tensor) -> list[ParameterUse] | None:
    """``y = x · p`` with a broadcast parameter (layer scale, hand-written RMSNorm)."""
    return _broadcast_use(n, input, other, lambda grad: grad * input, reads=input)


def _broadcast_use(
    n: int, x: Tensor, parameter: Tensor, at_output: Product, reads: Tensor | None = None
) -> list[ParameterUse] | None:
    """A parameter broadcast over the samples: its rows are ``at_output(grad)`` summed over the broadcast dimensions."""
    lead = x.dim() - parameter.dim()
    padded = (1,) * lead + tuple(parameter.shape)
    if lead < 0 or padded[0] != 1:
        return None

    def rows(grad: Tensor, start: int, stop: int) -> Tensor:
        values = at_output(grad)
        summed = [d for d in range(1, values.dim()) if padded[d] == 1 and values.shape[d] != 1]
        if summed:
            values = values.sum(summed, keepdim=True)
        return _sum_positions(values.reshape(-1, *(parameter.shape or (1,))), n)[:, start:stop]

    return [ParameterUse(parameter, rows, reads)]


def _affine_uses(
    n: int,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    normalized: Callable[[], Tensor],
    *,
    channel_dim: int | None = None,
    tail: int = 0,
) -> list[ParameterUse]:
    """The scale and shift after a normalization; ``normalized()`` gives what they are applied to."""

    def reduce(values: Tensor) -> Tensor:
        if channel_dim is not None:
            return _sum_positions(values.flatten(2).sum(2) if values.dim() > 2 else values, n)
        kept = values.shape[values.dim() - tail :]
        return values.reshape(n, -1, *kept).sum(1)

    uses = []
    if weight is not None:
        uses.append(ParameterUse(weight, lambda grad, start, stop: reduce(grad * normalized())[:, start:stop], input))
    if bias is not None:
        uses.append(ParameterUse(bias, lambda grad, start, stop: reduce(grad)[:, start:stop]))
    return uses


def _bias_use(bias: Tensor | None, n: int, *, channel_last: bool) -> list[ParameterUse]:
    if bias is None:
        return []

    def rows(grad: Tensor, start: int, stop: int) -> Tensor:
        if channel_last:
            return _positions(grad, n)[:, :, start:stop].sum(1)
        return _sum_positions(grad[:, start:stop].flatten(2).sum(2), n)

    return [ParameterUse(bias, rows)]


def _positions(values: Tensor, n: int) -> Tensor:
    """(N, T, features): every leading dimension but the samples' folded into T."""
    return values.reshape(n, -1, values.shape[-1])


def _sum_positions(rows: Tensor, n: int) -> Tensor:
    """(N·T, ...) → (N, ...): the sum over the T positions of each sample."""
    return rows if rows.shape[0] == n else rows.reshape(n, -1, *rows.shape[1:]).sum(1)


def _tuple(value: int | Sequence[int], length: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * length if len(values) == 1 else values


def _padding(
    padding: str | int | Sequence[int], kernel: tuple[int, ...], dilations: tuple[int, ...]
) -> list[tuple[int, int]]:
    if padding == "valid":
        return [(0, 0)] * len(kernel)
    if padding == "same":  # any odd remainder goes to the end, as PyTorch does
        totals = [d * (k - 1) for k, d in zip(kernel, dilations, strict=True)]
        return [(total // 2, total - total // 2) for total in totals]
    assert not isinstance(padding, str)
    return [(p, p) for p in _tuple(padding, len(kernel))]


def _commuted(rule: Rule) -> Rule:
    """The rule for a commutative function, with the parameter on either side."""

    def either_side(n: int, input: Any, other: Any, **kwargs: Any) -> list[ParameterUse] | None:
        if not (isinstance(input, Tensor) and isinstance(other, Tensor)):
            return None
        if isinstance(input, torch.nn.Parameter):
            input, other = other, input
        return rule(n, input, other, **kwargs)

    return either_side


RULES: dict[Callable[..., Any], Rule] = {
    F.linear: linear,
    torch.addmm: addmm,
    torch.matmul: matmul,
    torch.Tensor.matmul: matmul,
    torch.Tensor.__matmul__: matmul,
    F.conv1d: convolution,
    F.conv2d: convolution,
    F.conv3d: convolution,
    F.batch_norm: batch_norm,
    F.group_norm: group_norm,
    F.instance_norm: instance_norm,
    F.layer_norm: layer_norm,
    F.rms_norm: rms_norm,
    F.embedding: embedding,
    torch.add: _commuted(add),
    torch.Tensor.add: _commuted(add),
    torch.Tensor.add_: add,
    torch.Tensor.__iadd__: add,
    torch.Tensor.expand: expand,
    torch.mul: _commuted(multiply),
    torch.Tensor.mul: _commuted(multiply),
}
"""The functions whose parameters have a rule. ``rule(n, *args, **kwargs)`` takes the function's own arguments."""
