"""The rival measure of Sokolić et al. (2017), the spectral norm of the network's input Jacobian."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flatminima.errors import UndefinedMeasureError, require
from flatminima.losses import refuse_non_finite
from flatminima.measures.registry import catalogued
from flatminima.measures.trial import Trial
from flatminima.network import (
    back_like,
    call_model,
    evaluating,
    frozen,
    in_float64,
    sound_batchnorm,
    true_precision,
)
from flatminima.torch_compat import without_checkpoints

_PASSES = 2.5
"""A forward and backward pass of a sample takes as long as so many of its passes back to the input, or forward ones:
these take 0.37 to 0.4 of it (benchmarks/results/gram.json), the Gram matrices and small batches a little more."""


@catalogued("robustness", cost="pass", source="Jia & Su 2020, Sec. 7.1; Sokolić et al. 2017", paper=True)
def robustness(trial: Trial) -> float:
    """mean_i ‖J_x[f_w(x_i)]‖₂² over as many samples as the options say, or as one pass of the subset pays for.

    Raises:
        UndefinedMeasureError: for data, outputs or targets that have none, and where the options leave it out.
    """
    if trial.options.robustness_samples == 0:
        raise UndefinedMeasureError("robustness_samples=0 leaves it out")
    if not (isinstance(trial.inputs, Tensor) and trial.inputs.is_floating_point()):
        raise UndefinedMeasureError("the input is not one floating-point tensor")
    samples = robustness_sample_count(len(trial.targets), trial.require_classes(), trial.options.robustness_samples)
    return input_jacobian_norms(trial.model, trial.inputs[:samples]).mean().item()


def robustness_sample_count(subset_size: int, classes: int, asked: int | None) -> int:
    """Of a subset, those that the robustness is computed on: one forward and K − 1 backward passes each.

    Args:
        subset_size: N'.
        classes: K.
        asked: as the options have it; None: as many as cost a forward and backward pass of the subset.
    """
    wanted = max(1, int(_PASSES * subset_size / classes)) if asked is None else asked
    return min(wanted, subset_size)


def input_jacobian_norms(model: nn.Module, inputs: Tensor) -> Tensor:
    """‖J_x[f_w(x)]‖₂² of every sample, f_w the softmax output (Jia & Su, Sec. 7.1, "robustness").

    Exact: J = S A with A the logits' Jacobian (K × D) and S = diag(p) − ppᵀ (K × K, rank K − 1). The K − 1 eigenvectors
    of S are back-propagated at unit length, in the network's precision, and scaled by their eigenvalues, which are
    tiny where p is nearly one-hot, in float64; the norm is that of a (K − 1)² Gram matrix.

    Args:
        model: logits out, one floating-point tensor in; run in eval mode and left as it was found.
        inputs: (N, ...).

    Returns:
        (N,) float64.

    Raises:
        NonFiniteError: if a logit is NaN or infinite.
        FlatminimaError: if the logits are not (N, K) with K ≥ 2.
    """
    with (
        evaluating(model),
        true_precision(),
        torch.enable_grad(),
        frozen(model.parameters()),
        sound_batchnorm(),
        without_checkpoints(),
    ):
        x = inputs.detach().requires_grad_()
        logits = call_model(model, x.clone())  # a leaf cannot be written to, as some models do with their input
        require(
            logits.dim() == 2 and logits.shape[1] > 1,
            f"robustness needs logits of shape (N, K ≥ 2), the model returned {tuple(logits.shape)}",
        )
        refuse_non_finite("logits", logits)
        if not logits.requires_grad:  # nor is any path from the input to them differentiable
            return in_float64(logits.new_zeros(len(logits)))
        scales, directions = _softmax_jacobian(in_float64(logits.detach()))
        rows = []
        for k in range(directions.shape[2]):
            direction = back_like(directions[:, :, k], logits)
            (row,) = torch.autograd.grad(
                logits, x, direction, retain_graph=k + 1 < directions.shape[2], materialize_grads=True
            )
            rows.append(row.flatten(1))
    jacobian = in_float64(torch.stack(rows, 1)) * scales[:, :, None]
    products: Tensor = torch.linalg.eigvalsh(jacobian @ jacobian.transpose(1, 2))
    return products[:, -1]


def _softmax_jacobian(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Nonzero eigenvalues (N, K − 1) and eigenvectors (N, K, K − 1) of S = diag(p) − ppᵀ, uncancelled at p → 1."""
    p = logits.softmax(1)
    top = logits.argmax(1, keepdim=True)
    rest = p.scatter(1, top, 0)
    remainder = rest.sum(1, keepdim=True)  # 1 − p_top, of which the subtraction would keep few digits
    scale = remainder.clamp_min(torch.finfo(p.dtype).tiny)
    shape = (p / scale)[:, :, None] * -p[:, None, :]
    diagonal = (p * (1 - p) / scale).scatter(1, top, p.gather(1, top) * remainder / scale)
    shape.diagonal(dim1=1, dim2=2).copy_(diagonal)
    eigenvalues, eigenvectors = torch.linalg.eigh(shape)
    return eigenvalues[:, 1:] * scale, eigenvectors[:, :, 1:]
