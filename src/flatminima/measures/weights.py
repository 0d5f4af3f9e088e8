"""Weights as matrices, for measures that look at one layer after the other."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from flatminima.errors import UndefinedMeasureError
from flatminima.measures.trial import Trial
from flatminima.network import in_float64


def weight_tensors(trial: Trial) -> Mapping[str, Tensor]:
    """The trainable parameters of two or more dimensions by name, in float64: every layer's, without biases and scales.

    Raises:
        UndefinedMeasureError: for a sharded model, one without such parameters, or weights that are computed from
            parameters (weight or spectral normalization).
    """
    for name, module in trial.model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and not isinstance(weight, nn.Parameter) and "weight" not in _buffers(module):
            raise UndefinedMeasureError(f"the weight of {name!r} is no parameter but computed from some")
    weights = {name: in_float64(p.detach()) for name, p in trial.parameters.items() if p.dim() > 1}
    if not weights:
        raise UndefinedMeasureError("the model has no trainable parameter of two or more dimensions")
    return weights


def _buffers(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_buffers(recurse=False)}
