"""What a command says: a report on standard output, all else in lines on standard error."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from rich.text import Text

from flatminima.cli.options import PROGRAM, Output
from flatminima.errors import FlatminimaError, needing, one_line
from flatminima.launch import rank_and_size
from flatminima.progress import ProgressBar, silent


@dataclass(frozen=True)
class Report:
    """A command's outcome, for programs and for people."""

    json: Any
    text: RenderableType
    status: int = 0
    """The exit status: 1 where a part of the work failed."""
    unwritten: FlatminimaError | None = None
    """Why a file could not be written, which is raised once the report is printed."""


@contextlib.contextmanager
def working(command: str, output: Output) -> Iterator[None]:
    """A bar is there from the first second to the last, if it is wanted, whatever bars there are within it.

    And what other code prints goes to standard error: standard output is the report's.
    """
    with contextlib.redirect_stdout(sys.stderr), silent(output.no_progress), ProgressBar(command, None):
        yield


def require_place_of_picture(path: Path) -> None:
    """Refuse a picture that could not be drawn or written, before the work that it shows."""
    with needing("plot", "a picture"):
        from flatminima.pictures import require_picture
    require_picture(path)


class Files:
    """What a command writes at its end: a disk that is full by then takes nothing from what it prints.

    Attributes:
        shown: a line for every file that is written.
    """

    def __init__(self) -> None:
        self.shown: list[Text] = []
        self._unwritten: list[str] = []
        self._written: dict[str, Path | None] = {}

    def write(self, name: str, path: Path | None, says: str, write: Callable[[Path], object]) -> None:
        """Write a file.

        Args:
            name: of the option that says where.
            path: there; None if it is not wanted.
            says: what the file shows, to go behind its path.
            write: writes it.
        """
        if path is None:
            return
        try:
            write(path)
        except FlatminimaError as error:
            self._unwritten.append(str(error))
            return
        self._written[name] = path
        self.shown.append(Text(f"\n{path} {says}"))

    @property
    def unwritten(self) -> FlatminimaError | None:
        """Why files could not be written, if any could not."""
        return FlatminimaError("; ".join(self._unwritten)) if self._unwritten else None

    def named_in(self, body: dict[str, Any]) -> dict[str, Any]:
        """The JSON of the command, with the files that are written."""
        return with_files(body, **self._written)


def with_files(body: dict[str, Any], **files: Path | None) -> dict[str, Any]:
    """The JSON of a command, with the files that it has written under the names of the options that say where."""
    return body | {name: str(path) for name, path in files.items() if path is not None}


def starting() -> ProgressBar:
    """A bar for what imports torch and all that stands on it, which may take many seconds."""
    return ProgressBar("starting", None)


def say(text: str, *, by_any: bool = False) -> None:
    """Say it on standard error; of several processes the first alone, unless it may be news to that one."""
    if by_any or rank_and_size()[0] == 0:
        print(f"{PROGRAM}: {one_line(text)}", file=sys.stderr)  # noqa: T201
