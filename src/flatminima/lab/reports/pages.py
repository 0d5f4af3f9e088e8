"""Summaries of experiments laid out as in the paper: tables, figures, a page."""

from __future__ import annotations

import datetime
import functools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from flatminima.lab.experiments import INDICATORS, RIVALS, SHORT_NAMES, select, value_of
from flatminima.lab.reports.figures import Picture, Table, Theme, band, picture, write_page, write_text

_SHOWN_OF_A_SEARCH = 10


@dataclass(frozen=True)
class Section:
    """One experiment on a page."""

    summary: dict[str, Any]
    tables: list[Table]
    pictures: list[Picture]
    runs: Table
    progress: str
    time_left: str


def section(summary: dict[str, Any]) -> Section:
    """A summary's tables and figures."""
    pictures = _figure(summary) if summary["answers"] == "ranking" else []
    time_left = duration(summary["seconds_left"]) if summary["left"] else "–"
    return Section(summary, tables(summary), pictures, _runs(summary), progress(summary), time_left)


def tables(summary: dict[str, Any]) -> list[Table]:
    """A summary's tables alone."""
    kinds = {"ranking": _ranking_tables, "comparison": _comparison_tables, "choice": _choice_tables}
    return kinds[summary["answers"]](summary)


def progress(summary: dict[str, Any]) -> str:
    """How far the experiment is."""
    done, left, failed = len(summary["records"]), len(summary["left"]), len(summary["failures"])
    pruned = sum(trial["state"] == "pruned" for trial in summary.get("trials", ()))
    text = f"{done} of {done + pruned + left + failed} runs are done"
    text += f", {pruned} pruned" if pruned else ""
    text += f", {failed} failed" if failed else ""
    if left:
        text += f", {left} {'is' if left == 1 else 'are'} left"
        bound = "at most" if "trials" in summary else "about"  # pruning saves some of it
        text += f", {bound} {duration(summary['seconds_left'])} with {counted(summary['workers'], 'worker')}"
    return text + "."


