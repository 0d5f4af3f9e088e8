"""The largest singular value of the softmax output's Jacobian with respect to a sample's input.

With A the logits' Jacobian (K × D) and p the probabilities, it is J = S A with S = diag(p) − ppᵀ, of rank K − 1. A
backward pass gives one combination uᵀJ of its rows. The square of the largest singular value is the largest eigenvalue
of the Gram matrix of orthonormal combinations: of all K − 1, or of a few that span the singular vector. These few are
found by Lanczos iterations (Rayleigh–Ritz in the Krylov space of JJᵀ), whose products Jv are second backward passes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flatminima.errors import UndefinedMeasureError, require
from flatminima.losses import refuse_non_finite
from flatminima.measures.second_derivatives import (
    differentiated,
    require_second_derivative,
)
from flatminima.network import (
    back_like,
    call_model,
    differentiating,
    frozen,
    in_float64,
)
from flatminima.parallel import is_sharded
from flatminima.torch_compat import differentiable_twice

_ALL_DIRECTIONS = 40
"""Up to so many classes all directions are back-propagated, which then takes no longer than the iterations: each of
them is a pass back to the input and one that takes longer."""

_ITERATIONS = 100
"""After so many, all directions are back-propagated: the largest singular values are too close to one another."""

_TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}
"""Relative, of the square, as estimated from the residual; about what rounding makes of all directions."""

_MISMATCH = 1e-3
"""Relative difference of ‖Jᵀu‖² and uᵀ(JJᵀu) beyond which some second derivative of PyTorch's must be wrong."""


def input_jacobian_norms(model: nn.Module, inputs: Tensor) -> Tensor:
    """‖J_x[f_w(x)]‖₂² of every sample, f_w the softmax output (Jia & Su, Sec. 7.1, "robustness").

    Exact but for the network's rounding: by K − 1 backward passes up to 40 classes, beyond by Lanczos iterations of two
    passes each, the fewer the surer the network. Where these cannot be had (a layer without second derivatives, half
    precision, a sharded model) or do not converge, by K − 1 passes again.

    Args:
        model: logits out, one floating-point tensor in; run in eval mode and left as it was found.
        inputs: (N, ...).

    Returns:
        (N,) float64.

    Raises:
        NonFiniteError: if a logit is NaN or infinite.
        UndefinedMeasureError: if a logit's derivative is.
        FlatminimaError: if the logits are not (N, K) with K ≥ 2.
    """
    with differentiating(model), frozen(model.parameters()):
        x = inputs.detach().requires_grad_()
        logits = _logits(model, x)
        if not logits.requires_grad:  # nor is any path from the input to them differentiable
            return in_float64(logits.new_zeros(len(logits)))
        if logits.shape[1] > _ALL_DIRECTIONS and _can_iterate(model, logits, x):
            del logits  # with its graph, which this way has one of its own
            squares = _by_lanczos(model, x)
            if squares is not None:
                return squares
            logits = _logits(model, x)
        return _by_all_directions(logits, x)


def input_jacobian_passes(classes: int) -> int:
    """Passes of :func:`input_jacobian_norms` for so many classes: forward, back to the input, or as long as those."""
    return min(classes, _ALL_DIRECTIONS)


def _can_iterate(model: nn.Module, logits: Tensor, x: Tensor) -> bool:
    """Unless rounding is coarse, or processes share the parameters, which must all make the same passes."""
    return {logits.dtype, x.dtype} <= set(_TOLERANCE) and not any(map(is_sharded, model.parameters()))


def _logits(model: nn.Module, x: Tensor) -> Tensor:
    logits = call_model(model, x.clone())  # a leaf cannot be written to, as some models do with their input
    require(
        logits.dim() == 2 and logits.shape[1] > 1,
        f"robustness needs logits of shape (N, K ≥ 2), the model returned {tuple(logits.shape)}",
    )
    refuse_non_finite("logits", logits)
    return logits


def _by_all_directions(logits: Tensor, x: Tensor) -> Tensor:
    """Of the K − 1 eigenvectors of S, back-propagated at unit length in the network's precision.

    They are scaled by their eigenvalues, which are tiny where p is nearly one-hot, in float64.
    """
    scales, directions = _softmax_eigenvectors(in_float64(logits.detach()))
    rows = []
    for k in range(directions.shape[2]):
        direction = back_like(directions[:, :, k], logits)
        (row,) = torch.autograd.grad(
            logits, x, direction, retain_graph=k + 1 < directions.shape[2], materialize_grads=True
        )
        rows.append(row.flatten(1))
    jacobian = _finite(in_float64(torch.stack(rows, 1))) * scales[:, :, None]
    products: Tensor = torch.linalg.eigvalsh(jacobian @ jacobian.transpose(1, 2))
    return products[:, -1]


def _finite(rows: Tensor) -> Tensor:
    if not rows.isfinite().all():
        raise UndefinedMeasureError("a derivative of the logits with respect to the input is NaN or infinite")
    return rows


