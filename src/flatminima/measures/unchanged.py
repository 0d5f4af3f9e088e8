"""Whether a user's own measure leaves the weights as they were."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from flatminima.errors import require
from flatminima.network import add_tensor
from flatminima.parallel import shard_of
from flatminima.torch_compat import version_of


class UnchangedWeights:
    """Those of one model, of which every own measure has to leave the values, to the bit.

    A digest of them is taken before the first such measure, and again where a write has moved their version counters.
    Writes through ``.data`` move none: so after a measure's first trial it is taken in any case.
    """

    def __init__(self) -> None:
        self._digest: bytes | None = None
        self._known: set[str] = set()

    @contextmanager
    def left_by(self, measure: str, model: nn.Module) -> Iterator[None]:
        """A block in which ``measure`` has the model.

        Raises:
            FlatminimaError: if the weights have other values after it.
        """
        if self._digest is None:
            self._digest = _digest(model)
        versions = _versions(model)
        yield
        if measure in self._known and versions == _versions(model):
            return
        require(
            self._digest == _digest(model),
            f"measure {measure!r} changed the model's weights, which what is measured after it would see: put them "
            "back to the bit, or work on copy.deepcopy(trial.model)",
        )
        self._known.add(measure)


def _versions(model: nn.Module) -> list[int]:
    """What a write to any of the weights changes."""
    return [version_of(parameter) for parameter in model.parameters()]


def _digest(model: nn.Module) -> bytes:
    digest = hashlib.sha256()
    for parameter in model.parameters():
        add_tensor(digest, shard_of(parameter))
    return digest.digest()
