"""From the Fisher information's log-determinant to statements about generalization (Jia & Su, Sec. 5).

Two log-determinants must not be confused:

* γ = ln det I(w0) of the W × W observed Fisher information (Eq. 3) is what the theorem and the criterion take. It is
  defined only at full rank; for small models :func:`flatminima.exact.exact_gamma` computes it.
* γ̂ = (1/T) Σ_t ln det ξ_t of N' × N' Gram matrices (Eq. 5) is what :func:`flatminima.measure` reports as
  ``log_det_fisher.mean``. :func:`gamma_from_subsets` turns it into an estimate of γ, whose bias it describes.

The functions ``*_of`` take both steps for a :class:`~flatminima.Characterization`.
"""

from __future__ import annotations

import math
import operator
import sys
from typing import Any

from flatminima.errors import is_finite, require, require_integer, require_number
from flatminima.losses import brief_form, form_in_words
from flatminima.measures import Characterization


def gamma_from_subsets(gamma_hat: float, *, num_parameters: int, subset_size: int, rows_per_sample: int = 1) -> float:
    """Estimate γ = ln det I(w0) from γ̂: γ ≈ (W/N') · (γ̂ − N' ln W) (Eq. 5, derived in App. C).

    With r rows of J per sample (the exact Fisher: r = K − 1) the training set that App. C imagines, which makes J
    square, has W/r samples, and the same derivation gives γ ≈ (W/N'r) · (γ̂ − N'r ln(W/r)).

    The estimate is biased, and more subsets (T → ∞) do not remove the bias; only N' → W does:

    * Drawn from the paper's imagined training set of W samples, its expectation falls as N' grows and reaches γ at
      N' = W (Szász's inequality for principal minors). At N' = 1 it is at most W (ln tr I − ln W), the bound of Sec. 6.
      So it is an upper bound of γ on average, near that trace bound if N' ≪ W, as it is for real networks. On a network
      of 37 parameters it was too high by 4.5 nats per parameter at N' = 1, 3.5 at 8, 2.5 at 16, 0.2 at 36, 0 at 37.
    * Drawn from N > W samples, it ends below γ at N' = W instead, ln det being concave: by 1.0 nats per parameter for
      N = 2 W, 1.5 for N = 27 W on networks of the same shape.

    And where I(w0) is singular however many samples there are, as for every softmax over K free logits
    (:func:`~flatminima.exact.exact_gamma`), γ does not exist and the estimate is finite only because N' ≤ rank. So use
    it to compare minima of one network measured alike, which it orders as γ̂ does, not for its absolute value.

    Args:
        gamma_hat: γ̂, the mean of ln det ξ_t over subsets (``characterization.log_det_fisher.mean``).
        num_parameters: W.
        subset_size: N', the samples per subset, at most W/r.
        rows_per_sample: r.

    Raises:
        FlatminimaError: if γ̂ is no finite number, or a count no integer or out of range.
    """
    gamma_hat = _finite("gamma_hat", gamma_hat, ": was a subset's ξ singular?")
    num_parameters = _count("num_parameters", num_parameters, at_least=1)
    rows_per_sample = _count("rows_per_sample", rows_per_sample, at_least=1)
    require_integer("subset_size", subset_size)
    subset_size = operator.index(subset_size)
    largest = num_parameters // rows_per_sample
    require(
        1 <= subset_size <= largest,
        f"subset_size must lie in 1..num_parameters/rows_per_sample = {largest}, got {subset_size}",
    )
    rows = subset_size * rows_per_sample
    return num_parameters * (gamma_hat / rows - math.log(num_parameters / rows_per_sample))


