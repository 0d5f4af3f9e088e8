"""ξ → numbers: γ̂, its rivals, their standard errors, and comparisons of minima."""

from flatminima.choices import PlainOptions
from flatminima.measures.catalogue import SpectralDensity, robustness_sample_count, spectral_density
from flatminima.measures.comparing import compare
from flatminima.measures.comparison import Comparison, comparison_of
from flatminima.measures.evaluation import Evaluation, evaluate
from flatminima.measures.hessian_products import hessian_of, top_eigenpairs
from flatminima.measures.input_jacobian import input_jacobian_norms, input_jacobian_passes
from flatminima.measures.loss_surface import DataSurface
from flatminima.measures.measuring import measure
from flatminima.measures.options import MeasureOptions
from flatminima.measures.plausibility import refuse_random
from flatminima.measures.registry import CATALOGUE, Measure, Selection, catalogued, selected
from flatminima.measures.results import Characterization, Estimate, Settings, Share, jsonable
from flatminima.measures.second_derivatives import differentiated, require_second_derivative
from flatminima.measures.tables import settings_in_words
from flatminima.measures.trial import Trial

__all__ = [
    "CATALOGUE",
    "Characterization",
    "Comparison",
    "DataSurface",
    "Estimate",
    "Evaluation",
    "Measure",
    "MeasureOptions",
    "PlainOptions",
    "Selection",
    "Settings",
    "Share",
    "SpectralDensity",
    "Trial",
    "catalogued",
    "compare",
    "comparison_of",
    "differentiated",
    "evaluate",
    "hessian_of",
    "input_jacobian_norms",
    "input_jacobian_passes",
    "jsonable",
    "measure",
    "refuse_random",
    "require_second_derivative",
    "robustness_sample_count",
    "selected",
    "settings_in_words",
    "spectral_density",
    "top_eigenpairs",
]
