"""Files that are replaced as a whole, and tensors in them.

Every file is written beside, synced and renamed, so a process killed at any moment leaves either the old file or the
new one. Tensors are stored as safetensors together with their digest; nothing is ever unpickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from flatminima.errors import FlatminimaError, one_line
from flatminima.lab.errors import DamagedFileError

_NOTE = "flatminima"  # the one metadata entry of our safetensors files: safetensors writes several in random order


def write_tensors(path: Path, tensors: Mapping[str, Tensor], note: Mapping[str, Any]) -> None:
    """Write tensors by name, and a note that JSON can hold, with the digest of both."""
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(note)
    metadata = {_NOTE: json.dumps({"digest": _digest(stored, text), "note": text})}
    write_whole(path, safetensors.torch.save(stored, metadata=metadata))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and note; the digest is checked, except in files that others wrote, which have none."""
    try:
        # One look: `safe_open` would open the file twice, and it may be replaced in between.
        content = path.read_bytes()
        tensors = safetensors.torch.load(content)
        signed: dict[str, Any] = json.loads(_metadata(content).get(_NOTE, '{"digest": null, "note": "{}"}'))
        digest, text = signed["digest"], signed["note"]
        note: dict[str, Any] = json.loads(text)
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        raise damaged(path, f"it is missing, truncated or not a safetensors file: {one_line(error)}") from None
    if digest is not None and digest != _digest(tensors, text):
        raise damaged(path, "it was altered after it was written: its digest does not match")
    return tensors, note


def _metadata(content: bytes) -> dict[str, str]:
    """The free-form part of a safetensors header: 8 bytes of length (little-endian), then JSON."""
    length = int.from_bytes(content[:8], "little")
    metadata: dict[str, str] = json.loads(content[8 : 8 + length]).get("__metadata__", {})
    return metadata


def _digest(tensors: Mapping[str, Tensor], note: str) -> str:
    digest = hashlib.sha256(note.encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        digest.update(bytes_of(tensors[name]))
    return digest.hexdigest()


def bytes_of(tensor: Tensor) -> memoryview:
    """The tensor's values as bytes, in order."""
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def read_text(path: Path) -> str:
    """The text of a file that must be there."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise damaged(path, f"it cannot be read: {one_line(error)}") from None


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
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(path, error) from None
    write_whole(path, content)


def beside(path: Path) -> Path:
    """Where a process writes what will become ``path``."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def unwritable(path: Path, error: OSError) -> FlatminimaError:
    """What to raise where ``path`` could not be written."""
    return FlatminimaError(f"cannot write {path}: {error.strerror}; free some space or choose another folder")


def damaged(path: Path, what: str) -> DamagedFileError:
    """What to raise where ``path`` holds something else than it should."""
    return DamagedFileError(f"{path} is damaged ({what}); restore it or make it again")
