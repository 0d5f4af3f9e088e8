"""Checkpoints of networks, read without ever running code from them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from flatminima.errors import FlatminimaError
from flatminima.lab.storage import read_tensors

_NAMED_KEYS = 3  # parameter names an error message lists before it counts the rest


def load_weights(model: nn.Module, path: Path | str) -> None:
    """Load a checkpoint into ``model``, in place, without ever running code from it.

    Args:
        model: The network the checkpoint was saved from.
        path: A ``.safetensors`` file, or a ``.pt`` or ``.pth`` file that holds ``model.state_dict()`` and nothing else.

    Raises:
        FlatminimaError: The file is missing, unreadable or holds pickled code, or its tensors are not the model's.
    """
    path = Path(path)
    if not path.is_file():
        raise FlatminimaError(f"there is no checkpoint {path}")
    if path.suffix == ".safetensors":
        tensors, _ = read_tensors(path)
    elif path.suffix in (".pt", ".pth"):
        tensors = _read_torch_file(path)
    else:
        raise FlatminimaError(f"{path} is no checkpoint I can read safely; save it as .safetensors (or as .pt or .pth)")
    assign_weights(model, tensors, source=path)


def assign_weights(model: nn.Module, tensors: Mapping[str, Tensor], *, source: Path) -> None:
    """Copy tensors into ``model``; ``source`` is the file an error names.

    Raises:
        FlatminimaError: Names or shapes are not the model's.
    """
    _check_fit(model.state_dict(), tensors, source)
    model.load_state_dict(tensors)


def _read_torch_file(path: Path) -> dict[str, Tensor]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a pickle protocol, before the error that names it
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # whatever a broken or hostile file makes torch raise, it is many lines long and means this
        raise FlatminimaError(
            f"{path} is unreadable or holds pickled code, which is never run; save model.state_dict() as .safetensors"
        ) from None
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise FlatminimaError(f"{path} does not hold a plain state dict; save model.state_dict() itself")
    return dict(content)


def _check_fit(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], path: Path) -> None:
    missing, unexpected = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing or unexpected:
        raise FlatminimaError(
            f"{path} is not of this model: missing {_list_names(missing)}; unexpected {_list_names(unexpected)}; "
            "build the model it was saved from"
        )
    for name, tensor in expected.items():
        if found[name].shape != tensor.shape:
            raise FlatminimaError(
                f"{path} is not of this model: {name} is {tuple(found[name].shape)} in the file and "
                f"{tuple(tensor.shape)} in the model; is its number of classes or its width another?"
            )


def _list_names(names: list[str]) -> str:
    shown = ", ".join(names[:_NAMED_KEYS]) or "nothing"
    return shown + (f" and {len(names) - _NAMED_KEYS} more" if len(names) > _NAMED_KEYS else "")
