"""An interruption, Ctrl-C above all, at whatever line it arrives: what was changed is put back, and it goes on.

A context manager alone cannot do this. An exception between two of its lines leaves a generator that waits in the
frames of the traceback, and runs its ``finally`` when these are freed: too late, and after what lies around it.
"""

from __future__ import annotations

import random
import sys
import traceback
from typing import Any

import torch
from torch import nn

from flatminima.network.modes import Buffers
from flatminima.torch_compat import float32_switches, forward_pre_hooks, own_parameters


class Before:
    """A model's state and that of the process at the beginning of a call, to go back to from an exception.

    It holds references and copies no weights: who moves these puts them back (:func:`flatminima.network.moved`).

    Args:
        model: its modes, buffers (the tensors that hold them), ``requires_grad``, ``.grad`` (the tensors) and hooks.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        self._modes = [(module, module.training) for module in modules]
        self._forwards = [(vars(module), vars(module).get("forward")) for module in modules]
        self._hooks = [(hooks := forward_pre_hooks(module), set(hooks)) for module in modules]
        self._weights = [(held := own_parameters(module), dict(held)) for module in modules]
        self._parameters = [(p, p.requires_grad, p.grad) for p in model.parameters()]
        self._buffers = Buffers(model)
        self._switches = [(holder, name, getattr(holder, name)) for holder, name, _, _ in float32_switches()]
        self._records = torch.is_grad_enabled()
        numpy = sys.modules.get("numpy")
        self._generators: list[tuple[Any, Any]] = [(torch.set_rng_state, torch.get_rng_state())]
        self._generators.append((random.setstate, random.getstate()))
        if numpy:
            self._generators.append((numpy.random.set_state, numpy.random.get_state()))

    def back_from(self, error: BaseException) -> None:
        """Put everything back; of an interruption, which has no locals worth looking at, free the frames first.

        This closes the generators of context managers that wait in them. Errors keep their frames for debuggers.
        """
        if isinstance(error, Exception):
            return  # no window was hit: every context manager has done its own
        traceback.clear_frames(error.__traceback__)
        for module, mode in self._modes:
            if module.training != mode:
                module.train(mode)
        for attributes, forward in self._forwards:
            if forward is None:
                attributes.pop("forward", None)
            else:
                attributes["forward"] = forward
        for hooks, known in self._hooks:
            for key in set(hooks) - known:
                del hooks[key]
        for held, own in self._weights:
            held.update(own)
        for parameter, requires_grad, gradient in self._parameters:
            parameter.requires_grad_(requires_grad)
            parameter.grad = gradient
        self._buffers.put_back()
        for holder, name, value in self._switches:
            setattr(holder, name, value)
        torch.set_grad_enabled(self._records)
        for set_state, state in self._generators:
            set_state(state)
