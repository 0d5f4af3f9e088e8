"""How: the penalty R_α of Jia & Su, Eq. 6, and its gradient, one sub-batch at a time."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import get_total_norm

from flatminima._distributed import this_process_alone
from flatminima._isolation import (
    BatchStatistics,
    MeanBuffers,
    batch_statistics,
    moved,
    restored_generators,
    scratch_buffers,
    without_autocast,
)
from flatminima.batching import batch_size, map_tensors, take
from flatminima.errors import FlatminimaError
from flatminima.precision import true_precision

Estimator = Literal["finite-difference", "hvp"]

Closure = Callable[[Any], Tensor]
"""``closure(batch)`` → the scalar mean loss of the model on that batch."""


@dataclass(frozen=True)
class Weights:
    """The trainable parameters, each once however many layers share it, and whether the penalty moves it."""

    names: list[str]
    parameters: list[Tensor]
    penalized: list[bool]

    @classmethod
    def of(cls, model: nn.Module, penalized: set[str] | None) -> Weights:
        """The model's trainable parameters; ``penalized`` holds the names of those to move, None for all.

        Raises:
            FlatminimaError: if there are none, they are in half precision, or the model is in DataParallel.
        """
        _require(
            not any(isinstance(module, nn.DataParallel) for module in model.modules()),
            "DataParallel is not supported: use DistributedDataParallel, or train on one device with the inner module",
        )
        _require(
            not any(
                isinstance(module, DistributedDataParallel) for child in model.children() for module in child.modules()
            ),
            "DistributedDataParallel must be the outermost module: wrap the whole model",
        )
        trainable: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}
        _require(
            len(trainable) > 0, f"{type(model).__name__} has no trainable parameters (requires_grad is False for all)"
        )
        for name, parameter in trainable.items():
            _require(
                parameter.dtype in (torch.float32, torch.float64),
                f"parameter {name} is {parameter.dtype}: keep trainable parameters in float32, use autocast for speed",
            )
        mask = [penalized is None or name in penalized for name in trainable]
        _require(any(mask), "none of the penalized parameters is trainable")
        return cls(list(trainable), list(trainable.values()), mask)

    def select(self, values: list[Tensor]) -> list[Tensor]:
        """Those of ``values``, one per parameter, whose parameter is penalized."""
        return [value for value, penalized in zip(values, self.penalized, strict=True) if penalized]


@dataclass(frozen=True)
class PenaltyPasses:
    """How the passes are done; the fields are arguments of :class:`~flatminima.FisherTraceRegularizer`."""

    alpha: float
    num_sub_batches: int
    estimator: Estimator
    batch_statistics: BatchStatistics

    def run(self, model: nn.Module, closure: Closure, batch: Any, weights: Weights, *, update_buffers: bool) -> Penalty:
        """R_α on ``batch``. The weights are put back; so are buffers, unless ``update_buffers`` asks for one update.

        Raises:
            FlatminimaError: if the batch is empty, or the loss is no scalar, or not differentiable (twice, for "hvp").
        """
        size = batch_size(batch)
        if size == 0:
            raise FlatminimaError("the batch is empty: pass at least one sample")
        sub_batches = torch.randperm(size).tensor_split(min(self.num_sub_batches, size))
        estimate = {"finite-difference": _finite_difference, "hvp": _hessian_vector_product}[self.estimator]
        penalty = Penalty.zero(weights)
        buffers = MeanBuffers(model) if update_buffers else None
        with true_precision(), without_autocast(model), this_process_alone(model):

            def whole_batch_forward() -> None:
                with scratch_buffers(model):
                    closure(_in_float32(batch))

            with batch_statistics(model, whole_batch_forward, self.batch_statistics):
                for indices in sub_batches:
                    share = len(indices) / size
                    sub_batch = _SubBatch(model, closure, _in_float32(take(batch, indices)), weights, buffers, share)
                    penalty.add(estimate(sub_batch, self.alpha), weight=1 / len(sub_batches), share=share)
        if buffers is not None:
            buffers.write()
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
        parameters = weights.parameters
        nothing = parameters[0].new_zeros(())
        gradient, main_gradient = ([torch.zeros_like(p) for p in parameters] for _ in range(2))
        return cls(nothing, nothing, gradient, nothing, main_gradient, [False] * len(parameters), weights)

    def add(self, passes: _Passes, *, weight: float, share: float) -> None:
        """Add one sub-batch, of the ``weight`` 1/M in R_α and of the ``share`` |B_i| / |B| in the main loss."""
        self.value = self.value + weight * passes.penalty
        self.trace = self.trace + weight * get_total_norm(self.weights.select(passes.gradient)).square()
        torch._foreach_add_(self.gradient, passes.penalty_gradient, alpha=weight)
        self.loss = self.loss + share * passes.loss
        torch._foreach_add_(self.main_gradient, passes.gradient, alpha=share)
        self.used = [any(uses) for uses in zip(self.used, passes.used, strict=True)]
        self.num_sub_batches += 1

    def add_gradient_to_grad(self, factor: float | Tensor) -> None:
        """Add ``factor`` ∇R_α to ``.grad``; a parameter that no loss used keeps ``.grad`` as it is, None included."""
        self._add_to_grad(self.gradient, factor)

    def add_main_gradient_to_grad(self, factor: float | Tensor) -> None:
        """Add ``factor`` times the mean of the g_i to ``.grad``."""
        self._add_to_grad(self.main_gradient, factor)

    def _add_to_grad(self, gradient: list[Tensor], factor: float | Tensor) -> None:
        for parameter, value, used in zip(self.weights.parameters, gradient, self.used, strict=True):
            if used and parameter.grad is None:
                parameter.grad = value * factor
            elif used:
                parameter.grad.add_(value * factor)  # type: ignore[union-attr]


@dataclass(frozen=True)
class _Passes:
    """What the passes over one sub-batch give: L(B_i, w), g_i, its part of R_α and ∇R_α, and the parameters in use."""

    loss: Tensor
    gradient: list[Tensor]
    penalty: Tensor
    penalty_gradient: list[Tensor]
    used: list[bool]


@dataclass(frozen=True)
class _SubBatch:
    model: nn.Module
    closure: Closure
    batch: Any
    weights: Weights
    buffers: MeanBuffers | None
    share: float

    def loss(self) -> Tensor:
        try:
            return scalar_loss(self.closure, self.batch)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise FlatminimaError(
                f"BatchNorm has no statistics on a sub-batch of {batch_size(self.batch)} sample(s): "
                "lower num_sub_batches, or drop the last, short batch"
            ) from error

    def keep_buffers(self) -> None:
        """Remember what the pass at w made of the buffers, if they are to be updated."""
        if self.buffers is not None:
            self.buffers.add(self.share)


def scalar_loss(closure: Closure, batch: Any) -> Tensor:
    """The loss on ``batch``.

    Raises:
        FlatminimaError: if it is not a scalar that depends on a trainable parameter.
    """
    loss = closure(batch)
    returned = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
    if returned != "shape ()":
        raise FlatminimaError(f"loss_fn must return a scalar tensor, the mean over the samples; got {returned}")
    if not loss.requires_grad:
        raise FlatminimaError("the loss does not depend on a trainable parameter: is gradient recording switched off?")
    return loss


def _finite_difference(sub_batch: _SubBatch, alpha: float) -> _Passes:
    """L(B_i, w) − L(B_i, w − α g_i), and the same difference of gradients (Eq. 6)."""
    weights = sub_batch.weights
    with restored_generators(weights.parameters), scratch_buffers(sub_batch.model):
        loss = sub_batch.loss()
        gradients = torch.autograd.grad(loss, weights.parameters, allow_unused=True)
        sub_batch.keep_buffers()
    here = _dense(gradients, weights)
    with moved(weights.select(weights.parameters), weights.select(here), -alpha), scratch_buffers(sub_batch.model):
        moved_loss = sub_batch.loss()
        moved_gradients = torch.autograd.grad(moved_loss, weights.parameters, allow_unused=True)
    difference = torch._foreach_sub(here, _dense(moved_gradients, weights))
    used = [a is not None or b is not None for a, b in zip(gradients, moved_gradients, strict=True)]
    return _Passes(loss.detach(), here, loss.detach() - moved_loss.detach(), list(difference), used)


def _hessian_vector_product(sub_batch: _SubBatch, alpha: float) -> _Passes:
    """The limit of the finite difference for small α: α‖g_i‖² and α H_i g_i, by differentiating g_i once more."""
    weights = sub_batch.weights
    with scratch_buffers(sub_batch.model), _twice_differentiable_kernels():
        loss = sub_batch.loss()
        gradients = torch.autograd.grad(loss, weights.parameters, create_graph=True, allow_unused=True)
        products = _times_hessian(gradients, weights)
        sub_batch.keep_buffers()
    here = [value.detach() for value in _dense(gradients, weights)]
    penalty = alpha * get_total_norm(weights.select(here)).square()
    products = torch._foreach_mul(_dense(products, weights), alpha)
    return _Passes(loss.detach(), here, penalty, list(products), [gradient is not None for gradient in gradients])


def _times_hessian(gradients: tuple[Tensor | None, ...], weights: Weights) -> tuple[Tensor | None, ...]:
    """H P g, where P keeps the penalized parameters: the derivative of g along the constant P g."""
    penalized = [
        gradient
        for gradient, wanted in zip(gradients, weights.penalized, strict=True)
        if wanted and gradient is not None and gradient.requires_grad
    ]
    if not penalized:  # the loss is linear in the weights
        return (None,) * len(gradients)
    _require_second_derivatives(penalized)
    direction = [gradient.detach() for gradient in penalized]
    try:
        return torch.autograd.grad(penalized, weights.parameters, direction, allow_unused=True)
    except RuntimeError as error:
        if "not implemented" not in str(error):
            raise
        raise _no_second_derivative(str(error)) from error


@contextmanager
def _twice_differentiable_kernels() -> Iterator[None]:
    """Compiled graphs and fused attention differentiate once: run eagerly, with the plain attention."""
    in_use = "torch._dynamo" in sys.modules  # else nothing is compiled, and importing it takes seconds
    with torch.compiler.set_stance("force_eager") if in_use else nullcontext(), sdpa_kernel(SDPBackend.MATH):
        yield


def _require_second_derivatives(gradients: list[Tensor]) -> None:
    """Find functions marked once_differentiable: autograd calls what lies behind them unused, and raises nothing."""
    seen: set[Any] = set()
    waiting = [gradient.grad_fn for gradient in gradients]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        if node.name().endswith("Error"):
            raise _no_second_derivative("a function is marked once_differentiable")
        seen.add(node)
        waiting.extend(following for following, _ in node.next_functions)


def _no_second_derivative(reason: str) -> FlatminimaError:
    return FlatminimaError(
        f"estimator='hvp' needs second derivatives, and an operation of the model has none ({reason}): "
        "choose estimator='finite-difference'"
    )


def _dense(gradients: tuple[Tensor | None, ...], weights: Weights) -> list[Tensor]:
    return [
        torch.zeros_like(parameter) if gradient is None else gradient.to_dense()
        for gradient, parameter in zip(gradients, weights.parameters, strict=True)
    ]


def _in_float32(batch: Any) -> Any:
    half = (torch.float16, torch.bfloat16)
    return map_tensors(lambda tensor: tensor.float() if tensor.dtype in half else tensor, batch)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise FlatminimaError(message)
