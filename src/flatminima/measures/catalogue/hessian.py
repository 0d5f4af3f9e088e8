"""The Hessian of the loss itself, for networks of any size (the extra ``curvature``)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from flatminima.errors import UndefinedMeasureError, first_line
from flatminima.measures.hessian_products import hessian_of
from flatminima.measures.registry import catalogued
from flatminima.measures.trial import Trial

PRODUCTS = 30
"""Hessian-vector products for the trace; up to so many parameters the whole matrix is formed."""


@catalogued("top eigenvalue of the Hessian", cost="costly", source="Keskar et al. 2017; ARPACK's Lanczos iterations")
def hessian_top_eigenvalue(trial: Trial) -> float:
    """The largest eigenvalue of ∇²L, L the mean loss of the subset.

    Raises:
        UndefinedMeasureError: without the extra, for networks without a right second derivative, or if the
            iterations fail.
    """
    with hessian_of(trial) as hessian:
        if len(hessian) <= PRODUCTS:
            return float(torch.linalg.eigvalsh(hessian.dense())[-1])
        with _extra():
            from scipy.sparse.linalg import ArpackError, LinearOperator, eigsh

        dtype = str(hessian.dtype).removeprefix("torch.")
        operator = LinearOperator(hessian.shape, matvec=hessian.times_array, dtype=dtype)
        start = torch.randn(len(hessian), generator=trial.generator(), dtype=torch.float64).to(hessian.dtype)
        tolerance = torch.finfo(hessian.dtype).eps ** 0.5  # of the eigenvector: the eigenvalue's is its square
        try:
            (top,) = eigsh(operator, k=1, which="LA", v0=start.numpy(), tol=tolerance, return_eigenvectors=False)
        except ArpackError as error:
            raise UndefinedMeasureError(f"the Lanczos iterations failed: {first_line(error)}") from None
        return float(top)


@catalogued("trace of the Hessian", cost="costly", source="Meyer et al. 2021, Hutch++ (curvlinops)")
def hessian_trace(trial: Trial) -> float:
    """The trace of ∇²L, L the mean loss of the subset: exact up to 30 parameters, or Hutch++'s estimate of 30 products.

    The estimate is unbiased, and exact up to rank 10; the standard error over trials includes what it adds.

    Raises:
        UndefinedMeasureError: without the extra, or for networks without a right second derivative.
    """
    with hessian_of(trial) as hessian:
        if len(hessian) <= PRODUCTS:
            return float(hessian.dense().trace())
        with _extra():
            from curvlinops import hutchpp_trace

        with torch.random.fork_rng([]):  # its draws are the global generator's
            torch.manual_seed(trial.generator().initial_seed())
            return float(hutchpp_trace(hessian, PRODUCTS))


@contextmanager
def _extra() -> Iterator[None]:
    try:
        yield
    except ImportError:
        raise UndefinedMeasureError("it needs curvlinops: pip install 'flatminima[curvature]'") from None
