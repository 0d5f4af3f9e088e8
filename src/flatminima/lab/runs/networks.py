"""Networks to be measured, each with the data as it was trained to see them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from flatminima.errors import FlatminimaError, NonFiniteError, naming, require, warn
from flatminima.lab.data import FROM_DATA, ImageSet, Normalization, OwnData, Pictures, Preparation, TrainingData
from flatminima.lab.errors import GuessedNormalizationWarning
from flatminima.lab.networks import inputs_of, is_model_source, open_network
from flatminima.lab.reading import Reading
from flatminima.lab.runs.folder import RunFolder
from flatminima.lab.runs.records import CheckpointNote
from flatminima.lab.runs.sets import load_run
from flatminima.lab.schema import parse
from flatminima.lab.storage import read_tensors
from flatminima.measures import evaluate
from flatminima.network import Inputs, map_tensors

CANDIDATES = ("data", "none", "0.5/0.5", "imagenet")
"""What a network may have been trained with that does not say."""
_LOOKED_AT = 250  # images that candidates are tried on
_BYTES = 2**28  # that they may take
_BATCH = 50  # of them at once: they may be large
_FITS = 0.1  # nats: with a smaller loss a candidate may be the right one


@dataclass(frozen=True)
class NetworkInputs:
    """A data set whose floating-point inputs come in the type of the network's parameters."""

    data: TrainingData
    dtype: torch.dtype

    @classmethod
    def of(cls, data: TrainingData, model: nn.Module) -> NetworkInputs:
        """Those of one network."""
        return cls(data, type_of(model))

    def __len__(self) -> int:
        return len(self.data)

    def fetch(self, indices: Sequence[int]) -> tuple[Inputs, Tensor]:
        """The inputs at ``indices`` as one batch, and their labels."""
        inputs, labels = self.data.fetch(indices)
        return map_tensors(
            lambda tensor: tensor.to(self.dtype) if tensor.is_floating_point() else tensor, inputs
        ), labels


def type_of(model: nn.Module) -> torch.dtype:
    """The floating-point type of a network's parameters."""
    return next((parameter.dtype for parameter in model.parameters()), torch.float32)


@dataclass(frozen=True)
class LoadedNetwork:
    """A network, and the data it is measured on."""

    model: nn.Module
    data: TrainingData
    """Its inputs, prepared as in its training."""
    preparation: Normalization | Preparation
    prepared: Callable[[OwnData], TrainingData]
    """Other data, as those."""

    @classmethod
    def of_images(cls, model: nn.Module, images: ImageSet | Pictures, normalization: Normalization) -> LoadedNetwork:
        """A network for images, normalized in one way."""

        def prepared(data: OwnData) -> TrainingData:
            if not isinstance(data, (ImageSet, Pictures)) or data.channels != images.channels:
                raise FlatminimaError(f"the network takes images of {images.channels} channels, which these are not")
            return normalization.apply(data)

        return cls(model, prepared(images), normalization, prepared)


def load_network(source: str, checkpoint: Path | None, data: OwnData, reading: Reading | None = None) -> LoadedNetwork:
    """A network from a factory or by name, and the data as it was trained to see them.

    Args:
        source: as for :func:`~flatminima.lab.networks.open_network`.
        checkpoint: likewise.
        data: the training data.
        reading: how its training prepared images: ``normalize`` as :meth:`Normalization.named` reads it. None: by the
            network's own transforms if it has some; as its checkpoint says, if one of our runs wrote it; else that of
            :data:`CANDIDATES` with the smallest training loss.

    Raises:
        FlatminimaError: as :func:`~flatminima.lab.networks.open_network`, or there is no such normalization.

    Warns:
        GuessedNormalizationWarning: the normalization is a guess.
        AdaptedCheckpointWarning: the checkpoint was not loaded as it is.
    """
    reading = reading or Reading()
    given = None
    if reading.normalize is not None:
        if not isinstance(data, (ImageSet, Pictures)):
            raise FlatminimaError("normalize is for images of 8 bits, and these data are none: leave it out")
        given = Normalization.named(reading.normalize, data)
    opened = open_network(source, checkpoint, data, reading)
    if not isinstance(opened.data, (ImageSet, Pictures)):
        return LoadedNetwork(
            opened.model,
            opened.data,
            opened.preparation or Preparation("as the data give them"),
            lambda other: _ready(source, opened.model, other, reading),
        )
    normalization = given or _as_trained(checkpoint, opened.data) or _guessed(opened.model, opened.data, source)
    return LoadedNetwork.of_images(opened.model, opened.data, normalization)


def _ready(source: str, model: nn.Module, data: OwnData, reading: Reading) -> TrainingData:
    inputs, preparation = inputs_of(source, model, data, reading)
    require(preparation is not None, f"model {source} takes its inputs as they are, and these data are images")
    return inputs


