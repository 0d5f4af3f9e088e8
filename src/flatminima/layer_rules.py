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
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flatminima.convolutions import Window, convolution_weight_rows
from flatminima.products import times_transposes

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
    kernel, dilations = tuple(weight.shape[2:]), _tuple(dilation, spatial)
    pads = tuple(before for before, _ in _padding(padding, kernel, dilations))
    window = Window(kernel, _tuple(stride, spatial), pads, dilations)

    def weight_rows(grad: Tensor, start: int, stop: int) -> Tensor:
        return _sum_positions(convolution_weight_rows(input, grad, window, groups, (start, stop)), n)

    return [ParameterUse(weight, weight_rows, input), *_bias_use(bias, n, channel_last=False)]


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
