"""What a minimum's measures are: means over trials with their standard errors, and how they were obtained."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import torch
from rich.table import Table

from flatminima.choices import Fisher
from flatminima.errors import FlatminimaError
from flatminima.measures.registry import in_table_order
from flatminima.measures.tables import characterization_table, rendered


@dataclass(frozen=True)
class Estimate:
    """A mean over trials with its uncertainty.

    Attributes:
        mean: the average over trials.
        standard_error: sample standard deviation / √T; NaN for a single trial.
        per_trial: the T values, in the order of the subsets; NaN where a trial was left out (then not in the mean).
    """

    mean: float
    standard_error: float
    per_trial: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """The estimate from one value per trial; NaN where all of them are."""
        kept = [value for value in values if not math.isnan(value)]
        mean = statistics.fmean(kept) if kept else math.nan
        error = statistics.stdev(kept) / math.sqrt(len(kept)) if len(kept) > 1 else math.nan
        return cls(mean, error, tuple(values))

    def __str__(self) -> str:
        return f"{self.mean:.6g} ± {self.standard_error:.2g}"


@dataclass(frozen=True)
class Share:
    """One parameter's part of ξ = Σ_p J_p J_pᵀ.

    Attributes:
        fisher_trace: its part of the trace of the Fisher information; the parts add up to the whole.
        log_det: ln det J_p J_pᵀ; None where that is singular in some trial, as it must be for a parameter with fewer
            entries than J has rows. These do not add up: ln det of a sum is at least that of each summand.
        rank: the smallest rank of J_p J_pᵀ over the trials.
    """

    fisher_trace: Estimate
    log_det: Estimate | None
    rank: int


ATTRIBUTES = (
    "log_det_fisher",
    "residual",
    "sensitivity",
    "diversity",
    "log_det_unit_fisher",
    "spectral_radius",
    "frobenius_norm",
    "fisher_frobenius_norm",
    "fisher_trace",
)
"""The measures that are attributes of every :class:`Characterization`."""


@dataclass(frozen=True)
class Characterization:
    """The measures of one trained minimum; smaller means better generalization, at similar training loss.

    γ̂ = residual + sensitivity + diversity, trial by trial. The residual only says how well the minimum fits; what is
    evidence about the minimum itself is the rest, γ̂ at unit residuals.

    F_i is sample i's part of the Fisher information: g_i g_iᵀ of its loss gradient g_i (Eq. 4), so that ‖F_i‖_F² is
    ξ_ii²; with ``fisher="labels"`` or ``"model"`` it is Σ_c y_c ∇ℓ_c ∇ℓ_cᵀ (Eq. 2), and J has K − 1 rows per sample.

    Attributes:
        log_det_fisher: γ̂ = (1/T) Σ_t ln det ξ_t (Eq. 5), natural logarithm.
        residual: Σ_i 2 ln‖δ_i‖ of the losses' gradients δ_i at the logits. None with batch statistics, and so the
            other parts.
        sensitivity: Σ_i 2 ln‖h_i‖, with h_i what δ_i/‖δ_i‖ back-propagates to.
        diversity: ln det C ≤ 0, of the cosines C_ij of the rows of J.
        log_det_unit_fisher: sensitivity + diversity, γ̂ at unit residuals.
        spectral_radius: (1/T) Σ_t ‖J_t‖₂², the largest eigenvalue of ξ_t (App. D; Keskar et al.).
        frobenius_norm: mean_i ‖F_i‖_F² over samples (App. D; Wu et al.), exact instead of sampled.
        fisher_frobenius_norm: ‖(1/N') J_tᵀJ_t‖_F² = ‖ξ_t‖_F² / N'², of the subset's Fisher information itself.
        fisher_trace: mean_i tr F_i over samples = tr ξ_t / N' (Sec. 6).
        others: all other measures by name: the robustness, rivals, and your own.
        spectrum: eigenvalues of ξ_t in descending order, averaged over trials; as many as J has rows.
        train_loss: mean loss over all of ``data``; measures compare at similar values only.
        train_accuracy: fraction of ``data`` classified right; None for losses other than the cross entropy.
        num_parameters: W, trainable parameters.
        num_samples: N, the size of ``data``.
        singular_trials: trials left out of ``log_det_fisher`` (``on_singular="skip"``).
        shares: every parameter's :class:`Share` of ξ by name, where asked for.
        settings: everything needed to get the numbers again.
    """

    log_det_fisher: Estimate
    residual: Estimate | None
    sensitivity: Estimate | None
    diversity: Estimate | None
    log_det_unit_fisher: Estimate | None
    spectral_radius: Estimate
    frobenius_norm: Estimate
    fisher_frobenius_norm: Estimate
    fisher_trace: Estimate
    others: dict[str, Estimate]
    spectrum: tuple[float, ...]
    train_loss: float
    train_accuracy: float | None
    num_parameters: int
    num_samples: int
    singular_trials: tuple[int, ...]
    shares: dict[str, Share] | None
    settings: Settings

    def estimates(self) -> dict[str, Estimate]:
        """The measures by name, γ̂ first; those not defined for this network left out."""
        found = {name: value for name in ATTRIBUTES if (value := getattr(self, name)) is not None} | self.others
        return {name: found[name] for name in in_table_order(found)}

    @property
    def robustness(self) -> Estimate | None:
        """mean_i ‖J_x[f_w(x_i)]‖₂² (Sokolić et al.); None where it is not defined, or was not asked for."""
        return self.others.get("robustness")

    def to_json(self) -> str:
        """One JSON object; NaN and infinities become null."""
        return json.dumps(jsonable(dataclasses.asdict(self)), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Characterization:
        """The inverse of :meth:`to_json`.

        Raises:
            FlatminimaError: if ``text`` is not a characterization.
        """
        try:
            values = json.loads(text)
            if "others" not in values:
                _bring_up_to_date(values)
            for name in ATTRIBUTES:
                if values[name] is not None:
                    values[name] = _estimate_from(values[name])
            values["others"] = {name: _estimate_from(value) for name, value in values["others"].items()}
            values["settings"] = Settings(**values["settings"])
            for name in ("spectrum", "singular_trials"):
                values[name] = tuple(values[name])
            if values["shares"] is not None:
                values["shares"] = {name: _share_from(share) for name, share in values["shares"].items()}
            return cls(**values)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise FlatminimaError(f"not a characterization ({error!r}): measure the model again") from error

    def __rich__(self) -> Table:
        return characterization_table(self)

    def __str__(self) -> str:
        return rendered(self)


@dataclass(frozen=True)
class Settings:
    """How a :class:`Characterization` was obtained.

    Attributes:
        loss: ``"cross_entropy"``, or the callable's name.
        fisher: as in :class:`~flatminima.measures.PlainOptions`.
        subset_size: N'.
        trials: T, as many as were done.
        seed: as in :class:`~flatminima.measures.PlainOptions`.
        batchnorm: as in :class:`~flatminima.measures.PlainOptions`.
        logit_normalization: as in :class:`~flatminima.measures.PlainOptions`.
        scale_invariant: as in :class:`~flatminima.measures.PlainOptions`.
        robustness_samples: as in :class:`~flatminima.measures.PlainOptions`.
        generic_parameters: parameters without a layer rule, differentiated one sample at a time.
        dtype: the network's floating-point type.
        device: where it ran.
        torch_version: PyTorch's version.
        flatminima_version: this library's version.
        left_out: of the groups of measures that were asked for, those that are not defined here, with the reason.
        larger_is_better: the measures of whose values larger ones are better.
    """

    loss: str
    fisher: Fisher
    subset_size: int
    trials: int
    seed: int
    batchnorm: str | int
    logit_normalization: float | None
    scale_invariant: bool
    robustness_samples: int | None
    generic_parameters: list[str]
    dtype: str
    device: str
    torch_version: str = field(default_factory=lambda: str(torch.__version__))
    flatminima_version: str = field(default_factory=lambda: version("flatminima"))
    left_out: dict[str, str] = field(default_factory=dict)
    larger_is_better: list[str] = field(default_factory=list)


def _bring_up_to_date(values: dict[str, Any]) -> None:
    """From the form of 0.1.0, which knew neither γ̂'s parts nor other measures than the robustness."""
    values |= dict.fromkeys(("residual", "sensitivity", "diversity", "log_det_unit_fisher"))
    robustness, reason = values.pop("robustness"), values["settings"].pop("no_robustness", None)
    values["others"] = {} if robustness is None else {"robustness": robustness}
    values["settings"] |= {"left_out": {} if reason is None else {"robustness": reason}, "larger_is_better": []}


def _estimate_from(values: dict[str, Any]) -> Estimate:
    def number(value: float | None) -> float:
        return math.nan if value is None else value

    return Estimate(number(values["mean"]), number(values["standard_error"]), tuple(map(number, values["per_trial"])))


def _share_from(values: dict[str, Any]) -> Share:
    log_det = values["log_det"]
    return Share(
        _estimate_from(values["fisher_trace"]), None if log_det is None else _estimate_from(log_det), values["rank"]
    )


def jsonable(value: Any) -> Any:
    """``value`` as JSON can hold it: NaN and infinities None throughout, tuples lists."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    return value
