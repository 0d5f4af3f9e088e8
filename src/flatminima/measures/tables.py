"""Results as tables, and in words how they were obtained."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from textwrap import shorten
from typing import TYPE_CHECKING

from flatminima.errors import did_you_mean, require
from flatminima.losses import brief_form
from flatminima.measures.registry import label_of
from flatminima.tables import Table, rounded, rounded_alone

if TYPE_CHECKING:  # results draw themselves by these functions
    from flatminima.measures.comparison import Comparison
    from flatminima.measures.results import Characterization

_LONGEST_FORM = 150
"""Characters of a loss with its settings: class weights may be a thousand."""


def characterization_tables(characterization: Characterization) -> list[Table]:
    """Every measure with its standard error, and the shares by parameter where there are any."""
    rows = [
        (label_of(name), f"{estimate.mean:.6g}", f"{estimate.standard_error:.2g}")
        for name, estimate in characterization.estimates().items()
    ]
    fit = [(name, value, "") for name, value in _fit(characterization).items()]
    table = Table(
        _title(characterization),
        ("measure", "mean", "standard error"),
        (*rows, *fit),
        settings_in_words({"": characterization}),
        rules=(len(rows),),
    )
    return [table] if characterization.shares is None else [table, _shares_table(characterization)]


def characterization_table(characterization: Characterization, measures: Sequence[str] | None = None) -> Table:
    """Measures as value ± standard error, for papers.

    Raises:
        FlatminimaError: for a name that is no measure's.
    """
    estimates = characterization.estimates()
    rows = [(label_of(name), str(estimates[name])) for name in _chosen(measures, estimates)]
    return Table(
        _title(characterization),
        ("measure", "mean ± standard error"),
        (*rows, *_fit(characterization).items()),
        settings_in_words({"": characterization}, left_out=measures is None),
        rules=(len(rows),),
    )


def comparison_tables(comparison: Comparison) -> list[Table]:
    """Every measure of every minimum, with its rank and its difference to one of them; and the shares by module."""
    minima = comparison.characterizations
    rows = [
        (label_of(measure), *(_cell(comparison, name, measure) for name in minima)) for measure in comparison.measures()
    ]
    table = Table(
        f"Minima on the same subsets; {_differences_to(comparison)}",
        ("measure", *minima),
        (*rows, *_fits(minima)),
        _comparison_caption(comparison),
        rules=(len(rows),),
    )
    return [table, *([module_shares_table(minima)] if _have_shares(minima) else [])]


def comparison_table(
    comparison: Comparison, measures: Sequence[str] | None = None, *, differences: bool = True
) -> Table:
    """Measures as value ± standard error, and paired differences below them, for papers.

    Raises:
        FlatminimaError: for a name that is no measure's.
    """
    minima, reference = comparison.characterizations, comparison.reference
    rows: list[tuple[str, ...]] = []
    for measure in _chosen(measures, comparison.measures()):
        estimates = [c.estimates().get(measure) for c in minima.values()]
        rows.append((label_of(measure), *("" if found is None else str(found) for found in estimates)))
        paired = [_difference(comparison, name, measure) for name in minima]
        if differences and any(paired):
            rows.append(("    paired difference", *paired))
    return Table(
        f"Minima on the same subsets, mean ± standard error{f'; differences to {reference}' if differences else ''}",
        ("measure", *minima),
        (*rows, *_fits(minima)),
        _comparison_caption(comparison, left_out=measures is None),
        rules=(len(rows),),
    )


def module_shares_table(minima: Mapping[str, Characterization], most: int | None = None) -> Table:
    """How much of each minimum's Fisher trace lies in which module."""
    shares = {name: c.shares_by_module(most) for name, c in minima.items()}
    modules = dict.fromkeys(module for found in shares.values() for module in found)
    rows = [
        (module or "(the model)", *(f"{found[module]:.1%}" if module in found else "" for found in shares.values()))
        for module in modules
    ]
    return Table("Shares of the Fisher trace by module", ("module", *minima), tuple(rows))


def shares_by_module(characterization: Characterization, most: int | None) -> dict[str, float]:
    """See :meth:`~flatminima.measures.Characterization.shares_by_module`."""
    traces = {name.rpartition(".")[0]: 0.0 for name in characterization.shares or {}}
    for name, share in (characterization.shares or {}).items():
        traces[name.rpartition(".")[0]] += share.fisher_trace.mean
    depth = max((name.count(".") + 1 for name in traces), default=1)
    while most is not None and len(traces) > most and depth > 1:
        depth -= 1
        joined: dict[str, float] = {}
        for name, trace in traces.items():
            parent = ".".join(name.split(".")[:depth])
            joined[parent] = joined.get(parent, 0.0) + trace
        traces = joined
    whole = sum(traces.values())
    return {name: trace / whole if whole else 0.0 for name, trace in traces.items()}


def settings_in_words(minima: Mapping[str, Characterization], *, left_out: bool = True) -> str:
    """Every setting but those that are off; what differs between minima by name.

    Args:
        minima: by name.
        left_out: with the measures that are not defined, and why.
    """
    described = _SETTINGS if left_out else _SETTINGS[:-1]
    said = {name: [phrase for describe in described for phrase in describe(c)] for name, c in minima.items()}
    common = [phrase for phrase in next(iter(said.values())) if all(phrase in phrases for phrases in said.values())]
    own = {name: [phrase for phrase in phrases if phrase not in common] for name, phrases in said.items()}
    return "; ".join([*common, *(f"{name}: {', '.join(phrases)}" for name, phrases in own.items() if phrases)])


