"""The kinds of networks that are known by a prefix, as ``timm:NAME``: each is one registered entry.

A kind builds the network, and may bring along its own way to make inputs of samples: transforms, a tokenizer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from flatminima.lab.data import OwnData, Preparation, ReadySamples
from flatminima.lab.reading import Reading

Build = Callable[[str, OwnData, bool], nn.Module]
"""The name behind the prefix, the data, and whether weights come along (else a checkpoint has them) → a model."""
Prepare = Callable[[str, nn.Module, OwnData, Reading], tuple[ReadySamples, Preparation] | None]
"""The name, the model, the data as they lie there, and the user's wishes → its inputs; None: prepare them as others."""


@dataclass(frozen=True)
class ModelKind:
    """One kind of network."""

    described: str
    """As an error lists it."""
    build: Build
    prepare: Prepare


MODEL_KINDS: dict[str, ModelKind] = {}
"""By prefix."""


def kind_of(source: str) -> ModelKind | None:
    """What a source with a prefix is; None for a factory, and for one of our networks."""
    prefix, colon, _ = source.partition(":")
    return MODEL_KINDS.get(prefix) if colon else None


def is_factory(source: str) -> bool:
    """Whether a source is ``package.module:factory``."""
    return ":" in source and kind_of(source) is None
