"""Which minimum generalizes better, and how to train to it: the Fisher information, for PyTorch."""

from flatminima.exact import exact_fisher, exact_gamma, exact_hessian
from flatminima.gramian import gram
from flatminima.loss_landscape import Landscape, landscape
from flatminima.losses import BinaryCrossEntropy, CrossEntropy
from flatminima.measures import Characterization, Comparison, Estimate, MeasureOptions, compare, measure
from flatminima.regularizer import FisherTraceRegularizer
from flatminima.theory import (
    fia_criterion,
    fia_criterion_of,
    gamma_from_subsets,
    pac_bayes_bound,
    pac_bayes_bound_of,
)
from flatminima.tracking import Tracker

__all__ = [
    "BinaryCrossEntropy",
    "Characterization",
    "Comparison",
    "CrossEntropy",
    "Estimate",
    "FisherTraceRegularizer",
    "Landscape",
    "MeasureOptions",
    "Tracker",
    "compare",
    "exact_fisher",
    "exact_gamma",
    "exact_hessian",
    "fia_criterion",
    "fia_criterion_of",
    "gamma_from_subsets",
    "gram",
    "landscape",
    "measure",
    "pac_bayes_bound",
    "pac_bayes_bound_of",
]
