"""The PAC-Bayes σ of Jiang et al. (2020): how much noise on the weights the training accuracy stands."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flatminima.errors import UndefinedMeasureError
from flatminima.losses import is_single_label
from flatminima.measures.registry import catalogued
from flatminima.measures.trial import Trial
from flatminima.network import back_like, call_model_without_graph, moved

_DRAWS = 10
_BISECTIONS = 15
_RANGE = (1e-5, 10.0)
ACCURACY_LOSS = 0.1


@catalogued(
    "PAC-Bayes σ", cost="costly", source="Jiang et al. 2020, App. C; Dziugaite et al. 2020", larger_is_better=True
)
def pac_bayes_sigma(trial: Trial) -> float:
    """The largest σ at which weights w + σ ε, ε ~ N(0, 1), lose no more than 0.1 of the subset's accuracy at w.

    The accuracy is the mean of ten draws of ε, the same for all σ, on all trainable parameters. σ is a standard
    deviation, found by bisection of its logarithm between 1e-5 and 10, to 0.05 per cent: 160 forward passes. NaN where
    the accuracy stands σ = 10.

    Raises:
        UndefinedMeasureError: where an output is no prediction of one class.
    """
    right = sum(int(hits.sum()) for hits in _hits(trial))
    allowed = _DRAWS * (right - ACCURACY_LOSS * len(trial.targets)) - 1e-6
    low, high = map(math.log, _RANGE)
    if _hits_under_noise(trial, _RANGE[1]) >= allowed:
        return math.nan
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        stands = _hits_under_noise(trial, math.exp(middle)) >= allowed
        low, high = (middle, high) if stands else (low, middle)
    return math.exp(low)


def _hits_under_noise(trial: Trial, sigma: float) -> int:
    """Right predictions over all draws."""
    parameters, generator, hits = list(trial.parameters.values()), trial.generator(), 0
    for _ in range(_DRAWS):
        noise = [torch.randn(p.shape, generator=generator, dtype=torch.float32, device="cpu") for p in parameters]
        direction = [back_like(part, parameter) for part, parameter in zip(noise, parameters, strict=True)]
        with moved(parameters, direction, sigma):  # type: ignore[arg-type]
            hits += sum(int(part.sum()) for part in _hits(trial))
    return hits


def _hits(trial: Trial) -> list[Tensor]:
    """Whether each sample's label has the largest logit."""
    found = []
    for inputs, targets in trial.parts():
        logits = call_model_without_graph(trial.model, inputs)
        if not is_single_label(trial.loss, logits):
            raise UndefinedMeasureError("accuracy is defined for the cross entropy of one label per sample alone")
        found.append(logits.argmax(1) == targets)
    return found
