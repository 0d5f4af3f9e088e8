"""What a model must be before anything is done with it."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from flatminima.errors import FlatminimaError, require


def require_module(model: Any) -> None:
    """Raise :class:`FlatminimaError` for what is no module: a path, a state dict, a class."""
    require(
        isinstance(model, nn.Module),
        f"a model is a torch.nn.Module, got {type(model).__name__}: build the network and load its weights first",
    )


def require_usable(model: nn.Module) -> None:
    """Raise :class:`FlatminimaError`, by name, for a parameter without a shape or one that can have no gradient."""
    require_module(model)
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise FlatminimaError(
                f"parameter {name!r} has no shape yet (a lazy module): run the model on one batch first"
            )
        if parameter.is_inference():
            raise FlatminimaError(
                f"parameter {name!r} was made in inference mode, where gradients are lost for good: build or load the "
                "model outside torch.inference_mode()"
            )
