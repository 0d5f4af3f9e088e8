"""A model, a loss and samples → ξ = JJᵀ, the Gram matrix of per-sample loss gradients."""

from flatminima.gramian.engine import factored_gram, gram, plan_for
from flatminima.gramian.factored import FactoredGram

__all__ = ["FactoredGram", "factored_gram", "gram", "plan_for"]
