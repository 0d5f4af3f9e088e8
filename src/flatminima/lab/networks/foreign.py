"""Networks that are not ours: by a factory, by name from timm or Transformers, with or without a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flatminima.errors import FlatminimaError, did_you_mean, first_line, require, warn
from flatminima.lab.data import ImageSet, OwnData, Pictures, Preparation, ReadySamples, Texts
from flatminima.lab.errors import UnlikeClassesWarning
from flatminima.lab.networks.checkpoints import load_weights
from flatminima.lab.networks.kinds import MODEL_KINDS, kind_of
from flatminima.lab.networks.paper import MODEL_NAMES, build_model
from flatminima.lab.reading import Reading
from flatminima.lab.user_code import made_by_factory, others_errors
from flatminima.network import Inputs, call_model, evaluating, map_tensors, tensors_of


@dataclass(frozen=True)
class OpenedNetwork:
    """A network, and the data that it is measured on."""

    model: nn.Module
    data: ImageSet | Pictures | ReadySamples
    """Its inputs; of images that it does not prepare itself, not yet normalized as in its training."""
    preparation: Preparation | None
    """How they became its inputs; None for such images."""


def is_model_source(source: str) -> bool:
    """Whether a text is a factory, or a network by a prefix, and no path."""
    return ":" in source and not Path(source).exists()


def open_network(source: str, checkpoint: Path | None, data: OwnData, reading: Reading | None = None) -> OpenedNetwork:
    """A network by its name, with a checkpoint's weights, and the data as its own transforms prepare them.

    A factory is called with ``num_classes`` and ``in_channels`` as far as it takes them, and without arguments
    otherwise. The current directory is importable.

    Args:
        source: ``resnet20``, ``package.module:factory``, ``timm:NAME``, ``hf:NAME`` or ``hf:FOLDER``.
        checkpoint: A file that :func:`~flatminima.lab.networks.checkpoints.load_weights` takes; None if the network
            comes with its weights.
        data: The data that it is for.
        reading: How the user wants them prepared, in place of the network's own transforms.

    Raises:
        FlatminimaError: For a name, module or factory that is not there, a factory that fails or returns no module,
            a network that does not take the data or has too few outputs for their classes, and whatever
            :func:`~flatminima.lab.networks.checkpoints.load_weights` refuses.

    Warns:
        UnlikeClassesWarning: The network has more outputs than the data have classes.
    """
    kind = kind_of(source)
    if kind is None and isinstance(data, Texts):
        raise _no_tokenizer(source, data)  # before its checkpoint is found not to fit the texts' classes
    made = _built(source, checkpoint, data) if kind is None else kind.build(_name_in(source), data, checkpoint is None)
    model = _as_module(made, source)
    if checkpoint is not None:
        with others_errors(f"model {source}: loading its checkpoint failed"):
            load_weights(model, checkpoint)
    inputs, preparation = inputs_of(source, model, data, reading)
    _check_takes(model, inputs, source)
    with others_errors(f"model {source}: its eval() failed"):
        model.eval()
    return OpenedNetwork(model, inputs, preparation)


def new_network(source: str, images: ImageSet) -> nn.Module:
    """A network to be trained on images: one of ours, with fresh weights, or what a factory makes.

    Args:
        source: ``resnet20`` and the like, or ``package.module:factory``, called as by :func:`open_network`.
        images: what it is for.

    Raises:
        FlatminimaError: There is no such network, the factory fails, or what it returns does not take the images or has
            nothing to train.
    """
    if ":" not in source:
        return build_model(source, num_classes=images.num_classes, in_channels=images.channels)
    if kind_of(source) is not None:
        raise FlatminimaError(f"model {source} is for measuring: to train it, return it from package.module:factory")
    given = {"num_classes": images.num_classes, "in_channels": images.channels}
    model = _as_module(made_by_factory(source, "model", given), source)
    trainable = any(parameter.requires_grad for parameter in model.parameters())
    require(trainable, f"model {source}: it has no trainable parameters: let some require a gradient")
    _check_takes(model, images, source)
    return model


def inputs_of(
    source: str, model: nn.Module, data: OwnData, reading: Reading | None = None
) -> tuple[ImageSet | Pictures | ReadySamples, Preparation | None]:
    """What a network's own transforms make of data, and which these are; images as they are, where it has none.

    Raises:
        FlatminimaError: Texts, for a network without a tokenizer, and whatever its transforms refuse.
    """
    kind = kind_of(source)
    own = None if kind is None else kind.prepare(_name_in(source), model, data, reading or Reading())
    return own if own is not None else _as_they_are(source, data)


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


def _name_in(source: str) -> str:
    return source.partition(":")[2]


def _as_module(made: Any, source: str) -> nn.Module:
    if not isinstance(made, nn.Module):
        raise FlatminimaError(f"model {source}: it returned {type(made).__name__}, not a torch.nn.Module")
    return made


def _built(source: str, checkpoint: Path | None, data: OwnData) -> Any:
    """One of ours, or a factory's."""
    given = {"num_classes": data.num_classes, "in_channels": None if isinstance(data, Texts) else data.channels}
    arguments = {name: value for name, value in given.items() if value is not None}
    if ":" in source:
        return _of_factory(source, arguments)
    if source not in MODEL_NAMES:
        kinds = ", ".join(kind.described for kind in MODEL_KINDS.values())
        raise FlatminimaError(
            f"unknown model {source!r}{did_you_mean(source, MODEL_NAMES)}: give one of {', '.join(MODEL_NAMES)}, "
            f"package.module:factory, {kinds}"
        )
    if checkpoint is None:
        raise FlatminimaError(f"model {source} has random weights without a checkpoint: name the checkpoint too")
    if len(arguments) < len(given):
        raise FlatminimaError(
            f"model {source} is for images, and these data do not say their {' and '.join(given.keys() - arguments)}: "
            "build it by package.module:factory"
        )
    return build_model(source, **arguments)


