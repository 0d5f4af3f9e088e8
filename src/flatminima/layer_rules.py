"""What: how one use of a parameter turns (input, output gradient) into its rows of J.

Rules are attached to the *functions* that modules call (``F.linear``, ``F.conv2d``, ...), not to module types, so a
parameter used without its module (a tied embedding, ``F.linear(x, self.weight)``) is seen like any other. A rule reads
the call's arguments and returns one :class:`ParameterUse` per parameter in it, or None for a call it does not cover;
parameters without a covering rule take the generic path of :mod:`flatminima.gramian`. What is taken out of a parameter
without looking at the samples (:data:`EXTRACTS`) counts as a parameter itself.

Throughout, N is the number of samples and a tensor's first dimension is N, or N·T with the T positions of one
sample side by side (a model that folds time or windows into the batch).
"""

from __future__ import annotations

import inspect
import itertools
import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flatminima.products import has_onednn, times_transposes

Rows = Callable[[Tensor, int, int], Tensor]
Product = Callable[[Tensor, int, int], Tensor]
PutBack = Callable[[Tensor], Tensor]
Rule = Callable[..., "list[ParameterUse] | None"]

_CACHE_BYTES = 2**22
"""What a core multiplies fastest: copies of a convolution's input that stay in its share of the cache."""

_COPIES_BYTES = 2**28
"""The same on an accelerator, where large products are fastest and only memory limits them."""

_BLOCK = 16
"""Channels that oneDNN keeps together."""


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


