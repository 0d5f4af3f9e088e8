"""Checkpoints of networks, as programs write them, read without ever running code from them."""

from __future__ import annotations

import argparse
import contextlib
import warnings
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from flatminima.errors import FlatminimaError, warn
from flatminima.lab.errors import AdaptedCheckpointWarning
from flatminima.lab.networks.tensor_names import matched
from flatminima.lab.storage import read_tensors

_TORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".tar")
_HOLDERS = ("state_dict", "model_state_dict", "model", "net", "network", "module")
"""Under which of its entries a program's checkpoint has the weights: the first that is there."""
_DEPTH = 4  # entries within entries

_scalar = np.float64(0).__reduce__()[0]
_HARMLESS: list[Any] = [
    argparse.Namespace,
    *(defaultdict, dict, list, set),
    np.dtype,
    *((_scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),  # as numpy 1 and 2 write them
    *{type(np.dtype(kind)) for kind in ("bool", "i4", "i8", "f4", "f8")},
]
"""What training programs put beside the weights, and what makes nothing but data: their options, numpy's numbers."""


def load_weights(model: nn.Module, path: Path | str) -> None:
    """Load a checkpoint into ``model``, in place, without ever running code from it.

    Args:
        model: The network the checkpoint was saved from.
        path: A ``.safetensors`` file, or one of ``torch.save`` (``.pt``, ``.pth``, ``.ckpt``, ``.bin``, ``.tar``) that
            holds a state dict, itself or as an entry such as ``state_dict`` or ``model``. What wrappers put before and
            into the names (``module.``, ``_orig_mod.``, Lightning's ``model.``) is taken off where they then fit.

    Raises:
        FlatminimaError: The file is missing, unreadable or holds pickled code, its tensors are not the model's, or they
            are of a type that would have to be converted.

    Warns:
        AdaptedCheckpointWarning: Something was taken off, left out or rounded.
    """
    path = Path(path)
    if path.is_dir():
        raise FlatminimaError(f"{path} is a folder, not a checkpoint: name the file in it")
    if not path.is_file():
        raise FlatminimaError(f"there is no checkpoint {path}")
    remarks: list[str] = []
    found: Mapping[str, Tensor]
    if path.suffix == ".safetensors":
        found, _ = read_tensors(path)
    elif path.suffix in _TORCH_SUFFIXES:
        found = _state_dict(_read_torch_file(path), path, remarks)
    else:
        raise FlatminimaError(f"{path} is no checkpoint I can read safely; save it as .safetensors (or as .pt or .pth)")
    tensors, said = matched(model.state_dict(), found, path)
    if remarks or said:
        warn(f"{path}: {'; '.join((*remarks, *said))}", AdaptedCheckpointWarning)
    assign_weights(model, tensors, source=path)


def assign_weights(model: nn.Module, tensors: Mapping[str, Tensor], *, source: Path) -> None:
    """Copy tensors into ``model``; ``source`` is the file an error names.

    Raises:
        FlatminimaError: Names, shapes or kinds of numbers are not the model's.

    Warns:
        AdaptedCheckpointWarning: Floating-point numbers were rounded to the model's type.
    """
    expected = model.state_dict()
    tensors, _ = matched(expected, tensors, source, exactly=True)
    rounded = set()
    for name, tensor in expected.items():
        _check_value(name, tensors[name], tensor, source)
        if not _holds_all(tensor.dtype, tensors[name].dtype):
            rounded.add(f"{_type_name(tensors[name])} to {_type_name(tensor)}")
    if rounded:
        warn(f"{source}: weights were rounded from {' and '.join(sorted(rounded))}", AdaptedCheckpointWarning)
    model.load_state_dict(tensors)


def _read_torch_file(path: Path) -> Any:
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(_HARMLESS):
            warnings.simplefilter("ignore")  # of a pickle protocol, before the error that names it
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # whatever a broken or hostile file makes torch raise, it is many lines long and means this
        needs = ""
        with contextlib.suppress(Exception), torch.serialization.safe_globals(_HARMLESS):
            unsafe = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
            needs = f" (it needs {unsafe[0]})" if unsafe else ""
        raise FlatminimaError(
            f"{path} is unreadable or holds pickled code, which is never run; "
            f"save model.state_dict() as .safetensors{needs}"
        ) from None


def _state_dict(content: Any, path: Path, remarks: list[str]) -> Mapping[str, Tensor]:
    """The state dict in what a file holds, however deep; a remark where it was chosen from several entries."""
    for _ in range(_DEPTH):
        if not isinstance(content, Mapping):
            break
        holder = next((name for name in _HOLDERS if isinstance(content.get(name), Mapping)), None)
        if holder is None:
            _check_entries(content, path)
            return dict(content)
        beside = ", ".join(str(name) for name in content if name != holder)
        remarks.append(f"the weights are those of its entry {holder!r}" + (f" (beside {beside})" if beside else ""))
        content = content[holder]
    raise FlatminimaError(
        f"{path} does not hold a plain state dict, but a value of type {type(content).__name__}; "
        "save model.state_dict() itself"
    )


def _check_entries(content: Mapping[Any, Any], path: Path) -> None:
    for name, value in content.items():
        if not (isinstance(name, str) and isinstance(value, Tensor)):
            raise FlatminimaError(
                f"{path} does not hold a plain state dict: its entry {name!r} is of type {type(value).__name__}; "
                f"save model.state_dict() itself, or as one of the entries {', '.join(_HOLDERS)}"
            )


def _check_value(name: str, found: Tensor, expected: Tensor, path: Path) -> None:
    """Refuse what would have to be converted, other than from one floating-point type to another."""
    has_no_values = found.layout != torch.strided or found.is_quantized or found.is_nested or found.is_meta
    if has_no_values or type(found) not in (Tensor, nn.Parameter, nn.Buffer):
        kind = "quantized" if found.is_quantized else "without values" if found.is_meta else type(found).__name__
        layout = "" if found.layout == torch.strided else f" of layout {found.layout}"
        raise FlatminimaError(f"{path}: {name} is {kind}{layout}; save it as a plain dense tensor")
    if found.dtype == expected.dtype or {found.dtype, expected.dtype} <= _FLOATS:
        return
    if {found.dtype, expected.dtype} <= _INTEGERS and torch.promote_types(
        found.dtype, expected.dtype
    ) == expected.dtype:
        return
    raise FlatminimaError(
        f"{path}: {name} is {_type_name(found)} in the file and {_type_name(expected)} in the model, and is not "
        "converted; save the weights in the model's type, or build the model with theirs"
    )


_FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
_INTEGERS = {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}


def _holds_all(dtype: torch.dtype, other: torch.dtype) -> bool:
    """Whether a type holds every number of the other."""
    return torch.promote_types(dtype, other) == dtype


def _type_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
