"""How minima are measured: the arguments of ``measure`` and ``compare`` beside models and data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from flatminima.errors import (
    FlatminimaError,
)
from flatminima.losses import Loss
from flatminima.measures.fisher import Fisher
from flatminima.measures.results import Estimate

MINIMUM_TRIALS = 5
"""Before so many trials a standard error is too uncertain itself to stop by."""


@dataclass(frozen=True)
class Options:
    """The arguments of :func:`measure` beside model and data, checked; they are explained there."""

    loss: Loss
    fisher: Fisher
    subset_size: int
    trials: int
    seed: int
    batchnorm: Literal["eval"] | int
    logit_normalization: float | None
    scale_invariant: bool
    per_parameter: bool
    max_standard_error: float | None
    robustness_samples: int | None
    on_singular: Literal["raise", "skip"]
    memory_budget: int | None
    distributed: bool
    progress: bool

    def __post_init__(self) -> None:
        if self.batchnorm != "eval" and not isinstance(self.batchnorm, int):
            raise FlatminimaError(
                f"unknown batchnorm={self.batchnorm!r}: use 'eval' (running statistics) or the number of samples in a "
                "chunk"
            )
        if self.fisher != "empirical" and (self.batchnorm != "eval" or self.logit_normalization is not None):
            raise FlatminimaError(
                f"fisher={self.fisher!r} is the exact Fisher of the network in eval mode at its own logits: "
                "leave batchnorm and logit_normalization out, or use fisher='empirical'"
            )
        if self.max_standard_error is not None and not self.max_standard_error > 0:
            raise FlatminimaError(f"max_standard_error must be positive, got {self.max_standard_error}")
        if self.on_singular not in ("raise", "skip"):
            raise FlatminimaError(f"unknown on_singular={self.on_singular!r}: use 'raise' or 'skip'")
        if self.robustness_samples is not None and self.robustness_samples < 0:
            raise FlatminimaError(f"robustness_samples must be 0 or more, got {self.robustness_samples}")

    def precise_enough(self, values: Sequence[float]) -> bool:
        """Whether the mean of so many trials' values (NaN: left out) is as precise as was asked for."""
        if self.max_standard_error is None:
            return False
        kept = [value for value in values if not math.isnan(value)]
        return len(kept) >= MINIMUM_TRIALS and Estimate.of(kept).standard_error <= self.max_standard_error
