"""What a model must be before anything is done with it."""

from __future__ import annotations

import itertools
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from flatminima.errors import FlatminimaError, require


def require_module(model: Any) -> None:
    """Raise :class:`FlatminimaError` for what is no module: a path, a state dict, a class."""
    require(
        isinstance(model, nn.Module),
        f"a model is a torch.nn.Module, got {type(model).__name__}: build the network and load its weights first",
    )


def require_values(model: nn.Module) -> None:
    """Raise :class:`FlatminimaError`, by name, for a parameter or buffer without a shape, or without values."""
    require_module(model)
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if is_lazy(tensor):
            raise FlatminimaError(f"{name!r} has no shape yet (a lazy module): run the model on one batch first")
        if tensor.is_meta and type(tensor) in (Tensor, nn.Parameter):  # a wrapper has its values elsewhere
            raise FlatminimaError(f"{name!r} is on the meta device, without values: load the model's weights first")


def require_usable(model: nn.Module) -> None:
    """Raise :class:`FlatminimaError`, by name, as :func:`require_values`, or for one that can have no gradient."""
    require_values(model)
    for name, parameter in model.named_parameters():
        if parameter.is_inference():
            raise FlatminimaError(
                f"parameter {name!r} was made in inference mode, where gradients are lost for good: build or load the "
                "model outside torch.inference_mode()"
            )
