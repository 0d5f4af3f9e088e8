"""How minima are measured, as far as a file or a command line can say it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from flatminima.choices import PlainOptions


@dataclass(frozen=True)
class Measuring(PlainOptions):
    """How minima are measured."""

    fisher: Literal["empirical", "model"] = "empirical"
    """One gradient per sample, or the K classes' weighted by the model's probabilities: K - 1 times the cost."""
    measures: tuple[str, ...] = ("paper",)
    """Beside γ̂ and its parts: names of measures, or of groups: paper, free, cheap, weights, all; or your own, as
    package.module:function."""
    memory_gib: float | None = None
    """Memory that may be used beside the network, in GiB (None: half of what is free); the results are the same."""
    per_parameter: bool = False
    """Also report every parameter's share of ξ, and so every layer's."""
    double: bool = False
    """Measure in float64."""

    @property
    def own(self) -> tuple[str, ...]:
        """Measures of the user's own."""
        return tuple(name for name in self.measures if ":" in name)

    def options(self) -> dict[str, Any]:
        """Those of :func:`flatminima.measure`, measures by name."""
        options = dataclasses.asdict(self)
        del options["double"]
        gib = options.pop("memory_gib")
        return {**options, "memory_budget": None if gib is None else int(gib * 2**30)}