def _softmax_eigenvectors(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Nonzero eigenvalues (N, K − 1) and eigenvectors (N, K, K − 1) of S = diag(p) − ppᵀ, uncancelled at p → 1."""
    p, top, others, scale = _probabilities(logits)
    shape = (p / scale)[:, :, None] * -p[:, None, :]
    remainder = others.sum(1, keepdim=True)  # 1: or 0, if all other probabilities vanish
    diagonal = (p * (1 - p) / scale).scatter(1, top, p.gather(1, top) * remainder)
    shape.diagonal(dim1=1, dim2=2).copy_(diagonal)
    eigenvalues, eigenvectors = torch.linalg.eigh(shape)
    return eigenvalues[:, 1:] * scale, eigenvectors[:, :, 1:]


def _probabilities(logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All p, and the most probable class; the other classes' probabilities divided by their sum, and this sum.

    The sum is 1 − p_top, of which a subtraction would keep few digits.
    """
    p = logits.softmax(1)
    top = logits.argmax(1, keepdim=True)
    others = p.scatter(1, top, 0)
    scale = others.sum(1, keepdim=True).clamp_min(torch.finfo(p.dtype).tiny)
    return p, top, others / scale, scale


def _by_lanczos(model: nn.Module, x: Tensor) -> Tensor | None:
    """Lanczos iterations of all samples side by side; None where they are impossible or do not converge."""
    try:
        with differentiable_twice():
            return _Jacobian(_logits(model, x), x).largest_square()
    except UndefinedMeasureError:
        return None


class _Jacobian:
    """J divided by 1 − p_top, of every sample, for products with vectors: (N, K) and (N, D), in float64."""

    def __init__(self, logits: Tensor, x: Tensor) -> None:
        self._logits, self._x = logits, x
        p, self._top, self._others, self._scale = _probabilities(in_float64(logits.detach()))
        self._p_top = p.gather(1, self._top)
        # Aᵀw as a function of w, whose derivative along v is Av
        self._direction = torch.zeros_like(logits, requires_grad=True)
        (self._row,) = torch.autograd.grad(logits, x, self._direction, create_graph=True)
        if not self._row.requires_grad:
            raise UndefinedMeasureError("the gradient with respect to the input has no graph")
        require_second_derivative([self._row])

    def largest_square(self) -> Tensor | None:
        """σ₁² of J: (N,), or None where a second derivative is wrong or the iterations do not converge."""
        count, classes = self._others.shape
        tolerance = _TOLERANCE[self._logits.dtype]
        generator = torch.Generator("cpu").manual_seed(0)
        start = torch.randn(classes, generator=generator, dtype=torch.float64, device="cpu")
        start = (start - start.mean()).to(self._others.device)  # S maps (1, ..., 1) to 0
        direction = _unit(start.expand(count, -1))
        directions = direction.new_zeros(count, 0, classes)
        rows = direction.new_zeros(count, 0, self._x[0].numel())
        for _ in range(min(classes - 1, _ITERATIONS)):
            directions = torch.cat([directions, direction[:, None]], 1)
            rows = torch.cat([rows, self.transposed_times(direction)[:, None]], 1)
            values, vectors = torch.linalg.eigh(rows @ rows.transpose(1, 2))
            largest, combination = values[:, -1], vectors[:, :, -1:]
            left, right = ((combination * basis).sum(1) for basis in (directions, rows))
            product = self.times(right)
            if not (((left * product).sum(1) - largest).abs() <= _MISMATCH * largest).all():  # NaN is none either
                return None
            residual = _orthogonal_to(directions, product)
            size = residual.norm(dim=1)
            gap = largest - values[:, -2] if values.shape[1] > 1 else torch.zeros_like(largest)
            tiny = torch.finfo(gap.dtype).tiny
            error = torch.minimum(size, size.square() / gap.clamp_min(tiny))  # Parlett 1998, Theorem 11.7.1
            if (error <= tolerance * largest).all():
                squares: Tensor = largest * self._scale.flatten().square()
                return squares
            direction = _unit(_orthogonal_to(directions, residual))
        return None

    def transposed_times(self, direction: Tensor) -> Tensor:
        """Jᵀu, from a vector of length 1 at the logits."""
        cotangent = self._softmax_product(direction)
        length = cotangent.norm(dim=1, keepdim=True)
        (row,) = torch.autograd.grad(
            self._logits, self._x, back_like(_unit(cotangent), self._logits), retain_graph=True, materialize_grads=True
        )
        product: Tensor = _finite(in_float64(row.flatten(1))) * length
        return product

    def times(self, right: Tensor) -> Tensor:
        """Jv."""
        length = right.norm(dim=1, keepdim=True)
        tangent = back_like(_unit(right), self._x).view_as(self._x)
        (pushed,) = differentiated([self._row], [self._direction], [tangent], retain_graph=True)
        return self._softmax_product(in_float64(pushed) * length)

    def _softmax_product(self, u: Tensor) -> Tensor:
        """Su divided by 1 − p_top, uncancelled at p → 1: (Su)_k = p_k (d_k − Σ_j p_j d_j) with d_k = u_k − u_top."""
        differences = u - u.gather(1, self._top)
        mean = (self._others * differences).sum(1, keepdim=True)
        product = self._others * (differences - self._scale * mean)
        whole: Tensor = product.scatter(1, self._top, -self._p_top * mean)
        return whole


def _unit(vectors: Tensor) -> Tensor:
    """Of length 1; zero stays zero."""
    lengths: Tensor = vectors.norm(dim=1, keepdim=True)
    return vectors / lengths.clamp_min(torch.finfo(vectors.dtype).tiny)


def _orthogonal_to(basis: Tensor, vectors: Tensor) -> Tensor:
    """What is left of (N, K) vectors outside the span of their (N, j, K) orthonormal rows."""
    inside = torch.einsum("njk,nk->nj", basis, vectors)
    return vectors - torch.einsum("njk,nj->nk", basis, inside)
