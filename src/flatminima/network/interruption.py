"""An interruption, Ctrl-C above all, at whatever line it arrives: what was changed is put back, and it goes on.

A context manager alone cannot do this. An exception between two of its lines leaves a generator that waits in the
frames of the traceback, and runs its ``finally`` when these are freed: too late, and after what lies around it.
"""

from __future__ import annotations

import gc
import sys
import traceback
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn

from flatminima.network.generators import Generators
from flatminima.network.modes import Buffers
from flatminima.torch_compat import (
    checkpoint_variants,
    compiler_stance,
    float32_switches,
    forward_pre_hooks,
    func_levels,
    function_modes,
    hold,
    leave_func_levels,
    leave_function_modes,
    own_parameters,
    restore_checkpoint_variants,
    restore_compiler_stance,
)

P = ParamSpec("P")
R = TypeVar("R")


def undone_if_interrupted(function: Callable[P, R]) -> Callable[P, R]:
    """Let an interruption of ``function(model, ...)`` leave the model and the process as they were before it.

    Also of ``function(models, ...)`` with models by name.
    """

    @wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        given: Any = args[0] if args else kwargs.get("model", kwargs.get("models"))
        models = given.values() if isinstance(given, Mapping) else [given]
        modules = nn.ModuleList([model for model in models if isinstance(model, nn.Module)])
        before = Before(modules, writes_buffers=True)
        try:
            return function(*args, **kwargs)
        except BaseException as error:
            before.back_from(error)
            raise

    return wrapped


class Before:
    """A model's state and that of the process at the beginning of a call, to go back to from an exception.

    It holds references and copies no weights: who moves these puts them back (:func:`flatminima.network.moved`).

    Args:
        model: its modes, buffers (the tensors that hold them), ``requires_grad``, ``.grad`` (the tensors) and hooks.
        writes_buffers: whether the call writes to the model's own buffers, so that their values are copied.

    Attributes:
        generators: the global random generators, for passes that are to be repeated.
    """

    def __init__(self, model: nn.Module, *, writes_buffers: bool) -> None:
        self._modes, self._forwards, self._hooks, self._weights = [], [], [], []
        for module in model.modules():
            attributes, hooks, held = vars(module), forward_pre_hooks(module), own_parameters(module)
            self._modes.append((module, module.training))
            self._forwards.append((attributes, attributes.get("forward")))
            self._hooks.append((hooks, set(hooks)))
            self._weights.append((held, dict(held)))
        self._handled = sys.exc_info()[1]  # by the caller, in an except or finally around this call
        self._parameters = [(p, p.requires_grad, p.grad) for p in model.parameters()]
        self._buffers = Buffers(model)
        self._values = [buffer.detach().clone() for buffer in self._buffers.own] if writes_buffers else []
        self._switches = [(holder, name, getattr(holder, name)) for holder, name, _, _ in float32_switches()]
        self._records = torch.is_grad_enabled()
        self._function_modes, self._func_levels = function_modes(), func_levels()
        self._stance, self._checkpoint_variants = compiler_stance(), checkpoint_variants()
        self.generators = Generators(p for p, _, _ in self._parameters)
        self._states = self.generators.states()

    def back_from(self, error: BaseException) -> None:
        """Put everything back; of an interruption, which has no locals worth looking at, free the frames first.

        This closes the generators of context managers that wait in them. Errors keep their frames for debuggers: no
        window was hit, and every context manager has done its own.

        Raises:
            BaseException: the interruption, where ``error`` is what a context manager made of it on the way out.
        """
        interruption = _interruption_behind(error, self._handled)
        if interruption is None:
            return
        traceback.clear_frames(interruption.__traceback__)
        traceback.clear_frames(error.__traceback__)
        gc.collect()  # and of those in cycles
        leave_func_levels(self._func_levels)
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
            hold(held, own)
        for parameter, requires_grad, gradient in self._parameters:
            parameter.requires_grad_(requires_grad)
            parameter.grad = gradient
        self._buffers.put_back()
        with torch.no_grad():
            for buffer, value in zip(self._buffers.own, self._values, strict=False):
                buffer.copy_(value)
        for holder, name, value in self._switches:
            setattr(holder, name, value)
        torch.set_grad_enabled(self._records)
        leave_function_modes(self._function_modes)
        restore_compiler_stance(self._stance)
        restore_checkpoint_variants(self._checkpoint_variants)
        self.generators.go_back(self._states)
        if interruption is not error:
            raise interruption


def _interruption_behind(error: BaseException, handled: BaseException | None) -> BaseException | None:
    """The error itself or what it was raised on top of since ``handled``, if that is no error but an interruption."""
    found: BaseException | None = error
    while isinstance(found, Exception) and found is not handled:
        found = found.__context__
    return None if found is handled else found
