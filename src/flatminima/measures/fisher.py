"""Which Fisher information ξ is of; the exact one (Eq. 2) in as many rows of J as it has dimensions.

A sample's part of I(w) = (1/N) Σ Σ_c y_c ∇ℓ_c ∇ℓ_cᵀ is ZᵀAZ, with Z its logits' Jacobian, p = f_w(x) and

    A = Σ_c y_c (p − e_c)(p − e_c)ᵀ = diag(y) − y pᵀ − p yᵀ + p pᵀ.

A·1 = 0, so the K gradients √y_c ∇ℓ_c of one sample are always linearly dependent and their Gram matrix is singular.
Any K − 1 vectors a_r with Σ_r a_r a_rᵀ = A have the same Fisher information and no such dependence; back-propagated,
they are the sample's rows of J. They are formed here without a difference of nearly equal numbers, like every gradient
at the logits (:mod:`flatminima.losses`): A has entries of the order of 1 − p_y, which vanish at a good minimum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flatminima.choices import Fisher
from flatminima.errors import FlatminimaError, require
from flatminima.losses import CrossEntropy, LogitGradient, Loss, label_entropy, off_target_log_probabilities
from flatminima.network import Inputs, call_model_without_graph, evaluating, take


@dataclass(frozen=True)
class FisherRows:
    """How a batch of samples becomes a batch of rows of J.

    Attributes:
        per_sample: 1 for the empirical Fisher, K − 1 for the exact one.
        loss: the loss whose gradient at a row's logits the row is.
    """

    per_sample: int
    loss: Loss | ExactFisherRow

    @classmethod
    def of(cls, fisher: Fisher, loss: Loss, model: nn.Module, inputs: Inputs) -> FisherRows:
        """The rows of ``fisher`` for a loss and a model. The exact ones cost a forward pass of one sample, to see K.

        Raises:
            FlatminimaError: for an unknown ``fisher``, or an exact one of anything but a cross entropy of one label
                per sample.
        """
        if fisher not in ("empirical", "labels", "model"):
            raise FlatminimaError(f"unknown fisher={fisher!r}: use 'empirical', 'labels' or 'model'")
        if fisher == "empirical":
            return cls(1, loss)
        with evaluating(model):
            logits = call_model_without_graph(model, take(inputs, slice(0, 1)))
        entropy = label_entropy(loss)
        if entropy is None or entropy.weight is not None or logits.dim() != 2:
            raise FlatminimaError(
                f"fisher={fisher!r} is defined for the cross entropy of one label per sample, logits (N, K) and no "
                "class weights: use fisher='empirical'"
            )
        if fisher == "labels" and not entropy.label_smoothing:
            return cls(1, entropy)
        smoothing = entropy.label_smoothing if fisher == "labels" else None
        return cls(logits.shape[1] - 1, ExactFisherRow(entropy, smoothing))

    def of_batch(self, inputs: Inputs, targets: Tensor) -> tuple[Inputs, Tensor]:
        """Every sample as many times as it has rows, one after the other; exact rows' targets are (label, row).

        Raises:
            FlatminimaError: if the exact Fisher's targets are not one label per sample.
        """
        if not isinstance(self.loss, ExactFisherRow):
            return inputs, targets
        require(
            targets.dim() == 1,
            f"targets of shape {tuple(targets.shape)} are no class indices for the exact Fisher: pass one per sample, "
            "of shape (N,)",
        )
        of_sample = torch.arange(len(targets), device=targets.device).repeat_interleave(self.per_sample)
        number = torch.arange(self.per_sample, device=targets.device).repeat(len(targets))
        return take(inputs, of_sample), torch.stack([targets[of_sample], number], 1)

    def names(self, samples: Sequence[int]) -> list[int]:
        """The sample that each row is of."""
        return [sample for sample in samples for _ in range(self.per_sample)]


@dataclass(frozen=True)
class ExactFisherRow:
    """The loss, as it were, whose gradient at a sample's logits is one row of a factor of A.

    Each row has its own copy of the sample, so what it is must not depend on choices that rounding could make
    differently for another copy (a pivot, say): rows are numbered by the K − 1 classes other than the label.

    Attributes:
        entropy: the loss of the samples.
        smoothing: ε of the label distribution y = (1 − ε) e_t + ε/K; None: y is the model's own.
    """

    entropy: CrossEntropy
    smoothing: float | None

    def gradient(self, logits: Tensor, targets: Tensor) -> LogitGradient:
        """The samples' losses, and the rows at float64 logits (M, K) for targets (M, 2) of label and row number."""
        labels, number = targets.unbind(1)
        losses = self.entropy.gradient(logits, labels).loss
        of_class = number + (number >= labels)  # the classes other than the label, in order
        if self.smoothing is None:
            rows, log_scale = _rows_of_model(logits, labels, of_class)
        else:
            rows, log_scale = _rows_of_smoothed(logits, labels, of_class, self.smoothing)
        norm = rows.norm(dim=1)
        return LogitGradient(losses, rows / norm[:, None], log_scale + norm.log())


def _rows_of_model(logits: Tensor, labels: Tensor, of_class: Tensor) -> tuple[Tensor, Tensor]:
    """A = diag(p) − ppᵀ by its Cholesky factor in closed form (Tanabe & Sagae 1992), the label last.

    With q_c the probability of all classes j after c, row c is √(p_c q_c / (p_c + q_c)) · (e_c − Σ_j p_j/q_c e_j). That
    takes no subtraction. At unit length the rows' Gram matrix has no eigenvalue below 1/K², whatever p.

    Returns:
        The rows (M, K) without that root, and its logarithm (M,).
    """
    classes = torch.arange(logits.shape[1], device=logits.device)
    after = (classes > of_class[:, None]) | (classes == labels[:, None])
    log_p = logits.log_softmax(1)
    own = log_p.gather(1, of_class[:, None])
    remaining = log_p.where(after, -torch.inf)
    log_q = remaining.logsumexp(1, keepdim=True)
    rows = (-(remaining - log_q).exp()).scatter(1, of_class[:, None], 1.0)
    return rows, (own + log_q - torch.logaddexp(own, log_q))[:, 0] / 2


def _rows_of_smoothed(logits: Tensor, labels: Tensor, of_class: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
    """A = BᵀB of the K rows B_c = √y_c (p − e_c), one of them rotated away.

    νᵀB = 0 for ν_c = p_c/√y_c, so the reflection that takes ν to the label t's axis makes row t zero, and the others
    B_c − ν_c √y_t / (‖ν‖ + ν_t) · (p − e_t).

    Returns:
        The rows (M, K) without a factor √y_c, and its logarithm (M,).
    """
    K = logits.shape[1]
    label, own = labels[:, None], of_class[:, None]
    y = torch.full_like(logits, smoothing / K).scatter_add(1, label, torch.full_like(logits, 1 - smoothing))
    log_p = logits.log_softmax(1)
    p = log_p.exp()
    nu = p / y.sqrt()
    root_of_label = y.gather(1, label).sqrt()
    share = (p / y).gather(1, own) * root_of_label / (nu.norm(dim=1, keepdim=True) + nu.gather(1, label))
    off_label = off_target_log_probabilities(logits, labels).logsumexp(1, keepdim=True).exp()  # 1 − p_t, uncancelled
    at_label = p.gather(1, label) + share * off_label
    at_own = log_p.gather(1, own).expm1() - share * p.gather(1, own)
    rows = (p * (1 - share)).scatter(1, label, at_label).scatter(1, own, at_own)
    return rows, y.gather(1, own)[:, 0].log() / 2
