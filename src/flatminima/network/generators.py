"""The global random generators: torch's (CPU and the model's devices), Python's and numpy's."""

from __future__ import annotations

import ctypes
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

_MT19937_BYTES = 624 * 4 + 4  # numpy's struct: the key, and the position in it


class Generators:
    """Where the generators stand, to lead them back there as often as passes are to be repeated.

    Args:
        parameters: those of the model; beside the CPU's, the generators of their devices are led back.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        devices = dict.fromkeys(p.device for p in parameters if p.device.type not in ("cpu", "meta"))
        self._all: list[tuple[Callable[[], Any], Callable[[Any], None]]] = [
            (torch.get_rng_state, torch.set_rng_state),
            (random.getstate, random.setstate),
        ]
        for device in devices:
            module = torch.get_device_module(device)
            self._all.append((partial(module.get_rng_state, device), partial(module.set_rng_state, device=device)))
        if "numpy" in sys.modules:  # where it is not imported, nothing has drawn from it
            numpys = _NumpyGenerator(sys.modules["numpy"].random)
            self._all.append((numpys.get, numpys.set))

    def states(self) -> list[Any]:
        """Where they stand now."""
        return [get() for get, _ in self._all]

    def go_back(self, states: list[Any]) -> None:
        """Lead them back to where they stood."""
        for (_, set_state), state in zip(self._all, states, strict=True):
            set_state(state)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Lead them back on exit to where they stand on entry."""
        states = self.states()
        try:
            yield
        finally:
            self.go_back(states)


class _NumpyGenerator:
    """numpy's global generator, whose state takes as long to read or to write as a small network's pass.

    So it is read and written only where it has moved, as its memory tells, which has an address in numpy's interface
    for ctypes. Beside that memory there is half a pair of normal numbers that a first draw may leave for a second. The
    shortcut is for when there is none: then every draw moves what the memory holds.
    """

    def __init__(self, numpys: Any) -> None:
        self._random = numpys
        self._memory: bytes | None = None
        self._state: Any = None

    def get(self) -> Any:
        if self._has_moved():
            memory = self._look()
            self._state = self._random.get_state(legacy=False)
            self._memory = memory  # last, so that an interruption before it leaves what counts as moved
        return self._state

    def set(self, state: Any) -> None:
        if state is not self._state or self._has_moved():
            self._random.set_state(state)
            self._state = state
            self._memory = self._look()

    def _has_moved(self) -> bool:
        """Whether it may have, since it was read."""
        if self._memory is None or self._look() != self._memory:
            return True
        return bool(self._state["has_gauss"])

    def _look(self) -> bytes | None:
        """What the memory holds; None where another kind of generator is in use, or numpy is older than 1.24."""
        if not hasattr(self._random, "get_bit_generator"):
            return None
        generator = self._random.get_bit_generator()
        if type(generator) is not self._random.MT19937:
            return None
        return ctypes.string_at(generator.ctypes.state_address, _MT19937_BYTES)


@contextmanager
def restored_generators(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Put the generators back on exit: those of :class:`Generators`."""
    with Generators(parameters).restored():
        yield
