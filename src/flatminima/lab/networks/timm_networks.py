"""``timm:NAME``: a network of timm, with its own transforms for images."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flatminima.errors import FlatminimaError, did_you_mean
from flatminima.lab.data import ImageSet, OwnData, Pictures, Preparation, Prepared, ReadySamples, as_pictures
from flatminima.lab.networks.kinds import MODEL_KINDS, ModelKind
from flatminima.lab.reading import Reading
from flatminima.lab.user_code import others_errors


def _timm() -> Any:
    try:
        timm = importlib.import_module("timm")
        importlib.import_module("timm.data")
    except ImportError as error:
        raise FlatminimaError(f"timm: networks need the package timm ({error}): pip install timm") from error
    return timm


def _build(name: str, data: OwnData, with_weights: bool) -> nn.Module:
    timm = _timm()
    known: dict[str, int | None] = {}
    if not with_weights:  # a head of another size would come with random weights
        known = {"num_classes": data.num_classes, "in_chans": getattr(data, "channels", None)}
    if ":" not in name and not timm.is_model(name):
        hint = did_you_mean(name, timm.list_models())
        raise FlatminimaError(f"model timm:{name}: timm {timm.__version__} has no such model{hint}")
    hub = " with its weights from the hub; a checkpoint of yours would do without them" if with_weights else ""
    with others_errors(f"model timm:{name}: timm.create_model failed{hub}"):
        model: nn.Module = timm.create_model(
            name, pretrained=with_weights, **{key: value for key, value in known.items() if value is not None}
        )
    return model


def _prepare(name: str, model: nn.Module, data: OwnData, reading: Reading) -> tuple[ReadySamples, Preparation] | None:
    if reading.changes_images or not isinstance(data, (ImageSet, Pictures)):
        return None
    timm = _timm()
    pictures = as_pictures(data, f"timm:{name}", reading) if isinstance(data, ImageSet) else data
    with others_errors(f"model timm:{name}: its transforms"):
        config = timm.data.resolve_model_data_config(model)
        transform = timm.data.create_transform(**config, is_training=False)
        channels = int(config["input_size"][0])

    def prepare(indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        with others_errors(f"model timm:{name}: its transforms"):
            inputs = torch.stack([transform(image) for image in pictures.images(indices, channels)])
        return inputs, pictures.labels[torch.as_tensor(indices)]

    samples = ReadySamples(Prepared(len(pictures), prepare), data.num_classes)
    said = ", ".join(f"{key} {value}" for key, value in config.items())
    return samples, Preparation(f"timm's own transforms ({said})", repr(sorted(config.items())))


MODEL_KINDS["timm"] = ModelKind("timm:NAME", _build, _prepare)
