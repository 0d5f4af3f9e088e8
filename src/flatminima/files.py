"""Files that are replaced as a whole: a process killed at any moment leaves either the old file or the new one."""

from __future__ import annotations

import contextlib
import glob
import os
import re
import shutil
import socket
import threading
import time
from pathlib import Path

from flatminima.errors import FlatminimaError

_LONGEST_WRITE_SECONDS = 3600.0
"""Whether a process of another machine lives cannot be asked, but a file that old is not being written."""


def write_whole(path: Path, content: str | bytes) -> None:
    """Replace ``path`` as a whole, and return once the disk has it.

    A link stays one, to a file that is replaced; a file keeps its permissions. What is no file (``/dev/stdout``, a
    pipe) is written to.

    Raises:
        FlatminimaError: The disk is full, or the folder cannot be written to; ``path`` is as before.
    """
    data = content.encode() if isinstance(content, str) else content
    try:
        if _is_special(path):
            path.write_bytes(data)
            return
        file = Path(os.path.realpath(path))
        _replace(file, data)
    except OSError as error:
        raise unwritable(path, error) from None
    for left in abandoned(file.parent, file.name):
        with contextlib.suppress(OSError):
            left.unlink()


def _replace(path: Path, data: bytes) -> None:
    temporary = beside(path)
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            shutil.copymode(path, temporary)
        temporary.replace(path)
    except BaseException:  # an interruption, too
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)  # a full disk has better use for its space
        raise


def _is_special(path: Path) -> bool:
    """Whether it is a device or a pipe, which a file must not take the place of."""
    return path.exists() and not path.is_file() and not path.is_dir()


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
    if _is_special(path):
        return
    if not os.access(Path(os.path.realpath(path)).parent, os.W_OK):
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
    return path.with_name(f".{path.name}.{writer}@{socket.gethostname()}.tmp")


def abandoned(folder: Path, name: str | None = None) -> list[Path]:
    """What killed processes have left half-written (see :func:`beside`): of the file of this name, or of any."""
    pattern = "*" if name is None else glob.escape(name)
    return [path for path in folder.glob(f".{pattern}.*.tmp") if _is_abandoned(path)]


def _is_abandoned(path: Path) -> bool:
    """Whether nobody is writing it any more: no thread of this process, no process of this or another machine."""
    writer = re.search(r"\.(\d+)(?:-(\d+))?@(.+)\.tmp$", path.name)
    if writer is None:  # it is not ours
        return False
    pid, thread, host = int(writer[1]), int(writer[2] or 0) or threading.main_thread().ident, writer[3]
    if host != socket.gethostname() or os.name != "posix":
        with contextlib.suppress(FileNotFoundError):
            return time.time() - path.stat().st_mtime > _LONGEST_WRITE_SECONDS
        return False
    if pid != os.getpid():
        return not _is_alive(pid)
    others = {other.ident for other in threading.enumerate() if other is not threading.current_thread()}
    return thread not in others


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # it is somebody else's
        pass
    return True


def unwritable(path: Path, error: OSError) -> FlatminimaError:
    """What to raise where ``path`` could not be written."""
    if isinstance(error, IsADirectoryError):
        return FlatminimaError(f"cannot write {path}: it is a folder; name a file")
    return FlatminimaError(f"cannot write {path}: {error.strerror}; free some space or choose another folder")
