"""Summaries of experiments laid out as in the paper: tables, figures, a page."""

from __future__ import annotations

import datetime
import functools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes

from flatminima.files import write_file
from flatminima.lab.experiments import (
    INDICATORS,
    SHORT_NAMES,
    Contrast,
    Difference,
    Experiment,
    Published,
    RankCorrelation,
    Record,
    SettingMeans,
    Spread,
    Summary,
    TrialSummary,
    json_of,
    number,
    select,
    write_ledger,
)
from flatminima.lab.reports.evidence import evidence_table
from flatminima.lab.reports.figures import band, lines
from flatminima.pages.drawing import Picture, picture
from flatminima.pages.writing import write_page
from flatminima.tables import Table, markdown_text

_SHOWN_OF_A_SEARCH = 10


@dataclass(frozen=True)
class Section:
    """One experiment on a page."""

    summary: Summary
    tables: list[Table]
    pictures: list[Picture]
    runs: Table
    progress: str
    time_left: str


def section(summary: Summary) -> Section:
    """A summary's tables and figures."""
    time_left = duration(summary.seconds_left) if summary.left else "–"
    return Section(summary, tables(summary), figures(summary), _runs(summary), progress_line(summary), time_left)


def tables(summary: Summary) -> list[Table]:
    """A summary's tables alone."""
    kinds = {"ranking": _ranking_tables, "comparison": _comparison_tables, "choice": _choice_tables}
    return kinds[summary.answers](summary)


def progress_line(summary: Summary) -> str:
    """How far the experiment is."""
    done, left, failed = len(summary.records), len(summary.left), len(summary.failures)
    pruned = sum(trial.state == "pruned" for trial in summary.trials or ())
    text = f"{done} of {done + pruned + left + failed} runs are done"
    text += f", {pruned} pruned" if pruned else ""
    text += f", {failed} failed" if failed else ""
    if left:
        text += f", {left} {'is' if left == 1 else 'are'} left"
        stops = not summary.records and any(spec.get("stop_at_loss") for spec in summary.specs.values())
        early = summary.trials is not None or stops  # finished runs have told when others will stop
        bound = "at most" if early else "about"
        text += f", {bound} {duration(summary.seconds_left)} with {counted(summary.workers, 'worker')}"
    return text + "."


def failure_lines(summary: Summary) -> list[str]:
    """A line for every failed run: which, where, why."""
    return [f"failed: {summary.unfinished[run]} ({run}): {error}" for run, error in summary.failures.items()]


