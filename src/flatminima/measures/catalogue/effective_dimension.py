"""In how many directions the loss is curved: by a threshold, and by the largest eigenvalue."""

from __future__ import annotations

from flatminima.measures.registry import catalogued
from flatminima.measures.trial import Trial


@catalogued("effective dimension", cost="free", source="MacKay 1992; Maddox et al. 2020")
def effective_dimension(trial: Trial) -> float:
    """Σ λ / (λ + a) over the eigenvalues of ξ, with a their mean.

    The sources take for a the precision of a prior. With the mean, rescaling the loss or the network changes nothing:
    equal eigenvalues give half of their number, a single one that outweighs all others 1.
    """
    spectrum = trial.spectrum
    return (spectrum / (spectrum + spectrum.mean())).sum().item()


@catalogued("stable rank", cost="free", source="Rudelson & Vershynin 2007")
def stable_rank(trial: Trial) -> float:
    """‖J‖_F² / ‖J‖₂² = tr ξ / λ_max, from 1 to the number of rows."""
    return (trial.spectrum.sum() / trial.spectrum[0]).item()
