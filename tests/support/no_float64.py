"""A device without float64, as Apple's MPS is, but on every machine: its tensors say that they are on "meta"."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = "meta"
COPY_TO, COPY_INTO = torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default


class Held(Tensor):
    """A tensor on the device; its values are in ``inner``, on the CPU."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Held:
        if inner.dtype == torch.float64:
            raise TypeError("the device has no float64")
        return Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _perform(func, args, kwargs or {})


class Device(TorchDispatchMode):
    """While it is entered, tensors can be made on the device, moved there and back, and nothing can mix the two."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _perform(func, args, kwargs or {})


def moved(model: nn.Module) -> nn.Module:
    """A copy of the model on the device. (``Module.to`` would look at the tensors' storage, which is not there.)"""
    model = copy.deepcopy(model)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            module._parameters[name] = nn.Parameter(Held(parameter.detach()))
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = Held(buffer)
    return model


def _perform(func, args: tuple[Any, ...], kwargs: dict[str, Any]):
    """The operation on the values, with a result where PyTorch would have it."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    held = any(isinstance(tensor, Held) for tensor in tensors)
    asked = kwargs.get("device")
    there = held if asked is None else torch.device(asked).type == DEVICE
    if not (held or there):
        return func(*args, **kwargs)
    mixed = held and any(tensor.dim() and not isinstance(tensor, Held) for tensor in tensors)
    if mixed and func not in (COPY_TO, COPY_INTO):
        raise RuntimeError(f"{func}: tensors on two devices")
    if func == COPY_TO and held and kwargs.get("dtype") == torch.float64:
        raise TypeError("converted to float64 before it was moved")
    output = func(*tree_map(_inner, args), **{**tree_map(_inner, kwargs), **({"device": "cpu"} if asked else {})})
    if func._schema.is_mutable:
        if isinstance(args[0], Held) and any(tensor.dtype == torch.float64 for tensor in tensors):
            raise TypeError("float64 written to the device")
        originals = {id(_inner(tensor)): tensor for tensor in tensors}
        return tree_map(lambda leaf: originals.get(id(leaf), leaf), output)
    return tree_map(lambda leaf: Held(leaf) if there and isinstance(leaf, Tensor) else leaf, output)


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, Held) else value
