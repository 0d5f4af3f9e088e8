"""ξ → numbers: γ̂, its rivals, their standard errors, and comparisons of minima."""

from flatminima.measures.comparison import Comparison, compare, comparison_of
from flatminima.measures.measuring import measure
from flatminima.measures.results import MEASURES, Characterization, Estimate, Settings, Share

__all__ = [
    "MEASURES",
    "Characterization",
    "Comparison",
    "Estimate",
    "Settings",
    "Share",
    "compare",
    "comparison_of",
    "measure",
]
