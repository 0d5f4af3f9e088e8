"""A package's face that imports what it shows when that is first looked at (PEP 562), not before."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from types import ModuleType
from typing import Any


def on_demand(package: str, homes: Mapping[str, Sequence[str]]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The package's ``__getattr__`` and ``__dir__``.

    Args:
        package: its name.
        homes: names to show by the module of the package that defines them; these modules are attributes too.
    """
    home_of = {name: module for module, names in homes.items() for name in names}

    def attribute(name: str) -> Any:
        if name in homes:
            return _imported(f"{package}.{name}")
        if name not in home_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}", name=name, obj=sys.modules[package])
        value = getattr(_imported(f"{package}.{home_of[name]}"), name)
        setattr(sys.modules[package], name, value)
        return value

    def names() -> list[str]:
        shown = (module for module in homes if "." not in module)
        return sorted({*vars(sys.modules[package]), *shown, *home_of})

    return attribute, names


def _imported(module: str) -> ModuleType:
    """A module. What comes with it may draw from Python's generator (rich does), which may have been seeded by now."""
    state = random.getstate()
    try:
        return import_module(module)
    finally:
        random.setstate(state)
