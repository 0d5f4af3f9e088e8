"""The largest eigenvalue of the generalized Gauss–Newton matrix."""

from __future__ import annotations

from flatminima.errors import UndefinedMeasureError
from flatminima.measures.registry import catalogued
from flatminima.measures.trial import Trial


@catalogued("top eigenvalue of the GGN", cost="free", source="Schraudolph 2002; Martens 2020")
def ggn_eigenvalue(trial: Trial) -> float:
    """λ_max of mean_i J_z,iᵀ (diag p_i − p_i p_iᵀ) J_z,i over the subset, p_i the network's own probabilities.

    The GGN of a cross entropy is the Fisher information under these, λ_max(ξ)/N' with ``fisher="model"``. Where the fit
    is exact, it is the Hessian's.
    """
    if trial.options.fisher != "model":
        raise UndefinedMeasureError("the GGN takes the model's own probabilities: use fisher='model'")
    return trial.spectrum[0].item() / len(trial.targets)
