"""What: from the Fisher information's log-determinant to a bound on the expected test loss (Jia & Su, Sec. 5).

Two log-determinants must not be confused:

* γ = ln det I(w0) of the W × W observed Fisher information (Eq. 3) is what the theorem takes. With fewer samples than
  parameters I(w0) is singular and γ is defined only for the paper's imagined training set of W samples.
* γ̂ = (1/T) Σ_t ln det ξ_t of N' × N' Gram matrices (Eq. 5) is what :func:`flatminima.measure` reports as
  ``log_det_fisher.mean``. :func:`gamma_from_subsets` turns it into an estimate of γ.
"""

from __future__ import annotations

import math
import sys

from flatminima.errors import FlatminimaError


def gamma_from_subsets(gamma_hat: float, *, num_parameters: int, subset_size: int) -> float:
    """Estimate γ = ln det I(w0) from γ̂: γ ≈ (W/N') · (γ̂ − N' ln W) (Eq. 5, derived in App. C).

    Exact if I(w0) is a multiple of the identity or N' = W; otherwise a rough extrapolation from N' eigenvalues to W,
    whose error App. C leaves open. It preserves the order of minima of one network, whatever its error.

    Args:
        gamma_hat: γ̂, the mean of ln det ξ_t over subsets (``characterization.log_det_fisher.mean``).
        num_parameters: W.
        subset_size: N', the samples per subset, at most W.

    Raises:
        FlatminimaError: if γ̂ is not finite or a count is out of range.
    """
    _require(math.isfinite(gamma_hat), f"gamma_hat must be finite, got {gamma_hat}: was a subset's ξ singular?")
    _require(
        1 <= subset_size <= num_parameters,
        f"subset_size must lie in 1..num_parameters = {num_parameters}, got {subset_size}",
    )
    return num_parameters * (gamma_hat / subset_size - math.log(num_parameters))


def pac_bayes_bound(
    *,
    log_det_fisher: float,
    num_parameters: int,
    num_samples: int,
    train_loss: float,
    log_volume: float,
    delta: float,
) -> float:
    """Theorem 1: an upper bound on the expected loss on the data distribution, near the minimum w0.

    With probability at least 1 − δ over the training set of N samples,

        E_{w~Q}[L(D, w)] ≤ L0 + A + 2 √((2 L0 + 2 A + ln(2N/δ)) / (N − 1)),
        A = W · V^{2/W} · π^{1/W} · e^{γ/W} / (4πe).

    A is formed in logarithms, so that neither V nor e^γ can overflow. The theorem assumes a local minimum whose
    neighbourhood of volume V is small enough for the loss to be quadratic in it, and its proof (App. B) starts from a
    PAC-Bayes theorem for losses in [0, 1], which the cross entropy is not: compare minima of one network by it.

    Args:
        log_det_fisher: γ = ln det I(w0) of the W × W matrix. This is not the γ̂ that ``measure`` reports:
            convert that by :func:`gamma_from_subsets`.
        num_parameters: W.
        num_samples: N ≥ 2.
        train_loss: L0 = L(S, w0) ≥ 0, in nats per sample.
        log_volume: ln V of the neighbourhood.
        delta: δ in (0, 1], the probability that the bound fails.

    Returns:
        The bound in nats per sample; ``inf`` only where it exceeds the largest float (about 1.8e308).

    Raises:
        FlatminimaError: for an argument out of its range.
    """
    _require(math.isfinite(log_det_fisher), f"log_det_fisher must be finite (full rank), got {log_det_fisher}")
    _require(math.isfinite(log_volume), f"log_volume must be finite, got {log_volume}")
    _require(num_parameters >= 1, f"num_parameters must be at least 1, got {num_parameters}")
    _require(num_samples >= 2, f"num_samples must be at least 2, got {num_samples}")
    _require(math.isfinite(train_loss) and train_loss >= 0, f"train_loss must be finite and ≥ 0, got {train_loss}")
    _require(0 < delta <= 1, f"delta must lie in (0, 1], got {delta}")

    log_a = (
        math.log(num_parameters)
        + (2 * log_volume + math.log(math.pi) + log_det_fisher) / num_parameters
        - math.log(4 * math.pi * math.e)
    )
    if log_a > math.log(sys.float_info.max):
        return math.inf
    height = train_loss + math.exp(log_a)
    confidence = (math.log(2 * num_samples) - math.log(delta)) / 2
    # √(2 (h + c) / (N − 1)) in two factors: 2h alone could overflow where the bound does not.
    return height + 2 * math.sqrt(height + confidence) * math.sqrt(2 / (num_samples - 1))


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise FlatminimaError(message)
