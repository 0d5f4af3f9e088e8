"""How one use of a parameter turns (input, output gradient) into its rows of J; one file a family of layers."""

from flatminima.gramian.rules.base import ParameterUse
from flatminima.gramian.rules.table import EXTRACTS, RULES, SPLIT

__all__ = ["EXTRACTS", "RULES", "SPLIT", "ParameterUse"]
