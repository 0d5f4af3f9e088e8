"""Packages that only the process imports which uses them: every worker collects all tests."""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from typing import Any

import pytest


class Lazily:
    """A module, imported when first an attribute of it is asked for."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("__"):  # as whoever inspects all things of a file asks for
            raise AttributeError(attribute)
        return getattr(importlib.import_module(self._name), attribute)


def needs(*packages: str) -> pytest.MarkDecorator:
    """Skip the tests of a file where one of the packages is not installed."""
    missing = [package for package in packages if find_spec(package) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")
