"""All protocols for all measures of a ledger, and what they say in plain words."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from flatminima.protocols.findings import Finding
from flatminima.protocols.information import conditional_mutual_information
from flatminima.protocols.kendall import (
    granulated_kendall,
    kendall,
    kendall_of_settings,
    partial_correlation,
    partial_kendall,
)
from flatminima.protocols.ledger import Ledger
from flatminima.protocols.sign_error import SignError, sign_error

Verdict = Literal["follows", "goes against", "may repeat", "shows nothing", "undefined"]

_FEW_UNITS = 10
"""Fewer seeds or minima than this make a percentile interval too narrow to be trusted."""

_MANY_MINIMA = 10
"""Of so many, 3.6 million orders are possible: none is met by luck."""

_ERRORS_BY_CHANCE = 0.05


@dataclass(frozen=True)
class Evidence:
    """What the protocols say of one measure."""

    kendall: Finding
    """τ-b over single minima."""
    kendall_of_settings: Finding
    """τ-b over the means of settings."""
    partial_kendall: Finding
    """Partial τ given the training loss, or what else is named."""
    partial_correlation: Finding
    """Partial correlation given the same, which a noisy copy of it does not have."""
    granulated_kendall: Finding
    """Ψ: the mean τ where one hyper-parameter alone varies."""
    conditional_mutual_information: Finding
    """Normalized, given at most two hyper-parameters."""
    sign_error: SignError
    """The worst environment's."""

    @classmethod
    def of(cls, ledger: Ledger, measure: str) -> Evidence:
        """By every protocol."""
        return cls(
            kendall=kendall(ledger, measure),
            kendall_of_settings=kendall_of_settings(ledger, measure),
            partial_kendall=partial_kendall(ledger, measure),
            partial_correlation=partial_correlation(ledger, measure),
            granulated_kendall=granulated_kendall(ledger, measure),
            conditional_mutual_information=conditional_mutual_information(ledger, measure),
            sign_error=sign_error(ledger, measure),
        )

    def decisive(self, given: str | None) -> list[Finding]:
        """The findings that count: the partial coefficients, or without anything given τ itself."""
        return [self.kendall] if given is None else [self.partial_kendall, self.partial_correlation]

    def verdict(self, given: str | None) -> Verdict:
        """What the decisive intervals say of measure and error."""
        findings = self.decisive(given)
        if any(finding.interval is None for finding in findings):
            return "undefined"
        if all(finding.above_zero for finding in findings):
            return "follows"
        if all(finding.below_zero for finding in findings):
            return "goes against"
        return "may repeat" if findings[0].above_zero or findings[0].below_zero else "shows nothing"


