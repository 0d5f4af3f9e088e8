"""Networks that are not ours: from ``package.module:factory`` and a checkpoint."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flatminima.errors import FlatminimaError, described, first_line
from flatminima.lab.data import ImageSet
from flatminima.lab.networks.checkpoints import load_weights
from flatminima.lab.networks.paper import MODEL_NAMES, build_model
from flatminima.network import call_model, evaluating


def load_model(source: str, checkpoint: Path | None, data: ImageSet) -> nn.Module:
    """A network from one of our names or from ``package.module:factory``, with a checkpoint's weights.

    The factory is called with ``num_classes`` and ``in_channels`` as far as it takes them, and without arguments
    otherwise. The current directory is importable.

    Args:
        source: ``resnet20``, or ``package.module:factory``.
        checkpoint: a file that :func:`~flatminima.lab.networks.checkpoints.load_weights` takes; None if the factory
            loads its weights itself.
        data: the data the network is for.

    Raises:
        FlatminimaError: for a name, module or factory that is not there, a factory that fails or returns no module,
            a network that does not take the data's images, and whatever
            :func:`~flatminima.lab.networks.checkpoints.load_weights` refuses.
    """
    arguments = {"num_classes": data.num_classes, "in_channels": data.images.shape[1]}
    if ":" in source:
        model = _from_factory(source, arguments)
    elif source in MODEL_NAMES:
        if checkpoint is None:
            raise FlatminimaError(f"model {source} has random weights without a checkpoint: name the checkpoint too")
        model = build_model(source, **arguments)
    else:
        raise FlatminimaError(
            f"unknown model {source!r}: give one of {', '.join(MODEL_NAMES)}, or package.module:factory"
        )
    if checkpoint is not None:
        with _theirs(f"model {source}: loading its checkpoint failed"):
            load_weights(model, checkpoint)
    _check_takes(model, data, source)
    with _theirs(f"model {source}: its eval() failed"):
        model.eval()
    return model


@contextlib.contextmanager
def _theirs(what: str) -> Iterator[None]:
    """Whatever somebody else's code raises becomes an error of ours, ``SystemExit`` too; not so Ctrl-C."""
    try:
        yield
    except (FlatminimaError, KeyboardInterrupt):
        raise
    except BaseException as error:
        raise FlatminimaError(f"{what} ({described(error)})") from error


def resolve_device(name: str) -> torch.device:
    """The device called ``name``; ``auto`` is the first GPU that CUDA offers, else the CPU.

    Raises:
        FlatminimaError: if PyTorch cannot use it here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    # An absent device is an AssertionError, a RuntimeError or a NotImplementedError, by its kind.
    except Exception as error:
        raise FlatminimaError(f"device {name!r} cannot be used here ({first_line(error)}): choose another") from error
    return device


def _from_factory(source: str, arguments: dict[str, int]) -> nn.Module:
    factory = imported(source, "model")
    with _theirs(f"model {source}: calling it failed"):
        model = factory(**_accepted(factory, arguments))
    if not isinstance(model, nn.Module):
        raise FlatminimaError(f"model {source}: it returned {type(model).__name__}, not a torch.nn.Module")
    return model


def imported(source: str, what: str) -> Callable[..., Any]:
    """The function or class that ``package.module:name`` names; the current directory is importable.

    Args:
        source: the name.
        what: it is, in messages.

    Raises:
        FlatminimaError: the module cannot be imported, or has nothing of that name to be called.
    """
    module_name, _, name = source.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")
    with _theirs(f"{what} {source}: cannot import {module_name!r}"):
        module = importlib.import_module(module_name)
        found: Callable[..., Any] | None = getattr(module, name, None)
    if not callable(found):
        raise FlatminimaError(f"{what} {source}: {module_name} has no function or class {name!r}")
    return found


def _accepted(factory: Callable[..., Any], arguments: dict[str, int]) -> dict[str, int]:
    """The arguments that ``factory`` names; and ``num_classes`` if it hands on any (as torchvision's factories do)."""
    try:
        parameters = inspect.signature(factory).parameters
    except (TypeError, ValueError):  # written in C: it does not say
        return {}
    hands_on = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    return {name: n for name, n in arguments.items() if name in parameters or (hands_on and name == "num_classes")}


def _check_takes(model: nn.Module, data: ImageSet, source: str) -> None:
    """Try one image, so that a wrong network is named as such and not found out in the middle of measuring."""
    parameter = next(model.parameters(), None)
    image, _ = data.fetch([0])
    try:
        with evaluating(model), torch.no_grad():
            call_model(model, image if parameter is None else image.to(parameter))
    except (FlatminimaError, KeyboardInterrupt):
        raise
    except BaseException as error:  # SystemExit too: it is somebody else's code
        raise FlatminimaError(
            f"model {source} does not take images of shape {tuple(image.shape[1:])} ({first_line(error)}): "
            "name the network and the data that belong together"
        ) from error
