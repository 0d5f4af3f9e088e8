"""``flatminima COMMAND``: run it, print its report, and say what went wrong in one line."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import textwrap
import traceback
import warnings
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from flatminima.cli.commands import COMMANDS
from flatminima.cli.completion import COMPLETION, write_completion
from flatminima.cli.evaluate import Evaluate
from flatminima.cli.options import (
    PROGRAM,
    TYPED,
    Compare,
    Demo,
    Measure,
    Reproduce,
    RunOptions,
    Shown,
    Train,
    options_meant,
)
from flatminima.cli.output import say
from flatminima.cli.track import Track
from flatminima.errors import (
    FlatminimaError,
    FlatminimaWarning,
    NonFiniteError,
    RankDeficientError,
    described,
    require_one_of,
)
from flatminima.lab.errors import TrainingInterrupted
from flatminima.lab.heap import keep_freed_memory
from flatminima.lab.runs import RECIPES
from flatminima.launch import rank_and_size

INTERRUPTED = 130
"""The exit status of a program that Ctrl-C ended."""
NARROWEST_TABLE = 120
"""Columns of a table that goes to a file or a pipe; on a terminal it is as wide as that."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status (0 done, 1 failed, 2 bad input, 130 Ctrl-C)."""
    if arguments is None:  # the process is ours, and not a caller's
        keep_freed_memory()
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given or bool(os.environ.get("FLATMINIMA_DEBUG"))
    TYPED.set(())
    with warnings.catch_warnings():
        warnings.simplefilter("always", FlatminimaWarning)
        warnings.showwarning = _show_warning
        try:
            status = _run(given)
            sys.stdout.flush()
            return status
        except Shown as shown:
            return shown.status
        except TrainingInterrupted as interruption:
            return _fail(f"interrupted: {interruption}", INTERRUPTED, False)
        except KeyboardInterrupt:
            again = _ONCE_MORE.get(given[0] if given else "", "the same command starts again")
            return _fail(f"interrupted: {again}", INTERRUPTED, False)
        except BrokenPipeError:  # the reader of our output has gone, `| head`
            with contextlib.suppress(OSError, ValueError):  # so that the interpreter's own flush does not fail again
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except RankDeficientError as error:
            return _fail(f"error: {error} (options: --on-singular skip, --double, --subset-size)", 2, debug)
        except NonFiniteError as error:  # one process alone may have met it
            return _fail(f"error: {_with_options(str(error))}", 2, debug, by_any=True)
        except (FlatminimaError, FileNotFoundError) as error:
            return _fail(f"error: {_with_options(str(error))}", 2, debug)
        except ModuleNotFoundError as error:
            return _fail(f"error: the command line needs {error.name}: pip install 'flatminima[lab]'", 1, debug)
        except OSError as error:
            return _fail(f"error: {error}", 1, debug, by_any=True)
        except (Exception, SystemExit) as error:  # that one is somebody else's: a network may call `sys.exit`
            return _fail(f"error: {described(error)} (--debug shows where)", 1, debug, by_any=True)


_ONCE_MORE = {
    **dict.fromkeys(("demo", "reproduce"), "finished runs are kept; the same command goes on with the others"),
    "track": "measured checkpoints are kept; the same command goes on with the others",
}
"""What Ctrl-C says of a command that keeps what it has done."""


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """In the place of ``warnings.showwarning``: one line, as errors are."""
    say(f"warning: {_with_options(str(message))}")


def _with_options(text: str) -> str:
    """A message, and what the options are called that it names as Python does."""
    meant = [] if "--help explains" in text else options_meant(text, TYPED.get())
    return f"{text} (options: {', '.join(meant)})" if meant else text


def _run(given: list[str]) -> int:
    if not given or given[0] in ("-h", "--help", "help"):
        print(_usage(), end="")  # noqa: T201
        return 0
    if given[0] == "--version":
        from importlib.metadata import version

        print(PROGRAM, version(PROGRAM))  # noqa: T201
        return 0
    if given[0] in COMPLETION:
        write_completion(given, _OPTIONS)
    require_one_of("command", given[0], COMMANDS)
    rank, size = rank_and_size()
    if size > 1 and given[0] != "train":
        raise FlatminimaError(f"only `train` can be shared by several processes: start `{given[0]}` without torchrun")
    as_json, report = COMMANDS[given[0]](given[1:])
    if rank > 0:
        return report.status
    if as_json:
        print(json.dumps(report.json, default=str, allow_nan=False))  # noqa: T201
    else:
        # What is printed has names in it, and a name is text: neither markup nor an emoji.
        console = Console(markup=False, emoji=False, highlight=False)
        if not console.is_terminal:
            console.width = NARROWEST_TABLE
        console.print(report.text, soft_wrap=isinstance(report.text, Text))
    if report.unwritten is not None:
        sys.stdout.flush()  # what is printed comes first, also where both go to one file
        raise report.unwritten
    return report.status


_OPTIONS: dict[str, Any] = {
    "demo": Demo(),
    "train": Train(RunOptions.of(RECIPES["resnet20"])),
    "measure": Measure(),
    "compare": Compare(),
    "track": Track(),
    "evaluate": Evaluate(),
    "reproduce": Reproduce(),
}
"""What each command takes, in the order of the help."""


def _usage() -> str:
    lines = [f"usage: {PROGRAM} COMMAND [options]", "", "Which minimum generalizes better, and how to train to it.", ""]
    for command, options in _OPTIONS.items():
        summary = (options.__doc__ or "").splitlines()[0]
        name = f"  {command:<10} "
        lines.append(textwrap.fill(summary, 80, initial_indent=name, subsequent_indent=" " * len(name)))
    lines += [
        "",
        f"Begin with: {PROGRAM} demo",
        f"{PROGRAM} COMMAND --help explains a command.",
        f"{PROGRAM} --version prints the version.",
        f"{PROGRAM} {COMPLETION[0]} SHELL prints completion for bash, zsh, tcsh.",
        "",
    ]
    return "\n".join(lines)


def _fail(text: str, status: int, debug: bool, *, by_any: bool = False) -> int:
    if debug:
        traceback.print_exc()
    if status == INTERRUPTED:
        # Met inside `exec` (dataclasses use it), Ctrl-C would end Python by the signal whatever is returned, unless
        # another `exec` ends well.
        exec("")
    say(text, by_any=by_any)
    return status
