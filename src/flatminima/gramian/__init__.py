"""A model, a loss and samples → ξ = JJᵀ, the Gram matrix of per-sample loss gradients."""

from flatminima.gramian.checks import Checks
from flatminima.gramian.engine import PathName, factored_gram, gram, plan_for, require_path, unwrapped, warn_generic
from flatminima.gramian.factored import (
    FactoredGram,
    LogDeterminant,
    log_determinant,
    log_determinant_parts,
    numerical_rank,
)
from flatminima.gramian.memory import default_budget
from flatminima.gramian.parts import trainable_parameters, trainable_parts
from flatminima.gramian.planning import Plan
from flatminima.gramian.products import times_own_transpose, times_transposes

__all__ = [
    "Checks",
    "FactoredGram",
    "LogDeterminant",
    "PathName",
    "Plan",
    "default_budget",
    "factored_gram",
    "gram",
    "log_determinant",
    "log_determinant_parts",
    "numerical_rank",
    "plan_for",
    "require_path",
    "times_own_transpose",
    "times_transposes",
    "trainable_parameters",
    "trainable_parts",
    "unwrapped",
    "warn_generic",
]
