"""How: train towards minima with a smaller Fisher trace (Jia & Su, Sec. 6, Algorithm 1).

The penalty on a mini-batch B, split at random into M sub-batches B_i with gradients g_i = ∇L(B_i, w), is (Eq. 6)

    R_α(w) = (1/M) Σ_i [L(B_i, w) − L(B_i, w − α g_i)]  ≈  α · mean_i ‖g_i‖²,

and no derivative passes through g_i, so its gradient is a finite difference of sub-batch gradients:

    ∇R_α(w) = (1/M) Σ_i [∇L(B_i, w) − ∇L(B_i, w − α g_i)]  →  α · mean_i H_i g_i  as α → 0 (smooth networks).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from flatminima.batching import Inputs, batch_size, device_of, map_tensors, take
from flatminima.errors import FlatminimaError, NonFiniteError
from flatminima.precision import true_precision

LossFunction = Callable[[Any, Any], Tensor]
"""``loss_fn(model_output, targets)`` → scalar, a mean over the samples (``reduction="mean"``)."""


@dataclass(frozen=True)
class RegularizerStep:
    """What one step saw. Scalar tensors on the model's device, so that keeping them does not wait for the device.

    Attributes:
        trace: mean_i ‖g_i‖₂², the trace estimate that the penalty drives down (Sec. 6).
        penalty: R_α (Eq. 6), without β. Close to ``alpha * trace`` where the network is smooth.
        grad_norm: global 2-norm of ``.grad`` after the step and before clipping.
    """

    trace: Tensor
    penalty: Tensor
    grad_norm: Tensor


class FisherTraceRegularizer:
    """Algorithm 1: replaces ``loss.backward()`` in a training loop; any optimizer, weight decay stays with it.

    One step costs 2M sub-batch passes beside the ordinary one: about three times the arithmetic of a plain step.

    * Sub-batches: a random equal split (torch's global generator). If M does not divide the batch, sizes differ by at
      most one and every sub-batch still weighs 1/M, as in Eq. 6. Fewer than M samples are taken one by one.
    * BatchNorm and any other buffer: penalty passes use the sub-batch's statistics and work on copies of the buffers,
      which are thrown away. Only the main pass updates running statistics.
    * Dropout: both passes of a sub-batch see the same mask; otherwise their difference would be noise. (Randomness from
      outside torch's default generators, and state that a module keeps outside its buffers, are out of reach.)
    * Precision: penalty passes run in float32 without autocast and TF32, whatever the main pass uses; at α = 1e-4 the
      difference would otherwise be mostly rounding. Half-precision inputs are converted.
    * Weights are back to the same bits after every step, also when ``loss_fn`` raises. Frozen parameters never move.

    Args:
        model: the network; its trainable parameters are float32 or float64.
        alpha: α, the step of the finite difference, > 0.
        beta: β, the penalty's weight, ≥ 0. The paper searches 10 to 125.
        num_sub_batches: M ≥ 1. The paper searches 4, 8 and 16.
        max_grad_norm: τ, the global norm to which ``.grad`` is clipped, or None. The paper searches 1 to 15. With
            several ``backward`` calls per optimizer step, the accumulated gradient is clipped after each.

    Attributes:
        last_step: the :class:`RegularizerStep` of the latest ``backward``, None before the first.

    Raises:
        FlatminimaError: for a value outside its range, a model without trainable parameters, half-precision or complex
            parameters, or a model wrapped for distributed training.

    Example:
        >>> import torch
        >>> from flatminima import FisherTraceRegularizer
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        >>> loader = [(torch.randn(16, 4), torch.randint(3, (16,))) for _ in range(5)]
        >>> loss_fn = torch.nn.CrossEntropyLoss()
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=1e-4)
        >>> regularizer = FisherTraceRegularizer(model, alpha=1e-4, beta=10.0, num_sub_batches=8, max_grad_norm=5.0)
        >>> for inputs, targets in loader:
        ...     optimizer.zero_grad()
        ...     loss = regularizer.backward(loss_fn, inputs, targets)  # was: loss_fn(model(inputs), targets).backward()
        ...     optimizer.step()
        >>> bool(regularizer.last_step.trace > 0)
        True
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        alpha: float = 1e-4,
        beta: float = 10.0,
        num_sub_batches: int = 8,
        max_grad_norm: float | None = None,
    ) -> None:
        _require(math.isfinite(alpha) and alpha > 0, f"alpha must be a positive number, got {alpha}")
        _require(math.isfinite(beta) and beta >= 0, f"beta must be zero or a positive number, got {beta}")
        _require(
            isinstance(num_sub_batches, int) and num_sub_batches >= 1,
            f"num_sub_batches must be an integer of at least 1, got {num_sub_batches}",
        )
        _require(
            max_grad_norm is None or max_grad_norm > 0, f"max_grad_norm must be positive or None, got {max_grad_norm}"
        )
        self.model = model
        self.alpha = alpha
        self.beta = beta
        self.num_sub_batches = num_sub_batches
        self.max_grad_norm = max_grad_norm
        self.last_step: RegularizerStep | None = None
        _check_model(model)

    def backward(self, loss_fn: LossFunction, inputs: Inputs, targets: Any) -> Tensor:
        """Add ∇[L + βR_α] to ``.grad``, as ``loss.backward()`` adds ∇L, then clip ``.grad``.

        Args:
            loss_fn: ``loss_fn(model_output, targets)`` → scalar, a mean over the samples.
            inputs: a tensor, a tuple (``model(*inputs)``) or a mapping (``model(**inputs)``); tensors have B rows.
            targets: a tensor, or a nested tuple or mapping of tensors, with B rows.

        Returns:
            The main loss L, detached: the one number a plain step would have given.

        Raises:
            NonFiniteError: if a loss is NaN or infinite; ``.grad`` is then left as it was.
            FlatminimaError: if tensors disagree about B, or ``loss_fn`` does not return a differentiable scalar.
        """
        parameters = _check_model(self.model)
        penalty = self._penalty(loss_fn, (inputs, targets), parameters)
        loss = self._loss(loss_fn, inputs, targets)
        _refuse_non_finite(loss.detach(), penalty.value)

        penalty.add_gradient(parameters, self.beta)
        loss.backward()  # type: ignore[no-untyped-call]
        self.last_step = RegularizerStep(penalty.trace, penalty.value, self._clip(parameters))
        return loss.detach()

    def _penalty(self, loss_fn: LossFunction, batch: Inputs, parameters: list[Tensor]) -> _Penalty:
        size = batch_size(batch)
        _require(size > 0, "the batch is empty: pass at least one sample")
        sub_batches = torch.randperm(size).tensor_split(min(self.num_sub_batches, size))
        penalty = _Penalty.zero(parameters)
        with true_precision(), _autocast_refused(self.model):
            for indices in sub_batches:
                sub_batch = map_tensors(_at_least_float32, take(batch, indices))
                with _restored_generators(parameters):
                    here = self._gradient(loss_fn, sub_batch, parameters)
                with _moved(parameters, here.values, -self.alpha):
                    there = self._gradient(loss_fn, sub_batch, parameters)
                penalty.add(here, there, weight=1 / len(sub_batches))
        return penalty

    def _gradient(self, loss_fn: LossFunction, sub_batch: Inputs, parameters: list[Tensor]) -> _Gradient:
        """∇L(B_i, w) at the parameters' present values."""
        with _scratch_buffers(self.model):
            try:
                loss = self._loss(loss_fn, *sub_batch)
            except ValueError as error:
                if "more than 1 value per channel" not in str(error):
                    raise
                raise FlatminimaError(
                    f"BatchNorm has no statistics on a sub-batch of {batch_size(sub_batch)} sample(s): "
                    "lower num_sub_batches, or drop the last, short batch"
                ) from error
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        return _Gradient.of(loss.detach(), gradients, parameters)

    def _loss(self, loss_fn: LossFunction, inputs: Inputs, targets: Any) -> Tensor:
        loss = loss_fn(_forward(self.model, inputs), targets)
        returned = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        _require(
            returned == "shape ()", f"loss_fn must return a scalar tensor, the mean over the samples; got {returned}"
        )
        _require(
            loss.requires_grad, "the loss does not depend on a trainable parameter: is gradient recording switched off?"
        )
        return loss

    def _clip(self, parameters: list[Tensor]) -> Tensor:
        """The global norm of ``.grad``, clipped afterwards."""
        if self.max_grad_norm is None:
            return get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
        return nn.utils.clip_grad_norm_(parameters, self.max_grad_norm)


