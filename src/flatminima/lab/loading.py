"""Networks that are not ours: from ``package.module:factory`` and a checkpoint."""

from __future__ import annotations

import importlib
import inspect
import sys
from pathlib import Path

from torch import nn

from flatminima.errors import FlatminimaError
from flatminima.lab.data import ImageSet
from flatminima.lab.models import MODEL_NAMES, build_model
from flatminima.lab.results import load_weights


def load_model(source: str, checkpoint: Path | None, data: ImageSet) -> nn.Module:
    """A network from one of our names or from ``package.module:factory``, with a checkpoint's weights.

    The factory is called with ``num_classes`` and ``in_channels`` as far as it takes them, and without arguments
    otherwise. The current directory is importable.

    Args:
        source: ``resnet20``, or ``package.module:factory``.
        checkpoint: a ``.safetensors`` file, or a ``.pt``/``.pth`` file holding a state dict alone; None if the factory
            loads its weights itself.
        data: the data the network is for.

    Raises:
        FlatminimaError: for a name, module or factory that is not there, a factory that fails or returns no module,
            and whatever :func:`~flatminima.lab.results.load_weights` refuses.
    """
    arguments = {"num_classes": data.num_classes, "in_channels": data.images.shape[1]}
    if ":" in source:
        model = _from_factory(source, arguments)
    elif source in MODEL_NAMES:
        if checkpoint is None:
            raise FlatminimaError(f"--model {source} has random weights without a checkpoint: give --checkpoint FILE")
        model = build_model(source, **arguments)
    else:
        raise FlatminimaError(
            f"unknown model {source!r}: give one of {', '.join(MODEL_NAMES)}, or package.module:factory"
        )
    if checkpoint is not None:
        load_weights(model, checkpoint)
    return model


def _from_factory(source: str, arguments: dict[str, int]) -> nn.Module:
    module_name, _, factory_name = source.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise FlatminimaError(f"--model {source}: cannot import {module_name!r} ({error})") from error
    factory = getattr(module, factory_name, None)
    if not callable(factory):
        raise FlatminimaError(f"--model {source}: {module_name} has no function or class {factory_name!r}")
    accepted = inspect.signature(factory).parameters
    try:
        model = factory(**{name: value for name, value in arguments.items() if name in accepted})
    except Exception as error:
        raise FlatminimaError(f"--model {source}: calling it failed ({type(error).__name__}: {error})") from error
    if not isinstance(model, nn.Module):
        raise FlatminimaError(f"--model {source}: it returned {type(model).__name__}, not a torch.nn.Module")
    return model