def line_of(experiment: Experiment, records: Sequence[Record]) -> str:
    """One setting's runs in a line, as soon as they are known."""
    first = records[0]
    errors = Spread.of([100 * record.test_error for record in records])
    gammas = [record.value("log_det_fisher") for record in records]
    measured = "" if any(map(math.isnan, gammas)) else f", γ̂ {_mean_std(Spread.of(gammas))}"
    return (
        f"{experiment.factor} {first.case}, {first.arm}: test error {_mean_std(errors)} %{measured} "
        f"({counted(len(records), 'run')})"
    )


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    for unit, length in (("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.0f} {unit}"
    return counted(round(seconds), "second")


def counted(number: int, noun: str) -> str:
    """So many of something."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def write_reports(summaries: Sequence[Summary], stem: Path, *, heading: str, lead: str) -> None:
    """Write ``stem.html``, ``stem.md`` and ``stem.json``, and ``ledger.csv`` beside them."""
    write_json(summaries, stem)
    sections = [section(summary) for summary in summaries]
    environments = [dict(record.environment) for summary in summaries for record in summary.records]
    write_ledger(stem.with_name("ledger.csv"), summaries)
    write_file(stem.with_suffix(".md"), _markdown(sections, heading, lead))
    write_page(
        stem.with_suffix(".html"),
        "experiments.html.j2",
        package="flatminima.lab.reports",
        sections=sections,
        heading=heading,
        lead=lead,
        unfinished=any(summary.left for summary in summaries),
        written=f"{datetime.datetime.now().astimezone():%Y-%m-%d at %H:%M %Z}",
        environments=[made for place, made in enumerate(environments) if made not in environments[:place]],
    )


def write_json(summaries: Sequence[Summary], stem: Path) -> None:
    """Write ``stem.json`` alone, in a moment."""
    write_file(stem.with_suffix(".json"), json.dumps(json_of(summaries), indent=1, allow_nan=False) + "\n")


def figures(summary: Summary) -> list[Picture]:
    """The drawn quantities over the cases, as in the paper's figures."""
    return [_panel(summary, name) for name in summary.drawn if summary.records]


def _markdown(sections: Sequence[Section], heading: str, lead: str) -> str:
    parts = [f"# {markdown_text(heading)}\n\n{markdown_text(lead)}\n"]
    for part in sections:
        parts.append(f"## {markdown_text(part.summary.title)}\n\n{markdown_text(part.summary.question)}\n")
        parts.append("\n".join(f"* {markdown_text(line)}" for line in part.summary.verdict) + "\n")
        parts.append(part.progress + "\n")
        parts += [f"* {markdown_text(line)}\n" for line in failure_lines(part.summary)]
        parts += [table.markdown() for table in part.tables]
    return "\n".join(parts)


def _ranking_tables(summary: Summary) -> list[Table]:
    means = summary.means
    measured = [name for name in _indicators(summary) if any(entry.quantities.get(name) is not None for entry in means)]
    rows = [("runs", *(str(entry.runs) for entry in means))]
    rows.append(("test error (%)", *(_mean_std(entry.quantities["test_error"], 100) for entry in means)))
    rows += [
        (SHORT_NAMES.get(name, name), *(_mean_std(entry.quantities[name]) for entry in means)) for name in measured
    ]
    header = (summary.factor, *(entry.case for entry in means))
    first = Table("Mean ± standard deviation over seeds", header, tuple(rows))
    if summary.evaluation is None:
        return [first]
    says = {True: "follows", False: "fails"}
    told = ("the paper says it", {name: says[follows] for name, follows in summary.captured.items()})
    return [first, evidence_table(summary.evaluation, SHORT_NAMES, told if summary.captured else None)]


def _comparison_tables(summary: Summary) -> list[Table]:
    scale = _scale(summary.quantity)
    tables = [_claim_table(summary, scale)]
    for name in summary.drawn:
        if name != summary.quantity:
            rows = tuple((case, *_cells(summary, case, name)) for case in summary.cases)
            title = f"{_label(name)}, mean ± standard deviation over seeds"
            tables.append(Table(title, (summary.factor, *summary.arms), rows))
    if tests := tuple(_tests(d, scale) for d in (*summary.differences, *summary.pooled)):
        heading = ("paired by seed", "mean (95 % interval)", "lower in", "p, t test", "p, Wilcoxon", "p, sign test")
        tables.append(Table(f"Differences in {_label(summary.quantity)}", heading, tests))
    if any(summary.beside.values()):
        tables.append(_beside_table(summary))
    return tables


def _claim_table(summary: Summary, scale: float) -> Table:
    """Every case with every arm, what the claim is about, and the paper's numbers."""
    published = {(entry.case, entry.arm): entry for entry in summary.published}
    told = [arm for arm in summary.arms if any((case, arm) in published for case in summary.cases)]
    ours, against = summary.contrast or summary.arms[:2]
    gain_of = f"{ours} − {against}"
    header = (summary.factor, *summary.arms, gain_of, *(f"paper: {arm}" for arm in told))
    header += (f"paper: {gain_of}", "ours − paper's") if told else ()
    rows: list[tuple[str, ...]] = []
    for case in summary.cases:
        gain = next((d for d in summary.differences if (d.case, d.arm, d.against) == (case, ours, against)), None)
        row = [case, *_cells(summary, case, summary.quantity), _difference(gain, scale)]
        if told:
            row += [_mean_std(published.get((case, arm))) for arm in told]
            first, second = published.get((case, ours)), published.get((case, against))
            theirs = None if first is None or second is None else first.mean - second.mean
            row.append(number(theirs, "+.2f"))
            row.append(number(None if theirs is None or gain is None else scale * gain.mean - theirs, "+.2f"))
        rows.append(tuple(row))
    return Table(f"{_label(summary.quantity)}, mean ± standard deviation over seeds", header, tuple(rows))


def _beside_table(summary: Summary) -> Table:
    """Differences in the other quantities that are drawn."""
    cells: dict[str, dict[str, str]] = {}
    for name, differences in summary.beside.items():
        for d in differences:
            cells.setdefault(_pair(d), {})[name] = _difference(d, _scale(name), ".3g")
    rows = tuple((pair, *(found.get(name, "–") for name in summary.beside)) for pair, found in cells.items())
    return Table("Beside it, mean (95 % interval)", ("paired by seed", *map(_label, summary.beside)), rows)


def _pair(difference: Contrast) -> str:
    return f"{'all' if difference.case is None else difference.case}: {difference.arm} − {difference.against}"


def _tests(difference: Contrast, scale: float) -> tuple[str, ...]:
    return (
        _pair(difference),
        _difference(difference, scale),
        f"{difference.below} of {difference.pairs}",
        number(difference.p_t, ".2g"),
        number(difference.p_wilcoxon, ".2g"),
        number(difference.p_sign, ".2g"),
    )


def _cells(summary: Summary, case: str, quantity: str) -> list[str]:
    """A quantity by arm."""
    found: dict[str, SettingMeans] = {means.arm: means for means in summary.means if means.case == case}
    return [_mean_std(found[arm].quantities[quantity], _scale(quantity)) for arm in summary.arms]


def _choice_tables(summary: Summary) -> list[Table]:
    if summary.trials is not None:
        return [_trials_table(case, summary.trials) for case in summary.cases]
    tables = []
    for case in summary.cases:
        records = sorted(select(summary.records, case=case), key=lambda record: record.value("validation_error"))
        rows = tuple(
            (record.arm, f"{100 * record.value('validation_error'):.2f}", f"{100 * record.train_accuracy:.2f}")
            for record in records[:_SHOWN_OF_A_SEARCH]
        )
        if rows:
            header = ("setting", "validation error %", "training accuracy %")
            tables.append(Table(f"{case}: the best of {len(records)}", header, rows))
    return tables


def _trials_table(case: str, trials: Sequence[TrialSummary]) -> Table:
    """The best first: the finished by their errors, then the pruned by the errors at which they were."""
    states = ("finished", "pruned", "failed", "left")
    of_case = sorted(
        (trial for trial in trials if trial.case == case),
        key=lambda trial: (states.index(trial.state), trial.validation_error or 0.0, trial.trial),
    )
    rows = tuple(
        (
            trial.arm or "–",
            str(trial.trial),
            f"pruned after epoch {trial.epoch}" if trial.state == "pruned" else trial.state,
            "–" if trial.validation_error is None else f"{100 * trial.validation_error:.2f}",
        )
        for trial in of_case
    )
    return Table(f"{case}: {len(rows)} trials", ("", "trial", "outcome", "validation error %"), rows)


def _runs(summary: Summary) -> Table:
    measured = [] if summary.measuring is None else _indicators(summary)
    header = ("run", summary.factor, "training", "seed", "test error %", "training accuracy %", "seconds")
    rows = tuple(
        (
            record.run,
            record.case,
            record.arm,
            str(record.seed),
            f"{100 * record.test_error:.2f}",
            f"{100 * record.train_accuracy:.2f}",
            f"{record.seconds:.1f}",
            *(number(record.value(name), ".4g") for name in measured),
        )
        for record in summary.records
    )
    return Table("Every run", (*header, *(SHORT_NAMES.get(name, name) for name in measured)), rows)


def _indicators(summary: Summary) -> list[str]:
    """Ours, and the user's own as they come."""
    return list(dict.fromkeys([*INDICATORS, *(name for record in summary.records for name in record.indicators)]))


def _panel(summary: Summary, name: str) -> Picture:
    values = {
        arm: [
            [
                value
                for record in select(summary.records, arm, case)
                if not math.isnan(value := _scale(name) * record.value(name))
            ]
            for case in summary.cases
        ]
        for arm in summary.arms
    }
    label, correlation = _label(name), summary.correlations.get(name)
    title = label if correlation is None else f"{label}: τ {_equals(correlation)}"
    draw = functools.partial(_draw_panel, summary=summary, values=values, log=_spans_decades(name, values))
    return picture(title, f"{label} over {summary.factor}, mean and standard deviation over seeds", draw)


def _draw_panel(axes: Axes, *, summary: Summary, values: dict[str, list[list[float]]], log: bool) -> None:
    if len(values) == 1:
        band(axes, summary.cases, *values.values(), log=log)
    else:
        lines(axes, summary.cases, values, log=log)
    axes.set_xlabel(summary.factor)


def _scale(quantity: str) -> float:
    """Errors are shown in percent."""
    return 100.0 if quantity.endswith("error") else 1.0


def _label(quantity: str) -> str:
    return f"{SHORT_NAMES[quantity]} (%)" if quantity.endswith("error") else SHORT_NAMES[quantity]


def _spans_decades(quantity: str, values: Mapping[str, list[list[float]]]) -> bool:
    """Whether it is drawn on a logarithmic axis: what is positive and has values far apart, errors excepted."""
    drawn = [value for cases in values.values() for case in cases for value in case]
    return not quantity.endswith("error") and bool(drawn) and 0 < 10 * min(drawn) <= max(drawn)


def _equals(correlation: RankCorrelation) -> str:
    return f"= {correlation.tau:+.2f}" if correlation.defined else "undefined"


def _mean_std(entry: Spread | Published | None, scale: float = 1.0) -> str:
    if entry is None:
        return "–"
    mean, std = scale * entry.mean, scale * entry.std
    digits = f"{mean:.2f}" if 0.1 <= abs(mean) < 100 else f"{mean:.1f}" if 100 <= abs(mean) < 10_000 else f"{mean:.3g}"
    return digits if math.isnan(std) else f"{digits} ± {f'{std:.0f}' if 100 <= std < 10_000 else f'{std:.2g}'}"


def _difference(entry: Difference | None, scale: float, form: str = ".2f") -> str:
    if entry is None:
        return "–"
    mean, low, high = (format(scale * value, f"+{form}") for value in (entry.mean, entry.low, entry.high))
    return f"{mean} ({low} to {high})" if math.isfinite(entry.low) else mean