@dataclass(frozen=True)
class _Gradient:
    """A loss and its gradient, one dense tensor per parameter; zeros where the loss does not use the parameter."""

    loss: Tensor
    values: list[Tensor]
    used: list[bool]

    @classmethod
    def of(cls, loss: Tensor, gradients: tuple[Tensor | None, ...], parameters: list[Tensor]) -> _Gradient:
        values = [
            torch.zeros_like(parameter) if gradient is None else gradient.to_dense()
            for gradient, parameter in zip(gradients, parameters, strict=True)
        ]
        return cls(loss, values, [gradient is not None for gradient in gradients])


@dataclass
class _Penalty:
    """R_α, its gradient and the trace, summed over sub-batches."""

    value: Tensor
    trace: Tensor
    gradient: list[Tensor]
    used: list[bool]

    @classmethod
    def zero(cls, parameters: list[Tensor]) -> _Penalty:
        nothing = parameters[0].new_zeros(())
        return cls(nothing, nothing, [torch.zeros_like(p) for p in parameters], [False] * len(parameters))

    def add(self, here: _Gradient, there: _Gradient, weight: float) -> None:
        """Add one sub-batch: ``here`` is its gradient at w, ``there`` at w − α g."""
        self.value = self.value + weight * (here.loss - there.loss)
        self.trace = self.trace + weight * get_total_norm(here.values).square()
        torch._foreach_add_(self.gradient, here.values, alpha=weight)
        torch._foreach_sub_(self.gradient, there.values, alpha=weight)
        self.used = [any(uses) for uses in zip(self.used, here.used, there.used, strict=True)]

    def add_gradient(self, parameters: list[Tensor], beta: float) -> None:
        """Add β ∇R_α to ``.grad``; a parameter that no loss used keeps ``.grad`` as it is, None included."""
        for parameter, gradient, used in zip(parameters, self.gradient, self.used, strict=True):
            if not used:
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad.add_(gradient, alpha=beta)


