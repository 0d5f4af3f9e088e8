"""The penalty R_α of Jia & Su, Eq. 6, and its gradient, summed over the passes of sub-batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from flatminima.choices import Estimator
from flatminima.errors import FlatminimaError, NonFiniteError
from flatminima.network import (
    BatchStatistics,
    Buffers,
    Generators,
    batch_statistics,
    true_precision,
    without_autocast,
)
from flatminima.regularizer.checks import first_look
from flatminima.regularizer.distributed import this_process_alone
from flatminima.regularizer.gradients import norm_of
from flatminima.regularizer.passes import Passes
from flatminima.regularizer.steps import Rounding
from flatminima.regularizer.sub_batches import (
    Closure,
    Indices,
    SingleSampleError,
    SubBatches,
    TrainedOutside,
    Weights,
    shuffled,
    size_of,
    sub_batch_loss,
    whole,
)
from flatminima.torch_compat import (
    differentiable_twice,
    foreach_add_,
    foreach_copy_,
    foreach_mul,
    foreach_sub,
    graph_of,
    has_no_derivative,
    has_wrong_second_derivative,
    raises_when_differentiated,
    without_reentrant_checkpoints,
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
        self,
        model: nn.Module,
        closure: Closure,
        batch: Any,
        weights: Weights,
        generators: Generators,
        *,
        update_buffers: bool,
        short: bool = False,
        first: bool = False,
    ) -> Penalty:
        """R_α on ``batch``. The weights and buffers are put back.

        Args:
            model: the network.
            closure: its loss.
            batch: the samples.
            weights: the trainable parameters.
            generators: those that passes may draw from.
            update_buffers: whether the main gradient comes from these passes, so that the mean of what they leave in
                the buffers is taken, and a loss that trains anything outside the model is refused.
            short: whether the batch is smaller than others: it then has fewer sub-batches where BatchNorm needs it.
            first: whether to look at how passes repeat and round.

        Raises:
            NonFiniteError: if the batch's loss, or a sub-batch's loss at the moved weights, is NaN or infinite.
            FlatminimaError: if the batch is empty, or the loss is no scalar, or not differentiable (twice, for "hvp").
        """
        size = size_of(batch)
        if size == 0:
            raise FlatminimaError("the batch is empty: pass at least one sample")
        order, count = torch.randperm(size, device="cpu"), min(self.num_sub_batches, size)
        with true_precision(), without_autocast(model), this_process_alone(model), without_reentrant_checkpoints():
            samples_at = shuffled(batch, order)

            def loss_of(samples: Any) -> Tensor:
                """With the generators and buffers as they are, and leaving them so."""
                with generators.restored(), Buffers(model).scratch():
                    return sub_batch_loss(closure, samples)

            def loss_at(rows: range) -> Tensor:
                return loss_of(samples_at(slice(rows.start, rows.stop)))

            def whole_batch_forward() -> None:
                with Buffers(model).scratch():
                    closure(whole(batch))

            with batch_statistics(model, whole_batch_forward, self.batch_statistics):
                run = _Run(self, model, closure, samples_at, weights, Buffers(model), generators, update_buffers)
                rows = _near_equal(size, count)
                try:
                    penalty, means = run.over(rows)
                except SingleSampleError:
                    if not short or size == 1:
                        raise
                    rows = _near_equal(size, min(count, size // 2))
                    penalty, means = run.over(rows)
                if not bool(torch.isfinite(penalty.value + penalty.loss)):
                    with torch.no_grad():
                        require_finite(loss_of(whole(batch)))
                        kept = [own for own in rows if not bool(torch.isnan(loss_at(own)))]
                    if len(kept) in (0, len(rows)):  # no sub-batch without labels made it so
                        _require_finite_penalty(penalty)
                    penalty, means = run.over(kept, len(rows))
                    _require_finite_penalty(penalty)
                if first:
                    limit = None if self.estimator == "hvp" else self.alpha * penalty.trace
                    penalty.rounding = first_look(model, lambda: loss_at(rows[0]), penalty.value, limit)
        penalty.buffers = means
        return penalty


def _near_equal(size: int, count: int) -> list[range]:
    """The rows of ``count`` sub-batches of ``size`` samples, larger ones first."""
    smaller, more = divmod(size, count)
    ends = [i * smaller + min(i, more) for i in range(count + 1)]
    return list(map(range, ends, ends[1:]))


@dataclass(frozen=True)
class _Run:
    """What the passes over one batch have in common."""

    settings: PenaltySettings
    model: nn.Module
    closure: Closure
    samples_at: Callable[[Indices], Any]
    weights: Weights
    buffers: Buffers
    generators: Generators
    update_buffers: bool

    def over(self, rows: list[range], count: int | None = None) -> tuple[Penalty, _MeanBuffers | None]:
        """R_α of sub-batches, each weighing 1/``count`` (default: all), and what they leave in the buffers.

        Args:
            rows: those of each sub-batch.
            count: M, where sub-batches whose penalty is zero are left out.
        """
        total = sum(map(len, rows))
        penalty = Penalty.zero(self.weights)
        means = _MeanBuffers(self.buffers.own) if self.update_buffers else None
        outside = TrainedOutside(matters=self.update_buffers)
        passes = self.settings.passes
        for size, indices in passes.rounds(rows):
            samples = partial(self.samples_at, indices)
            sub_batches = passes.sub_batches(self.model, self.closure, samples, self.weights, self.buffers)
            estimate = self._estimate(sub_batches, outside)
            penalty.add(estimate, weight=1 / (count or len(rows)), share=size / total)
            if means is not None:
                means.add(estimate.buffers, size / total)
        outside.refuse([*self.weights.parameters, *sub_batches.parameters])
        return penalty, means

    def _estimate(self, sub_batches: SubBatches, outside: TrainedOutside) -> _Estimate:
        if self.settings.estimator == "hvp":
            return _hessian_vector_product(sub_batches, self.settings.alpha, outside)
        return _finite_difference(sub_batches, self.settings.alpha, outside, self.generators)


def require_finite(loss: Tensor) -> None:
    """Refuse a loss that is NaN or infinite."""
    if not bool(torch.isfinite(loss)):
        raise NonFiniteError(f"the loss is {float(loss)}: check inputs, weights and learning rate")


def _require_finite_penalty(penalty: Penalty) -> None:
    if bool(torch.isfinite(penalty.value + penalty.loss)):
        return
    require_finite(penalty.loss)
    raise NonFiniteError(
        f"the penalty is {float(penalty.value)} though the loss is {float(penalty.loss):.4g}: "
        "a sub-batch's loss is NaN or infinite at w − αg; lower alpha"
    )


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
        sparse: whether the parameter's gradients are sparse; those that join ``.grad`` then are as well.
        rounding: how coarsely the passes round, if that was looked at.
        buffers: what the passes would leave in the model's buffers, if that is to be written to them.
    """

    value: Tensor
    trace: Tensor
    gradient: list[Tensor]
    loss: Tensor
    main_gradient: list[Tensor]
    used: list[bool]
    weights: Weights
    sparse: list[bool]
    num_sub_batches: int = 0
    rounding: Rounding | None = None
    buffers: _MeanBuffers | None = None

    @classmethod
    def zero(cls, weights: Weights) -> Penalty:
        """No sub-batch yet."""
        nothing = weights.parameters[0].new_zeros(())
        none = [False] * len(weights.parameters)
        return cls(nothing, nothing, [], nothing, [], none, weights, none)

    def add(self, estimate: _Estimate, *, weight: float, share: float) -> None:
        """Add sub-batches, each of the ``weight`` 1/M in R_α and of the ``share`` |B_i| / |B| in the main loss."""
        self.value = self.value + weight * estimate.penalty
        self.trace = self.trace + weight * estimate.squares
        self.gradient = _plus(self.gradient, estimate.penalty_gradient, weight)
        self.loss = self.loss + share * estimate.loss
        self.main_gradient = _plus(self.main_gradient, estimate.gradient, share)
        self.used = [any(uses) for uses in zip(self.used, estimate.used, strict=True)]
        self.sparse = [any(kinds) for kinds in zip(self.sparse, estimate.sparse, strict=True)]
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
        columns = zip(self.weights.parameters, scaled, self.used, self.sparse, strict=True)
        for parameter, value, used, sparse in columns:
            if not used:
                continue
            if sparse:
                value = value.to_sparse(1)  # rows
            if parameter.grad is None:
                parameter.grad = value if sparse else _laid_out_like(parameter, value)
            elif parameter.grad.is_sparse:
                parameter.grad = value + parameter.grad  # in this order, as value may be dense
            elif sparse:
                parameter.grad.add_(value)
            else:
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
        sparse: whether its gradient is sparse.
        buffers: what the pass at w left in the model's buffers.
    """

    count: int
    loss: Tensor
    gradient: list[Tensor]
    squares: Tensor
    penalty: Tensor
    penalty_gradient: list[Tensor]
    used: list[bool]
    sparse: list[bool]
    buffers: list[Tensor]


def _finite_difference(
    sub_batches: SubBatches, alpha: float, outside: TrainedOutside, generators: Generators
) -> _Estimate:
    """L(B_i, w) − L(B_i, w − α g_i), and the same difference of gradients (Eq. 6)."""
    weights = sub_batches.weights
    with generators.restored(), sub_batches.scratch_buffers():
        loss = sub_batches.loss()
        outside.note(loss)
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
        squares=norm_of(weights.select(here)).square(),
        penalty=loss.detach() - moved_loss.detach(),
        penalty_gradient=sub_batches.total(list(difference)),
        used=[a is not None or b is not None for a, b in zip(gradients, moved_gradients, strict=True)],
        sparse=_sparse(gradients),
        buffers=buffers,
    )


def _hessian_vector_product(sub_batches: SubBatches, alpha: float, outside: TrainedOutside) -> _Estimate:
    """The limit of the finite difference for small α: α‖g_i‖² and α H_i g_i, by differentiating g_i once more."""
    weights = sub_batches.weights
    with sub_batches.scratch_buffers(), differentiable_twice():
        loss = sub_batches.loss()
        outside.note(loss)
        gradients = sub_batches.gradients(loss, create_graph=True)
        products = _times_hessian(gradients, sub_batches)
        buffers = sub_batches.buffers_left()
    here = [value.detach() for value in _dense(gradients, sub_batches.parameters)]
    squares = norm_of(weights.select(here)).square()
    products = foreach_mul(_dense(products, sub_batches.parameters), alpha)
    return _Estimate(
        count=sub_batches.count,
        loss=loss.detach(),
        gradient=sub_batches.total(here),
        squares=squares,
        penalty=alpha * squares,
        penalty_gradient=sub_batches.total(list(products)),
        used=[gradient is not None for gradient in gradients],
        sparse=_sparse(gradients),
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
    for node in graph_of(gradients):
        if raises_when_differentiated(node):
            raise _no_second_derivative("a function is marked once_differentiable")
        if has_wrong_second_derivative(node):
            raise _no_second_derivative("PyTorch's of weight normalization is wrong")


def _no_second_derivative(reason: str) -> FlatminimaError:
    return FlatminimaError(
        f"estimator='hvp' needs second derivatives, and an operation of the model has none ({reason}): "
        "choose estimator='finite-difference'"
    )


def _sparse(gradients: tuple[Tensor | None, ...]) -> list[bool]:
    return [gradient is not None and gradient.is_sparse for gradient in gradients]


def _dense(gradients: tuple[Tensor | None, ...], parameters: list[Tensor]) -> list[Tensor]:
    return [
        torch.zeros_like(parameter) if gradient is None else gradient.to_dense()
        for gradient, parameter in zip(gradients, parameters, strict=True)
    ]
