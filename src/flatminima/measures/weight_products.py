"""The loss gradient of every sample times the weights, g_i·w: one sweep in forward mode, held against plain autograd.

g_i·w = δ_i · (J_z,i w), with J_z,i w how the sample's logits change along the weights themselves. Forward mode gives
that for all samples at once, in about the time of a forward and backward pass and without a graph. Like rows of J,
products are formed of the directions δ_i/‖δ_i‖ alone, which loses no digits where the loss is tiny.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from flatminima.losses import Loss, logit_gradient
from flatminima.network import Inputs, call_model, in_float64, sound_batchnorm, take
from flatminima.torch_compat import differentiable_twice, hold, own_parameters

_TOLERANCE = 1e-4
"""How far a product may be from plain autograd's, relative to ‖h_i‖‖w‖: beyond what float32 rounds, by far."""


@dataclass(frozen=True)
class WeightProducts:
    """What g_i·w is formed of.

    Attributes:
        model: the model itself, in eval mode.
        weights: its trainable parameters.
        inputs: N samples.
        targets: theirs.
        loss: whose gradients g_i are.
        logit_normalization: see :func:`flatminima.losses.logit_gradient`.
    """

    model: nn.Module
    weights: Sequence[nn.Parameter]
    inputs: Inputs
    targets: Tensor
    loss: Loss
    logit_normalization: float | None = None

    def at_unit_residuals(self, chunks: Sequence[slice]) -> Tensor:
        """(N,) float64: h_i·w = g_i·w / ‖δ_i‖, where g_i = ‖δ_i‖ h_i.

        What forward mode cannot do, or does otherwise than plain autograd on the first and the last sample alone (for a
        layer that keeps its weights elsewhere, say), is done one sample at a time by plain autograd: slower, and right.

        Args:
            chunks: the samples of every pass in forward mode.
        """
        with sound_batchnorm():
            alone = {sample: self._alone(sample) for sample in (0, len(self.targets) - 1)}
            try:
                products = torch.cat([self._in_forward_mode(rows) for rows in chunks])
                if all(abs(products[i].item() - one) <= _TOLERANCE * bound for i, (one, bound) in alone.items()):
                    return products
            except (AttributeError, RuntimeError, TypeError, ValueError):
                pass  # an error that is not forward mode's comes again
            one_by_one = [(alone.get(sample) or self._alone(sample))[0] for sample in range(len(self.targets))]
            return torch.tensor(one_by_one, dtype=torch.float64, device="cpu")

    def _in_forward_mode(self, rows: slice) -> Tensor:
        with forward_ad.dual_level(), differentiable_twice():
            weights = {id(weight): weight.detach() for weight in self.weights}
            duals = {
                key: forward_ad.make_dual(weight, weight)  # type: ignore[no-untyped-call]
                for key, weight in weights.items()
            }
            with _replaced(self.model, duals):
                output = call_model(self.model, take(self.inputs, rows))
            logits, along = forward_ad.unpack_dual(output)  # type: ignore[no-untyped-call]
            if along is None:
                along = torch.zeros_like(logits)
        direction = self._direction(logits, rows)
        return (in_float64(direction) * in_float64(along)).reshape(len(logits), -1).sum(1)

    def _alone(self, sample: int) -> tuple[float, float]:
        """h·w of one sample by plain autograd, and ‖h‖‖w‖."""
        rows = slice(sample, sample + 1)
        with torch.enable_grad():
            logits = call_model(self.model, take(self.inputs, rows))
        if not logits.requires_grad:
            return 0.0, 0.0
        gradients = torch.autograd.grad(
            logits, self.weights, self._direction(logits, rows), allow_unused=True, materialize_grads=True
        )
        product = squared = squared_weights = 0.0
        for gradient, weight in zip(map(in_float64, gradients), map(in_float64, self.weights), strict=True):
            product += (gradient * weight).sum().item()
            squared += gradient.square().sum().item()
            squared_weights += weight.detach().square().sum().item()
        return product, (squared * squared_weights) ** 0.5

    def _direction(self, logits: Tensor, rows: slice) -> Tensor:
        return logit_gradient(
            self.loss, logits, self.targets[rows], logit_normalization=self.logit_normalization
        ).direction


@contextmanager
def _replaced(model: nn.Module, values: Mapping[int, Tensor]) -> Iterator[None]:
    """Let all modules hold these tensors instead of the parameters with these ids, under whatever names."""
    holders = [(held, dict(held)) for module in model.modules() if (held := own_parameters(module))]
    try:
        for held, own in holders:
            hold(held, {name: values.get(id(p), p) for name, p in own.items()})
        yield
    finally:
        for held, own in holders:
            hold(held, own)