def gamma_of(characterization: Characterization) -> float:
    """The estimate of γ from a measured γ̂, by :func:`gamma_from_subsets` and with its bias.

    Trials left out as singular count as never drawn.

    Raises:
        FlatminimaError: if γ̂ was measured of anything but the plain cross entropy in the network's own parameters and
            in eval mode (logit normalization, scale invariance, another loss, batch statistics): its determinant is
            then not one of I(w0), and does not belong with the training loss. And for what ``measure`` did not return.
    """
    require(
        isinstance(characterization, Characterization),
        f"the *_of functions take what measure returned, a Characterization, got {type(characterization).__name__}; "
        "for numbers of your own there are those without _of",
    )
    settings = characterization.settings
    plain = {"loss": "cross_entropy", "batchnorm": "eval", "logit_normalization": None, "scale_invariant": False}
    for name, value in plain.items():
        found, is_plain, form = getattr(settings, name), getattr(settings, name) == value, ""
        if name == "loss" and settings.loss_form is not None:  # in which a name may be anything's
            is_plain = settings.loss_form == form_in_words("cross_entropy")
            form = f" ({brief_form(settings.loss_form)})"
        require(
            is_plain,
            f"measured with {name}={found!r}{form}, so its ln det is not one of the Fisher information I(w0): "
            f"measure with {name}={value!r}",
        )
    return gamma_from_subsets(
        characterization.log_det_fisher.mean,
        num_parameters=characterization.num_parameters,
        subset_size=settings.subset_size,
        rows_per_sample=len(characterization.spectrum) // settings.subset_size,
    )


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
    PAC-Bayes theorem for losses in [0, 1], which the cross entropy is not: compare minima of one network by it. As
    printed, A also leaves out a factor W^{1/W} of that proof (1.26 at W = 10, 1.0001 at W = 10⁵).

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
        FlatminimaError: for an argument of another type or out of its range.
    """
    log_det_fisher, num_parameters, train_loss, log_volume = _minimum(
        log_det_fisher, num_parameters, train_loss, log_volume
    )
    num_samples = _count("num_samples", num_samples, at_least=2)
    require_number("delta", delta)
    require(0 < delta <= 1, f"delta must lie in (0, 1], got {delta}")

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


def pac_bayes_bound_of(characterization: Characterization, *, log_volume: float, delta: float) -> float:
    """Theorem 1 for a measured minimum: :func:`pac_bayes_bound` with γ estimated by :func:`gamma_of`.

    Args:
        characterization: what :func:`flatminima.measure` returned.
        log_volume: ln V of the neighbourhood; the same for minima to be compared.
        delta: δ in (0, 1], the probability that the bound fails.

    Returns:
        The bound in nats per sample.

    Raises:
        FlatminimaError: as for :func:`gamma_of` and :func:`pac_bayes_bound`.
    """
    return pac_bayes_bound(
        log_det_fisher=gamma_of(characterization),
        num_parameters=characterization.num_parameters,
        num_samples=characterization.num_samples,
        train_loss=characterization.train_loss,
        log_volume=log_volume,
        delta=delta,
    )


def fia_criterion(
    *, log_det_fisher: float, num_parameters: int, num_samples: int, train_loss: float, log_volume: float
) -> float:
    """The Fisher information approximation (FIA) of the description length, at a minimum (Sec. 5.1.1).

        FIA = −Σ_{(x,y)∈S} E_{c∼y} ln p(x, c; w0) + (W/2) ln(N/2π) + ln V + ½ ln det I(w0).

    The last two terms are ln ∫ √|I_w| dw over the neighbourhood of volume V, where the loss is taken to be quadratic
    and the observed Fisher information stands for the expected one. The likelihood is joint, p(x, c) = f_w(x)_c / N
    (Sec. 4), so the first term is N (L0 + ln N).

    Args:
        log_det_fisher: γ = ln det I(w0) of the W × W matrix, not γ̂ (see :func:`gamma_from_subsets`).
        num_parameters: W.
        num_samples: N.
        train_loss: L0 = L(S, w0) ≥ 0, in nats per sample.
        log_volume: ln V of the neighbourhood.

    Returns:
        The description length of data and model in nats; lower is better.

    Raises:
        FlatminimaError: for an argument of another type or out of its range.
    """
    log_det_fisher, num_parameters, train_loss, log_volume = _minimum(
        log_det_fisher, num_parameters, train_loss, log_volume
    )
    num_samples = _count("num_samples", num_samples, at_least=1)
    negative_log_likelihood = num_samples * (train_loss + math.log(num_samples))
    return (
        negative_log_likelihood
        + num_parameters / 2 * math.log(num_samples / (2 * math.pi))
        + log_volume
        + log_det_fisher / 2
    )


def fia_criterion_of(characterization: Characterization, *, log_volume: float) -> float:
    """The FIA criterion of a measured minimum: :func:`fia_criterion` with γ estimated by :func:`gamma_of`.

    Args:
        characterization: what :func:`flatminima.measure` returned.
        log_volume: ln V of the neighbourhood; the same for minima to be compared.

    Returns:
        The description length in nats; lower is better.

    Raises:
        FlatminimaError: as for :func:`gamma_of` and :func:`fia_criterion`.
    """
    return fia_criterion(
        log_det_fisher=gamma_of(characterization),
        num_parameters=characterization.num_parameters,
        num_samples=characterization.num_samples,
        train_loss=characterization.train_loss,
        log_volume=log_volume,
    )


def _minimum(log_det: Any, num_parameters: Any, train_loss: Any, log_volume: Any) -> tuple[float, int, float, float]:
    """What is known of a minimum, as Python's numbers."""
    return (
        _finite("log_det_fisher", log_det, ": was I(w0) singular?"),
        _count("num_parameters", num_parameters, at_least=1),
        _loss(train_loss),
        _finite("log_volume", log_volume),
    )


def _finite(name: str, value: Any, hint: str = "") -> float:
    """The number as a float; numpy's would be counted on with in their own precision."""
    value = _of_one_entry(value)
    require_number(name, value)
    require(is_finite(value), f"{name} must be finite, got {value}{hint}")
    return float(value)


def _of_one_entry(value: Any) -> Any:
    """What a tensor or array without dimensions holds; anything else as it is."""
    return value.item() if getattr(value, "shape", None) == () else value


def _count(name: str, value: Any, *, at_least: int) -> int:
    """The count as an integer of Python's, which cannot overflow as numpy's can."""
    require_integer(name, value)
    require(operator.index(value) >= at_least, f"{name} must be at least {at_least}, got {value}")
    require(operator.index(value) <= sys.float_info.max, f"{name} is larger than any float")
    return operator.index(value)


def _loss(value: Any) -> float:
    value = _of_one_entry(value)
    require_number("train_loss", value)
    require(is_finite(value) and value >= 0, f"train_loss must be finite and ≥ 0, got {value}")
    return float(value)
