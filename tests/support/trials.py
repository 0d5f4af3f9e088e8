"""A trial as measures are given it, to call them with outside of ``measure``."""

from __future__ import annotations

from typing import Any

from torch import nn

import flatminima as fm
from flatminima.measures import Trial


def trial_of(model: nn.Module, inputs: Any, targets: Any, **options: Any) -> Trial:
    """The first trial on all samples, or on ``subset_size`` of them; its model is in eval mode and stays there."""
    found: list[Trial] = []

    def first(trial: Trial) -> float:
        found.append(trial)
        return 0.0

    options = {"subset_size": len(targets), "trials": 1, "progress": False, **options}
    fm.measure(model.eval(), (inputs, targets), measures=first, **options)
    return found[0]
