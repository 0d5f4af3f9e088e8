"""Scripts that let a shell complete commands and options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Union

import tyro
from tyro.conf import OmitSubcommandPrefixes, subcommand

from flatminima.cli.optional import OPTIONAL
from flatminima.cli.options import PROGRAM, Shown
from flatminima.errors import FlatminimaError, require_one_of

COMPLETION = ("--tyro-print-completion", "--tyro-write-completion")
"""What asks for such a script, as in all programs of tyro; the second takes a file, too."""

_SHELLS = ("bash", "zsh", "tcsh")


def write_completion(given: list[str], commands: Mapping[str, Any]) -> None:
    """Print or write the script that completes all commands at once.

    Args:
        given: one of :data:`COMPLETION` with its values.
        commands: what each command takes, as an object with its defaults.

    Raises:
        Shown: when it is done.
        FlatminimaError: for other values.
    """
    if len(given) != (2 if given[0] == COMPLETION[0] else 3):
        raise FlatminimaError(f"{given[0]} takes a shell, and {COMPLETION[1]} the file to write, too")
    require_one_of("shell", given[1], _SHELLS)
    any_of_them: Any = Union[  # noqa: UP007
        tuple(Annotated[type(options), subcommand(name, default=options)] for name, options in commands.items())
    ]
    try:
        with OPTIONAL:
            tyro.cli(any_of_them, prog=PROGRAM, args=given, config=(OmitSubcommandPrefixes,))
    except SystemExit as leaving:
        raise Shown(leaving.code) from None
