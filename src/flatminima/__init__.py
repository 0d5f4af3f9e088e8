"""Which minimum generalizes better, and how to train to it: the Fisher information, for PyTorch."""

from flatminima.comparison import Comparison, compare
from flatminima.gramian import gram
from flatminima.losses import BinaryCrossEntropy, CrossEntropy
from flatminima.measures import Characterization, Estimate, measure
from flatminima.regularizer import FisherTraceRegularizer
from flatminima.theory import pac_bayes_bound

__all__ = [
    "BinaryCrossEntropy",
    "Characterization",
    "Comparison",
    "CrossEntropy",
    "Estimate",
    "FisherTraceRegularizer",
    "compare",
    "gram",
    "measure",
    "pac_bayes_bound",
]
