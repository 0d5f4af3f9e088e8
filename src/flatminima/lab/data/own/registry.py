"""The kinds of sources that are known: each is one registered opener, in a file of its own.

::

    @source_kind("a folder of class folders", lambda source: Path(source).is_dir())
    def open_image_folder(source: str, reading: Reading) -> Opened: ...
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from flatminima.lab.data.ready import OwnData
from flatminima.lab.reading import Reading


@dataclass(frozen=True)
class Opened:
    """Data, and what was taken for what."""

    data: OwnData
    about: str | None = None
    """One line; None where nothing was guessed."""
    classes: tuple[str, ...] = ()
    """Their names in the order of their numbers, where they have names."""


Opener = Callable[[str, Reading], Opened]


@dataclass(frozen=True)
class SourceKind:
    """One kind of source."""

    described: str
    """As an error lists it."""
    recognizes: Callable[[str], bool]
    """Whether a source is of this kind."""
    open: Opener


KINDS: list[SourceKind] = []
"""As they were registered; the latest that recognizes a source opens it."""


def source_kind(described: str, recognizes: Callable[[str], bool]) -> Callable[[Opener], Opener]:
    """Register the decorated opener."""

    def register(opener: Opener) -> Opener:
        KINDS.append(SourceKind(described, recognizes, opener))
        return opener

    return register
