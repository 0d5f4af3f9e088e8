"""What a batch is: inputs are a tensor, a tuple of positional arguments or a dict of keyword arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from flatminima.errors import FlatminimaError

Inputs = Any
"""A tensor, a tuple or list (positional arguments), or a mapping (keyword arguments); every tensor has N rows."""


def map_tensors(function: Callable[[Tensor], Tensor], inputs: Inputs) -> Inputs:
    """Apply ``function`` to every tensor of a nested tuple, list or mapping; hand everything else on."""
    if isinstance(inputs, Tensor):
        return function(inputs)
    if isinstance(inputs, Mapping):
        return {key: map_tensors(function, value) for key, value in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        return tuple(map_tensors(function, value) for value in inputs)
    return inputs


def tensors_of(inputs: Inputs) -> list[Tensor]:
    """Every tensor of a nested tuple, list or mapping, in order."""
    found: list[Tensor] = []
    map_tensors(lambda tensor: found.append(tensor) or tensor, inputs)  # type: ignore[func-returns-value]
    return found


def batch_size(inputs: Inputs) -> int:
    """The number of samples N: the common first dimension of every tensor.

    Raises:
        FlatminimaError: if there is no tensor, or their first dimensions differ.
    """
    sizes = {tensor.shape[0] if tensor.dim() else None for tensor in tensors_of(inputs)}
    if len(sizes) != 1 or None in sizes:
        raise FlatminimaError(
            "inputs and targets must be tensors that share their first dimension (the samples); "
            f"found {sizes or 'none'}"
        )
    return int(next(iter(sizes)))  # type: ignore[arg-type]


def take(inputs: Inputs, indices: Tensor | slice) -> Inputs:
    """The samples at ``indices`` of every tensor, in memory of their own: models may write to what they are given."""
    return map_tensors(lambda t: t[indices].clone() if isinstance(indices, slice) else t[indices], inputs)


def run_model(model: nn.Module, inputs: Inputs) -> Any:
    """The model's output, whatever it is: a tuple holds positional arguments, a mapping keyword arguments."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, (tuple, list)):
        return model(*inputs)
    return model(inputs)


def call_model(model: nn.Module, inputs: Inputs) -> Tensor:
    """The model's logits: its output if that is a tensor, else the output's ``logits`` (Hugging Face models).

    Raises:
        FlatminimaError: if the output is neither.
    """
    output = run_model(model, inputs)
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise FlatminimaError(
            f"{type(model).__name__} returned {type(output).__name__}: "
            "return the logits as a tensor, or an object with `.logits`"
        )
    return logits


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's first parameter (the CPU for a model without any)."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def to_device(batch: tuple[Inputs, Tensor], device: torch.device) -> tuple[Inputs, Tensor]:
    """A batch (inputs, targets) on ``device``."""
    inputs, targets = batch
    return map_tensors(lambda tensor: tensor.to(device), inputs), targets.to(device)
