"""The regularizer's nearest relative: the Fisher penalty (Jastrzębski et al., 2021).

The trace of the Fisher information takes labels that the model itself draws, ŷ_i ~ f_w(x_i). Jastrzębski et al.
estimate it by one gradient of the mini-batch, and add

    weight · ‖ (1/|B|) Σ_i ∇ℓ(x_i, ŷ_i) ‖₂²

to the loss, differentiated exactly: twice through the network, at fixed ŷ_i.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatminima.lab.runs.rival import Rival
from flatminima.network import (
    Buffers,
    Inputs,
    outside_autocast,
    restored_generators,
    run_model,
    true_precision,
    without_autocast,
)
from flatminima.regularizer import LossFunction, Weights, scalar_loss
from flatminima.torch_compat import differentiable_twice


class FisherPenaltyGradient(Rival):
    """The Fisher penalty with the interface of :class:`~flatminima.FisherTraceRegularizer`.

    The penalty has a pass of its own, in float32, which sees the main pass's dropout masks and leaves the buffers
    alone. Several processes are not supported.

    Args:
        model: a classifier with logits (B, K); its trainable parameters are float32 or float64.
        weight: of the penalty, > 0.
        max_grad_norm: the global norm to which ``.grad`` is clipped, or None.
    """

    def __init__(self, model: nn.Module, *, weight: float, max_grad_norm: float | None = None) -> None:
        super().__init__(model, max_grad_norm)
        self.weight = weight

    def backward(self, loss_fn: LossFunction, inputs: Inputs, targets: Any) -> Tensor:
        """Add the gradient of L + ``weight`` · penalty to ``.grad``, then clip ``.grad``.

        Args:
            loss_fn: ``loss_fn(model_output, targets)`` → scalar, a mean over the samples.
            inputs: a tensor, a tuple (``model(*inputs)``) or a mapping (``model(**inputs)``); tensors have B rows.
            targets: what ``loss_fn`` takes.

        Returns:
            L(B, w), detached: the one number a plain step would have given.

        Raises:
            FlatminimaError: if ``loss_fn`` does not return a differentiable scalar.
        """
        parameters = Weights.of(self.model, None).parameters
        with restored_generators(parameters):
            loss = scalar_loss(lambda batch: loss_fn(run_model(self.model, batch), targets), inputs)
        with outside_autocast():
            loss.backward()  # type: ignore[no-untyped-call]
        self._add_penalty(inputs, parameters)
        self.clip(parameters)
        return loss.detach()

    def _add_penalty(self, inputs: Inputs, parameters: list[Tensor]) -> None:
        """Add the gradient of ``weight`` times the squared norm to ``.grad``, all of it in float32."""
        with true_precision(), without_autocast(self.model), differentiable_twice(), Buffers(self.model).scratch():
            logits = run_model(self.model, inputs)
            loss = F.cross_entropy(logits, _drawn_labels(logits.detach()))
            gradient = torch.autograd.grad(
                loss, parameters, create_graph=True, allow_unused=True, materialize_grads=True
            )
            penalty = torch.stack([part.square().sum() for part in gradient]).sum()
            (self.weight * penalty).backward()  # type: ignore[no-untyped-call]


def _drawn_labels(logits: Tensor) -> Tensor:
    """One label for each sample from its softmax: the first of K exponential clocks, whose rates are the probabilities.

    ``torch.multinomial`` would raise where a run has diverged; here the loss says so, as in plain training.
    """
    return (logits.softmax(1) / torch.empty_like(logits).exponential_()).argmax(1)
