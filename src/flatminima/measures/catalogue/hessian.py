"""The Hessian of the loss itself, for networks of any size (the extra ``curvature``)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from flatminima.errors import UndefinedMeasureError
from flatminima.measures.hessian_products import SMALL, hessian_of, top_eigenpairs
from flatminima.measures.registry import catalogued
from flatminima.measures.trial import Trial

PRODUCTS = 30
"""Hessian-vector products for the trace."""


@catalogued("top eigenvalue of the Hessian", cost="costly", source="Keskar et al. 2017; ARPACK's Lanczos iterations")
def hessian_top_eigenvalue(trial: Trial) -> float:
    """The largest eigenvalue of ∇²L, L the mean loss of the subset.

    Raises:
        UndefinedMeasureError: without the extra, for networks without a right second derivative, or if the
            iterations fail.
    """
    with hessian_of(trial, trial.generator()) as hessian, _extra():
        return float(top_eigenpairs(hessian, 1, trial.generator())[0])


@catalogued("trace of the Hessian", cost="costly", source="Meyer et al. 2021, Hutch++ (curvlinops)")
def hessian_trace(trial: Trial) -> float:
    """The trace of ∇²L, L the mean loss of the subset: exact up to 30 parameters, or Hutch++'s estimate of 30 products.

    The estimate is unbiased, and exact up to rank 10; the standard error over trials includes what it adds.

    Raises:
        UndefinedMeasureError: without the extra, or for networks without a right second derivative.
    """
    with hessian_of(trial, trial.generator()) as hessian:
        if len(hessian) <= SMALL:
            return float(hessian.dense().trace())
        with _extra():
            from curvlinops import hutchpp_trace

        with torch.random.fork_rng([]):  # its draws are the global generator's
            torch.default_generator.manual_seed(trial.generator().initial_seed())  # not those of other devices
            return float(hutchpp_trace(hessian, PRODUCTS))


@contextmanager
def _extra() -> Iterator[None]:
    try:
        yield
    except ImportError:
        raise UndefinedMeasureError("it needs curvlinops: pip install 'flatminima[curvature]'") from None
