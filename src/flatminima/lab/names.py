"""The names that a run's description chooses from; what they stand for needs torch, and is in the lab's other rooms."""

from __future__ import annotations

from typing import Literal

AUGMENTATIONS: tuple[str, ...] = ("no-aug", "flip-only", "1-crop-f", "4-crop-f")
"""The schemes of Scenario II, from none to the standard one."""

OWN_NETWORKS: tuple[str, ...] = (
    "cnn",
    "resnet20",
    "wrn28-2",
    "densenet-bc-100",
    "resnet8",
    "resnet8-wide",
    "small-cnn",
    "mlp",
)
"""The networks that :mod:`flatminima.lab.networks` registers itself; users' own are not among them."""

PresetName = Literal["paper", "medium", "small", "digits"]
"""The sizes that the paper's experiments come in."""

Protocol = Literal["paper", "matched"]
"""When the runs of a scenario end: after as many epochs each, or once they fit their training set equally well."""
