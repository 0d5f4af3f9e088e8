"""Networks to be measured, each with the data as it was trained to see them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from flatminima.errors import FlatminimaError, NonFiniteError, naming, warn
from flatminima.lab.data import ImageSet, Normalization, load_data
from flatminima.lab.errors import GuessedNormalizationWarning
from flatminima.lab.networks import load_model
from flatminima.lab.runs.records import CheckpointNote
from flatminima.lab.runs.sets import load_run
from flatminima.lab.schema import parse
from flatminima.lab.storage import read_tensors
from flatminima.measures import evaluate

CANDIDATES = ("data", "none", "0.5/0.5", "imagenet")
"""What a network may have been trained with that does not say."""
_LOOKED_AT = 250  # images that candidates are tried on


@dataclass(frozen=True)
class NetworkInputs:
    """A data set whose images come in the floating-point type of the network's parameters."""

    data: ImageSet
    dtype: torch.dtype

    @classmethod
    def of(cls, data: ImageSet, model: nn.Module) -> NetworkInputs:
        """Those of one network."""
        return cls(data, type_of(model))

    def __len__(self) -> int:
        return len(self.data)

    def fetch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The images at ``indices`` as one batch, and their labels."""
        images, labels = self.data.fetch(indices)
        return images.to(self.dtype), labels


def type_of(model: nn.Module) -> torch.dtype:
    """The floating-point type of a network's parameters."""
    return next((parameter.dtype for parameter in model.parameters()), torch.float32)


@dataclass(frozen=True)
class LoadedNetwork:
    """A network, and the images it is measured on."""

    model: nn.Module
    data: ImageSet
    """Normalized as in its training."""
    normalization: Normalization


def load_network(source: str, checkpoint: Path | None, data: ImageSet, normalize: str | None = None) -> LoadedNetwork:
    """A network from a factory or by one of our names, and the data as it was trained to see them.

    Args:
        source: as for :func:`~flatminima.lab.networks.foreign.load_model`.
        checkpoint: likewise.
        data: the training images.
        normalize: how its training normalized them, as :meth:`Normalization.named` reads it. None: as its checkpoint
            says, if one of our runs wrote it; else that of :data:`CANDIDATES` with the smallest training loss.

    Raises:
        FlatminimaError: as :func:`~flatminima.lab.networks.foreign.load_model`, or there is no such normalization.

    Warns:
        GuessedNormalizationWarning: the normalization is a guess.
        AdaptedCheckpointWarning: the checkpoint was not loaded as it is.
    """
    given = None if normalize is None else Normalization.named(normalize, data)
    model = load_model(source, checkpoint, data)
    normalization = given or _as_trained(checkpoint, data) or _guessed(model, data, source)
    return LoadedNetwork(model, normalization.apply(data), normalization)


def load_networks(
    paths: Mapping[str, Path], source: str, model: str | None, normalize: str | None = None
) -> dict[str, LoadedNetwork]:
    """Run folders, and checkpoints of one ``model``, with the images of one training set.

    Args:
        paths: run folder or checkpoint by name.
        source: the training set, as for :func:`~flatminima.lab.data.sources.load_data`.
        model: what the checkpoints are of, as for :func:`~flatminima.lab.networks.foreign.load_model`.
        normalize: of the checkpoints, as for :func:`load_network`; a run folder has its own.

    Raises:
        FlatminimaError: whatever loading raises, naming the network.
    """
    data, _ = load_data(source)
    networks: dict[str, LoadedNetwork] = {}
    for name, path in paths.items():
        with naming(name):
            if path.is_dir():
                _, network, trained_on, _ = load_run(path)
                normalization = Normalization.of(trained_on, "as trained")
                networks[name] = LoadedNetwork(network, normalization.apply(data), normalization)
            elif model is not None:
                networks[name] = load_network(model, path, data, normalize)
            else:
                raise FlatminimaError(f"{path} is not a run folder; for a checkpoint name its model too")
    return networks


def _as_trained(checkpoint: Path | None, data: ImageSet) -> Normalization | None:
    """What a checkpoint says that one of our runs wrote; one of an earlier version had that of its data."""
    if checkpoint is None or checkpoint.suffix != ".safetensors":
        return None
    try:
        _, text = read_tensors(checkpoint, signed=True)
        note = parse(CheckpointNote, text)
    except FlatminimaError:
        return None
    normalization = Normalization("as trained", note.mean, note.std) if note.mean else Normalization.of(data)
    return normalization if len(normalization.mean) == data.images.shape[1] else None


def _guessed(model: nn.Module, data: ImageSet, name: str) -> Normalization:
    """That of the candidates at which the network fits best: at a minimum, only the right one fits well."""
    channels = data.images.shape[1]
    some = data.subset(torch.linspace(0, len(data) - 1, min(len(data), _LOOKED_AT)).long())
    losses: dict[Normalization, float] = {}
    for candidate in CANDIDATES:
        if candidate == "imagenet" and channels != 3:
            continue
        normalization = Normalization.named(candidate, data)
        try:
            losses[normalization] = evaluate(model, NetworkInputs.of(normalization.apply(some), model)).loss
        except NonFiniteError:  # a network with NaN fits nothing: who measures it says so
            continue
    if not losses:
        return Normalization.of(data)
    best = min(losses, key=losses.__getitem__)
    said = ", ".join(f"{normalization.name} {loss:.3g}" for normalization, loss in losses.items())
    warn(
        f"{name} does not say how its images were normalized: taken is {best}, where its training loss is the smallest "
        f"({said}); give normalize to be sure",
        GuessedNormalizationWarning,
    )
    return replace(best, name=f"{best.name}, a guess")
