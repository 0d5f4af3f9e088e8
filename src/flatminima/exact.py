"""The exact W × W matrices of Jia & Su, Sec. 4–5, for networks small enough to have them.

They are what the scalable measures approximate, and the oracle these can be checked against: the observed Fisher
information I(w) (Eq. 2, 4), the Hessian of the training loss (Eq. 1) and γ = ln det I(w0) (Eq. 3). Everything is
formed by plain autograd in float64 on a copy of the model, one sample and one class at a time.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatminima.errors import FlatminimaError, RankDeficientError, WrongGradientError, described, require
from flatminima.gramian import trainable_parameters, unwrapped
from flatminima.losses import off_target_log_probabilities, refuse_non_finite
from flatminima.measures import differentiated, require_second_derivative
from flatminima.network import (
    Inputs,
    batch_size,
    call_model,
    call_model_without_graph,
    depended_on,
    explained_errors,
    map_tensors,
    sound_batchnorm,
    take,
    tensors_of,
    undisturbed,
    warn_unused,
)
from flatminima.torch_compat import differentiable_twice, without_checkpoints

MAX_PARAMETERS = 4096
"""Larger networks are refused: a single W × W matrix is then 128 MiB, and its decomposition takes minutes."""

LABEL_SUM_TOLERANCE = 1e-5
"""How far a label distribution may be from summing to one: float32 rounding over many classes."""

_HESSIAN_CHUNK = 256
"""Samples whose graph is held at once for second derivatives."""

_SYMMETRY = 1e-3
"""Allowed asymmetry of a Hessian, relative to its largest entry: at a minimum its rounding is that of larger terms."""

Labels = Tensor | Literal["model"]
"""The label distributions y: (N,) integer class indices (one-hot), (N, K) probabilities, or ``"model"``: the model's
own probabilities f_w(x), which are the labels at the label-smoothed optimum that Sec. 4 assumes."""


def exact_fisher(model: nn.Module, inputs: Inputs, labels: Labels) -> Tensor:
    """The observed Fisher information over all trainable parameters (Eq. 2; with one-hot labels Eq. 4).

        I(w) = (1/N) Σ_{(x,y)} Σ_i y_i ∇ℓ_x(w)_i ∇ℓ_x(w)_iᵀ,   ℓ_x(w)_i = −ln f_w(x)_i.

    One-hot labels are *not* a small change where a determinant is concerned: a sample whose label the network gives the
    probability 1 − ε contributes O(ε) with y = f_w(x), but O(ε²) with its one-hot form (with two classes exactly
    ε/(1 − ε) times as much). Never compare a γ by Eq. 2 with one by Eq. 4.

    Args:
        model: a small network with logits (N, K); run in eval mode, on a float64 copy on the CPU.
        inputs: a tensor, a tuple (``model(*inputs)``) or a mapping (``model(**inputs)``) of tensors with N rows.
        labels: y, see :data:`Labels`.

    Returns:
        (W, W) float64 on the CPU, symmetric positive semidefinite. Rows follow ``model.parameters()``, trainable ones
        only, each flattened.

    Raises:
        FlatminimaError: for more than ``MAX_PARAMETERS`` parameters (states the bytes needed), or unsuitable labels.
        NonFiniteError: for NaN or infinity in weights or logits.

    Example:
        >>> import torch
        >>> model, x = torch.nn.Linear(4, 3), torch.randn(20, 4)
        >>> exact_fisher(model, x, "model").shape
        torch.Size([15, 15])
    """
    factor = _fisher_factor(model, inputs, labels)
    return factor.T @ factor


def exact_gamma(model: nn.Module, inputs: Inputs, labels: Labels) -> float:
    """γ(w0) = ln det I(w0) (Eq. 3), natural logarithm.

    Defined only where I(w0) has full rank W (Assumption 1). **An ordinary softmax classifier never has it**: adding the
    same function of the last features to all K logits changes nothing, which takes at least one dimension per input
    of the last layer, beside dead or identical units. Pin one class's logit to zero (K − 1 outputs) to have a γ; γ̂
    (``measure``) needs only N' ≤ rank.

    It is the sum over singular values of the matrix of gradients, scaled to columns of norm one, so that neither a
    determinant that under- or overflows nor parameters of unlike scale cost digits.

    Args:
        model: as for :func:`exact_fisher`.
        inputs: as for :func:`exact_fisher`; N (Eq. 4) or N·(K − 1) (Eq. 2) must reach W.
        labels: as for :func:`exact_fisher`; γ̂ of ``measure`` corresponds to class indices.

    Raises:
        RankDeficientError: if I(w0) is singular to float64; gives its rank.
        FlatminimaError: as for :func:`exact_fisher`.
        NonFiniteError: as for :func:`exact_fisher`.
    """
    factor = _fisher_factor(model, inputs, labels)
    W = factor.shape[1]
    norms = factor.norm(dim=0)
    singular_values = torch.linalg.svdvals(factor / norms.where(norms > 0, 1))
    tolerance = W * torch.finfo(torch.float64).eps * singular_values[0]
    rank = int((singular_values > tolerance).sum())
    if rank < W:
        raise RankDeficientError(
            f"I(w0) is singular (rank {rank} of W = {W}), so γ = ln det I(w0) is undefined: {_why_singular(factor)}; "
            "γ̂ of `measure` needs only subset_size ≤ rank"
        )
    return float(2 * (singular_values.log().sum() + norms.log().sum()))


def exact_hessian(model: nn.Module, inputs: Inputs, labels: Labels) -> Tensor:
    """The Hessian ∇²_w L(S, w) of the mean cross entropy over all trainable parameters.

    At a minimum with f_w0(x) = y for every sample it equals the observed Fisher information of the same labels (Eq. 1);
    elsewhere it need not even be positive semidefinite. With piecewise linear activations (ReLU) it is the Hessian of
    the piece that w lies in.

    Args:
        model: as for :func:`exact_fisher`.
        inputs: as for :func:`exact_fisher`.
        labels: as for :func:`exact_fisher`, held constant under differentiation.

    Returns:
        (W, W) float64 on the CPU, ordered as in :func:`exact_fisher`.

    Raises:
        FlatminimaError: as for :func:`exact_fisher`.
        NonFiniteError: as for :func:`exact_fisher`.
        UndefinedMeasureError: if an operation has no second derivative.
        WrongGradientError: if what PyTorch gives is not symmetric.
    """
    model = unwrapped(model)
    with undisturbed(model), torch.enable_grad(), differentiable_twice():
        reference = _Reference.of(model, inputs, labels)
        W, n = reference.num_parameters, len(reference.y)
        hessian = torch.zeros(W, W, dtype=torch.float64, device="cpu")
        for start in range(0, n, _HESSIAN_CHUNK):
            chunk = slice(start, start + _HESSIAN_CHUNK)
            loss = F.cross_entropy(reference.logits(chunk), reference.y[chunk], reduction="sum") / n
            # with a history of the gradient that comes to them, functions that end it are found
            gradient = reference.gradient(loss, torch.ones_like(loss, requires_grad=True), create_graph=True)
            require_second_derivative([gradient])
            for i in range(W if gradient.requires_grad else 0):
                hessian[i] += _flat(differentiated([gradient[i]], reference.parameters, retain_graph=True))
    _require_symmetric(hessian)
    return hessian


def _require_symmetric(hessian: Tensor) -> None:
    difference, size = (hessian - hessian.T).abs().max().item(), hessian.abs().max().item()
    if difference > _SYMMETRY * size:
        raise WrongGradientError(
            f"the Hessian that PyTorch gives is not symmetric (by {difference / size:.1e} of its largest entry): some "
            "layer's second derivative must be wrong, as weight normalization's is known to be (PyTorch 2.13); fold it "
            "into the weights (torch.nn.utils.parametrize.remove_parametrizations)"
        )


@dataclass(frozen=True)
class _Reference:
    """A float64 copy of the model on the CPU, with its data and label distributions.

    Attributes:
        model: in eval mode.
        inputs: N samples.
        y: (N, K) float64, the label distributions.
        parameters: the trainable ones.
    """

    model: nn.Module
    inputs: Inputs
    y: Tensor
    parameters: list[nn.Parameter]

    @classmethod
    def of(cls, model: nn.Module, inputs: Inputs, labels: Labels) -> _Reference:
        trainable = trainable_parameters(model)
        for name, parameter in trainable.items():
            require(not parameter.is_complex(), f"parameter {name!r} is {parameter.dtype}: exact forms need real ones")
        W = sum(p.numel() for p in trainable.values())
        if W > MAX_PARAMETERS:
            raise FlatminimaError(
                f"the exact matrix of W = {W:,} parameters needs {8 * W**2:,} bytes, and exact forms stop at "
                f"W = {MAX_PARAMETERS:,}: use `measure`, or freeze parameters"
            )
        if batch_size(inputs if isinstance(labels, str) else (inputs, labels)) == 0:
            raise FlatminimaError("no samples: pass the training set")
        original, model = model, _copied(model).cpu().double().eval()
        inputs = map_tensors(_on_cpu, inputs)
        with explained_errors(model, inputs, f"the float64 copy of {type(model).__name__} on the CPU"):
            logits = call_model_without_graph(model, inputs)
        if logits.dim() != 2 or len(logits) != batch_size(inputs) or logits.shape[1] < 2:
            raise FlatminimaError(
                f"exact forms need logits of shape (N, K ≥ 2) for N = {batch_size(inputs)} samples, the model returned "
                f"{tuple(logits.shape)}"
            )
        refuse_non_finite("logits", logits)
        reference = cls(
            model, inputs, _distributions(labels, logits), [p for p in model.parameters() if p.requires_grad]
        )
        reference.require_independence(original)
        reference.warn_unused()
        return reference

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters)

    def require_independence(self, original: nn.Module) -> None:
        """Go on only where the copy runs on its own weights: a forward that is no method may hold the model itself."""
        with torch.enable_grad():
            used = depended_on(self.logits(slice(0, 1)), _trainable(original))
        if used:
            raise FlatminimaError(
                f"a copy of {type(original).__name__} runs on the weights of the original, which some function holds "
                "(assigned to `forward`?), so there is no float64 copy: define forward as a method of the class"
            )

    def warn_unused(self) -> None:
        """Warn of parameters that the copy does not depend on in eval mode, but in training mode."""
        trainable = _trainable(self.model)
        with torch.enable_grad():
            used = depended_on(self.logits(slice(None)), trainable)
        warn_unused(self.model, self.inputs, trainable.keys() - used)

    def logits(self, samples: slice) -> Tensor:
        with sound_batchnorm(), without_checkpoints():
            return call_model(self.model, take(self.inputs, samples))

    def gradient(self, output: Tensor, weight: Tensor | None = None, *, create_graph: bool = False) -> Tensor:
        """(W,): the gradient of ⟨weight, output⟩ over all parameters; zero for unused ones. Keeps the graph."""
        return _flat(
            torch.autograd.grad(
                output, self.parameters, weight, retain_graph=True, create_graph=create_graph, materialize_grads=True
            )
        )


def _trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _flat(gradients: Sequence[Tensor]) -> Tensor:
    """One after the other; those of embeddings may be sparse."""
    return torch.cat([gradient.to_dense().flatten() for gradient in gradients])


def _copied(model: nn.Module) -> nn.Module:
    """A deep copy. What earlier passes have left in the modules with a graph, which cannot be copied, is detached.

    Such as activations, and weights that a hook computes anew in every pass (pruning, older normalizations).
    """
    try:
        left = [tensor for module in model.modules() for tensor in tensors_of(list(vars(module).values()))]
        detached: dict[int, Any] = {id(tensor): tensor.detach().clone() for tensor in left if not tensor.is_leaf}
        copied = copy.deepcopy(model, detached)
    except Exception as error:
        raise FlatminimaError(
            f"{type(model).__name__} cannot be copied, and exact forms need a float64 copy: {described(error)}; remove "
            "what it holds beside weights and layers"
        ) from error
    for parameter in copied.parameters():
        if not parameter.is_leaf:  # TorchScript's copies come from the originals
            parameter.detach_().requires_grad_()
    return copied


def _fisher_factor(model: nn.Module, inputs: Inputs, labels: Labels) -> Tensor:
    """A with AᵀA = I(w): the triangular factor of the matrix with rows √(y_i/N) ∇ℓ_x(w)_i, or, of few, these rows.

    The factor keeps the digits that the product AᵀA would square away.
    """
    model = unwrapped(model)
    with undisturbed(model):
        reference = _Reference.of(model, inputs, labels)
        W, n = reference.num_parameters, len(reference.y)
        factor = torch.zeros(0, W, dtype=torch.float64, device="cpu")
        pending: list[Tensor] = []
        for sample in range(n):
            pending += _weighted_gradients(reference, sample)
            if len(pending) >= W or sample + 1 == n:
                factor = torch.linalg.qr(torch.cat([factor, torch.stack(pending)]), mode="r").R
                pending = []
    return factor / math.sqrt(n)


def _weighted_gradients(reference: _Reference, sample: int) -> list[Tensor]:
    """√y_i ∇ℓ_i of one sample, for every class i with y_i > 0."""
    y = reference.y[sample]
    rows = []
    with torch.enable_grad():
        logits = reference.logits(slice(sample, sample + 1))
        for i in y.nonzero().flatten():
            delta = off_target_log_probabilities(logits.detach(), i[None]).exp()
            delta[0, i] = -delta.sum()  # p_i − 1, without the cancellation
            rows.append(reference.gradient(logits, y[i].sqrt() * delta))
    return rows


def _distributions(labels: Labels, logits: Tensor) -> Tensor:
    """The label distributions (N, K) in float64."""
    if isinstance(labels, str):
        if labels != "model":
            raise FlatminimaError(f"unknown labels {labels!r}: pass class indices, probabilities or 'model'")
        return logits.softmax(1)
    if not isinstance(labels, Tensor):
        raise FlatminimaError(f"labels must be a tensor or 'model', got {type(labels).__name__}: convert them")
    labels, classes = _on_cpu(labels), logits.shape[1]
    if labels.dim() == 1 and not labels.is_floating_point():
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= classes:
            raise FlatminimaError(f"class indices run from {low} to {high} but the model has {classes} outputs")
        return F.one_hot(labels.long(), classes).double()
    if labels.shape != logits.shape or not labels.is_floating_point():
        raise FlatminimaError(
            f"labels of shape {tuple(labels.shape)} and type {labels.dtype} are neither class indices "
            f"({len(logits)},) nor probabilities {tuple(logits.shape)}"
        )
    if not ((labels >= 0).all() and ((labels.sum(1) - 1).abs() <= LABEL_SUM_TOLERANCE).all()):
        raise FlatminimaError("label distributions must be non-negative and sum to one: normalize each row")
    return labels


def _on_cpu(tensor: Tensor) -> Tensor:
    """There, and in float64 unless it holds integers."""
    tensor = tensor.detach().cpu().clone()  # also because autograd keeps none that was made in inference mode
    return tensor.double() if tensor.is_floating_point() else tensor


def _why_singular(factor: Tensor) -> str:
    rows, W = factor.shape
    if rows < W:
        return f"the samples have only {rows} gradients, so use more of them"
    return "pin one class's logit (a softmax over K free logits is always singular), remove dead or identical units"
