"""Tensors and records in files.

Tensors are stored as safetensors together with their digest; nothing is ever unpickled. Whatever is read back
may be damaged, which is a :class:`~flatminima.lab.errors.DamagedFileError` that names the file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import filelock
import safetensors
import safetensors.torch
import torch
from pydantic.dataclasses import dataclass
from torch import Tensor

from flatminima.errors import FlatminimaError, one_line
from flatminima.files import make_folder_of, unwritable, write_whole
from flatminima.lab.errors import DamagedFileError
from flatminima.lab.schema import RECORD, parse

Kind = TypeVar("Kind")

_NOTE = "flatminima"  # the one metadata entry of our safetensors files: safetensors writes several in random order


@dataclass(frozen=True, config=RECORD)
class _Signed:
    """That entry: a note, and the digest of the tensors and the note."""

    digest: str | None
    note: str


_UNSIGNED = _Signed(None, "{}")  # what files have that others wrote


def digest_of(*parts: bytes | memoryview) -> str:
    """The SHA-256 of the parts one after the other, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def read_record(path: Path, kind: type[Kind], **known: Any) -> Kind:
    """What a file of JSON holds, as :func:`flatminima.lab.schema.parse` reads it.

    Raises:
        DamagedFileError: The file is missing, no JSON, or not that of such a value.
    """
    text = read_text(path)
    try:
        return parse(kind, text, **known)
    except FlatminimaError as error:
        raise damaged(path, str(error)) from None


@contextlib.contextmanager
def locked(lock: Path, *, busy: str | None = None) -> Iterator[None]:
    """Hold what a lock file stands for alone; the system frees it when the process ends, however it ends.

    Args:
        lock: The file, which is made with its folder and stays.
        busy: What to say where another process holds it; None waits for that one.

    Raises:
        FlatminimaError: Another process holds it, and ``busy`` says so, or the file cannot be made.
    """
    make_folder_of(lock)
    try:
        lock.touch()  # of a file that cannot be made filelock says that another process holds it, or waits for ever
        held = filelock.FileLock(lock, blocking=busy is None).acquire()
    except filelock.Timeout:
        raise FlatminimaError(busy) from None
    except OSError as error:
        raise unwritable(lock, error) from None
    with held:
        yield


def write_tensors(path: Path, tensors: Mapping[str, Tensor], note: Mapping[str, Any]) -> None:
    """Write tensors by name, and a note that JSON can hold, with the digest of both."""
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(note)
    metadata = {_NOTE: json.dumps(asdict(_Signed(_digest(stored, text), text)))}
    write_whole(path, safetensors.torch.save(stored, metadata=metadata))


def read_tensors(path: Path, *, signed: bool = False) -> tuple[dict[str, Tensor], str]:
    """Tensors and note, as JSON; the digest is checked, except in files that others wrote, which have none.

    Args:
        path: The file.
        signed: It must be one of ours.

    Raises:
        DamagedFileError: The file is missing, truncated, altered, or not one of ours.
    """
    try:
        # One look: `safe_open` would open the file twice, and it may be replaced in between.
        content = path.read_bytes()
        tensors = safetensors.torch.load(content)
        written = _metadata(content).get(_NOTE)
        entry = _UNSIGNED if written is None else parse(_Signed, written)
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        raise damaged(path, f"it is missing, truncated or not a safetensors file: {one_line(error)}") from None
    if entry.digest is None and signed:
        raise damaged(path, "another program has written it: it has no digest of ours")
    if entry.digest is not None and entry.digest != _digest(tensors, entry.note):
        raise damaged(path, "it was altered after it was written: its digest does not match")
    return tensors, entry.note


def _metadata(content: bytes) -> dict[str, str]:
    """The free-form part of a safetensors header: 8 bytes of length (little-endian), then JSON."""
    length = int.from_bytes(content[:8], "little")
    metadata: dict[str, str] = json.loads(content[8 : 8 + length]).get("__metadata__", {})
    return metadata


def _digest(tensors: Mapping[str, Tensor], note: str) -> str:
    parts: list[bytes | memoryview] = [note.encode()]
    for name in sorted(tensors):
        parts.append(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        parts.append(bytes_of(tensors[name]))
    return digest_of(*parts)


def bytes_of(tensor: Tensor) -> memoryview:
    """The tensor's values as bytes, in order."""
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def read_text(path: Path) -> str:
    """The text of a file that must be there."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise damaged(path, f"it cannot be read: {one_line(error)}") from None


def damaged(path: Path, what: str) -> DamagedFileError:
    """What to raise where ``path`` holds something else than it should."""
    return DamagedFileError(f"{path} is damaged ({what}); restore it or make it again")
