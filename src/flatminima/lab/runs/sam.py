"""Rivals that look at the gradient near by: SAM (Foret et al., 2021), ASAM (Kwon et al., 2021), and Zhao et al. (2022).

SAM moves the weights with the gradient of L(B, ·) at w + e, the worst place near by to first order:

    e = ρ T² g / ‖T g‖₂,  g = ∇L(B, w),  T = 1 (SAM; Foret et al., Eq. 2) or |w| elementwise (ASAM; Kwon et al., Eq. 7).

Zhao et al. penalize the gradient's norm: the gradient of L + λ‖g‖₂ is g + λ H g/‖g‖₂, by a finite difference over e:

    (1 − λ/r) g + (λ/r) ∇L(B, w + e),  e = r g / ‖g‖₂  (Zhao et al., Algorithm 1; SAM is the case λ = r).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from flatminima.lab.runs.rival import Rival
from flatminima.network import Buffers, Inputs, moved, outside_autocast, restored_generators, run_model
from flatminima.regularizer import LossFunction, Weights, scalar_loss
from flatminima.torch_compat import foreach_mul

_TINY = 1e-12  # beside ‖T g‖, so that a gradient of zero moves nothing


class SharpnessAwareGradient(Rival):
    """SAM, ASAM, or a penalty on the gradient's norm; one step costs two plain ones.

    The interface is that of :class:`~flatminima.FisherTraceRegularizer`.

    Both passes see the same dropout mask. Running statistics and other buffers are updated by the first pass alone, and
    the weights are back to the same bits after every step. Both forward passes run in the precision around them, so
    autocast works; float16 with a gradient scaler, gradient accumulation and several processes are not supported.

    Args:
        model: the network; its trainable parameters are float32 or float64.
        rho: ρ, the length of e (of T⁻¹e for ASAM), > 0.
        adaptive: ASAM, without its stabilizer η and with T = |w| for biases and normalization layers too, as in most
            implementations.
        share: what the gradient at w + e counts for, > 0; that at w counts for the rest. SAM: 1; Zhao et al.: λ/r.
        max_grad_norm: the global norm to which ``.grad`` is clipped, or None.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        rho: float = 0.05,
        adaptive: bool = False,
        share: float = 1.0,
        max_grad_norm: float | None = None,
    ) -> None:
        super().__init__(model, max_grad_norm)
        self.rho = rho
        self.adaptive = adaptive
        self.share = share

    def backward(self, loss_fn: LossFunction, inputs: Inputs, targets: Any) -> Tensor:
        """Add ``share`` ∇L(B, w + e) + (1 − ``share``) ∇L(B, w) to ``.grad``, then clip ``.grad``.

        Args:
            loss_fn: ``loss_fn(model_output, targets)`` → scalar, a mean over the samples.
            inputs: a tensor, a tuple (``model(*inputs)``) or a mapping (``model(**inputs)``); tensors have B rows.
            targets: what ``loss_fn`` takes.

        Returns:
            L(B, w), detached: the one number a plain step would have given.

        Raises:
            FlatminimaError: if ``loss_fn`` does not return a differentiable scalar.
        """

        def loss() -> Tensor:
            torch.clear_autocast_cache()  # its half-precision copies of the weights do not move with them
            return scalar_loss(lambda batch: loss_fn(run_model(self.model, batch), targets), inputs)

        parameters = Weights.of(self.model, None).parameters
        with restored_generators(parameters):
            here = loss()
            with outside_autocast():
                found = torch.autograd.grad(here, parameters, allow_unused=True, materialize_grads=True)
        ascent = self._ascent(parameters, [part.to_dense() for part in found])
        with moved(parameters, ascent, 1.0), Buffers(self.model).scratch():
            there = loss()
            with outside_autocast():
                (self.share * there).backward()  # type: ignore[no-untyped-call]
        torch.clear_autocast_cache()
        if self.share != 1.0:
            for parameter, part in zip(parameters, found, strict=True):
                if parameter.grad is not None:
                    parameter.grad.add_(part, alpha=1 - self.share)
        self.clip(parameters)
        return here.detach()

    def _ascent(self, parameters: list[Tensor], gradient: list[Tensor]) -> list[Tensor]:
        """The step e, one tensor per parameter."""
        with torch.no_grad():
            magnitudes = [parameter.abs() if self.adaptive else torch.ones_like(parameter) for parameter in parameters]
            scaled = foreach_mul(gradient, magnitudes)
            length = self.rho / (get_total_norm(scaled) + _TINY)
            return list(foreach_mul(foreach_mul(scaled, magnitudes), length))
