"""The regularizer in trainers people already use; nothing else in the library imports these modules."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from flatminima.errors import FlatminimaError


def regularizer_options(options: dict[str, Any], owner: str) -> dict[str, Any]:
    """Options that a regularizer can be made with again, where a framework owns the main backward pass.

    Raises:
        FlatminimaError: for options that are the framework's business.
    """
    for name in ("max_grad_norm", "main_gradient"):
        if name in options:
            raise FlatminimaError(f"{name} is not the regularizer's here: {owner} owns the main backward pass")
    if isinstance(options.get("parameters"), Iterator):  # every regularizer goes through them
        return {**options, "parameters": list(options["parameters"])}
    return options
