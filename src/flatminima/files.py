"""Files that are replaced as a whole: a process killed at any moment leaves either the old file or the new one."""

from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path

from flatminima.errors import FlatminimaError


def write_whole(path: Path, content: str | bytes) -> None:
    """Replace ``path`` as a whole, and return once the disk has it.

    Raises:
        FlatminimaError: The disk is full, or the folder cannot be written to; ``path`` is as before.
    """
    temporary = beside(path)
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)  # a full disk has better use for its space
        raise unwritable(path, error) from None


def write_file(path: Path, content: str | bytes) -> None:
    """:func:`write_whole`, in a folder that is made if there is none.

    Raises:
        FlatminimaError: The disk is full, or the folder cannot be written to.
    """
    make_folder_of(path)
    write_whole(path, content)


def require_writable(path: Path) -> None:
    """Ask before long work whether :func:`write_file` could write its result.

    Raises:
        FlatminimaError: It is a folder, or its folder cannot be made or written to.
    """
    make_folder_of(path)
    if path.is_dir():
        raise FlatminimaError(f"cannot write {path}: it is a folder; name a file")
    if not os.access(path.parent, os.W_OK):
        raise FlatminimaError(f"cannot write {path}: its folder is read-only; choose another one")


def make_folder_of(path: Path) -> None:
    """Make the folder that a file will lie in.

    Raises:
        FlatminimaError: It cannot be made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise FlatminimaError(f"cannot write {path}: {path.parent} is no folder; choose another one") from None
    except OSError as error:
        raise unwritable(path, error) from None


def beside(path: Path) -> Path:
    """Where a process writes what will become ``path``; each of its threads elsewhere."""
    thread = threading.current_thread()
    writer = f"{os.getpid()}" if thread is threading.main_thread() else f"{os.getpid()}-{thread.ident}"
    return path.with_name(f".{path.name}.{writer}.tmp")


def unwritable(path: Path, error: OSError) -> FlatminimaError:
    """What to raise where ``path`` could not be written."""
    return FlatminimaError(f"cannot write {path}: {error.strerror}; free some space or choose another folder")
