"""The loss along one or two directions from a minimum (Li et al. 2018, Visualizing the Loss Landscape of Neural Nets).

A picture to look at, not a measure: what it shows depends on the directions, and two dimensions of many hide saddles.
"""

from flatminima.loss_landscape.evaluation import landscape
from flatminima.loss_landscape.landscapes import Landscape

__all__ = ["Landscape", "landscape"]
