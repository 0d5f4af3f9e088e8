"""Training towards minima with a smaller Fisher trace (Jia & Su, Sec. 6, Algorithm 1)."""

from flatminima.choices import Estimator, MainGradient
from flatminima.regularizer.penalty import Penalty
from flatminima.regularizer.regularizer import FisherTraceRegularizer, LossFunction
from flatminima.regularizer.steps import RegularizerStep
from flatminima.regularizer.sub_batches import SeveralBatches, Weights, scalar_loss
from flatminima.regularizer.suggestion import Suggestion, suggest

__all__ = [
    "Estimator",
    "FisherTraceRegularizer",
    "LossFunction",
    "MainGradient",
    "Penalty",
    "RegularizerStep",
    "SeveralBatches",
    "Suggestion",
    "Weights",
    "scalar_loss",
    "suggest",
]
