"""The C library's heap, set for processes of our own that make and free large tensors all day."""

from __future__ import annotations

import contextlib
import ctypes
import sys

_MMAP_MAX, _TRIM_THRESHOLD = -4, -1  # glibc's numbers for them, from malloc.h
_KEPT_BYTES = 2**30


def keep_freed_memory() -> None:
    """Have this process keep up to a gibibyte of freed memory for its next tensors.

    The C library otherwise gives large blocks back to the system, which zeroes their pages anew, a fault for each, when
    the next update makes tensors of the same sizes. Results are the same to the bit. With another library than glibc
    (on macOS, Windows, Alpine) nothing happens. Meant for the command line and its workers, not for a caller's process.
    """
    if sys.platform != "linux":
        return
    with contextlib.suppress(AttributeError):  # not glibc
        set_option = ctypes.CDLL(None).mallopt
        set_option(_MMAP_MAX, 0)
        set_option(_TRIM_THRESHOLD, _KEPT_BYTES)
