"""The measures: a file each, every decorated function of which is one; imported in the order of tables."""

# ruff: noqa: I001
from flatminima.measures.catalogue import gamma
from flatminima.measures.catalogue import spectral_radius
from flatminima.measures.catalogue import frobenius_norm
from flatminima.measures.catalogue import fisher_trace
from flatminima.measures.catalogue import robustness
from flatminima.measures.catalogue.robustness import input_jacobian_norms

__all__ = ["fisher_trace", "frobenius_norm", "gamma", "input_jacobian_norms", "robustness", "spectral_radius"]
