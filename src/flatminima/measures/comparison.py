"""Minima that were measured on the same subsets, compared pair by pair."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from rich.console import Group

from flatminima.errors import (
    FlatminimaError,
    UnequalLossWarning,
    UnlikeModelsWarning,
    did_you_mean,
    needing,
    require,
    warn,
)
from flatminima.losses import LOGIT_NORMALIZATION, brief_forms
from flatminima.measures.findings import caveats, decisive_measure, findings, unequal_losses, unequal_sizes
from flatminima.measures.registry import CATALOGUE, in_table_order
from flatminima.measures.results import (
    SCHEMA,
    Characterization,
    Estimate,
    Settings,
    characterization_from,
    jsonable,
    values_in,
)
from flatminima.measures.tables import comparison_table, comparison_tables
from flatminima.tables import Table, rendered

if TYPE_CHECKING:  # extras
    from matplotlib.axes import Axes
    from pandas import DataFrame


@dataclass(frozen=True)
class Comparison:
    """Several minima measured on the same subsets. ``comparison["name"]`` is a minimum, and iteration gives the names.

    Attributes:
        characterizations: by name, in the order given.
    """

    characterizations: dict[str, Characterization]

    def __getitem__(self, name: str) -> Characterization:
        known = self.characterizations
        if name not in known:
            raise FlatminimaError(
                f"no model named {name!r}{did_you_mean(str(name), known)}: choose from {', '.join(known)}"
            )
        return known[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.characterizations)

    def __len__(self) -> int:
        return len(self.characterizations)

    @property
    def has_parts(self) -> bool:
        """Whether γ̂ of every minimum is taken apart; not so with batch statistics."""
        return all(c.residual is not None for c in self.characterizations.values())

    @property
    def decisive(self) -> str | None:
        """The measure that orders these minima: γ̂ at similar training losses, otherwise γ̂ at unit residuals.

        None where neither does: between models of different sizes, with one that has not fitted its training data, and
        with batch statistics at unequal losses.
        """
        return decisive_measure(self)

    @property
    def best(self) -> str | None:
        """The lowest minimum by the :attr:`decisive` measure; None where there is no such measure."""
        measure = self.decisive
        return None if measure is None else next(iter(self.ranks(measure)), None)

    @property
    def reference(self) -> str:
        """The minimum that tables and pictures take differences to: the best, or else the first."""
        return self.best or next(iter(self))

    def caveats(self) -> list[str]:
        """Why γ̂ does not order these minima: a sentence for each reason, none where it does."""
        return caveats(self)

    def findings(self) -> list[str]:
        """In sentences: which minimum is the best, by how much, is that sure, how much of it is fit.

        Raises:
            FlatminimaError: without scipy, for the intervals.
        """
        return findings(self)

    def difference(self, first: str, second: str, measure: str = "log_det_fisher") -> Estimate:
        """``first`` − ``second``, paired by subset; negative: ``first`` is the better minimum by this measure.

        Pairing removes what the subsets share: its standard error is usually far below that of either mean. Where one
        was measured on fewer trials, the trials both have are paired.

        Raises:
            FlatminimaError: for an unknown name or measure, or a measure that one of the two lacks.
        """
        pair = []
        for name in (first, second):
            estimates = self[name].estimates()
            if measure not in estimates:
                raise FlatminimaError(f"{name!r} has no measure {measure!r}: choose from {', '.join(estimates)}")
            pair.append(estimates[measure].per_trial)
        return Estimate.of([a - b for a, b in zip(*pair, strict=False)])

    def ranks(self, measure: str = "log_det_fisher") -> dict[str, int]:
        """Every model's rank by the measure, 1 = best: its mean over the trials that all models with a value have.

        The smallest is the best, but for measures of which theory expects it of the largest. Where no trial is common
        to all, there are no ranks.

        Raises:
            FlatminimaError: for a name that is no measure's.
        """
        names = self.measures()
        require(
            measure in (*names, *CATALOGUE),
            f"no measure {measure!r}{did_you_mean(measure, names)}: choose from {', '.join(names)}",
        )
        found = {name: c.estimates()[measure] for name, c in self.characterizations.items() if measure in c.estimates()}
        trials = {name: estimate.per_trial for name, estimate in found.items() if not math.isnan(estimate.mean)}
        common = [values for values in zip(*trials.values(), strict=False) if not any(map(math.isnan, values))]
        totals = {name: sum(values) for name, values in zip(trials, zip(*common, strict=True), strict=False)}
        larger = any(measure in c.settings.larger_is_better for c in self.characterizations.values())
        order = sorted(totals, key=totals.__getitem__, reverse=larger)
        return {name: rank for rank, name in enumerate(order, start=1)}

    def measures(self) -> list[str]:
        """The names of all measures that any of the minima has, in the order of tables."""
        return list(in_table_order(name for c in self.characterizations.values() for name in c.estimates()))

    def to_json(self) -> str:
        """One JSON object: ``schema``, the characterizations, and paired differences of all pairs by every measure."""
        differences = {
            measure: {
                f"{a} - {b}": dataclasses.asdict(self.difference(a, b, measure))
                for a, b in itertools.combinations(self, 2)
                if measure in self[a].estimates() and measure in self[b].estimates()
            }
            for measure in self.measures()
        }
        body = {name: dataclasses.asdict(c) for name, c in self.characterizations.items()}
        values = jsonable({"characterizations": body, "differences": differences})
        return json.dumps({"schema": SCHEMA, **values}, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Comparison:
        """The inverse of :meth:`to_json`; reads what ``flatminima compare --json`` prints, too.

        Raises:
            FlatminimaError: if ``text`` is not a comparison, or one of a later version.
        """
        values = values_in(text, "comparison").get("characterizations")
        if not isinstance(values, dict) or not values or not all(isinstance(c, dict) for c in values.values()):
            raise FlatminimaError("not a comparison: it has no characterizations by name")
        return cls({name: characterization_from(c) for name, c in values.items()})

    def to_metrics(self, prefix: str = "") -> dict[str, float]:
        """Numbers as ``name/measure``, as loggers take them; see :meth:`Characterization.to_metrics`."""
        return {
            metric: value
            for name, c in self.characterizations.items()
            for metric, value in c.to_metrics(f"{prefix}{name}/").items()
        }

    def to_frame(self) -> DataFrame:
        """A pandas frame with a row for every minimum and measure.

        Returns:
            Columns ``mean`` and ``standard_error``, ``rank``, and ``difference`` and ``difference_standard_error`` to
            :attr:`reference`; rows by ``minimum`` and ``measure``. ``frame["mean"].unstack()`` has a row a minimum.

        Raises:
            FlatminimaError: without pandas.
        """
        with needing("protocols", "a data frame"):
            import pandas as pd
        frame = pd.concat({name: c.to_frame() for name, c in self.characterizations.items()}, names=["minimum"])
        reference = self.reference
        for measure in self.measures():
            for name, rank in self.ranks(measure).items():
                frame.loc[(name, measure), "rank"] = rank
                if name != reference and measure in self[reference].estimates():
                    found = self.difference(name, reference, measure)
                    frame.loc[(name, measure), ["difference", "difference_standard_error"]] = (
                        found.mean,
                        found.standard_error,
                    )
        return frame

    def to_markdown(self, measures: Sequence[str] | None = None, *, differences: bool = True) -> str:
        """A table of values ± standard errors in Markdown, with how they were obtained.

        Args:
            measures: names of those wanted (None: all).
            differences: with the paired differences to :attr:`reference`, a row below each measure's.

        Raises:
            FlatminimaError: for a name that is no measure's.
        """
        return comparison_table(self, measures, differences=differences).markdown()

    def to_latex(
        self, measures: Sequence[str] | None = None, *, differences: bool = True, label: str | None = None
    ) -> str:
        r"""The same in LaTeX, for ``\usepackage{booktabs}``.

        Args:
            measures: as for :meth:`to_markdown`.
            differences: likewise.
            label: for ``\ref``.

        Raises:
            FlatminimaError: as for :meth:`to_markdown`.
        """
        return comparison_table(self, measures, differences=differences).latex(label)

    def plot(
        self,
        kind: Literal["parts", "trials", "spectrum", "shares", "differences"] = "parts",
        *,
        measure: str | None = None,
        ax: Axes | None = None,
    ) -> Axes:
        """A picture (matplotlib), made for the width of a column.

        Args:
            kind: as for :meth:`Characterization.plot`; or ``"differences"``: paired, to :attr:`reference`, with 95 %
                intervals (scipy).
            measure: of which the trials or differences are shown (None: γ̂, and of differences γ̂ at unit residuals
                beside it).
            ax: where to draw (None: a new figure).

        Returns:
            The axes; ``axes.figure.savefig(...)`` writes them.

        Raises:
            FlatminimaError: for an unknown kind or measure, for what was not measured, or without the packages.
        """
        with needing("plot", "a picture"):
            from flatminima.measures.plots import plotted, plotted_differences
        if kind == "differences":
            return plotted_differences(self, measure, ax)
        return plotted(self.characterizations, kind, measure or "log_det_fisher", ax)

    def tables(self) -> list[Table]:
        """What is printed, as tables with ``markdown()``, ``latex()`` and ``html()``."""
        return comparison_tables(self)

    def __rich__(self) -> Group:
        return Group(*self.tables())

    def __str__(self) -> str:
        return rendered(self)

    def __repr__(self) -> str:
        minima = ", ".join(f"{name}: γ̂ = {c.log_det_fisher}" for name, c in self.characterizations.items())
        return f"<Comparison of {len(self)} minima: {minima}>"

    def _repr_html_(self) -> str:
        return "".join(table.html() for table in self.tables())


def comparison_of(characterizations: Mapping[str, Characterization]) -> Comparison:
    """A comparison of minima that are measured already, on the same subsets.

    Raises:
        FlatminimaError: if they were measured with different subsets, data sizes or losses, or are no characterizations
            by name.

    Warns:
        UnequalLossWarning: as for :func:`compare`.
        UnlikeModelsWarning: as for :func:`compare`.
    """
    require(
        isinstance(characterizations, Mapping)
        and all(isinstance(name, str) and isinstance(c, Characterization) for name, c in characterizations.items()),
        "comparison_of takes what measure returned, by name: {'a': measure(a, data), ...}",
    )
    require(len(characterizations) > 0, "comparison_of takes at least one minimum, got none")
    for first, second in itertools.combinations(characterizations, 2):
        differing = _differing(characterizations[first], characterizations[second])
        require(
            differing is None,
            f"the minima were measured on different subsets or with different settings ({first!r} and {second!r}: "
            f"{differing}): measure all with the same data, subset_size, seed, loss, fisher, batchnorm, "
            "logit_normalization and scale_invariant",
        )
    comparison = Comparison(dict(characterizations))
    sizes, losses = unequal_sizes(comparison), unequal_losses(comparison)
    if sizes is not None:
        small, large = sizes
        warn(
            f"the models differ in kind ({small!r} has {comparison[small].num_parameters:,} trainable parameters, "
            f"{large!r} {comparison[large].num_parameters:,}): γ̂ orders minima of one architecture, and between "
            "several it follows their scale",
            UnlikeModelsWarning,
        )
    if losses is not None:
        low, high = losses
        warn(
            f"training losses differ ({low!r}: {comparison[low].train_loss:.3g}, {high!r}: "
            f"{comparison[high].train_loss:.3g}), and γ̂ falls with its loss, whatever the "
            f"minimum{_residual_share(comparison, high, low)}; compare at similar training loss, by "
            f"log_det_unit_fisher, or with logit_normalization={LOGIT_NORMALIZATION}",
            UnequalLossWarning,
        )
    return comparison


def _residual_share(comparison: Comparison, first: str, second: str) -> str:
    """How much of their difference in γ̂ is residual; nothing where there is no residual."""
    pair = [comparison.characterizations[name] for name in (first, second)]
    if any(c.residual is None for c in pair):
        return ""
    residual, whole = (comparison.difference(first, second, name).mean for name in ("residual", "log_det_fisher"))
    return f": {residual:+.0f} of the {whole:+.0f} between these two is residual"


_PAIRED = ("subset_size", "seed", "fisher", "batchnorm", "logit_normalization", "scale_invariant")
"""The settings beside the loss that must be equal for per-trial values to be paired."""


def _differing(first: Characterization, second: Characterization) -> str | None:
    """Why the per-trial values of two minima are no pairs; None if they are."""
    a, b = first.settings, second.settings
    values = [("samples", first.num_samples, second.num_samples)]
    values += [(name, getattr(a, name), getattr(b, name)) for name in _PAIRED]
    return next((f"{name} {x} and {y}" for name, x, y in values if x != y), None) or _differing_loss(a, b)


def _differing_loss(a: Settings, b: Settings) -> str | None:
    if a.loss_form is None or b.loss_form is None:  # from a version that knew names alone
        return None if a.loss == b.loss else f"loss {a.loss} and {b.loss}"
    if a.loss_form == b.loss_form:
        return None
    return "loss {} and {}".format(*brief_forms(a.loss_form, b.loss_form))
