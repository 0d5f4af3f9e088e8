"""The rows of J of a convolution's weight, by whichever way is fastest where they are formed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from flatminima.gramian.products import has_onednn, times_transposes
from flatminima.gramian.rules.base import ParameterUse, bias_use, rule, sum_positions
from flatminima.torch_compat import convolution_backward

CACHE_BYTES = 2**22
"""What a core multiplies fastest: copies of a convolution's input that stay in its share of the cache."""

COPIES_BYTES = 2**28
"""The same on an accelerator, where large products are fastest and only memory limits them."""

_BLOCK = 16
"""Channels that oneDNN keeps together."""


@dataclass(frozen=True)
class Window:
    """What a convolution looks at, by spatial dimension."""

    kernel: tuple[int, ...]
    """Its size."""
    strides: tuple[int, ...]
    """How far it moves."""
    pads: tuple[int, ...]
    """Zeros before the first entry."""
    dilations: tuple[int, ...]
    """How far apart its entries are."""


def convolution_weight_rows(
    input: Tensor, grad: Tensor, window: Window, groups: int, channels: tuple[int, int]
) -> Tensor:
    """Per-sample weight gradients of a convolution, for some of its output channels.

    Args:
        input: (N, C_in, *spatial).
        grad: (N, C_out, *output spatial).
        window: the convolution's.
        groups: number of groups that channels are split into.
        channels: (start, stop), the output channels wanted.

    Returns:
        (N, stop − start, C_in / groups, *kernel).
    """
    start, stop = channels
    if groups == 1:
        return _rows(input, grad[:, start:stop], window, 1)
    # Whole groups, of which the wanted channels are cut out in the end.
    out_size, in_size = grad.shape[1] // groups, input.shape[1] // groups
    first, last = start // out_size, (stop - 1) // out_size + 1
    input, grad = input[:, first * in_size : last * in_size], grad[:, first * out_size : last * out_size]
    rows = _rows(input, grad, window, last - first)
    return rows[:, start - first * out_size : stop - first * out_size]


def _rows(input: Tensor, grad: Tensor, window: Window, groups: int) -> Tensor:
    """Those of all channels: (N, C_out, C_in / groups, *kernel)."""
    if _suits_groups(input, grad, window, groups):
        return _by_groups(input, grad, window, groups)
    pads = tuple(d * (k - 1) - pad for k, pad, d in zip(window.kernel, window.pads, window.dilations, strict=True))
    if groups == 1 and grad.shape[1] < input.shape[1] and set(window.strides) == {1} and min(pads) >= 0:
        # Without strides the two may change places, which mirrors the taps: the narrower is cheaper to displace.
        swapped = _correlation(grad, input, replace(window, pads=pads), 1)
        return swapped.transpose(1, 2).flip(tuple(range(3, swapped.dim())))
    return _correlation(input, grad, window, groups)


def _suits_groups(input: Tensor, grad: Tensor, window: Window, groups: int) -> bool:
    """Whether oneDNN has this convolution with many groups, and is faster at it than products of matrices.

    It keeps channels in blocks of 16, and a group must be made of whole ones.
    """
    window_of_each = zip(window.kernel, window.strides, window.pads, window.dilations, strict=True)
    reached = [
        (size + 2 * pad - d * (k - 1) - 1) // s + 1
        for size, (k, s, pad, d) in zip(input.shape[2:], window_of_each, strict=True)
    ]
    return (
        has_onednn(input)
        and math.prod(window.kernel) > 1
        and input.shape[1] // groups % _BLOCK == grad.shape[1] // groups % _BLOCK == 0
        and reached == list(grad.shape[2:])  # padded alike on both sides, which "same" with an even kernel is not
    )


def _by_groups(input: Tensor, grad: Tensor, window: Window, groups: int) -> Tensor:
    """The same as :func:`_correlation`: the weight gradient of a convolution whose groups are the samples.

    A few samples at a time, so that all of it stays in the cache.
    """
    rows = grad.new_empty(len(grad), grad.shape[1], input.shape[1] // groups, *window.kernel)
    chunk = _samples_in_cache(sum(t[0].numel() for t in (input, grad, rows, rows)) * rows.element_size(), rows.device)
    for x, g, target in zip(*(torch.split(t, chunk) for t in (input, grad, rows)), strict=True):
        weight = target.flatten(0, 1)  # its shape is all that is read
        _, gradient, _ = convolution_backward(
            g.reshape(1, -1, *g.shape[2:]),
            x.reshape(1, -1, *x.shape[2:]),
            weight,
            None,
            window.strides,
            window.pads,
            window.dilations,
            False,
            [0] * len(window.kernel),
            groups * len(target),
            [False, True, False],
        )
        weight.copy_(gradient)
    return rows


def _correlation(input: Tensor, grad: Tensor, window: Window, groups: int) -> Tensor:
    """Per sample, input channels times gradient channels, summed over positions, at the displacement of every tap.

    Unfolding would copy the input once per tap. Here only the taps of the *last* dimension get a copy each, of a few
    samples at a time so that they stay in the cache. All copies are displaced along the other dimensions at once by a
    view, one offset into the flat grid, and multiplied with the gradient in one batched product. Where a stride
    skips positions of those dimensions, they are taken apart by phase, within which a displacement is a view again.

    Returns:
        (N, C_grad, C_in / groups, *kernel).
    """
    kernel, strides, pads, dilations = window.kernel, window.strides, window.pads, window.dilations
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
                displaced_by_tap = flat[:, :, offset : offset + target.shape[2]]
                times_transposes(displaced_by_tap, target, out=rows[row, first * groups : part.stop * groups])
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
    budget = CACHE_BYTES * torch.get_num_threads() if device.type == "cpu" else COPIES_BYTES
    return max(1, budget // sample_bytes)


@rule(F.conv1d, F.conv2d, F.conv3d)
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
    kernel, dilations = tuple(weight.shape[2:]), _tuple(dilation, spatial)
    pads = tuple(before for before, _ in _padding(padding, kernel, dilations))
    window = Window(kernel, _tuple(stride, spatial), pads, dilations)

    def weight_rows(grad: Tensor, start: int, stop: int) -> Tensor:
        return sum_positions(convolution_weight_rows(input, grad, window, groups, (start, stop)), n)

    return [ParameterUse(weight, weight_rows, input), *bias_use(bias, n, channel_last=False)]


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
