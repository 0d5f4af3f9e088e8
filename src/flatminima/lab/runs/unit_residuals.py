"""Algorithm 1 at unit residuals: ours, and exploratory.

The gradient of a sample's loss is g_i = J_z,iᵀ δ_i with δ_i = ∂ℓ_i/∂logits, so the Fisher trace falls as the residuals
δ_i do, and the penalty fades as the fit gets good. Here the residual is taken out of the penalty: its loss on a sample
is ⟨logits, d_i⟩ with d_i = δ_i/‖δ_i‖₂, formed once at the present weights and held constant. What the penalty drives
down is the squared norm of sub-batches' mean h_i = J_z,iᵀ d_i, of which γ̂ at unit residuals is made.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from flatminima.lab.runs.rival import Rival
from flatminima.losses import CrossEntropy, logit_gradient
from flatminima.network import Inputs, outside_autocast, run_model
from flatminima.regularizer import FisherTraceRegularizer, LossFunction, scalar_loss


class UnitResidualGradient(Rival):
    """The penalty with the interface of :class:`~flatminima.FisherTraceRegularizer`, whose passes it uses.

    Args:
        model: a classifier with logits (B, K); its trainable parameters are float32 or float64.
        alpha: α, the step of the finite difference, > 0.
        beta: β, the penalty's weight, ≥ 0.
        num_sub_batches: M ≥ 1.
        max_grad_norm: τ, the global norm to which ``.grad`` is clipped, or None.
        label_smoothing: that of the loss.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        alpha: float,
        beta: float,
        num_sub_batches: int,
        max_grad_norm: float | None = None,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(model, max_grad_norm)
        self._loss = CrossEntropy(label_smoothing)
        self._regularizer = FisherTraceRegularizer(model, alpha=alpha, beta=beta, num_sub_batches=num_sub_batches)

    def backward(self, loss_fn: LossFunction, inputs: Inputs, targets: Any) -> Tensor:
        """Add ∇[L + βR_α] to ``.grad``, with R_α at unit residuals, then clip ``.grad``.

        Args:
            loss_fn: ``loss_fn(model_output, targets)`` → scalar, the mean cross entropy of the samples.
            inputs: a tensor, a tuple (``model(*inputs)``) or a mapping (``model(**inputs)``); tensors have B rows.
            targets: what ``loss_fn`` takes; the first of them are the labels, (B,).

        Returns:
            L(B, w), detached: the one number a plain step would have given.

        Raises:
            NonFiniteError: if logits or losses are NaN or infinite.
            FlatminimaError: if ``loss_fn`` does not return a differentiable scalar.
        """
        outputs: list[Tensor] = []

        def main_loss(batch: Inputs) -> Tensor:
            outputs.append(run_model(self.model, batch))
            return loss_fn(outputs[0], targets)

        loss = scalar_loss(main_loss, inputs)
        with outside_autocast():
            loss.backward()  # type: ignore[no-untyped-call]
        directions = logit_gradient(self._loss, outputs[0].detach(), targets[0]).direction
        penalty = self._regularizer.penalize(self._unit_loss, (inputs, directions))
        assert penalty is not None  # it acts on every step
        penalty.add_gradient_to_grad(self._regularizer.present_beta)
        self.clip(penalty.weights.parameters)
        return loss.detach()

    def _unit_loss(self, batch: tuple[Inputs, Tensor]) -> Tensor:
        inputs, directions = batch
        products: Tensor = run_model(self.model, inputs) * directions
        return products.sum(1).mean()
