"""Training towards minima with a smaller Fisher trace (Jia & Su, Sec. 6, Algorithm 1)."""

from flatminima.regularizer.regularizer import FisherTraceRegularizer, RegularizerStep

__all__ = ["FisherTraceRegularizer", "RegularizerStep"]
