"""The squared Euclidean norm of the weights."""

from __future__ import annotations

from flatminima.measures.registry import catalogued
from flatminima.measures.trial import Trial
from flatminima.network import in_float64


@catalogued("parameter norm²", cost="weights", source="Jiang et al. 2020, App. C (parameter norm)")
def parameter_norm(trial: Trial) -> float:
    """‖w‖₂² of all trainable parameters, biases and normalization layers' scales included."""
    return sum(in_float64(parameter.detach()).square().sum().item() for parameter in trial.parameters.values())
