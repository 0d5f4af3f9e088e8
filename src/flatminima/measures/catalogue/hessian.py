"""The Hessian of the loss itself, for networks of any size, by curvlinops (the extra ``curvature``)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from flatminima.errors import UndefinedMeasureError, first_line
from flatminima.gramian import unwrapped
from flatminima.losses import Loss, mean_loss
from flatminima.measures.registry import catalogued
from flatminima.measures.trial import Trial
from flatminima.network import Inputs, call_model, take

PRODUCTS = 30
"""Hessian-vector products for the trace; up to so many parameters the whole matrix is formed."""

_PASSES_AT_ONCE = 4
"""A product takes the memory of so many forward and backward passes: it is a derivative along a direction of one."""


@catalogued("top eigenvalue of the Hessian", cost="costly", source="Keskar et al. 2017; curvlinops, ARPACK")
def hessian_top_eigenvalue(trial: Trial) -> float:
    """The largest eigenvalue of ∇²L of the subset's mean loss, by Lanczos iterations from a start of the trial's own.

    Raises:
        UndefinedMeasureError: without curvlinops; for networks that have no second derivative by it; or if the
            iterations do not converge.
    """
    with _hessian_of(trial) as hessian:
        if len(hessian) <= PRODUCTS:
            return float(torch.linalg.eigvalsh(hessian.dense())[-1])
        from scipy.sparse.linalg import ArpackError, LinearOperator, eigsh

        operator = LinearOperator(hessian.shape, matvec=hessian.of_array, dtype=_name(hessian.dtype))
        start = torch.randn(len(hessian), generator=trial.generator(), dtype=torch.float64).to(hessian.dtype)
        tolerance = torch.finfo(hessian.dtype).eps ** 0.5  # the error of an eigenvalue is of its square
        try:
            (top,) = eigsh(operator, k=1, which="LA", v0=start.numpy(), tol=tolerance, return_eigenvectors=False)
        except ArpackError as error:
            raise UndefinedMeasureError(f"the Lanczos iterations failed: {first_line(error)}") from None
        return float(top)


@catalogued("trace of the Hessian", cost="costly", source="Meyer et al. 2021 (Hutch++); curvlinops")
def hessian_trace(trial: Trial) -> float:
    """The trace of the subset's mean ∇²L: exact up to 30 parameters, otherwise estimated by Hutch++ of 30 products.

    The estimate is unbiased, and exact up to rank 10; the standard error over trials includes what it adds.

    Raises:
        UndefinedMeasureError: without curvlinops, or for networks that have no second derivative by it.
    """
    with _hessian_of(trial) as hessian:
        if len(hessian) <= PRODUCTS:
            return hessian.dense().trace().item()
        from curvlinops import hutchpp_trace

        with torch.random.fork_rng([]):  # its draws are those of the global generator
            torch.manual_seed(trial.generator().initial_seed())
            return float(hutchpp_trace(hessian, PRODUCTS))


@dataclass(frozen=True)
class _Hessian:
    """A curvlinops operator as seen from the CPU, where its vectors are, one product at a time.

    Attributes:
        operator: (W, W), on the network's device.
    """

    operator: Any

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def __len__(self) -> int:
        return int(self.operator.shape[0])

    @property
    def shape(self) -> tuple[int, int]:
        return len(self), len(self)

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.operator.dtype
        return dtype

    def __matmul__(self, vectors: Tensor) -> Tensor:
        return torch.stack([self._product(vector) for vector in vectors.unbind(1)], 1)

    def of_array(self, vector: Any) -> Any:
        return self._product(torch.as_tensor(vector).flatten()).numpy()

    def dense(self) -> Tensor:
        return self @ torch.eye(len(self), dtype=self.dtype)

    def _product(self, vector: Tensor) -> Tensor:
        try:
            product: Tensor = self.operator @ vector.to(self.operator.device)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, NotImplementedError) as error:
            raise UndefinedMeasureError(
                f"the network has no second derivative by curvlinops: {first_line(error)}"
            ) from error
        return product.detach().to(self.device)


@contextmanager
def _hessian_of(trial: Trial) -> Iterator[_Hessian]:
    """The Hessian of the subset's mean loss over the trainable parameters; fused attention has no second derivative."""
    try:
        from curvlinops import HessianLinearOperator
    except ImportError:
        raise UndefinedMeasureError("it needs curvlinops: pip install 'flatminima[curvature]'") from None
    samples = torch.arange(len(trial.targets), device=trial.targets.device)
    at_once = max(1, trial.samples_at_once // _PASSES_AT_ONCE)
    parts = list(zip(torch.split(samples, at_once), torch.split(trial.targets, at_once), strict=True))
    with sdpa_kernel(SDPBackend.MATH):
        yield _Hessian(
            HessianLinearOperator(
                _OfSamples(unwrapped(trial.model), trial.inputs),
                _MeanLoss(trial.loss),
                list(trial.parameters.values()),
                parts,
                check_deterministic=False,
                num_data=len(samples),
            )
        )


class _OfSamples(nn.Module):
    """A model as a function of samples' indices, as curvlinops takes one tensor."""

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        super().__init__()
        self.model, self.inputs = model, inputs

    def forward(self, samples: Tensor) -> Tensor:
        return call_model(self.model, take(self.inputs, samples))


class _MeanLoss(nn.Module):
    reduction = "mean"

    def __init__(self, loss: Loss) -> None:
        super().__init__()
        self.loss = loss  # a module, too, but one without parameters

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        return mean_loss(self.loss, logits, targets)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