@contextmanager
def _moved(parameters: list[Tensor], direction: list[Tensor], step: float) -> Iterator[None]:
    """Move the weights by step · direction, and back to the very same bits: by copy, as adding would round."""
    saved = [parameter.detach().clone() for parameter in parameters]
    try:
        with torch.no_grad():
            torch._foreach_add_(parameters, direction, alpha=step)
        yield
    finally:
        with torch.no_grad():
            torch._foreach_copy_(parameters, saved)


@contextmanager
def _scratch_buffers(model: nn.Module) -> Iterator[None]:
    """Let the model work on copies of its buffers, and give it back its own.

    This covers every layer that keeps statistics, whatever its class, and both passes of a sub-batch start alike.
    """
    originals = [(module._buffers, dict(module._buffers)) for module in model.modules() if module._buffers]
    copies = {
        id(buffer): buffer.detach().clone() for _, own in originals for buffer in own.values() if buffer is not None
    }
    try:
        for buffers, own in originals:
            buffers.update({name: copies.get(id(buffer)) for name, buffer in own.items()})
        yield
    finally:
        for buffers, own in originals:
            buffers.update(own)


def _restored_generators(parameters: list[Tensor]) -> AbstractContextManager[None]:
    """A context that puts torch's random generators (CPU and the model's devices) back on exit."""
    accelerators = {parameter.device for parameter in parameters if parameter.device.type != "cpu"}
    device_type = next(iter(accelerators)).type if accelerators else "cuda"
    return torch.random.fork_rng(accelerators, device_type=device_type)


@contextmanager
def _autocast_refused(model: nn.Module) -> Iterator[None]:
    """Notice a forward that switches autocast back on (a decorated forward, a framework's wrapper)."""
    innermost = (module for module in model.modules() if module._parameters and not list(module.children()))
    handle = next(innermost, model).register_forward_pre_hook(_refuse_autocast)
    try:
        yield
    finally:
        handle.remove()


def _refuse_autocast(module: nn.Module, inputs: tuple[Any, ...]) -> None:
    if torch.is_autocast_enabled(device_of(module).type):
        raise FlatminimaError(
            "the model switches autocast on inside its forward, but penalty passes need float32: "
            "pass the inner module, and use autocast around the training step"
        )


def _forward(model: nn.Module, inputs: Inputs) -> Any:
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, (tuple, list)):
        return model(*inputs)
    return model(inputs)


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _check_model(model: nn.Module) -> list[Tensor]:
    """The trainable parameters, each once however many layers share it."""
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    _require(
        not any(isinstance(module, wrappers) for module in model.modules()),
        "models wrapped for several devices are not supported yet: train on one device, with the inner module",
    )
    trainable: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}
    _require(len(trainable) > 0, f"{type(model).__name__} has no trainable parameters (requires_grad is False for all)")
    for name, parameter in trainable.items():
        _require(
            parameter.dtype in (torch.float32, torch.float64),
            f"parameter {name} is {parameter.dtype}: keep trainable parameters in float32 and use autocast for speed",
        )
    return list(trainable.values())


def _refuse_non_finite(loss: Tensor, penalty: Tensor) -> None:
    if bool(torch.isfinite(loss + penalty)):  # one wait for the device per step
        return
    if not bool(torch.isfinite(loss)):
        raise NonFiniteError(f"the loss is {float(loss)}: check inputs, weights and learning rate")
    raise NonFiniteError(
        f"the penalty is {float(penalty)} though the loss is {float(loss):.4g}: a sub-batch's loss is NaN or infinite "
        "at w or at w − αg; check the inputs, or lower alpha"
    )


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise FlatminimaError(message)
