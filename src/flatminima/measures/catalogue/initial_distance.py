"""How far training has moved the weights."""

from __future__ import annotations

import torch

from flatminima.errors import UndefinedMeasureError, did_you_mean, require
from flatminima.measures.registry import catalogued
from flatminima.measures.trial import Trial
from flatminima.network import in_float64


@catalogued(
    "distance from initialization²", cost="weights", source="Jiang et al. 2020, App. C; Nagarajan & Kolter 2019"
)
def distance_from_initialization(trial: Trial) -> float:
    """‖w − w₀‖₂² over all trainable parameters, w₀ those of ``initial``.

    Raises:
        UndefinedMeasureError: without ``initial``.
        FlatminimaError: if a trainable parameter is not among its names, has another shape there, or is not finite.
    """
    parameters = trial.parameters
    if trial.initial is None:
        raise UndefinedMeasureError("it needs the weights that training began with: pass initial=state_dict")
    total = 0.0
    for name, parameter in parameters.items():
        require(
            name in trial.initial,
            f"initial= has no parameter {name!r}{did_you_mean(name, trial.initial)}: pass the state_dict of this very "
            "model as it was before training",
        )
        before = trial.initial[name]
        require(
            before.shape == parameter.shape,
            f"parameter {name!r} has the shape {tuple(parameter.shape)}, but {tuple(before.shape)} in initial=: pass "
            "the state_dict of this very model as it was before training",
        )
        moved = in_float64(parameter.detach()) - in_float64(before.detach().to(parameter.device))
        require(bool(torch.isfinite(moved).all()), f"NaN or infinity in parameter {name!r} of initial=")
        total += moved.square().sum().item()
    return total
