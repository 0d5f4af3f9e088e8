"""How one use of a parameter turns (input, output gradient) into its rows of J; one file a family of layers.

Add your own with :func:`rule`, :func:`extract` or :func:`split`; :mod:`~flatminima.gramian.rules.base` shows one.
"""

from flatminima.gramian.rules import (  # noqa: F401 (imported so that they register the rules for PyTorch's functions)
    attention,
    convolution,
    elementwise,
    embedding,
    linear,
    normalization,
)
from flatminima.gramian.rules.base import (
    EXTRACTS,
    POSITIONWISE,
    RULES,
    SPLITS,
    ParameterUse,
    Rule,
    bias_use,
    extract,
    positions,
    rule,
    split,
    sum_channels,
    sum_positions,
    temporary_rules,
)

__all__ = [
    "EXTRACTS",
    "POSITIONWISE",
    "RULES",
    "SPLITS",
    "ParameterUse",
    "Rule",
    "bias_use",
    "extract",
    "positions",
    "rule",
    "split",
    "sum_channels",
    "sum_positions",
    "temporary_rules",
]
