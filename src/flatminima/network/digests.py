"""Tensors' values as digests, which tell whether they are the same to the bit."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor


class Digest(Protocol):
    """One of ``hashlib``."""

    def update(self, data: Any, /) -> None:
        """Go on with the bytes of a buffer."""
        ...


def add_tensor(digest: Digest, tensor: Tensor) -> None:
    """Go on with a tensor's type, shape and values, of any number, without numpy and without a copy on the CPU."""
    held = tensor.detach().cpu().contiguous()
    digest.update(f"{held.dtype} {tuple(held.shape)}".encode())
    if held.numel():
        digest.update((ctypes.c_char * held.nbytes).from_address(held.data_ptr()))


def add_state(digest: Digest, state: Mapping[str, Any]) -> None:
    """Go on with names and their tensors; of what is no tensor (a module's extra state may be anything) the name."""
    for name, value in state.items():
        digest.update(name.encode())
        if isinstance(value, Tensor):
            add_tensor(digest, value)