_SETTINGS: tuple[Callable[[Characterization], list[str]], ...] = (
    lambda c: [
        f"{c.settings.trials} subsets of {c.settings.subset_size} from {c.num_samples:,} samples, "
        f"seed {c.settings.seed}"
    ],
    lambda c: [f"{len(c.singular_trials)} of them singular, left out of γ̂"] if c.singular_trials else [],
    lambda c: [f"loss {_loss_in_words(c)}"],
    lambda c: [f"BatchNorm {c.settings.batchnorm if c.settings.batchnorm == 'eval' else _chunks(c)}"],
    lambda c: [] if c.settings.fisher == "empirical" else [f"exact Fisher by {c.settings.fisher}"],
    lambda c: _if_given(c.settings.logit_normalization, "logits divided by {:g} times their norm"),
    lambda c: ["gradients times the parameters' magnitudes (scale-invariant)"] if c.settings.scale_invariant else [],
    lambda c: _if_given(c.settings.robustness_samples, "robustness of {} samples a subset"),
    lambda c: _if_given(len(c.settings.generic_parameters) or None, "{} parameters sample by sample"),
    lambda c: [f"{c.settings.dtype} on {c.settings.device}"],
    lambda c: [f"flatminima {c.settings.flatminima_version}, PyTorch {c.settings.torch_version}"],
    lambda c: [f"no {label_of(name).strip()}: {reason}" for name, reason in c.settings.left_out.items()],
)


def _loss_in_words(c: Characterization) -> str:
    name, form = c.settings.loss, c.settings.loss_form
    if form is None or name == "cross_entropy" or form.startswith("<"):  # a function
        return name
    brief = shorten(brief_form(form), _LONGEST_FORM, placeholder=" …")
    return brief if brief.startswith(name) else f"{name}, {brief}"


def _chunks(c: Characterization) -> str:
    return f"by chunks of {c.settings.batchnorm}"


def _if_given(value: float | None, form: str) -> list[str]:
    return [] if value is None else [form.format(value)]


def _title(characterization: Characterization) -> str:
    return f"Minimum with {characterization.num_parameters:,} parameters"


def _comparison_caption(comparison: Comparison, *, left_out: bool = True) -> str:
    return " ".join([*comparison.caveats(), settings_in_words(comparison.characterizations, left_out=left_out)])


def _differences_to(comparison: Comparison) -> str:
    """What can be said of the one that differences are taken to."""
    best, measure = comparison.best, comparison.decisive
    if best is None or measure is None:
        return f"differences to {comparison.reference!r}"
    is_best = "the best by γ̂" if measure == "log_det_fisher" else f"the lowest in {label_of(measure)}"
    return f"differences to {best!r}, {is_best}"


def _cell(comparison: Comparison, name: str, measure: str) -> str:
    estimates = comparison.characterizations[name].estimates()
    if measure not in estimates:
        return ""
    ranks = comparison.ranks(measure)
    estimate = estimates[measure]
    text = rounded_alone(estimate.mean, estimate.standard_error) + (f" (rank {ranks[name]})" if name in ranks else "")
    difference = _difference(comparison, name, measure)
    return f"{text}\n{difference}" if difference else text


def _difference(comparison: Comparison, name: str, measure: str) -> str:
    """To the reference, where both have the measure."""
    reference = comparison.reference
    if name == reference or any(measure not in comparison[one].estimates() for one in (name, reference)):
        return ""
    found = comparison.difference(name, reference, measure)
    return "" if math.isnan(found.mean) else rounded(found.mean, found.standard_error, signed=True)


def _fit(characterization: Characterization) -> dict[str, str]:
    found = {"training loss": f"{characterization.train_loss:.6g}"}
    if characterization.train_accuracy is not None:
        found["training accuracy"] = f"{characterization.train_accuracy:.4%}"
    return found


def _fits(minima: Mapping[str, Characterization]) -> list[tuple[str, ...]]:
    rows = {"training loss": [f"{c.train_loss:.4g}" for c in minima.values()]}
    accuracies = [c.train_accuracy for c in minima.values()]
    if any(accuracy is not None for accuracy in accuracies):
        rows["training accuracy"] = ["" if accuracy is None else f"{accuracy:.2%}" for accuracy in accuracies]
    return [(name, *cells) for name, cells in rows.items()]


def _shares_table(characterization: Characterization) -> Table:
    shares = characterization.shares or {}
    whole = sum(share.fisher_trace.mean for share in shares.values())
    rows = [
        (
            name,
            f"{share.fisher_trace.mean / whole:.1%}" if whole else "–",
            "singular" if share.log_det is None else str(share.log_det),
            str(share.rank),
        )
        for name, share in shares.items()
    ]
    header = ("parameter", "of the Fisher trace", "its own ln det", "rank")
    return Table("Shares by parameter", header, tuple(rows))


def _have_shares(minima: Mapping[str, Characterization]) -> bool:
    return all(c.shares is not None for c in minima.values())


def _chosen(measures: Sequence[str] | None, known: Mapping[str, object] | Sequence[str]) -> list[str]:
    """The names asked for, in their order; all that are known if none are."""
    if measures is None:
        return list(known)
    names = [measures] if isinstance(measures, str) else list(measures)
    for name in names:
        require(name in known, f"no measure {name!r}{did_you_mean(name, known)}: choose from {', '.join(known)}")
    return names
