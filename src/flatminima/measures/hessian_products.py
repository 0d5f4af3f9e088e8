"""Products with the Hessian of a mean loss, and its top eigenvectors, for networks of any size.

They are formed by differentiating the gradient once more. curvlinops' own operator differentiates forward over
PyTorch's ``jacrev``, which with PyTorch 2.13 gives a wrong Hessian where there is a layer normalization. The other way,
too, some of PyTorch's second derivatives are wrong (weight normalization's); such a matrix is not symmetric, which is
looked at first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from flatminima.errors import UndefinedMeasureError, first_line
from flatminima.measures.loss_surface import Surface, gradients_with_graph
from flatminima.measures.second_derivatives import (
    PASSES_AT_ONCE,
    differentiated,
    require_second_derivative,
)
from flatminima.torch_compat import differentiable_twice

SMALL = 30
"""Up to so many parameters the whole matrix is formed."""

_SYMMETRY = {torch.float32: 1e-3, torch.float64: 1e-7}
"""How far uᵀHv may be from vᵀHu, relative to ‖Hu‖ + ‖Hv‖; rounding makes some 1e-5 and 1e-14 of it."""


class Hessian:
    """The Hessian of the mean loss over the trainable parameters, a matrix for vectors on the CPU.

    Where memory holds all samples, the gradient is formed once for all products.
    """

    def __init__(self, surface: Surface) -> None:
        at_once = max(1, surface.samples_at_once // PASSES_AT_ONCE)
        self._surface = dataclasses.replace(surface, samples_at_once=at_once)
        self._parameters = list(surface.parameters.values())
        self._sizes = [parameter.numel() for parameter in self._parameters]
        self._gradient = next(self._gradients()) if at_once >= surface.size else None
        self.shape = len(self), len(self)
        self.dtype, self.device = self._parameters[0].dtype, torch.device("cpu")
        self.after_product: Callable[[], None] = lambda: None

    def __len__(self) -> int:
        return sum(self._sizes)

    def __matmul__(self, vectors: Tensor) -> Tensor:
        return torch.stack([self.times(vector) for vector in vectors.unbind(1)], 1)

    def require_symmetry(self, generator: torch.Generator) -> None:
        """Compare uᵀHv with vᵀHu for random u and v, which costs two products.

        Raises:
            UndefinedMeasureError: if they differ by more than rounding.
        """
        u, v = torch.randn(2, len(self), generator=generator, dtype=torch.float64, device="cpu").to(self.dtype)
        Hu, Hv = self.times(u), self.times(v)
        difference, size = float(u @ Hv - v @ Hu), float(Hu.norm() + Hv.norm())
        if abs(difference) > _SYMMETRY[self.dtype] * size:
            raise UndefinedMeasureError(
                f"the Hessian that PyTorch gives is not symmetric (by {abs(difference) / size:.1e}), so that some "
                "layer's second derivative must be wrong; weight normalization's is known to be"
            )

    def dense(self) -> Tensor:
        """The whole matrix, by as many products as it has columns."""
        return self @ torch.eye(len(self), dtype=self.dtype, device=self.device)

    def times_array(self, vector: Any) -> Any:
        """As :meth:`times`, of arrays."""
        return self.times(torch.from_numpy(vector).flatten()).numpy()

    def times(self, vector: Tensor) -> Tensor:
        """(W,) → (W,)."""
        parts = torch.split(vector.to(self._parameters[0].device), self._sizes)
        direction = [part.view_as(parameter) for part, parameter in zip(parts, self._parameters, strict=True)]
        product = torch.zeros_like(vector)
        for gradient in self._gradients() if self._gradient is None else [self._gradient]:
            product += self._derivative(gradient, direction).to(product.device)
        self.after_product()
        return product

    def _gradients(self) -> Iterator[tuple[Tensor, ...]]:
        for gradient in gradients_with_graph(self._surface, self._parameters):
            require_second_derivative(gradient)
            yield gradient

    def _derivative(self, gradient: tuple[Tensor, ...], direction: list[Tensor]) -> Tensor:
        """Of a gradient along a direction."""
        used = [(part, along) for part, along in zip(gradient, direction, strict=True) if part.requires_grad]
        outputs, along = [part for part, _ in used], [part for _, part in used]
        products = differentiated(outputs, self._parameters, along, retain_graph=self._gradient is not None)
        return torch.cat([product.to_dense().flatten() for product in products])  # an embedding's may be sparse


@contextmanager
def hessian_of(surface: Surface, generator: torch.Generator) -> Iterator[Hessian]:
    """The Hessian of a mean loss, found to be symmetric by vectors that ``generator`` draws.

    Raises:
        UndefinedMeasureError: for networks without a right second derivative, for sharded ones, and for half precision.
    """
    for name, parameter in surface.parameters.items():
        if parameter.dtype not in _SYMMETRY:
            raise UndefinedMeasureError(
                f"parameter {name} is {parameter.dtype}, too coarse for second derivatives: pass a copy in float32"
            )
    with differentiable_twice():
        hessian = Hessian(surface)
        hessian.require_symmetry(generator)
        yield hessian


def top_eigenpairs(hessian: Hessian, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The algebraically largest eigenvalues, descending, and their eigenvectors: ARPACK's Lanczos iterations (scipy).

    Of a small Hessian all are formed.

    Args:
        hessian: (W, W).
        count: how many.
        generator: draws the vector that the iterations begin with.

    Returns:
        (count,) and (W, count), float64 on the CPU; eigenvectors are of length 1, their largest entries positive.

    Raises:
        UndefinedMeasureError: the iterations fail, or do not converge.
        ModuleNotFoundError: without scipy.
    """
    if len(hessian) <= SMALL:
        values, vectors = (found.flip(-1)[..., :count] for found in torch.linalg.eigh(hessian.dense().double()))
    else:
        from scipy.sparse.linalg import ArpackError, LinearOperator, eigsh

        dtype = str(hessian.dtype).removeprefix("torch.")
        operator = LinearOperator(hessian.shape, matvec=hessian.times_array, dtype=dtype)
        start = torch.randn(len(hessian), generator=generator, dtype=torch.float64, device="cpu").to(hessian.dtype)
        tolerance = torch.finfo(hessian.dtype).eps ** 0.5  # of the eigenvector: the eigenvalue's is its square
        try:
            found = eigsh(operator, k=count, which="LA", v0=start.numpy(), tol=tolerance)
        except ArpackError as error:
            raise UndefinedMeasureError(f"the Lanczos iterations failed: {first_line(error)}") from None
        values, vectors = (torch.from_numpy(array).double() for array in found)
        order = values.argsort(descending=True)
        values, vectors = values[order], vectors[:, order]
    largest = vectors.abs().argmax(0, keepdim=True)
    return values, vectors * vectors.gather(0, largest).sign()
