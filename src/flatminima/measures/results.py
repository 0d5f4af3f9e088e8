"""What a minimum's measures are: means over trials with their standard errors, and how they were obtained."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Literal

import torch
from rich.console import Group

from flatminima.choices import Fisher
from flatminima.errors import FlatminimaError, needing, require
from flatminima.measures.registry import in_table_order
from flatminima.measures.tables import characterization_table, characterization_tables, shares_by_module
from flatminima.tables import Table, rendered, rounded

if TYPE_CHECKING:  # extras
    from matplotlib.axes import Axes
    from pandas import DataFrame

SCHEMA = 2
"""The form of our JSON; what was written before it was counted has no number, and 1 has no ``loss_form``."""


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

    def __eq__(self, other: object) -> bool:
        """Whether all is equal: ``math.nan`` to itself too, which data classes no longer have from Python 3.13 on."""
        if not isinstance(other, Estimate):
            return NotImplemented
        return (self.mean, self.standard_error, self.per_trial) == (other.mean, other.standard_error, other.per_trial)

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """The estimate from one value per trial; NaN where all of them are, infinite where one is."""
        kept = [value for value in values if not math.isnan(value)]
        if not all(map(math.isfinite, kept)):
            return cls(sum(kept), math.nan, tuple(values))
        mean = statistics.fmean(kept) if kept else math.nan
        error = statistics.stdev(kept) / math.sqrt(len(kept)) if len(kept) > 1 else math.nan
        return cls(mean, error, tuple(values))

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Student's interval of the mean over subsets (scipy); NaN for a single trial.

        Raises:
            FlatminimaError: without scipy, or for a confidence that is no fraction.
        """
        require(0 < confidence < 1, f"confidence must be between 0 and 1, got {confidence!r}")
        with needing("plot", "an interval"):
            from scipy.stats import t as student
        trials = sum(not math.isnan(value) for value in self.per_trial)
        if trials < 2:
            return math.nan, math.nan
        reach = float(student.ppf((1 + confidence) / 2, trials - 1)) * self.standard_error
        return self.mean - reach, self.mean + reach

    def __str__(self) -> str:
        return rounded(self.mean, self.standard_error)

    def __repr__(self) -> str:
        return f"Estimate({self}, {len(self.per_trial)} trials)"


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

    def shares_by_module(self, most: int | None = None) -> dict[str, float]:
        """The fraction of the Fisher trace that lies in each module's own parameters, in the model's order.

        Args:
            most: join modules under their common parents until there are no more than so many.

        Raises:
            FlatminimaError: without ``shares``.
        """
        require(self.shares is not None, "there are no shares: measure with per_parameter=True")
        return shares_by_module(self, most)

    def to_json(self) -> str:
        """One JSON object with its ``schema``; NaN and infinities become null."""
        return json.dumps({"schema": SCHEMA, **jsonable(dataclasses.asdict(self))}, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Characterization:
        """The inverse of :meth:`to_json`; reads what ``flatminima measure --json`` prints, too.

        Raises:
            FlatminimaError: if ``text`` is not a characterization, or one of a later version.
        """
        return characterization_from(values_in(text, "characterization"))

    def to_metrics(self, prefix: str = "") -> dict[str, float]:
        """Numbers by name, as loggers take them: means, standard errors, training loss and accuracy.

        Args:
            prefix: put before every name, such as ``"flatness/"``.

        Returns:
            ``log_det_fisher``, ``log_det_fisher_standard_error``, ..., ``train_loss``, ``train_accuracy``; without
            those that are not defined.
        """
        found: dict[str, float | None] = {}
        for name, estimate in self.estimates().items():
            found |= {name: estimate.mean, f"{name}_standard_error": estimate.standard_error}
        found |= {"train_loss": self.train_loss, "train_accuracy": self.train_accuracy}
        return {f"{prefix}{name}": value for name, value in found.items() if value is not None and math.isfinite(value)}

    def to_frame(self) -> DataFrame:
        """A pandas frame: a row for every measure, columns ``mean`` and ``standard_error``.

        Raises:
            FlatminimaError: without pandas.
        """
        with needing("protocols", "a data frame"):
            import pandas as pd
        rows = {name: (value.mean, value.standard_error) for name, value in self.estimates().items()}
        rows["train_loss"] = (self.train_loss, math.nan)
        if self.train_accuracy is not None:
            rows["train_accuracy"] = (self.train_accuracy, math.nan)
        frame = pd.DataFrame.from_dict(rows, orient="index", columns=["mean", "standard_error"])
        return frame.rename_axis("measure")

    def to_markdown(self, measures: Sequence[str] | None = None) -> str:
        """A table of values ± standard errors in Markdown, with how they were obtained.

        Args:
            measures: names of those wanted (None: all).

        Raises:
            FlatminimaError: for a name that is no measure's.
        """
        return characterization_table(self, measures).markdown()

    def to_latex(self, measures: Sequence[str] | None = None, *, label: str | None = None) -> str:
        r"""The same in LaTeX, for ``\usepackage{booktabs}``.

        Args:
            measures: as for :meth:`to_markdown`.
            label: for ``\ref``.

        Raises:
            FlatminimaError: as for :meth:`to_markdown`.
        """
        return characterization_table(self, measures).latex(label)

    def plot(
        self,
        kind: Literal["parts", "trials", "spectrum", "shares"] = "parts",
        *,
        measure: str = "log_det_fisher",
        ax: Axes | None = None,
    ) -> Axes:
        """A picture (matplotlib), made for the width of a column.

        Args:
            kind: ``"parts"``: γ̂ and what it is made of; ``"trials"``: a measure's values and their mean;
                ``"spectrum"``: the eigenvalues of ξ; ``"shares"``: of the Fisher trace by module, with
                ``per_parameter=True``.
            measure: of which the trials are shown.
            ax: where to draw (None: a new figure).

        Returns:
            The axes; ``axes.figure.savefig(...)`` writes them.

        Raises:
            FlatminimaError: for an unknown kind or measure, for what was not measured, or without matplotlib.
        """
        with needing("plot", "a picture"):
            from flatminima.measures.plots import plotted
        return plotted({"": self}, kind, measure, ax)

    def tables(self) -> list[Table]:
        """What is printed, as tables with ``markdown()``, ``latex()`` and ``html()``."""
        return characterization_tables(self)

    def __rich__(self) -> Group:
        return Group(*self.tables())

    def __str__(self) -> str:
        return rendered(self)

    def __repr__(self) -> str:
        return (
            f"<Characterization: γ̂ = {self.log_det_fisher}, training loss {self.train_loss:.4g}, "
            f"{len(self.estimates())} measures in {self.settings.trials} trials of {self.settings.subset_size}>"
        )

    def _repr_html_(self) -> str:
        return "".join(table.html() for table in self.tables())


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
        loss_form: the loss with its settings, by :func:`flatminima.losses.form_in_words`; None where an earlier version
            measured, which knew the name alone.
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
    loss_form: str | None = None


def values_in(text: str, kind: str) -> dict[str, Any]:
    """What JSON of ours holds.

    Args:
        text: anything.
        kind: of what it should be.

    Raises:
        FlatminimaError: if it is no JSON object, or that of a later version.
    """
    try:
        values = json.loads(text)
        schema = values.pop("schema", 0)
    except (AttributeError, RecursionError, TypeError, ValueError) as error:
        raise FlatminimaError(f"not a {kind} ({error!r}): measure the model again") from error
    require(
        isinstance(schema, int) and schema <= SCHEMA,
        f"a {kind} of schema {schema!r}, and this version of flatminima reads up to {SCHEMA}: install a newer one",
    )
    return dict(values)


def characterization_from(values: dict[str, Any]) -> Characterization:
    """What :meth:`Characterization.to_json` has written, read by ``json``.

    Raises:
        FlatminimaError: if it is something else.
    """
    try:
        values = dict(values)
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
        return Characterization(**{entry.name: values[entry.name] for entry in dataclasses.fields(Characterization)})
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise FlatminimaError(f"not a characterization ({error!r}): measure the model again") from error


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
