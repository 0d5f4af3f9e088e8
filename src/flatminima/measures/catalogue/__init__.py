"""The measures: a file each, every decorated function of which is one; imported in the order of tables."""

# ruff: noqa: I001
from flatminima.measures.catalogue import gamma
from flatminima.measures.catalogue import ridge_log_det
from flatminima.measures.catalogue import spectral_radius
from flatminima.measures.catalogue import ggn_eigenvalue
from flatminima.measures.catalogue import frobenius_norm
from flatminima.measures.catalogue import fisher_trace
from flatminima.measures.catalogue import average_sharpness
from flatminima.measures.catalogue import effective_dimension
from flatminima.measures.catalogue import gradient_noise
from flatminima.measures.catalogue import coherence
from flatminima.measures.catalogue import fisher_rao_norm
from flatminima.measures.catalogue import weight_alignment
from flatminima.measures.catalogue import relative_flatness
from flatminima.measures.catalogue import margin
from flatminima.measures.catalogue import robustness
from flatminima.measures.catalogue import sharpness
from flatminima.measures.catalogue import pac_bayes
from flatminima.measures.catalogue import hessian
from flatminima.measures.catalogue import hessian_density
from flatminima.measures.catalogue import parameter_norm
from flatminima.measures.catalogue import initial_distance
from flatminima.measures.catalogue import spectral_norms
from flatminima.measures.catalogue import path_norm
from flatminima.measures.catalogue import heavy_tail
from flatminima.measures.catalogue.hessian_density import SpectralDensity, spectral_density
from flatminima.measures.catalogue.robustness import robustness_sample_count

__all__ = [
    "SpectralDensity",
    "average_sharpness",
    "coherence",
    "effective_dimension",
    "fisher_rao_norm",
    "fisher_trace",
    "frobenius_norm",
    "gamma",
    "ggn_eigenvalue",
    "gradient_noise",
    "heavy_tail",
    "hessian",
    "hessian_density",
    "initial_distance",
    "margin",
    "pac_bayes",
    "parameter_norm",
    "path_norm",
    "relative_flatness",
    "ridge_log_det",
    "robustness",
    "robustness_sample_count",
    "sharpness",
    "spectral_density",
    "spectral_norms",
    "spectral_radius",
    "weight_alignment",
]