def linear(n: int, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> list[ParameterUse]:
    """``y = x Wᵀ + b``: one outer product per position, summed over a sample's positions."""
    x = _positions(input, n)

    def weight_rows(grad: Tensor, start: int, stop: int) -> Tensor:
        return times_transposes(_positions(grad, n)[:, :, start:stop].transpose(1, 2), x.transpose(1, 2))

    def weight_product(grad: Tensor, start: int, stop: int) -> Tensor:
        return (g := _positions(grad, n)[:, 0, start:stop]) @ g.T * (x[:, 0] @ x[:, 0].T)

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
        return times_transposes(x[:, :, start:stop].transpose(1, 2), _positions(grad, n).transpose(1, 2))

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
    pads = [before for before, _ in _padding(padding, kernel, dilations)]

    def weight_rows(grad: Tensor, start: int, stop: int) -> Tensor:
        rows = convolution_weight_rows(input, grad, kernel, strides, pads, dilations, groups, (start, stop))
        return _sum_positions(rows, n)

    return [ParameterUse(weight, weight_rows, input), *_bias_use(bias, n, channel_last=False)]


def convolution_weight_rows(
    input: Tensor,
    grad: Tensor,
    kernel: tuple[int, ...],
    strides: tuple[int, ...],
    pads: Sequence[int],
    dilations: tuple[int, ...],
    groups: int,
    channels: tuple[int, int],
) -> Tensor:
    """Per-sample weight gradients of a convolution, for some of its output channels.

    Args:
        input: (N, C_in, *spatial).
        grad: (N, C_out, *output spatial).
        kernel: kernel size per spatial dimension.
        strides: stride per spatial dimension.
        pads: zero padding before the first entry, per spatial dimension.
        dilations: dilation per spatial dimension.
        groups: number of groups that channels are split into.
        channels: (start, stop), the output channels wanted.

    Returns:
        (N, stop − start, C_in / groups, *kernel).
    """
    start, stop = channels
    if groups > 1:  # whole groups, of which the wanted channels are cut out in the end
        out_size, in_size = grad.shape[1] // groups, input.shape[1] // groups
        first, last = start // out_size, (stop - 1) // out_size + 1
        input, grad = input[:, first * in_size : last * in_size], grad[:, first * out_size : last * out_size]
        form = (
            _by_groups if _suits_groups(input, grad, kernel, strides, pads, dilations, last - first) else _correlation
        )
        rows = form(input, grad, kernel, strides, pads, dilations, last - first)
        return rows[:, start - first * out_size : stop - first * out_size]
    grad = grad[:, start:stop]
    if _suits_groups(input, grad, kernel, strides, pads, dilations, 1):
        return _by_groups(input, grad, kernel, strides, pads, dilations, 1)
    swapped_pads = [d * (k - 1) - pad for d, k, pad in zip(dilations, kernel, pads, strict=True)]
    if grad.shape[1] < input.shape[1] and set(strides) == {1} and min(swapped_pads) >= 0:
        # Without strides the two may change places, which mirrors the taps: the narrower is cheaper to displace.
        swapped = _correlation(grad, input, kernel, strides, swapped_pads, dilations, 1)
        return swapped.transpose(1, 2).flip(tuple(range(3, swapped.dim())))
    return _correlation(input, grad, kernel, strides, pads, dilations, 1)


def _by_groups(
    input: Tensor,
    grad: Tensor,
    kernel: tuple[int, ...],
    strides: tuple[int, ...],
    pads: Sequence[int],
    dilations: tuple[int, ...],
    groups: int,
) -> Tensor:
    """The same as :func:`_correlation`: the weight gradient of a convolution whose groups are the samples.

    A few samples at a time, so that all of it stays in the cache.
    """
    rows = grad.new_empty(len(grad), grad.shape[1], input.shape[1] // groups, *kernel)
    chunk = _samples_in_cache(sum(t[0].numel() for t in (input, grad, rows, rows)) * rows.element_size(), rows.device)
    for x, g, target in zip(*(torch.split(t, chunk) for t in (input, grad, rows)), strict=True):
        weight = target.flatten(0, 1)  # its shape is all that is read
        x, g = x.reshape(1, -1, *x.shape[2:]), g.reshape(1, -1, *g.shape[2:])
        _, gradient, _ = torch.ops.aten.convolution_backward(
            g,
            x,
            weight,
            None,
            strides,
            list(pads),
            dilations,
            False,
            [0] * len(kernel),
            groups * len(target),
            [False, True, False],
        )
        weight.copy_(gradient)
    return rows


def _suits_groups(
    input: Tensor,
    grad: Tensor,
    kernel: tuple[int, ...],
    strides: tuple[int, ...],
    pads: Sequence[int],
    dilations: tuple[int, ...],
    groups: int,
) -> bool:
    """Whether oneDNN has this convolution with many groups, and is faster at it than products of matrices.

    It keeps channels in blocks of 16, and a group must be made of whole ones.
    """
    sizes = zip(input.shape[2:], grad.shape[2:], kernel, strides, pads, dilations, strict=True)
    return (
        has_onednn(input)
        and math.prod(kernel) > 1
        and input.shape[1] // groups % _BLOCK == grad.shape[1] // groups % _BLOCK == 0
        # padded alike on both sides, which "same" with an even kernel is not
        and all((size + 2 * pad - d * (k - 1) - 1) // s + 1 == out for size, out, k, s, pad, d in sizes)
    )


def _correlation(
    input: Tensor,
    grad: Tensor,
    kernel: tuple[int, ...],
    strides: tuple[int, ...],
    pads: Sequence[int],
    dilations: tuple[int, ...],
    groups: int,
) -> Tensor:
    """Per sample, input channels times gradient channels, summed over positions, at the displacement of every tap.

    Unfolding would copy the input once per tap. Here only the taps of the *last* dimension get a copy each, of a few
    samples at a time so that they stay in the cache. All copies are displaced along the other dimensions at once by a
    view, one offset into the flat grid, and multiplied with the gradient in one batched product. Where a stride
    skips positions of those dimensions, they are taken apart by phase, within which a displacement is a view again.

    Returns:
        (N, C_grad, C_in / groups, *kernel).
    """
    n, lead = input.shape[0], len(kernel) - 1
    x = input.reshape(n, groups, -1, *input.shape[2:])
    reach = [d * (k - 1) // s for k, s, d in zip(kernel[:lead], strides, dilations, strict=False)]
    grid = [size + more for size, more in zip(grad.shape[2:], [*reach, 0], strict=True)]
    # The gradient on the same grid. Its first dimension needs no room, as displacements only run forward along it; and
    # what it ends in is zeros, with which no tap may run past the grid's end.
    room = [0, 0, *(side for more in reversed(reach[1:]) for side in (0, more))]
    g = F.pad(grad, room).reshape(n, groups, grad.shape[1] // groups, -1)
    g = g[..., : g.shape[3] - sum(more * math.prod(grid[i + 2 :]) for i, more in enumerate(reach[1:]))]

    c_in, c_grad = x.shape[2], g.shape[2]
    rows = grad.new_empty(math.prod(kernel[:lead]), n * groups, kernel[-1] * c_in, c_grad)
    in_place = kernel[-1] == 1 and list(x.shape[3:]) == grid and not any(pads)
    sample_bytes = groups * kernel[-1] * c_in * math.prod(grid) * x.element_size()
    chunk = n if in_place else min(n, _samples_in_cache(sample_bytes, x.device))
    for phase, taps in _taps_by_phase(kernel[:lead], strides, dilations, grid).items():
        copies = x.unsqueeze(2) if in_place else x.new_zeros(chunk, groups, kernel[-1], c_in, *grid)
        starts = [p - pad for p, pad in zip(phase, pads, strict=False)]
        for first in range(0, n, chunk):
            part = slice(first, min(first + chunk, n))
            displaced = copies[: part.stop - first]
            for tap in range(0 if in_place else kernel[-1]):
                _copy_overlap(x[part], displaced[:, :, tap], [*starts, tap * dilations[lead] - pads[lead]], strides)
            flat = displaced.reshape((part.stop - first) * groups, kernel[-1] * c_in, -1)
            target = g[part].flatten(0, 1)
            for row, offset in taps:
                window = flat[:, :, offset : offset + target.shape[2]]
                times_transposes(window, target, out=rows[row, first * groups : part.stop * groups])
    shaped = rows.view(*kernel[:lead], n, groups, kernel[lead], c_in, c_grad)
    return shaped.permute(lead, lead + 1, lead + 4, lead + 3, *range(lead), lead + 2).flatten(1, 2)


def _taps_by_phase(
    kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int], grid: Sequence[int]
) -> dict[tuple[int, ...], list[tuple[int, int]]]:
    """``{phase: [(number of the tap, its offset into the flat grid of that phase), ...]}``."""
    by_phase: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    for number, tap in enumerate(itertools.product(*map(range, kernel))):
        displacements = [t * d for t, d in zip(tap, dilations, strict=False)]
        phase = tuple(by % s for by, s in zip(displacements, strides, strict=False))
        offset = sum(by // strides[i] * math.prod(grid[i + 1 :]) for i, by in enumerate(displacements))
        by_phase.setdefault(phase, []).append((number, offset))
    return by_phase


def _copy_overlap(source: Tensor, target: Tensor, starts: Sequence[int], strides: Sequence[int]) -> None:
    """``target[i] = source[start + stride · i]`` in every spatial dimension, wherever the source has that entry."""
    to, of = [], []
    for have, wanted, start, stride in zip(source.shape[3:], target.shape[3:], starts, strides, strict=True):
        low, high = max(0, -(start // stride)), min(wanted, (have - 1 - start) // stride + 1)
        if low >= high:
            return
        to.append(slice(low, high))
        of.append(slice(start + stride * low, start + stride * (high - 1) + 1, stride))
    target[(slice(None), slice(None), slice(None), *to)] = source[(slice(None), slice(None), slice(None), *of)]


def _samples_in_cache(sample_bytes: int, device: torch.device) -> int:
    """How many samples' copies to work on at once."""
    budget = _CACHE_BYTES * torch.get_num_threads() if device.type == "cpu" else _COPIES_BYTES
    return max(1, budget // sample_bytes)


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
            _, *rows = torch.ops.aten.native_batch_norm_backward(
                g, x, None, mean, variance, None, None, False, eps, [False, True, True]
            )
            of_weight, of_bias = (_sum_positions(row.view(samples, channels), n) for row in rows)
            formed[:] = [(weakref.ref(grad), of_weight, of_bias)]
        return formed[0][1:]

    uses = []
    if weight is not None:
        uses.append(ParameterUse(weight, lambda grad, start, stop: both_rows(grad)[0][:, start:stop], input))
    if bias is not None:
        uses.append(ParameterUse(bias, lambda grad, start, stop: both_rows(grad)[1][:, start:stop], input))
    return uses


def group_norm(
    n: int, input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> list[ParameterUse]:
    """Group normalization: the affine map after it, per channel."""
    return _affine_uses(
        input, weight, bias, lambda: F.group_norm(input, num_groups, eps=eps), lambda values: _sum_channels(values, n)
    )


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
        input, weight, bias, lambda: F.instance_norm(input, eps=eps), lambda values: _sum_channels(values, n)
    )


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

    def added(total: Tensor, grad: Tensor, start: int, stop: int) -> Tensor:
        chosen = (indices >= start) & (indices < stop)
        if padding is not None:
            chosen = chosen & (indices != padding)
        sample = torch.arange(n, device=indices.device)[:, None].expand_as(indices)[chosen]
        row = sample * (stop - start) + indices[chosen] - start
        return total.reshape(n * (stop - start), -1).index_add(0, row, _positions(grad, n)[chosen]).view_as(total)

    def rows(grad: Tensor, start: int, stop: int) -> Tensor:
        return added(grad.new_zeros(n, stop - start, grad.shape[-1]), grad, start, stop)

    return [ParameterUse(weight, rows, input, added=added)]


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
    n: int, x: Tensor, parameter: Tensor, at_output: Callable[[Tensor], Tensor], reads: Tensor | None = None
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


def _bias_use(bias: Tensor | None, n: int, *, channel_last: bool) -> list[ParameterUse]:
    if bias is None:
        return []

    def rows(grad: Tensor, start: int, stop: int) -> Tensor:
        if channel_last:
            return _positions(grad, n)[:, :, start:stop].sum(1)
        return _sum_channels(grad[:, start:stop], n)

    return [ParameterUse(bias, rows)]


def _positions(values: Tensor, n: int) -> Tensor:
    """(N, T, features): every leading dimension but the samples' folded into T."""
    return values.reshape(n, -1, values.shape[-1])


def _sum_positions(rows: Tensor, n: int) -> Tensor:
    """(N·T, ...) → (N, ...): the sum over the T positions of each sample."""
    return rows if rows.shape[0] == n else rows.reshape(n, -1, *rows.shape[1:]).sum(1)


def _sum_channels(values: Tensor, n: int) -> Tensor:
    """(N·T, C, ...) → (N, C): the sum over everything but samples and channels."""
    return _sum_positions(values.flatten(2).sum(2) if values.dim() > 2 else values, n)


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
        return [*(rule(n, input, other, **kwargs) or []), *(rule(n, other, input, **kwargs) or [])]

    return either_side


def attention(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None] | None:
    """``F.multi_head_attention_forward``, with its projections as calls of their own; None where that is not done.

    Identity matrices, which change nothing, stay in their place. The calls before and after are of (N, T, E), not of
    the (T, N, E) that attention works on.
    """
    call = inspect.signature(F.multi_head_attention_forward).bind(*args, **kwargs)
    call.apply_defaults()
    given = call.arguments
    query = given["query"]
    if given["in_proj_weight"] is None or given["bias_k"] is not None or query.dim() != 3:
        return None
    weight, bias = given["in_proj_weight"], given["in_proj_bias"]
    out_weight, out_bias = given["out_proj_weight"], given["out_proj_bias"]
    size = query.shape[-1]
    projected: dict[int, Tensor] = {}
    for i, name in enumerate(("query", "key", "value")):
        x = given[name]
        if id(x) not in projected:
            projected[id(x)] = F.linear(x.transpose(0, 1), weight, bias).transpose(0, 1)
        given[name] = projected[id(x)][..., i * size : (i + 1) * size]
    same = torch.eye(size, dtype=query.dtype, device=query.device)
    given |= {"in_proj_weight": same.repeat(3, 1), "in_proj_bias": None, "out_proj_weight": same, "out_proj_bias": None}
    attended, weights = F.multi_head_attention_forward(*call.args, **call.kwargs)
    return F.linear(attended.transpose(0, 1), out_weight, out_bias).transpose(0, 1), weights


def entries(source: Tensor, index: Any) -> tuple[Tensor, PutBack] | None:
    """``p[index]``, by numbers and slices."""
    index = index if isinstance(index, tuple) else (index,)
    if not all(part is None or part is Ellipsis or type(part) in (int, slice) for part in index):
        return None

    def put_back(rows: Tensor) -> Tensor:
        whole = rows.new_zeros(len(rows), *source.shape)
        whole[(slice(None), *index)] = rows
        return whole

    return source, put_back


def unsqueezed(source: Tensor, dim: int) -> tuple[Tensor, PutBack]:
    """``p.unsqueeze(dim)``."""
    return source, lambda rows: rows.reshape(len(rows), *source.shape)


def looked_up(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> tuple[Tensor, PutBack] | None:
    """``F.embedding`` of one row of indices, which are the same for all samples."""
    if max_norm is not None or scale_grad_by_freq or input.dim() != 1:
        return None
    trained = slice(None) if padding_idx is None else input != padding_idx % len(weight)

    def put_back(rows: Tensor) -> Tensor:
        return rows.new_zeros(len(rows), *weight.shape).index_add(1, input[trained], rows[:, trained])

    return weight, put_back


EXTRACTS: dict[Callable[..., Any], Callable[..., tuple[Tensor, PutBack] | None]] = {
    torch.Tensor.__getitem__: entries,
    torch.Tensor.unsqueeze: unsqueezed,
    torch.unsqueeze: unsqueezed,
    F.embedding: looked_up,
}
"""Functions that take entries out of a tensor: the call's arguments → the tensor, and how rows of J go back into it."""


SPLIT: dict[Callable[..., Any], Callable[..., Any]] = {F.multi_head_attention_forward: attention}
"""Functions that hide calls with rules from the recorder, and the same as calls that it sees."""


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
