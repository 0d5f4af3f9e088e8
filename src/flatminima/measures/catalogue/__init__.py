"""The measures: a file each, every decorated function of which is one; imported in the order of tables."""

# ruff: noqa: I001
from flatminima.measures.catalogue import gamma
from flatminima.measures.catalogue import spectral_radius
from flatminima.measures.catalogue import frobenius_norm
from flatminima.measures.catalogue import fisher_trace
from flatminima.measures.catalogue import robustness
from flatminima.measures.catalogue import sharpness
from flatminima.measures.catalogue import pac_bayes
from flatminima.measures.catalogue import hessian
from flatminima.measures.catalogue import parameter_norm
from flatminima.measures.catalogue import initial_distance
from flatminima.measures.catalogue import spectral_norms
from flatminima.measures.catalogue import path_norm
from flatminima.measures.catalogue import heavy_tail
from flatminima.measures.catalogue.robustness import input_jacobian_norms

__all__ = [
    "fisher_trace",
    "frobenius_norm",
    "gamma",
    "heavy_tail",
    "hessian",
    "initial_distance",
    "input_jacobian_norms",
    "pac_bayes",
    "parameter_norm",
    "path_norm",
    "robustness",
    "sharpness",
    "spectral_norms",
    "spectral_radius",
]
