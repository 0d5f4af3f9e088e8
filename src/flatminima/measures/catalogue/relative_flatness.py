"""Flatness in the last layer's weights, in units of these weights."""

from __future__ import annotations

from contextlib import ExitStack, suppress
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatminima.errors import UndefinedMeasureError
from flatminima.losses import logit_gradient
from flatminima.measures.registry import catalogued
from flatminima.measures.trial import Trial
from flatminima.network import Inputs, call_model_without_graph, in_float64, take

_SAME = 1e-4
"""How far the layer's product may be from the logits, relative to the largest: float32 rounds by less."""


@catalogued("relative flatness", cost="forward", source="Petzka et al. 2021, in the Fisher's form")
def relative_flatness(trial: Trial) -> float:
    """mean_i ‖Wᵀδ_i‖² ‖a_i‖² for the last layer z = W a + b.

    Petzka et al. take Σ_st ⟨w_s, w_t⟩ tr H_st over the rows of W, with H_st the blocks of the loss's Hessian in W, for
    a last layer mean_i (∂²ℓ_i/∂z_s∂z_t) a_i a_iᵀ. Here, as in γ̂, δ_i δ_iᵀ of the label stands for ∂²ℓ_i/∂z² (Eq. 4):
    for a cross entropy it is that on average over labels drawn from the network's own probabilities.

    Raises:
        UndefinedMeasureError: for networks without such a layer, besides what has no gradients of single samples.
    """
    trial.require_gradients_of_samples()
    trial.require_whole_weights()
    trial.require_classes()
    squares = []
    for rows in trial.chunks:
        layer, features, logits = _last_linear(trial.model, take(trial.inputs, rows))
        direction = logit_gradient(
            trial.loss, logits, trial.targets[rows], logit_normalization=trial.options.logit_normalization
        ).direction
        back = in_float64(direction) @ in_float64(layer.weight.detach())
        squares.append(back.square().sum(1) * in_float64(features).square().sum(1))
    return (torch.cat(squares) * (2 * trial.gram.log_scale).exp()).mean().item()


def _last_linear(model: nn.Module, inputs: Inputs) -> tuple[nn.Linear, Tensor, Tensor]:
    """The linear layer that the logits come from, what it takes, and the logits."""
    calls: list[tuple[nn.Linear, Tensor]] = []
    linear = [m for m in model.modules() if isinstance(m, nn.Linear) and type(m).forward is nn.Linear.forward]

    def note(layer: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        calls.append((cast(nn.Linear, layer), arguments[0] if arguments else keywords["input"]))

    with ExitStack() as stack:
        for layer in linear:
            stack.callback(layer.register_forward_pre_hook(note, with_kwargs=True).remove)
        logits = call_model_without_graph(model, inputs)
    for layer, features in calls[-1:]:
        with suppress(RuntimeError), torch.no_grad():  # raised for features of a vmap that is over
            product = F.linear(features, layer.weight, layer.bias)
            if product.shape == logits.shape and _close(product, logits):
                return layer, features, logits
    raise UndefinedMeasureError("the logits are not those of a last torch.nn.Linear on one vector per sample")


def _close(product: Tensor, logits: Tensor) -> bool:
    """Equal but for rounding: nothing came after the layer."""
    return bool((product - logits).abs().max() <= _SAME * logits.abs().max())
