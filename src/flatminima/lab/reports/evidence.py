"""What the protocols say of measures, as a table, a figure and a page."""

from __future__ import annotations

import datetime
import functools
from collections.abc import Mapping
from pathlib import Path

from matplotlib.axes import Axes

from flatminima.lab.experiments import number
from flatminima.lab.reports.figures import intervals
from flatminima.pages.drawing import Picture, picture
from flatminima.pages.writing import write_page
from flatminima.protocols import RESAMPLES, Evaluation, Evidence, Finding
from flatminima.tables import Table

_DRAWN = 30
"""Measures in a figure; the rest are in the table."""

_ROW_INCHES = 0.42


def evidence_table(
    evaluation: Evaluation,
    labels: Mapping[str, str] | None = None,
    more: tuple[str, Mapping[str, str]] | None = None,
) -> Table:
    """Every protocol of every measure; what is given stands last.

    Args:
        evaluation: what is shown.
        labels: what columns are called, if not by their names.
        more: heading and cells, by measure, of one more column.
    """
    called = {} if labels is None else labels
    given = None if evaluation.given is None else called.get(evaluation.given, evaluation.given)
    evidence = evaluation.all
    counts = {found.kendall.n for found in evidence.values()}
    header = (
        "measure",
        *([] if given is None else ["partial τ", "partial ρ"]),
        "τ (of settings)",
        "Ψ",
        "information",
        "sign error",
        *(["minima"] if len(counts) > 1 else []),
        *([] if more is None else [more[0]]),
    )
    rows = tuple(
        (
            called.get(name, name),
            *([] if given is None else [_cell(found.partial_kendall), _cell(found.partial_correlation)]),
            _cell(found.kendall, found.kendall_of_settings.value),
            _cell(found.granulated_kendall),
            _cell(found.conditional_mutual_information, form=".2f"),
            _cell(found.sign_error, found.sign_error.mean, form=".2f"),
            *([str(found.kendall.n)] if len(counts) > 1 else []),
            *([] if more is None else [more[1].get(name, "")]),
        )
        for name, found in evidence.items()
    )
    decisive = "τ" if given is None else f"partial τ, and partial ρ, given {given}"
    return Table(f"Evidence is the {decisive}; in brackets 95 % intervals", header, rows)


def write_evaluation(evaluation: Evaluation, path: Path, *, source: str) -> None:
    """Write one self-contained page."""
    write_page(
        path,
        "evaluation.html.j2",
        package="flatminima.lab.reports",
        evaluation=evaluation,
        source=source,
        conclusions=evaluation.conclusions(),
        picture=_picture(evaluation),
        table=evidence_table(evaluation),
        gaps=_gaps(evaluation.measures),
        resamples=RESAMPLES,
        written=f"{datetime.datetime.now().astimezone():%Y-%m-%d at %H:%M %Z}",
    )


def _picture(evaluation: Evaluation) -> Picture:
    """The partial coefficients beside τ itself, the strongest on top."""
    given = evaluation.given
    strength = {name: abs(found.decisive(given)[0].value or 0.0) for name, found in evaluation.measures.items()}
    names = sorted(strength, key=lambda name: -strength[name])[:_DRAWN]
    shown = [evaluation.measures[name] for name in names]
    groups = {"τ": [_ends(found.kendall) for found in shown]}
    if given is not None:
        partial = {
            f"partial τ, given {given}": [_ends(found.partial_kendall) for found in shown],
            f"partial ρ, given {given}": [_ends(found.partial_correlation) for found in shown],
        }
        groups = {**partial, **groups}
    draw = functools.partial(_draw, names=names, groups=groups)
    most = f"the {_DRAWN} strongest of {len(strength)} measures" if len(strength) > _DRAWN else "every measure"
    title = f"Kendall's τ with the error, {most}"
    return picture(title, f"{title}, with 95 % intervals", draw, (7.5, 1.2 + _ROW_INCHES * len(names)))


def _draw(axes: Axes, *, names: list[str], groups: Mapping[str, list[tuple[float, float, float] | None]]) -> None:
    intervals(axes, names, groups)


def _ends(finding: Finding) -> tuple[float, float, float] | None:
    if finding.value is None:
        return None
    low, high = finding.interval or (finding.value, finding.value)
    return finding.value, low, high


def _cell(finding: Finding, beside: float | None = None, form: str = "+.2f") -> str:
    """The interval below the number, and another number beside it."""
    more = "" if beside is None else f" ({beside:{form}})"
    ends = "" if finding.interval is None else "\n[{:.2f}, {:.2f}]".format(*finding.interval)
    return number(finding.value, form) + more + ends


def _gaps(measures: Mapping[str, Evidence]) -> dict[str, dict[str, str]]:
    """Why numbers or intervals are missing, by measure and protocol."""
    found = {
        name: {protocol: finding.reason for protocol, finding in vars(evidence).items() if finding.reason is not None}
        for name, evidence in measures.items()
    }
    return {name: reasons for name, reasons in found.items() if reasons}
