"""What calls of PyTorch's functions do to the dimension that the samples lie on.

A function that is not here is taken to leave the samples where they are if the output is as long there; such guesses
are held against plain autograd every time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flatminima.gramian.layouts import LOST, Call, Layout, Layouts, indexed, reshaped, viewed, written
from flatminima.gramian.rules import RULES
from flatminima.network import tensors_of

Handler = Callable[[Call], Layouts]

_HANDLERS: dict[Callable[..., Any], Handler] = {}

_PLACES: tuple[Any, ...] = (torch, torch.Tensor, F, torch.special, torch.fft, torch.linalg)


def follow(call: Call) -> list[Layout] | None:
    """The layout of every tensor that the call returns, or of the one that it writes to; None if of no samples."""
    outputs = tensors_of(call.args[:1] if call.output is None else call.output)
    if not outputs:
        return None
    try:
        layouts = _HANDLERS.get(call.func, _unknown)(call)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError):  # a call that is not foreseen
        layouts = _unknown(call)
    if layouts is None:
        return None
    found = layouts if isinstance(layouts, list) else [layouts] * len(outputs)
    found = [_existing(layout, output, call.n) for layout, output in zip(found, outputs, strict=False)]
    if any(layout.dim < 0 for layout in found):
        call.refuted.update(*(layout.assumed for _, layout in call.tensors))
    call.guessed &= any(layout.dim >= 0 for layout in found)
    return found


def _existing(layout: Layout, output: Tensor, n: int) -> Layout:
    """The layout, unless the output has no such dimension."""
    length = layout.outer * n * layout.inner
    return layout if 0 <= layout.dim < output.dim() and output.shape[layout.dim] == length else LOST


def _for(names: str) -> Callable[[Handler], Handler]:
    """Register a handler for what goes by these names in PyTorch, in place too."""

    def register(handler: Handler) -> Handler:
        for name in names.split():
            for place in _PLACES:
                for variant in (name, f"{name}_"):
                    function = getattr(place, variant, None)
                    if callable(function):
                        _HANDLERS[function] = handler
        return handler

    return register


def _outputs(call: Call) -> list[Tensor]:
    return tensors_of(call.output)


def _dims(value: Any, tensor: Tensor) -> set[int]:
    """Dimensions as arguments name them; all where none is named."""
    if value is None or isinstance(value, (bool, torch.dtype)):
        return set(range(tensor.dim()))
    return {dim % max(tensor.dim(), 1) for dim in ((value,) if isinstance(value, int) else value)}


def _unknown(call: Call) -> Layouts:
    call.guessed = call.func not in RULES  # whoever wrote a rule for a function knows that it keeps the samples
    places = {layout.place for _, layout in call.tensors}
    return call.tensors[0][1] if len(places) == 1 else LOST


@_for(
    """
    abs acos acosh add addcdiv addcmul alpha_dropout angle arctan arctan2 asin asinh atan atan2 atanh bernoulli
    bfloat16 bitwise_and bitwise_not bitwise_or bitwise_xor bool ceil celu clamp clamp_max clamp_min clip clone
    complex conj contiguous copy copysign cos cosh cpu cuda deg2rad detach digamma div divide double dropout
    dropout1d dropout2d dropout3d elu empty_like eq erf erfc erfinv exp exp2 expit expm1 feature_alpha_dropout
    feature_dropout float floor floor_divide fmax fmin fmod frac full_like ge gelu greater gt half hardshrink
    hardsigmoid hardswish hardtanh heaviside hypot i0 imag int isclose isfinite isinf isnan ldexp le leaky_relu lerp
    less lgamma log log10 log1p log2 logaddexp logaddexp2 logical_and logical_not logical_or logical_xor logit
    logsigmoid long lt masked_fill maximum minimum mish mul multiply nan_to_num ne neg negative nextafter not_equal
    ones_like polar positive pow prelu rad2deg rand_like randint_like randn_like real reciprocal relu relu6
    remainder requires_grad round rrelu rsqrt rsub selu sgn short sigmoid sign silu sin sinc sinh softplus
    softshrink softsign sqrt square sub subtract tan tanh tanhshrink threshold to tril triu true_divide trunc type
    type_as where xlogy zero zeros_like log_sigmoid expand_as __add__ __radd__ __iadd__ __sub__ __rsub__ __isub__
    __mul__ __rmul__ __imul__ __truediv__ __rtruediv__ __itruediv__ __div__ __rdiv__ __idiv__ __pow__ __rpow__
    __ipow__ __neg__ __and__ __or__ __xor__ __invert__ __eq__ __ne__ __lt__ __le__ __gt__ __ge__ __mod__
    __floordiv__ __rfloordiv__ __rmod__ __abs__ __pos__ __rand__ __ror__ __rxor__ __iand__ __ior__ broadcast_tensors
    """,
)
def _elementwise(call: Call) -> Layouts:
    if call.output is None:
        return _unknown(call)
    if len(call.tensors) == 1 and isinstance(call.output, Tensor) and call.output.shape == call.tensors[0][0].shape:
        return call.tensors[0][1]  # most calls
    return [call.aligned(output) for output in _outputs(call)]


@_for("batch_norm rms_norm layer_norm native_layer_norm group_norm instance_norm local_response_norm")
def _normalization(call: Call) -> Layouts:
    tensor, layout = call.first()
    if layout is None or len(call.tensors) > 1:
        return LOST
    if call.func in (F.batch_norm, torch.batch_norm) and call.argument(5, "training", False):
        return LOST  # by statistics of the batch
    last = {F.layer_norm, F.rms_norm, torch.layer_norm, torch.rms_norm}
    if call.func in last:
        return layout if layout.dim < tensor.dim() - len(tuple(call.argument(1, "normalized_shape"))) else LOST
    return layout if layout.dim == 0 or (call.func in (F.batch_norm, torch.batch_norm) and layout.dim > 1) else LOST


def _along(position: int, names: str = "dim axis", default: Any = None) -> Handler:
    """Functions that mix the entries along some dimensions, and leave the others as they are."""

    def handler(call: Call) -> Layouts:
        tensor, layout = call.first()
        if layout is None or len(call.tensors) > 1:
            return LOST
        value = call.argument(position, names, default)
        if isinstance(value, int) and len(call.args) > position + 1 and names == "dims":
            value = call.args[position:]
        return LOST if layout.dim in _dims(value, tensor) else layout

    return handler


_for("softmax log_softmax softmin cumsum cumprod cummax cummin logcumsumexp")(_along(1))
_for("sort argsort")(_along(1, default=-1))
_for("topk kthvalue rfft irfft hfft ihfft")(_along(2, default=-1))
_for("fft2 ifft2 rfft2 irfft2")(_along(2, default=(-2, -1)))
_for("fft ifft")(_along(2, default=-1))
_for("flip")(_along(1, "dims"))
_for("roll")(_along(2, "dims"))
_for("glu")(_along(1, default=-1))
_for("normalize")(_along(2, default=1))
_for("gumbel_softmax")(_along(4, default=-1))


def _over(position: int) -> Handler:
    """Reductions over some dimensions."""

    def handler(call: Call) -> Layouts:
        tensor, layout = call.first()
        value = call.argument(position, "dim axis")
        if isinstance(value, Tensor) or "other" in call.kwargs:  # the larger of two tensors
            return _elementwise(call)
        if layout is None or len(call.tensors) > 1:
            return LOST
        dims = _dims(value, tensor)
        if layout.dim in dims or layout.dim < 0:
            return LOST
        kept = _outputs(call)[0].dim() == tensor.dim()
        return layout if kept else layout.at(layout.dim - sum(dim < layout.dim for dim in dims))

    return handler


_for(
    """
    sum mean max min amax amin aminmax prod std var std_mean var_mean nansum nanmean logsumexp argmax argmin all any
    median nanmedian mode count_nonzero
    """,
)(_over(1))
_for("norm vector_norm")(_over(2))


@_for("view reshape flatten unflatten squeeze unsqueeze ravel view_as reshape_as")
def _reshaped(call: Call) -> Layouts:
    tensor, layout = call.first()
    if layout is None:
        return None
    return reshaped(layout, tensor.shape, call.output.shape, call.n)


_for(
    """
    transpose t permute movedim moveaxis swapaxes swapdims select narrow split chunk unbind tensor_split
    split_with_sizes hsplit vsplit dsplit diagonal unfold expand broadcast_to adjoint
    """,
)(viewed)
for _property in ("T", "mT", "H", "mH"):
    _HANDLERS[getattr(torch.Tensor, _property).__get__] = viewed
for _property in ("data", "real", "imag"):
    _HANDLERS[getattr(torch.Tensor, _property).__get__] = _elementwise
_HANDLERS[torch.Tensor.__getitem__] = indexed
_HANDLERS[torch.Tensor.__setitem__] = written
del _HANDLERS[F.unfold]


@_for("new_zeros new_ones new_full new_empty new_tensor")
def _constant(call: Call) -> Layouts:
    return None


@_for("cat concat concatenate")
def _concatenated(call: Call) -> Layouts:
    tensors = call.argument(0, "tensors")
    (dim,) = _dims(call.argument(1, "dim axis", 0), call.output)
    layouts = [call.layout_of(tensor) for tensor in tensors]
    if not any(layout is not None and layout.dim == dim for layout in layouts):
        return call.merged(layout for layout in layouts if layout is not None)
    known = [layout for layout in layouts if layout is not None]
    if len(known) < len(layouts) or len({(layout.dim, layout.inner) for layout in known}) > 1:
        return LOST
    return Layout(dim, sum(layout.outer for layout in known), known[0].inner, known[0].assumed)


@_for("stack")
def _stacked(call: Call) -> Layouts:
    (new,) = _dims(call.argument(1, "dim axis", 0), call.output)
    merged = call.merged(layout for _, layout in call.tensors)
    return merged.at(merged.dim + (new <= merged.dim)) if merged.dim >= 0 else LOST


@_for("repeat tile")
def _repeated(call: Call) -> Layouts:
    tensor, layout = call.first()
    if layout is None:
        return None
    dim = layout.dim + call.output.dim() - tensor.dim()
    times = call.output.shape[dim] // tensor.shape[layout.dim]
    return Layout(dim, layout.outer * times, layout.inner, layout.assumed)


@_for("repeat_interleave")
def _repeated_each(call: Call) -> Layouts:
    tensor, layout = call.first()
    times, dim = call.argument(1, "repeats"), call.argument(2, "dim axis")
    if layout is None or dim is None or not isinstance(times, int):
        return LOST
    inner = layout.inner * times if layout.dim in _dims(dim, tensor) else layout.inner
    return Layout(layout.dim, layout.outer, inner, layout.assumed)


def _at_one_dimension(others: Mapping[int, str], *, dim_at: int = 1, writes: bool = True) -> Handler:
    """``f(x, dim, index, ...)``: what happens along ``dim`` happens at every place of the other dimensions alone."""

    def handler(call: Call) -> Layouts:
        tensor, layout = call.first()
        (dim,) = _dims(call.argument(dim_at, "dim axis"), tensor)
        merged = call.merged(layout for _, layout in call.tensors)
        if merged.dim != dim and merged.dim >= 0:
            lengths = {t.shape[merged.dim] for t, _ in call.tensors}
            given = [call.argument(position, name) for position, name in others.items()]
            aligned = {t.shape[merged.dim] for t in given if isinstance(t, Tensor) and t.dim() == tensor.dim()}
            if len(lengths | aligned) == 1:
                return merged
        if writes:
            call.guessed = True
            return layout if layout is not None and layout.dim >= 0 else call.guess(call.output)
        return LOST

    return handler


_for("gather")(_at_one_dimension({2: "index"}, writes=False))
_for("take_along_dim")(_at_one_dimension({1: "indices"}, dim_at=2, writes=False))
_for("scatter scatter_add scatter_reduce")(_at_one_dimension({2: "index", 3: "src"}))
_for("index_select")(_at_one_dimension({}, writes=False))
_for("index_fill")(_at_one_dimension({}))
_for("index_add index_copy index_reduce")(_at_one_dimension({3: "source"}))


@_for("take masked_select nonzero argwhere unique unique_consecutive masked_scatter randperm")
@_for("_pack_padded_sequence _pad_packed_sequence combinations cartesian_prod bincount histc")
def _lost(call: Call) -> Layouts:
    return LOST


@_for("matmul bmm mm mv __matmul__ __rmatmul__")
def _product(call: Call) -> Layouts:
    (left, _), right = call.first(), call.argument(1, "other mat2 vec")
    if call.func is torch.Tensor.__rmatmul__:
        left, right = right, left
    return call.merged(_in_product(call, left, right))


@_for("addmm baddbmm addmv")
def _added_product(call: Call) -> Layouts:
    added, of_added = call.first()
    factors = call.argument(1, "mat1 batch1 mat"), call.argument(2, "mat2 batch2 vec")
    mine = [call.broadcast(added, of_added, call.output.shape)] if of_added is not None else []
    return call.merged([*mine, *_in_product(call, *factors)])


def _in_product(call: Call, left: Tensor, right: Tensor) -> list[Layout]:
    """Where the samples of each factor come to lie in a product of matrices."""
    found, out = [], call.output
    rows, columns = left.dim() > 1, right.dim() > 1
    for factor, contracted, lost in (
        (left, left.dim() - 1, not columns),
        (right, right.dim() - 2 if columns else 0, not rows),
    ):
        layout = call.layout_of(factor)
        if layout is None:
            continue
        if layout.dim < 0 or layout.dim == contracted:
            found.append(call.lost(layout))
            continue
        behind = factor.dim() - layout.dim - lost  # counted from the output's end, which may lack a dimension
        if factor is right and lost and layout.dim == factor.dim() - 1:
            behind = 1
        dim = out.dim() - behind
        fits = dim >= 0 and out.shape[dim] == factor.shape[layout.dim]
        found.append(layout.at(dim) if fits else call.lost(layout))
    return found


@_for("linear bilinear")
def _linear(call: Call) -> Layouts:
    given = [call.argument(0, "input input1")]
    if call.func in (F.bilinear, torch.bilinear):
        given.append(call.argument(1, "input2"))
    if any(not any(tensor is one for one in given) for tensor, _ in call.tensors):
        return LOST  # weights that were computed from the inputs
    return call.merged(
        call.lost(layout) if layout.dim == tensor.dim() - 1 else layout for tensor, layout in call.tensors
    )


@_for("einsum")
def _einsum(call: Call) -> Layouts:
    equation, operands = call.args[0], tensors_of(call.args[1:])
    terms, arrow, result = str(equation).replace(" ", "").partition("->")
    inputs = terms.split(",")
    if not arrow or len(inputs) != len(operands):
        return _unknown(call)
    found = []
    for letters, operand in zip(inputs, operands, strict=True):
        layout = call.layout_of(operand)
        if layout is None:
            continue
        named = _letters(letters, operand.dim())
        of_result = _letters(result, call.output.dim())
        letter = named[layout.dim] if layout.dim >= 0 else ""
        found.append(layout.at(of_result.index(letter)) if letter in of_result else call.lost(layout))
    return call.merged(found)


def _letters(term: str, dims: int) -> list[str]:
    """The name of every dimension; those of an ellipsis are counted from its end."""
    before, dots, after = term.partition("...")
    hidden = dims - len(before) - len(after) if dots else 0
    return [*before, *(f"...{i}" for i in range(hidden, 0, -1)), *after]


def _on_images(spatial: int | None) -> Handler:
    """Functions of (N, C, *spatial), or of anything in front of the spatial dimensions."""

    def handler(call: Call) -> Layouts:
        tensor, layout = call.first()
        if layout is None or len(call.tensors) > 1:
            return LOST
        last = tensor.dim() - 2 if spatial is None else spatial
        return layout if layout.dim < tensor.dim() - last else LOST

    return handler


for _d in (1, 2, 3):
    for _kind in ("avg_pool{}d", "max_pool{}d", "adaptive_avg_pool{}d", "adaptive_max_pool{}d", "lp_pool{}d"):
        _for(f"{_kind} {_kind}_with_indices".format(_d, _d))(_on_images(_d))
_for("interpolate upsample unfold_im2col")(_on_images(None))
_HANDLERS[F.unfold] = _HANDLERS[F.fold] = _on_images(2)
_for("pixel_shuffle pixel_unshuffle channel_shuffle")(_on_images(3))


@_for("conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d")
def _convolution(call: Call) -> Layouts:
    tensor, layout = call.first()
    weight = call.argument(1, "weight")
    alone = layout is not None and len(call.tensors) == 1
    return layout if alone and layout.dim == 0 and tensor.dim() == weight.dim() else LOST  # type: ignore[union-attr]


@_for("pad")
def _padded(call: Call) -> Layouts:
    tensor, layout = call.first()
    if layout is None or len(call.tensors) > 1:
        return LOST
    return layout if layout.dim < tensor.dim() - math.ceil(len(call.argument(1, "pad")) / 2) else LOST


@_for("embedding")
def _looked_up(call: Call) -> Layouts:
    _, layout = call.first()
    return layout if layout is not None and len(call.tensors) == 1 else LOST


_for("one_hot")(_looked_up)


@_for("scaled_dot_product_attention")
def _attention(call: Call) -> Layouts:
    found = [call.lost(layout) if layout.dim >= tensor.dim() - 2 else layout for tensor, layout in call.tensors]
    mask = call.argument(3, "attn_mask")
    for i, (tensor, layout) in enumerate(call.tensors):
        if tensor is mask or tensor.dim() < call.output.dim():
            found[i] = call.broadcast(tensor, found[i], call.output.shape) if found[i].dim >= 0 else layout
    return call.merged(found)


@_for("multi_head_attention_forward")
def _multi_head_attention(call: Call) -> Layouts:
    sequences = [call.argument(i, name) for i, name in enumerate(("query", "key", "value"))]
    layouts = [call.layout_of(tensor) for tensor in sequences]
    known = [layout for layout in layouts if layout is not None]
    if sequences[0].dim() != 3 or not known or any(layout.place != (1, 1, 1) for layout in known):
        return LOST
    return [known[0], known[0].at(0)]


@_for("lstm gru rnn_tanh rnn_relu")
def _recurrent(call: Call) -> Layouts:
    tensor, layout = call.first()
    if layout is None or not isinstance(call.args[-1], bool) or isinstance(call.args[2], Tensor):  # packed sequences
        return LOST
    batch = 0 if call.args[-1] else 1
    states = [of for tensor_, of in call.tensors if tensor_ is not tensor]
    if tensor.dim() != 3 or layout.place != (batch, 1, 1) or any(of.place != (1, 1, 1) for of in states):
        return LOST
    return [layout, *(layout.at(1) for _ in _outputs(call)[1:])]


@_for("lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell")
def _recurrent_cell(call: Call) -> Layouts:
    return call.merged(layout if layout.dim == 0 else LOST for _, layout in call.tensors)


@_for("cross_entropy nll_loss mse_loss l1_loss smooth_l1_loss binary_cross_entropy_with_logits")
def _loss(call: Call) -> Layouts:
    return LOST