def load_networks(
    paths: Mapping[str, Path], data: OwnData, model: str | None, reading: Reading | None = None
) -> dict[str, LoadedNetwork]:
    """Run folders, checkpoints of one ``model``, and other networks, with one training set.

    Args:
        paths: what :func:`load_checkpoint` takes, by name.
        data: the training set.
        model: what the checkpoints are of, as for :func:`~flatminima.lab.networks.open_network`.
        reading: of all but run folders, as for :func:`load_network`; a run folder knows how it normalizes.

    Raises:
        FlatminimaError: whatever loading raises, naming the network.
    """
    networks: dict[str, LoadedNetwork] = {}
    for name, path in paths.items():
        with naming(name):
            networks[name] = load_checkpoint(path, data, model, reading)
    return networks


def load_checkpoint(path: Path, data: OwnData, model: str | None, reading: Reading | None = None) -> LoadedNetwork:
    """A trained network by where it lies.

    Args:
        path: a run folder; a checkpoint of ``model``; a folder that Transformers wrote, such as its Trainer's
            ``checkpoint-500``, whose weights go into ``model`` if that is given; or ``hf:FOLDER`` and the like.
        data: the training set.
        model: what checkpoints are of, as for :func:`~flatminima.lab.networks.open_network`.
        reading: as for :func:`load_network`; a run folder knows how it normalizes.

    Raises:
        FlatminimaError: whatever loading raises.
    """
    if is_model_source(str(path)):
        return load_network(str(path), None, data, reading)
    if not path.is_dir():
        require(model is not None, f"{path} is not a run folder; for a checkpoint name its model too")
        return load_network(model or "", path, data, reading)
    if not RunFolder(path).is_empty:
        return _of_run(path, data)
    weights = next((path / name for name in WEIGHTS if (path / name).is_file()), None)
    if model is not None and weights is not None:
        return load_network(model, weights, data, reading)
    if (path / "config.json").is_file():
        require(model is None, f"{path} has its weights in no file called {' or '.join(WEIGHTS)}: leave the model out")
        return load_network(f"hf:{path}", None, data, reading)
    require(weights is None, f"{path} has weights, and does not say of which network: name its model too")
    return _of_run(path, data)  # which says what it is not


WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""The file of the weights in a folder that Transformers wrote."""


def _of_run(path: Path, data: OwnData) -> LoadedNetwork:
    _, network, trained_on, _ = load_run(path)
    if not isinstance(data, (ImageSet, Pictures)):
        raise FlatminimaError(f"{path} is a run folder, whose network takes images of 8 bits; these data are none")
    normalization = Normalization.of(trained_on, "as trained")
    require(
        data.channels == trained_on.channels,
        f"{path} was trained on images of {trained_on.channels} channels, these have {data.channels}: give in_channels",
    )
    return LoadedNetwork.of_images(network, data, normalization)


def _as_trained(checkpoint: Path | None, data: ImageSet | Pictures) -> Normalization | None:
    """What a checkpoint says that one of our runs wrote; one of an earlier version had that of its data."""
    if checkpoint is None or checkpoint.suffix != ".safetensors":
        return None
    try:
        _, text = read_tensors(checkpoint, signed=True)
        note = parse(CheckpointNote, text)
    except FlatminimaError:
        return None
    normalization = Normalization("as trained", note.mean, note.std) if note.mean else Normalization.of(data)
    return normalization if len(normalization.mean) == data.channels else None


def _guessed(model: nn.Module, data: ImageSet | Pictures, name: str) -> Normalization:
    """That of the candidates at which the network fits best: at a minimum the right one fits; so may others."""
    some = _looked_at(data)
    losses: dict[Normalization, float] = {}
    for candidate in CANDIDATES:
        if candidate == "imagenet" and data.channels != 3:
            continue
        normalization = Normalization.named(candidate, some)
        try:
            inputs = NetworkInputs.of(normalization.apply(some), model)
            losses[normalization] = evaluate(model, inputs, batch=_BATCH).loss
        except NonFiniteError:  # a network with NaN fits nothing: who measures it says so
            continue
    if not losses:
        return Normalization.of(data)
    best = found = min(losses, key=losses.__getitem__)
    if best.name == FROM_DATA:
        best = Normalization.of(data)  # of all images, which are not read for the other candidates
    said = ", ".join(f"{normalization.name} {loss:.3g}" for normalization, loss in losses.items())
    others = [each.name for each, loss in losses.items() if each is not found and loss < _FITS]
    doubt = f", but with {' and '.join(others)} it fits as a minimum does, too" if others else ""
    warn(
        f"{name} does not say how its images were normalized: taken is {best}, where its training loss is the smallest "
        f"({said}){doubt}; give normalize to be sure",
        GuessedNormalizationWarning,
    )
    return replace(best, name=f"{best.name}, a guess")


def _looked_at(data: ImageSet | Pictures) -> ImageSet:
    """Some of the images, spread over all of them, in memory."""
    bytes_each = data.fetch([0])[0].numel()
    count = max(1, min(len(data), _LOOKED_AT, _BYTES // bytes_each))
    some = data.subset(torch.linspace(0, len(data) - 1, count).long())
    return some if isinstance(some, ImageSet) else some.decoded()
