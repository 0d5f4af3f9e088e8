"""The largest eigenvalue of the Gram matrix, as a bound on sharpness."""

from __future__ import annotations

from flatminima.measures.registry import catalogued
from flatminima.measures.trial import Trial


@catalogued("spectral radius", cost="free", source="Jia & Su 2020, App. D; Keskar et al. 2017", paper=True)
def spectral_radius(trial: Trial) -> float:
    """‖J‖₂², the largest eigenvalue of ξ."""
    return trial.spectrum[0].item()
