"""ξ → numbers: γ̂, its rivals, their standard errors, and comparisons of minima."""

from flatminima.measures.comparison import Comparison, compare, comparison_of
from flatminima.measures.evaluation import evaluate
from flatminima.measures.measuring import measure
from flatminima.measures.options import MeasureOptions, PlainOptions
from flatminima.measures.results import Characterization, Estimate, Settings, Share, jsonable
from flatminima.measures.robustness import input_jacobian_norms
from flatminima.measures.tables import MEASURES

__all__ = [
    "MEASURES",
    "Characterization",
    "Comparison",
    "Estimate",
    "MeasureOptions",
    "PlainOptions",
    "Settings",
    "Share",
    "compare",
    "comparison_of",
    "evaluate",
    "input_jacobian_norms",
    "jsonable",
    "measure",
]