def failed(summary: dict[str, Any]) -> list[str]:
    """A line for every failed run: which, where, why."""
    return [f"failed: {summary['unfinished'][run]} ({run}): {error}" for run, error in summary["failures"].items()]


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    for unit, length in (("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.0f} {unit}"
    return counted(round(seconds), "second")


def counted(number: int, noun: str) -> str:
    """So many of something."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def write_reports(summaries: Sequence[dict[str, Any]], stem: Path, *, preset: str, lead: str) -> None:
    """Write ``stem.html``, ``stem.md`` and ``stem.json``."""
    sections = [section(summary) for summary in summaries]
    environments = [record["environment"] for summary in summaries for record in summary["records"]]
    write_text(stem.with_suffix(".json"), json.dumps(list(summaries), indent=1, allow_nan=False) + "\n")
    write_text(stem.with_suffix(".md"), _markdown(sections, preset, lead))
    write_page(
        stem.with_suffix(".html"),
        "reproduction.html.j2",
        sections=sections,
        preset=preset,
        lead=lead,
        unfinished=any(summary["left"] for summary in summaries),
        written=f"{datetime.datetime.now().astimezone():%Y-%m-%d at %H:%M %Z}",
        environment=environments[0] if environments else {},
    )


def _markdown(sections: Sequence[Section], preset: str, lead: str) -> str:
    parts = [f"# The paper's experiments, {preset}\n\n{lead}\n"]
    for part in sections:
        parts.append(f"## {part.summary['title']}\n\n{part.summary['question']}\n")
        parts.append("\n".join(f"* {line}" for line in part.summary["verdict"]) + "\n")
        parts.append(part.progress + "\n")
        parts += [f"* {line}\n" for line in failed(part.summary)]
        parts += [table.markdown() for table in part.tables]
    return "\n".join(parts)


def _ranking_tables(summary: dict[str, Any]) -> list[Table]:
    cells = {entry["case"]: entry["quantities"] for entry in summary["means"]}
    rows = [("runs", *(str(entry["runs"]) for entry in summary["means"]))]
    rows.append(("test error (%)", *(_mean_std(quantities["test_error"], 100) for quantities in cells.values())))
    rows += [(SHORT_NAMES[name], *(_mean_std(q[name]) for q in cells.values())) for name in INDICATORS]
    means = Table("Mean ± standard deviation over seeds", (summary["factor"], *cells), tuple(rows))
    said = {True: "follows", False: "fails", None: ""}
    correlations = tuple(
        (
            SHORT_NAMES[name],
            _signed(found["tau_of_settings"]),
            _signed(found["tau"]),
            _interval(found),
            said[summary["captured"].get(name)],
        )
        for name, found in summary["correlations"].items()
    )
    heading = ("measure", "over settings", "over minima", "95 % interval", "the paper says it")
    return [means, Table("Kendall's τ with the test error", heading, correlations)] if correlations else [means]


def _comparison_tables(summary: dict[str, Any]) -> list[Table]:
    quantity, arms = summary["quantity"], summary["arms"]
    scale = 100.0 if quantity == "test_error" else 1.0
    published = {(entry["case"], entry["arm"]): entry for entry in summary["published"]}
    ours = {(entry["case"], entry["arm"]): entry["quantities"][quantity] for entry in summary["means"]}
    differences = {(entry["case"], entry["against"]): entry for entry in summary["differences"]}
    told = [arm for arm in arms if any((case, arm) in published for case in summary["cases"])]
    unit = "test error %" if scale == 100 else SHORT_NAMES[quantity]
    header = (summary["factor"], *arms, "+reg − plain", *(f"paper: {arm}" for arm in told))
    header += ("paper: +reg − plain", "ours − paper's") if told else ()
    rows: list[tuple[str, ...]] = []
    for case in summary["cases"]:
        gain = differences.get((case, arms[0]))
        row = [case, *(_mean_std(ours.get((case, arm)), scale) for arm in arms), _difference(gain, scale)]
        if told:
            papers = [published.get((case, arm)) for arm in told]
            row += [_mean_std(entry) for entry in papers]
            theirs = papers[1]["mean"] - papers[0]["mean"] if len(papers) > 1 and papers[0] and papers[1] else None
            row.append("–" if theirs is None else f"{theirs:+.2f}")
            row.append("–" if theirs is None or gain is None else f"{scale * gain['mean'] - theirs:+.2f}")
        rows.append(tuple(row))
    tests: tuple[tuple[str, ...], ...] = tuple(
        (
            f"{entry['case']}: {entry['arm']} − {entry['against']}",
            _difference(entry, scale),
            f"{entry['below']} of {entry['pairs']}",
            _probability(entry["p_t"]),
            _probability(entry["p_wilcoxon"]),
            _probability(entry["p_sign"]),
        )
        for entry in [*summary["differences"], *({**pooled, "case": "all"} for pooled in summary["pooled"])]
    )
    heading = ("paired by seed", "mean (95 % interval)", "lower in", "p, t test", "p, Wilcoxon", "p, sign test")
    tables = [Table(f"{unit}, mean ± standard deviation over seeds", header, tuple(rows))]
    return [*tables, Table("Differences", heading, tests)] if tests else tables


def _choice_tables(summary: dict[str, Any]) -> list[Table]:
    if "trials" in summary:
        return [_trials_table(case, summary["trials"]) for case in summary["cases"]]
    tables = []
    for case in summary["cases"]:
        records = sorted(select(summary["records"], case=case), key=lambda record: float(record["validation_error"]))
        rows = tuple(
            (record["arm"], f"{100 * record['validation_error']:.2f}", f"{100 * record['train_accuracy']:.2f}")
            for record in records[:_SHOWN_OF_A_SEARCH]
        )
        if rows:
            header = ("setting", "validation error %", "training accuracy %")
            tables.append(Table(f"{case}: the best of {len(records)}", header, rows))
    return tables


def _trials_table(case: str, trials: Sequence[dict[str, Any]]) -> Table:
    """The best first: the finished by their errors, then the pruned by the errors at which they were."""
    states = ("finished", "pruned", "failed", "left")
    of_case = sorted(
        (trial for trial in trials if trial["case"] == case),
        key=lambda trial: (states.index(trial["state"]), trial["validation_error"] or 0.0, trial["trial"]),
    )
    rows = tuple(
        (
            trial["arm"] or "–",
            str(trial["trial"]),
            f"pruned after epoch {trial['epoch']}" if trial["state"] == "pruned" else trial["state"],
            "–" if trial["validation_error"] is None else f"{100 * trial['validation_error']:.2f}",
        )
        for trial in of_case
    )
    return Table(f"{case}: {len(rows)} trials", ("", "trial", "outcome", "validation error %"), rows)


def _runs(summary: dict[str, Any]) -> Table:
    measured = summary["measuring"] is not None
    indicators = [SHORT_NAMES[name] for name in INDICATORS] if measured else []
    header = [
        "run",
        summary["factor"],
        "training",
        "seed",
        "test error %",
        "training accuracy %",
        "seconds",
        *indicators,
    ]
    rows: list[tuple[str, ...]] = []
    for record in summary["records"]:
        row = [record["run"], record["case"], record["arm"], str(record["seed"])]
        row += [
            f"{100 * record['test_error']:.2f}",
            f"{100 * record['train_accuracy']:.2f}",
            f"{record['seconds']:.1f}",
        ]
        row += [_significant(record["indicators"].get(name)) for name in INDICATORS] if measured else []
        rows.append(tuple(row))
    return Table("Every run", tuple(header), tuple(rows))


def _figure(summary: dict[str, Any]) -> list[Picture]:
    """The paper's figure: the test error, then every measure, over the settings."""
    names = ["test_error", *RIVALS, "fisher_trace", "train_loss"]
    return [_panel(summary, name) for name in names if summary["records"]]


def _panel(summary: dict[str, Any], name: str) -> Picture:
    values = [
        [
            100 * record["test_error"] if name == "test_error" else value_of(record, name)
            for record in select(summary["records"], case=case)
        ]
        for case in summary["cases"]
    ]
    values = [[value for value in single if not math.isnan(value)] for single in values]
    tau = summary["correlations"].get(name, {}).get("tau")
    label = "test error (%)" if name == "test_error" else SHORT_NAMES[name]
    draw = functools.partial(
        _draw_panel,
        names=summary["cases"],
        values=values,
        factor=summary["factor"],
        log=name not in ("test_error", "log_det_fisher"),
    )
    title = label if name == "test_error" else f"{label}: τ " + ("undefined" if tau is None else f"= {tau:+.2f}")
    return picture(title, f"{label} over {summary['factor']}, mean and standard deviation over seeds", draw)


def _draw_panel(
    axes: Axes, theme: Theme, *, names: Sequence[str], values: Sequence[Sequence[float]], factor: str, log: bool
) -> None:
    band(axes, theme, names, values, log=log)
    axes.set_xlabel(factor)


def _mean_std(entry: dict[str, Any] | None, scale: float = 1.0) -> str:
    if entry is None:
        return "–"
    mean, std = scale * entry["mean"], None if entry["std"] is None else scale * entry["std"]
    digits = f"{mean:.2f}" if 0.1 <= abs(mean) < 100 else f"{mean:.1f}" if 100 <= abs(mean) < 10_000 else f"{mean:.3g}"
    return digits if std is None else f"{digits} ± {f'{std:.0f}' if 100 <= std < 10_000 else f'{std:.2g}'}"


def _difference(entry: dict[str, Any] | None, scale: float) -> str:
    if entry is None:
        return "–"
    mean, low, high = (None if entry[key] is None else scale * entry[key] for key in ("mean", "low", "high"))
    return f"{mean:+.2f}" if low is None else f"{mean:+.2f} ({low:+.2f} to {high:+.2f})"


def _signed(value: float | None) -> str:
    return "–" if value is None else f"{value:+.2f}"


def _interval(correlation: dict[str, Any]) -> str:
    return "–" if correlation["low"] is None else f"{correlation['low']:.2f} to {correlation['high']:.2f}"


def _probability(value: float | None) -> str:
    return "–" if value is None else f"{value:.2g}"


def _significant(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
