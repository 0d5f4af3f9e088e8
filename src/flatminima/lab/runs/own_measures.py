"""Measures of a user's own, as ``package.module:function`` names them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from flatminima.lab.runs.measuring_options import Measuring
from flatminima.lab.storage import digest_of
from flatminima.lab.user_code import found_by_name
from flatminima.measures import Selection, selected


def options_of(how: Measuring) -> dict[str, Any]:
    """Those of :func:`flatminima.measure`, with the functions themselves in the place of their names.

    Raises:
        FlatminimaError: for a measure that cannot be imported.
    """
    own = _own(how)
    return {**how.options(), "measures": [own.get(name, name) for name in how.measures]}


def selection_of(how: Measuring) -> Selection:
    """The measures that are taken.

    Raises:
        FlatminimaError: for an unknown measure, or one that cannot be imported.
    """
    return selected(options_of(how)["measures"])


def sources_of(how: Measuring) -> dict[str, str]:
    """Digests of the modules that measures of the user's own are in, by the measures' names."""
    return {name: digest_of_module(own) for name, own in _own(how).items()}


def _own(how: Measuring) -> dict[str, Callable[..., Any]]:
    return {name: found_by_name(name, "measure") for name in how.own}


def digest_of_module(function: Callable[..., Any]) -> str:
    """Of the text of the module that a function is from; of nothing, where it has none."""
    module = inspect.getmodule(function)
    try:
        return digest_of(b"" if module is None else inspect.getsource(module).encode())
    except OSError:
        return digest_of(b"")
