"""What a user chooses by plain values, which JSON and a command line can hold: known before torch is imported.

The options of ``measure`` are explained here and in :class:`~flatminima.measures.MeasureOptions`, and nowhere else: the
lab and its command line derive theirs from these.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Fisher = Literal["empirical", "labels", "model"]
"""``"empirical"`` (Eq. 4): one gradient per sample, that of its loss. ``"labels"`` (Eq. 2): the gradients of all K
classes, weighted by the loss's label distribution y, which label smoothing makes; of a loss without, the empirical one.
``"model"``: weighted by the model's own probabilities, y = f_w(x), which is the true Fisher information."""

Estimator = Literal["finite-difference", "hvp"]
"""How the penalty's gradient is formed: by the paper's finite difference, or by its limit for a small step."""

MainGradient = Literal["whole-batch", "sub-batches"]
"""Where a regularized step's main gradient is from: a pass of its own, or the mean of the sub-batches' gradients."""


@dataclass(frozen=True)
class PlainOptions:
    """The options that are plain values: what JSON and a command line can hold.

    Attributes:
        subset_size: Samples per subset, N' (paper: 100).
        trials: Number of subsets, T (paper: 100); with max_standard_error the most there will be.
        seed: Draws the subsets; the same ones for every network.
        fisher: "empirical": one gradient per sample, that of its loss (Eq. 4; the paper's measures). Or the exact
            Fisher information (Eq. 2), K - 1 rows of J per sample, at K - 1 times the cost: its K classes weighted by
            the network's own probabilities ("model"), or by a label distribution that the loss smooths ("labels").
        batchnorm: BatchNorm by its running statistics ("eval"), so that a sample's gradient is its own. Or a number n:
            by those of chunks of n samples, as in the authors' release (10), at the cost of n backward passes; n
            divides subset_size.
        logit_normalization: Take the loss at logits divided by this times their norm (the authors' 0.04): for unequal
            training losses. The training loss reported stays the plain one, and so does the robustness.
        scale_invariant: Weight gradients by the parameters' magnitudes, J diag(|w|), so that rescaling layers changes
            nothing (Dinh et al. 2017; Sec. 5.1).
        max_standard_error: Stop as soon as the standard error of γ̂, or in a comparison of all its paired differences,
            is at most this, and at least five trials are done.
        robustness_samples: Samples per subset for the robustness (None: as many as take no longer than a forward and
            backward pass of the subset; 0: leave it out).
        on_singular: Where a subset's gradients are linearly dependent (duplicates, say): "raise" an error, or "skip"
            it, which leaves it out of γ̂ with a warning.
    """

    subset_size: int = 100
    trials: int = 100
    seed: int = 0
    fisher: Fisher = "empirical"
    batchnorm: Literal["eval"] | int = "eval"
    logit_normalization: float | None = None
    scale_invariant: bool = False
    max_standard_error: float | None = None
    robustness_samples: int | None = None
    on_singular: Literal["raise", "skip"] = "raise"
