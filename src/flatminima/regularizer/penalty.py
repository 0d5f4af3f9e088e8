"""The penalty R_α of Jia & Su, Eq. 6, and its gradient, summed over the passes of sub-batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import get_total_norm

from flatminima.errors import FlatminimaError
from flatminima.network import (
    BatchStatistics,
    Buffers,
    batch_size,
    batch_statistics,
    map_tensors,
    restored_generators,
    take,
    true_precision,
    without_autocast,
)
from flatminima.regularizer.distributed import this_process_alone
from flatminima.regularizer.passes import Estimator, Passes
from flatminima.regularizer.sub_batches import Closure, SubBatches, Weights, graph_of
from flatminima.torch_compat import (
    eager_stance,
    foreach_add_,
    foreach_copy_,
    foreach_mul,
    foreach_sub,
    has_no_derivative,
    raises_when_differentiated,
)


@dataclass(frozen=True)
class PenaltySettings:
    """How the penalty is computed: arguments of :class:`~flatminima.FisherTraceRegularizer`."""

    alpha: float
    num_sub_batches: int
    estimator: Estimator
    batch_statistics: BatchStatistics
    passes: Passes

    def penalty(
        self, model: nn.Module, closure: Closure, batch: Any, weights: Weights, *, update_buffers: bool
    ) -> Penalty:
        """R_α on ``batch``. The weights are put back; so are buffers, unless ``update_buffers`` asks for one update.

        Raises:
            FlatminimaError: if the batch is empty, or the loss is no scalar, or not differentiable (twice, for "hvp").
        """
        size = batch_size(batch)
        if size == 0:
            raise FlatminimaError("the batch is empty: pass at least one sample")
        rows = list(torch.randperm(size).tensor_split(min(self.num_sub_batches, size)))
        estimator = {"finite-difference": _finite_difference, "hvp": _hessian_vector_product}[self.estimator]
        penalty = Penalty.zero(weights)
        with true_precision(), without_autocast(model), this_process_alone(model):

            def whole_batch_forward() -> None:
                with Buffers(model).scratch():
                    closure(_in_float32(batch))

            with batch_statistics(model, whole_batch_forward, self.batch_statistics):
                buffers = Buffers(model)
                means = _MeanBuffers(buffers.own) if update_buffers else None
                for indices in self.passes.rounds(rows):
                    share = indices.shape[-1] / size
                    samples = _in_float32(take(batch, indices))
                    sub_batches = self.passes.sub_batches(model, closure, samples, weights, buffers)
                    estimate = estimator(sub_batches, self.alpha)
                    penalty.add(estimate, weight=1 / len(rows), share=share)
                    if means is not None:
                        means.add(estimate.buffers, share)
        if means is not None:
            means.write()
        return penalty


@dataclass
class Penalty:
    """R_α and what comes with it, summed over sub-batches.

    Attributes:
        value: R_α (Eq. 6).
        trace: mean_i ‖g_i‖₂² over the penalized parameters.
        gradient: ∇R_α, one dense tensor per trainable parameter.
        loss: L(B, w) as the mean of the sub-batches' losses, each weighing its number of samples.
        main_gradient: its gradient.
        used: whether any sub-batch's loss uses the parameter.
        num_sub_batches: how many sub-batches there were.
    """

    value: Tensor
    trace: Tensor
    gradient: list[Tensor]
    loss: Tensor
    main_gradient: list[Tensor]
    used: list[bool]
    weights: Weights
    num_sub_batches: int = 0

    @classmethod
    def zero(cls, weights: Weights) -> Penalty:
        """No sub-batch yet."""
        nothing = weights.parameters[0].new_zeros(())
        return cls(nothing, nothing, [], nothing, [], [False] * len(weights.parameters), weights)

    def add(self, estimate: _Estimate, *, weight: float, share: float) -> None:
        """Add sub-batches, each of the ``weight`` 1/M in R_α and of the ``share`` |B_i| / |B| in the main loss."""
        self.value = self.value + weight * estimate.penalty
        self.trace = self.trace + weight * estimate.squares
        self.gradient = _plus(self.gradient, estimate.penalty_gradient, weight)
        self.loss = self.loss + share * estimate.loss
        self.main_gradient = _plus(self.main_gradient, estimate.gradient, share)
        self.used = [any(uses) for uses in zip(self.used, estimate.used, strict=True)]
        self.num_sub_batches += estimate.count

    def add_gradient_to_grad(self, factor: float | Tensor) -> None:
        """Add ``factor`` ∇R_α to ``.grad``; a parameter that no loss used keeps ``.grad`` as it is, None included."""
        self._add_to_grad(self.gradient, factor)

    def add_main_gradient_to_grad(self, factor: float | Tensor) -> None:
        """Add ``factor`` times the mean of the g_i to ``.grad``."""
        self._add_to_grad(self.main_gradient, factor)

    def _add_to_grad(self, gradient: list[Tensor], factor: float | Tensor) -> None:
        scaled = foreach_mul(gradient, factor)
        accumulated = []
        for parameter, value, used in zip(self.weights.parameters, scaled, self.used, strict=True):
            if used and parameter.grad is None:
                parameter.grad = _laid_out_like(parameter, value)
            elif used:
                accumulated.append((parameter.grad, value))
        if accumulated:
            foreach_add_(*map(list, zip(*accumulated, strict=True)))


def _laid_out_like(parameter: Tensor, value: Tensor) -> Tensor:
    """``value`` with the parameter's strides, which optimizers and DDP expect of gradients (channels-last, say)."""
    return value if value.stride() == parameter.stride() else torch.empty_like(parameter).copy_(value)


