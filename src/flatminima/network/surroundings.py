"""What surrounds a call of ours and must not reach into it: inference mode, and other threads with the same model."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import nn

_locks: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
_locks_change = threading.Lock()


@contextmanager
def undisturbed(*models: nn.Module) -> Iterator[None]:
    """One thread at a time changes a model's states, and gradients exist even within the caller's inference mode.

    Threads that want the same model wait. The same thread may enter again.
    """
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        # In one order everywhere, lest two threads wait for each other.
        for model in sorted({id(model): model for model in models}.values(), key=id):
            with _locks_change:
                lock = _locks.setdefault(model, threading.RLock())
            stack.enter_context(lock)
        yield
