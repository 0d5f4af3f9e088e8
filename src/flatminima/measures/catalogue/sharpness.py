"""Worst-case adaptive sharpness: how much the loss can rise where every weight moves by at most a share of itself."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from flatminima.measures.loss_surface import loss_and_gradient, loss_of_subset
from flatminima.measures.registry import catalogued
from flatminima.measures.trial import Trial
from flatminima.network import moved

RADIUS = 0.002
"""ρ: Andriushchenko et al. try 0.001 to 0.008 for convolutional networks, and 0.0005 to 0.004 for transformers."""

STEPS = 20

_MOMENTUM = 0.75
_LEAST_SUCCESS = 0.75
"""The share of steps since the last checkpoint that must have raised the loss, or else steps become half as long."""


@catalogued("one-step sharpness", cost="costly", source="Kwon et al. 2021, p = ∞; Foret et al. 2021, one step")
def one_step_sharpness(trial: Trial) -> float:
    """L(w + ρ |w| sign ∇L) − L(w) on the subset, ρ = 0.002: the worst case of the linearized loss.

    A forward and backward pass, and a forward pass at weights that are put back to the bit.
    """
    parameters = list(trial.parameters.values())
    loss, gradient = loss_and_gradient(trial, parameters)
    ascent = [part.sign() * parameter.detach().abs() for part, parameter in zip(gradient, parameters, strict=True)]
    with moved(parameters, ascent, RADIUS):  # type: ignore[arg-type]
        return loss_of_subset(trial) - loss


@catalogued("worst-case sharpness", cost="costly", source="Andriushchenko et al. 2023, ℓ∞, APGD of 20 steps")
def worst_case_sharpness(trial: Trial) -> float:
    """The largest L(w + δ) − L(w) on the subset over |δ_j| ≤ ρ |w_j|, ρ = 0.002, by 20 steps of APGD.

    The m of "m-sharpness" is the size of the subset. 21 forward and backward passes; the weights are put back to the
    bit.
    """
    return worst_case_rise(trial, RADIUS, STEPS)


def worst_case_rise(trial: Trial, radius: float, steps: int) -> float:
    """The largest L(w + |w| u) − L(w), ‖u‖_∞ ≤ radius, that the projected ascent of Croce & Hein (2020) finds.

    It starts at w, so that the first point is that of the linearized loss, with steps of twice the radius along the
    gradient's sign, and momentum; where too few steps have raised the loss, it goes back to the best point with steps
    half as long.
    """
    parameters = list(trial.parameters.values())
    sizes = [parameter.detach().abs() for parameter in parameters]
    at: list[Tensor] = [torch.zeros_like(size) for size in sizes]
    before = at
    start, gradient = loss_and_gradient(trial, parameters)
    loss, best, best_at, best_gradient = start, start, at, gradient
    length, successes, checkpoint = 2 * radius, 0, 0
    halved_at_last, best_at_last = False, start
    checkpoints = _checkpoints(steps)
    for step in range(1, steps + 1):
        share = 1.0 if step == 1 else _MOMENTUM
        following = [
            _next(u, v, part.sign(), length, radius, share) for u, v, part in zip(at, before, gradient, strict=True)
        ]
        before, at, loss_before = at, following, loss
        loss, gradient = _at(trial, parameters, sizes, at)
        successes += loss > loss_before
        if loss > best:
            best, best_at, best_gradient = loss, at, gradient
        if step in checkpoints:
            too_few = successes < _LEAST_SUCCESS * (step - checkpoint)
            halve = too_few or (not halved_at_last and best == best_at_last)
            if halve:
                length, at, before, loss, gradient = length / 2, best_at, best_at, best, best_gradient
            halved_at_last, best_at_last, checkpoint, successes = halve, best, step, 0
    return best - start


def _next(at: Tensor, before: Tensor, direction: Tensor, length: float, radius: float, share: float) -> Tensor:
    """Move u to u + share (z − u) + (1 − share) (u − u before), z = u + length · direction, all within the radius."""
    ahead = (at + length * direction).clamp(-radius, radius)
    return (at + share * (ahead - at) + (1 - share) * (at - before)).clamp(-radius, radius)


def _at(
    trial: Trial, parameters: list[nn.Parameter], sizes: list[Tensor], at: list[Tensor]
) -> tuple[float, list[Tensor]]:
    """The loss and its gradient at w + |w| u."""
    direction = [size * u for size, u in zip(sizes, at, strict=True)]
    with moved(parameters, direction, 1.0):  # type: ignore[arg-type]
        return loss_and_gradient(trial, parameters)


def _checkpoints(steps: int) -> set[int]:
    """After 22 per cent of the steps, then after ever shorter stretches, of 6 per cent at least."""
    shares = [0.0, 0.22]
    while shares[-1] < 1:
        shares.append(shares[-1] + max(shares[-1] - shares[-2] - 0.03, 0.06))
    return {math.ceil(share * steps) for share in shares[1:]}