class _MeanBuffers:
    """What one pass would leave in the buffers if its statistics were the mean of the sub-batches' statistics.

    Every sub-batch starts from the same buffers, so the mean of what it leaves is (1 − m) b + m · mean_i s_i: one
    update with momentum m, not M of them. Counters and other integers are taken from the last sub-batch.
    """

    def __init__(self, own: list[Tensor]) -> None:
        self._own = own
        self._means: list[Tensor] = []
        self._last: list[Tensor] = []

    def add(self, buffers: list[Tensor], weight: float) -> None:
        """Add what sub-batches left in the buffers with ``weight``; the weights of a step sum to 1."""
        means, self._last = _floats_and_others(buffers)
        self._means = _plus(self._means, means, weight)

    def write(self) -> None:
        """Copy the means into the model's own buffers."""
        with torch.no_grad():
            for own, values in zip(_floats_and_others(self._own), (self._means, self._last), strict=True):
                if own:
                    foreach_copy_(own, values)


def _floats_and_others(tensors: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    return [t for t in tensors if t.is_floating_point()], [t for t in tensors if not t.is_floating_point()]


def _plus(sums: list[Tensor], values: list[Tensor], factor: float) -> list[Tensor]:
    """``sums`` plus ``factor`` times ``values``, in place; no sums yet count as zeros."""
    if not values:
        return []
    if not sums:
        return list(foreach_mul(values, factor))
    foreach_add_(sums, values, alpha=factor)
    return sums


@dataclass(frozen=True)
class _Estimate:
    """What one round of passes gives, summed over its sub-batches.

    Attributes:
        count: how many sub-batches there are.
        loss: Σ_i L(B_i, w).
        gradient: Σ_i g_i.
        squares: Σ_i ‖g_i‖₂² over the penalized parameters.
        penalty: their part of M R_α.
        penalty_gradient: their part of M ∇R_α.
        used: whether their losses use the parameter.
        buffers: what the pass at w left in the model's buffers.
    """

    count: int
    loss: Tensor
    gradient: list[Tensor]
    squares: Tensor
    penalty: Tensor
    penalty_gradient: list[Tensor]
    used: list[bool]
    buffers: list[Tensor]


def _finite_difference(sub_batches: SubBatches, alpha: float) -> _Estimate:
    """L(B_i, w) − L(B_i, w − α g_i), and the same difference of gradients (Eq. 6)."""
    weights = sub_batches.weights
    with restored_generators(weights.parameters), sub_batches.scratch_buffers():
        loss = sub_batches.loss()
        gradients = sub_batches.gradients(loss)
        buffers = sub_batches.buffers_left()
    here = _dense(gradients, sub_batches.parameters)
    with sub_batches.moved(here, -alpha), sub_batches.scratch_buffers():
        moved_loss = sub_batches.loss()
        moved_gradients = sub_batches.gradients(moved_loss)
    difference = foreach_sub(here, _dense(moved_gradients, sub_batches.parameters))
    return _Estimate(
        count=sub_batches.count,
        loss=loss.detach(),
        gradient=sub_batches.total(here),
        squares=get_total_norm(weights.select(here)).square(),
        penalty=loss.detach() - moved_loss.detach(),
        penalty_gradient=sub_batches.total(list(difference)),
        used=[a is not None or b is not None for a, b in zip(gradients, moved_gradients, strict=True)],
        buffers=buffers,
    )


def _hessian_vector_product(sub_batches: SubBatches, alpha: float) -> _Estimate:
    """The limit of the finite difference for small α: α‖g_i‖² and α H_i g_i, by differentiating g_i once more."""
    weights = sub_batches.weights
    with sub_batches.scratch_buffers(), eager_stance(), sdpa_kernel(SDPBackend.MATH):
        loss = sub_batches.loss()
        gradients = sub_batches.gradients(loss, create_graph=True)
        products = _times_hessian(gradients, sub_batches)
        buffers = sub_batches.buffers_left()
    here = [value.detach() for value in _dense(gradients, sub_batches.parameters)]
    squares = get_total_norm(weights.select(here)).square()
    products = foreach_mul(_dense(products, sub_batches.parameters), alpha)
    return _Estimate(
        count=sub_batches.count,
        loss=loss.detach(),
        gradient=sub_batches.total(here),
        squares=squares,
        penalty=alpha * squares,
        penalty_gradient=sub_batches.total(list(products)),
        used=[gradient is not None for gradient in gradients],
        buffers=buffers,
    )


def _times_hessian(gradients: tuple[Tensor | None, ...], sub_batches: SubBatches) -> tuple[Tensor | None, ...]:
    """H_i P g_i, where P keeps the penalized parameters: the derivative of g_i along the constant P g_i."""
    penalized = [
        gradient
        for gradient, wanted in zip(gradients, sub_batches.weights.penalized, strict=True)
        if wanted and gradient is not None and gradient.requires_grad
    ]
    if not penalized:  # the loss uses none of them
        return (None,) * len(gradients)
    _require_second_derivatives(penalized)
    direction = [gradient.detach() for gradient in penalized]
    try:
        return torch.autograd.grad(penalized, sub_batches.parameters, direction, allow_unused=True)
    except RuntimeError as error:
        if not has_no_derivative(error):
            raise
        raise _no_second_derivative(str(error)) from error


def _require_second_derivatives(gradients: list[Tensor]) -> None:
    """Find functions marked once_differentiable: autograd calls what lies behind them unused, and raises nothing."""
    if any(raises_when_differentiated(node) for node in graph_of(gradients)):
        raise _no_second_derivative("a function is marked once_differentiable")


def _no_second_derivative(reason: str) -> FlatminimaError:
    return FlatminimaError(
        f"estimator='hvp' needs second derivatives, and an operation of the model has none ({reason}): "
        "choose estimator='finite-difference'"
    )


def _dense(gradients: tuple[Tensor | None, ...], parameters: list[Tensor]) -> list[Tensor]:
    return [
        torch.zeros_like(parameter) if gradient is None else gradient.to_dense()
        for gradient, parameter in zip(gradients, parameters, strict=True)
    ]


def _in_float32(batch: Any) -> Any:
    half = (torch.float16, torch.bfloat16)
    return map_tensors(lambda tensor: tensor.float() if tensor.dtype in half else tensor, batch)