def _of_factory(source: str, arguments: dict[str, int]) -> Any:
    try:
        return made_by_factory(source, "model", arguments)
    except FlatminimaError as error:
        wanted = next((name for name in ("num_classes", "in_channels") if f"'{name}'" in str(error)), None)
        if wanted is None or wanted in arguments:
            raise
        raise FlatminimaError(f"{error}: these data do not say it; give the factory a default of it") from error


def _no_tokenizer(source: str, data: Texts) -> FlatminimaError:
    return FlatminimaError(
        f"model {source} has no tokenizer for the texts of {data.where}: give it as hf:FOLDER, or pass data as "
        "package.module:factory that gives tokens"
    )


def _as_they_are(source: str, data: OwnData) -> tuple[ImageSet | Pictures | ReadySamples, Preparation | None]:
    if isinstance(data, Texts):
        raise _no_tokenizer(source, data)
    return data, Preparation("as the data give them", repr(data.loss)) if isinstance(data, ReadySamples) else None


def _check_takes(model: nn.Module, data: ImageSet | Pictures | ReadySamples, source: str) -> None:
    """Try one sample, so that a wrong network is named as such and not found out in the middle of measuring."""
    parameter = next(model.parameters(), None)
    inputs, targets = data.fetch([0])

    def placed(tensor: Tensor) -> Tensor:
        if parameter is None:
            return tensor
        return tensor.to(parameter) if tensor.is_floating_point() else tensor.to(parameter.device)

    try:
        with evaluating(model), torch.no_grad():
            logits = call_model(model, map_tensors(placed, inputs))
    except (FlatminimaError, KeyboardInterrupt):
        raise
    except BaseException as error:  # SystemExit too: it is somebody else's code
        raise FlatminimaError(
            f"model {source} does not take {_described(data, inputs)} ({first_line(error)}): "
            f"name the network and the data that belong together{_remedy(data)}"
        ) from error
    if targets.dim() == 1 and logits.dim() == 2 and data.num_classes is not None:
        _check_classes(logits.shape[1], data.num_classes, source)


def _check_classes(outputs: int, classes: int, source: str) -> None:
    if outputs < classes:
        raise FlatminimaError(
            f"model {source} has {outputs} outputs, but the data have {classes} classes: name the network and the data "
            "that belong together"
        )
    if outputs > classes:
        warn(
            f"model {source} has {outputs} outputs, but the data have {classes} classes: see that they are numbered as "
            "in its training",
            UnlikeClassesWarning,
        )


def _described(data: ImageSet | Pictures | ReadySamples, inputs: Inputs) -> str:
    shapes = [tuple(tensor.shape[1:]) for tensor in tensors_of(inputs)]
    what = "inputs" if isinstance(data, ReadySamples) else "images"
    return f"{what} of shape {', '.join(map(str, shapes))}"


def _remedy(data: ImageSet | Pictures | ReadySamples) -> str:
    return "; or see what in_channels, resize and crop do to images" if isinstance(data, Pictures) else ""
