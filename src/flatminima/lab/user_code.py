"""Other people's code: found by its name, and whatever it raises is one line that says what was being done."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from flatminima.errors import FlatminimaError, described, did_you_mean


@contextlib.contextmanager
def others_errors(what: str) -> Iterator[None]:
    """Whatever somebody else's code raises becomes an error of ours, ``SystemExit`` too; not so Ctrl-C."""
    try:
        yield
    except (FlatminimaError, KeyboardInterrupt):
        raise
    except BaseException as error:
        raise FlatminimaError(f"{what} ({described(error)})") from error


def made_by_factory(source: str, what: str, arguments: Mapping[str, Any]) -> Any:
    """What ``package.module:factory`` returns, called with those of ``arguments`` that it names.

    The current directory is importable. One that hands on keyword arguments, as torchvision's do, gets ``num_classes``.

    Args:
        source: ``package.module:factory``.
        what: It makes: ``model`` or ``data``, for messages.
        arguments: Keyword arguments.

    Raises:
        FlatminimaError: There is no such module or factory, or it fails.
    """
    factory = found_by_name(source, what)
    with others_errors(f"{what} {source}: calling it failed"):
        return factory(**_accepted(factory, arguments))


def found_by_name(source: str, what: str) -> Callable[..., Any]:
    """The function or class that ``package.module:name`` names; the current directory is importable.

    Args:
        source: The name.
        what: It is, for messages.

    Raises:
        FlatminimaError: There is no such module, or nothing of that name in it to be called.
    """
    module_name, _, factory_name = source.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")
    with others_errors(f"{what} {source}: cannot import {module_name!r}"):
        module = importlib.import_module(module_name)
        factory: Callable[..., Any] | None = getattr(module, factory_name, None)
    if not callable(factory):
        known = did_you_mean(factory_name, [name for name, value in vars(module).items() if callable(value)])
        raise FlatminimaError(f"{what} {source}: {module_name} has no function or class {factory_name!r}{known}")
    return factory


def _accepted(factory: Callable[..., Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that ``factory`` names; and ``num_classes`` if it hands on any (as torchvision's factories do)."""
    try:
        parameters = inspect.signature(factory).parameters
    except (TypeError, ValueError):  # written in C: it does not say
        return {}
    hands_on = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    return {name: n for name, n in arguments.items() if name in parameters or (hands_on and name == "num_classes")}
