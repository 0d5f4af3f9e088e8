"""Decoded data sets on disk: both splits in one safetensors file with a checksum, written as a whole."""

from __future__ import annotations

import os
import zlib
from dataclasses import dataclass
from pathlib import Path

import platformdirs
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from flatminima.errors import FlatminimaError, one_line
from flatminima.files import write_whole

SPLITS = ("train", "test")

CACHE_VERSION = "1"
"""Part of every cache key: raise it when the cached tensors change their meaning, and old files are left alone."""

_CACHED = tuple(f"{split}_{kind}" for split in SPLITS for kind in ("images", "labels"))


@dataclass(frozen=True)
class Decoded:
    """Both splits as tensors: what the cache holds."""

    tensors: dict[str, Tensor]
    """``train_images`` and ``test_images`` (N, C, H, W) uint8, ``train_labels`` and ``test_labels`` (N,) int64."""
    num_classes: int
    """Number of classes."""


def default_cache_dir() -> Path:
    """``$FLATMINIMA_CACHE``, else the folder for such files on this system (Linux: ``~/.cache/flatminima``)."""
    if own := os.environ.get("FLATMINIMA_CACHE"):
        return Path(own)
    return platformdirs.user_cache_path("flatminima", appauthor=False)


def read_cache(path: Path) -> Decoded | None:
    """What :func:`write_cache` wrote, or None if it is not there or not what was written."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            decoded = Decoded({name: file.get_tensor(name) for name in _CACHED}, int(metadata["num_classes"]))
            return decoded if metadata["checksum"] == _checksum(decoded.tensors) else None
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None


def write_cache(path: Path, decoded: Decoded) -> None:
    """Keep what was decoded; another process sees the whole file or none.

    Raises:
        FlatminimaError: It cannot be written there.
    """
    metadata = {"num_classes": str(decoded.num_classes), "checksum": _checksum(decoded.tensors)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, save(decoded.tensors, metadata=metadata))
    except (OSError, FlatminimaError) as error:
        raise FlatminimaError(
            f"cannot keep decoded images in {path.parent} ({one_line(error)}); "
            "let the environment variable FLATMINIMA_CACHE name a folder with room that you can write to"
        ) from error


def _checksum(tensors: dict[str, Tensor]) -> str:
    checksum = 0
    for name in sorted(tensors):
        checksum = zlib.crc32(tensors[name].numpy().data, checksum)
    return f"{checksum:08x}"