@dataclass(frozen=True)
class Evaluation:
    """What the protocols say of every measure of a ledger."""

    measures: Mapping[str, Evidence]
    """By name."""
    baseline: Evidence | None
    """Of the given column itself, which every measure is held against; None without one."""
    given: str | None
    """That column."""
    target: str
    """The column of errors, or of accuracies."""
    hyper_parameters: tuple[str, ...]
    """What makes a setting."""
    seed: str | None
    """What is redrawn for the intervals; None: minima are."""
    minima: int
    """How many there are."""
    settings: int
    """How many combinations of hyper-parameters."""
    units: int
    """Seeds, or minima where no seeds are named."""
    test_size: int
    """Samples that an error is taken to be a fraction of."""

    @property
    def all(self) -> dict[str, Evidence]:
        """Every measure's evidence, and last that of what is given."""
        if self.given is None or self.baseline is None:
            return dict(self.measures)
        return {**self.measures, self.given: self.baseline}

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)

    def conclusions(self, labels: Mapping[str, str] | None = None) -> list[str]:
        """What the numbers say, in sentences made from them.

        Args:
            labels: what columns are called in them, if not by their names.
        """
        called = {name: name for name in [*self.measures, self.target, self.given or ""]} | dict(labels or {})
        beyond = "" if self.given is None else f" beyond {called[self.given]}"
        of_given = "" if self.given is None else f" of {called[self.given]}"
        by_verdict: dict[Verdict, list[str]] = {}
        for name, evidence in self.measures.items():
            by_verdict.setdefault(evidence.verdict(self.given), []).append(name)
        shown = [self._ground(called)]
        if names := by_verdict.get("follows"):
            shown.append(f"Say something about the error{beyond}: {self._with_numbers(names, called)}.")
        else:
            shown.append(f"No measure here is seen to say something about the error{beyond}.")
        if names := by_verdict.get("goes against"):
            numbers = self._with_numbers(names, called)
            shown.append(f"Go against the error{beyond} (the more of it, the less error): {numbers}.")
        if names := by_verdict.get("may repeat"):
            numbers = self._with_numbers(names, called)
            shown.append(f"Follow or oppose the error no more than a noisy copy{of_given} might: {numbers}.")
        if names := by_verdict.get("shows nothing"):
            these = ", ".join(called[name] for name in names)
            shown.append(f"Show no clear relation to the error{beyond} (the interval holds zero): {these}.")
        undecided: dict[str, list[str]] = {}
        for name in by_verdict.get("undefined", []):
            reasons = [finding.reason for finding in self.measures[name].decisive(self.given) if finding.reason]
            undecided.setdefault(reasons[0], []).append(called[name])
        shown += [f"Not to be judged, as {reason}: {', '.join(those)}." for reason, those in undecided.items()]
        return [*shown, *self._cautions(called)]

    def _with_numbers(self, names: Sequence[str], called: Mapping[str, str]) -> str:
        """The strongest first."""
        symbol = "τ" if self.given is None else "partial τ"
        findings = {name: self.measures[name].decisive(self.given)[0] for name in names}
        strongest = sorted(names, key=lambda name: -abs(findings[name].value or 0.0))
        return ", ".join(f"{called[name]} ({symbol} = {described(findings[name])})" for name in strongest)

    def _ground(self, called: Mapping[str, str]) -> str:
        """What is asked, and of what."""
        of = f" of {self.settings} settings" if self.hyper_parameters else ""
        text = f"{self.minima} minima{of}, ordered by {called[self.target]}. "
        if self.given is None or self.baseline is None:
            return f"{text}Nothing is given, so whether a measure only repeats the training loss remains open."
        given, alone = called[self.given], self.baseline.kendall
        tau = f"τ is undefined, as {alone.reason}" if alone.value is None else f"τ = {described(alone)}"
        return (
            f"{text}Of {given} alone, {tau}. A measure's evidence is its partial τ and partial ρ, what it says of "
            f"the order beyond {given}; its plain τ may only repeat that."
        )

    def _cautions(self, called: Mapping[str, str]) -> list[str]:
        found, unit = [], "minima" if self.seed is None else "seeds"
        exact = [called[name] for name, evidence in self.measures.items() if abs(evidence.kendall.value or 0.0) == 1]
        if exact and self.minima >= _MANY_MINIMA:
            found.append(
                f"Exactly in the order of the error: {', '.join(exact)}. Is that the error under another name?"
            )
        judged = [e for e in self.measures.values() if e.verdict(self.given) != "undefined"]
        if len(judged) > 1:
            expected = _ERRORS_BY_CHANCE * len(judged)
            found.append(
                f"Of {len(judged)} intervals that each miss in one case of twenty, {expected:.2g} would leave out zero "
                "by chance: decide which measure you ask about before you look."
            )
        if judged and self.units < _FEW_UNITS:
            found.append(f"Intervals rest on {self.units} {unit}: of so few, percentile intervals are too narrow.")
        return found


def evaluate(ledger: Ledger, progress: Callable[[str], None] | None = None) -> Evaluation:
    """Every protocol for every measure of a ledger; deterministic.

    Args:
        ledger: the minima.
        progress: called with a measure's name when it is done.
    """

    def evidence(measure: str) -> Evidence:
        found = Evidence.of(ledger, measure)
        if progress is not None:
            progress(measure)
        return found

    minima = ledger.all
    return Evaluation(
        measures={measure: evidence(measure) for measure in ledger.measures},
        baseline=None if ledger.given is None else Evidence.of(ledger, ledger.given),
        given=ledger.given,
        target=ledger.target,
        hyper_parameters=ledger.hyper_parameters,
        seed=ledger.seed,
        minima=len(minima),
        settings=len(np.unique(minima.settings)),
        units=len(minima) if minima.seeds is None else len(np.unique(minima.seeds)),
        test_size=ledger.test_size,
    )


def described(finding: Finding) -> str:
    """A number with its interval, for people."""
    if finding.value is None:
        return "–"
    if finding.interval is None:
        return f"{finding.value:.2f}"
    low, high = finding.interval
    return f"{finding.value:.2f} [{low:.2f} to {high:.2f}]"
