"""What tyro refuses, said in one line: its parse errors as data, before it draws them in a box.

tyro 1.0 has no public way to its errors but their printed form. Its module ``tyro._errors`` offers them as events, and
says that it may change. So nothing here relies on it: without the module, or for an event that is not known, tyro
prints its own box and ends the program with the same exit status.
"""

from __future__ import annotations

import contextlib
import importlib
import re
from collections.abc import Callable, Iterable
from typing import Any

from flatminima.errors import did_you_mean, one_line


def problems_handed_to(refuse: Callable[[object], None]) -> contextlib.AbstractContextManager[None]:
    """Call ``refuse`` with what tyro is about to refuse; where it does not raise, tyro goes on by itself."""
    try:
        hook: Callable[[Any], contextlib.AbstractContextManager[None]] = importlib.import_module(
            "tyro._errors"
        ).on_parse_error
    except (ImportError, AttributeError):
        return contextlib.nullcontext()
    return hook(refuse)


def refusal(problem: Any, known: Iterable[str]) -> str:
    """What is wrong, in one line; nothing where it is not known.

    Args:
        problem: an event of ``tyro._errors``; kinds are told by name, since any release may add or drop some.
        known: the names of the options there are, to hint at the one that was meant.
    """
    try:
        return _DESCRIPTIONS[type(problem).__name__](problem, known)
    except (KeyError, AttributeError):
        return ""


def _unrecognized(problem: Any, known: Iterable[str]) -> str:
    """Options that do not exist; a token behind one is taken for its value and not listed."""
    names = [token.partition("=")[0] for token in problem.tokens if token.startswith("-")]
    if not names:
        return f"unrecognized arguments: {', '.join(problem.tokens)}"
    return "unrecognized options: " + ", ".join(f"{name}{did_you_mean(name, known)}" for name in names)


def _invalid_choice(problem: Any, known: Iterable[str]) -> str:
    choices = ", ".join(map(repr, problem.choices))
    return f"{_name(problem.argument)}: {problem.value!r} is not among its choices: {choices}"


def _bad_value(problem: Any, known: Iterable[str]) -> str:
    given = "needs a value" if problem.offending_value is None else f"cannot be {problem.offending_value!r}"
    return f"{_name(problem.argument)} {given}"


def _no_instance(problem: Any, known: Iterable[str]) -> str:
    message = one_line(problem.message)
    if problem.argument is None:
        return message.partition(" Got errors:")[0].rstrip(".")
    found = _VALUE.search(message)
    if found is None:
        return f"{_name(problem.argument)}: {message}"
    takes = kinds(problem.argument.lowered.metavar)
    return f"{_name(problem.argument)}: {found['value']} cannot be used, it takes {takes}"


def kinds(metavar: str) -> str:
    """What an option takes, by what its help shows: ``{eval}|INT`` is "an integer or eval"."""
    return " or ".join(_KINDS.get(kind) or kind.strip("{}").replace(",", " or ") for kind in metavar.split("|")[::-1])


_VALUE = re.compile(
    r"(could be instantiated from \[|could not convert string to float: |invalid literal for int\(\) with base 10: )"
    r"(?P<value>'[^']*'(, '[^']*')*)"
)
"""How tyro and Python name a value that fits no type."""
_KINDS = {
    "INT": "an integer",
    "FLOAT": "a number",
    "{[INT [INT ...]]}": "integers",
    "INT [INT ...]": "integers",
    "[INT [INT ...]]": "integers",
    "[FLOAT [FLOAT ...]]": "numbers",
}


def _name(argument: Any) -> str:
    return str(argument.lowered.metavar if argument.is_positional() else argument.lowered.name_or_flags[-1])


_DESCRIPTIONS: dict[str, Callable[[Any, Iterable[str]], str]] = {
    "UnrecognizedArgs": _unrecognized,
    "InvalidChoice": _invalid_choice,
    "BadValue": _bad_value,
    "InstantiationFailure": _no_instance,
}
