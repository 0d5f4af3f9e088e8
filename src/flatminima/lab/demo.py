"""The demo: both questions on handwritten digits, in minutes. Which minimum generalizes better, and how to reach one.

Scenario I of the paper (Sec. 7.1) in small: the same clean images plus a confusion set of randomly labelled ones that
grows from setting to setting, so that minima of equally small training loss generalize ever worse. Then the same
settings with the regularizer, and with plain training of the same cost.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from rich.console import Group
from rich.table import Table

from flatminima.lab.experiments import (
    INDICATORS,
    MATCHED_COST,
    NORMALIZED,
    PRESETS,
    SHORT_NAMES,
    Experiment,
    Record,
    Setting,
    correlation,
    difference,
    plain,
    run_experiment,
    select,
)
from flatminima.lab.jobs import Processes, available_cores
from flatminima.lab.reports import Picture, Theme, lines, picture, scatter, write_page, write_text
from flatminima.lab.runs import Measuring

CONFUSION = (0, 100, 200, 300)
SEEDS = (100, 101, 102, 103, 104)
"""β was chosen by looking at runs with seeds 0 to 2, which take no part here."""

PLAIN = dataclasses.replace(PRESETS["digits"].scenario, evaluate_every=1)
REGULARIZER = PRESETS["digits"].regularizer

ARMS = {
    "plain": PLAIN,
    "plain, equal cost": dataclasses.replace(PLAIN, epochs=MATCHED_COST * (PLAIN.epochs or 0)),
    "regularized": dataclasses.replace(PLAIN, regularizer=REGULARIZER),
}
MEASURING = Measuring(subset_size=100, trials=20, on_singular="skip")


def demo(out: Path, *, workers: int | None = None, progress: bool = True) -> dict[str, Any]:
    """Train and measure every minimum, and write ``report.html`` and ``summary.json`` into ``out``.

    Finished runs are kept under ``out/runs``: a second call, or one after an interruption, does not repeat them.

    Args:
        out: folder; made if missing.
        workers: processes at once (default: the cores available).
        progress: show a bar with the time left on a terminal.

    Returns:
        The summary, JSON-able: outcomes, rank correlations, the regularizer's paired differences, environment.
    """
    started = time.monotonic()
    experiment = Experiment(
        name="demo",
        title="Both questions on handwritten digits",
        question="Which minimum generalizes better, and does the regularizer find a better one?",
        answers="ranking",
        factor="randomly labelled training images",
        settings=tuple(
            Setting(str(size), arm, dataclasses.replace(spec, confusion=size))
            for size in CONFUSION
            for arm, spec in ARMS.items()
        ),
        measuring=MEASURING,
        seeds=SEEDS,
    )
    executor = Processes(workers or available_cores())
    records = run_experiment(experiment, root=out / "runs", executor=executor, progress=progress)
    summary = summarize(records)
    summary["seconds"] = round(time.monotonic() - started, 1)
    write_text(out / "summary.json", json.dumps(summary, indent=1))
    write_report(summary, out / "report.html")
    return summary


def summarize(records: Sequence[Record]) -> dict[str, Any]:
    """What the records show, as plain numbers; NaN as None."""
    return {
        "confusion": [str(size) for size in CONFUSION],
        "arms": list(ARMS),
        "seeds": list(SEEDS),
        "training_images": PLAIN.train_size,
        "regularizer": dataclasses.asdict(REGULARIZER),
        "measuring": dataclasses.asdict(MEASURING),
        "outcomes": list(records),
        "rank_correlation": {name: plain(correlation(select(records, "plain"), name)) for name in INDICATORS},
        "regularized_minus": {
            arm: {str(size): _effects(records, arm, str(size)) for size in CONFUSION}
            for arm in ARMS
            if arm != "regularized"
        },
        "environment": records[0]["environment"],
    }


def table(summary: dict[str, Any]) -> Group:
    """The summary for a terminal."""
    what = Table(title="Which minimum generalizes better? Means over seeds, plain training", title_justify="left")
    what.add_column("confusion set", justify="right")
    what.add_column("test error %", justify="right")
    for name in INDICATORS:
        what.add_column(SHORT_NAMES[name], justify="right")
    for confusion in summary["confusion"]:
        rows = select(summary["outcomes"], "plain", confusion)
        values = [statistics.fmean([row["indicators"][name] for row in rows]) for name in INDICATORS]
        errors = [100 * row["test_error"] for row in rows]
        what.add_row(confusion, f"{statistics.fmean(errors):.1f}", *(f"{value:.4g}" for value in values))
    what.add_section()
    taus = [summary["rank_correlation"][name]["tau"] for name in INDICATORS]
    what.add_row("Kendall's τ", "1", *("–" if tau is None else f"{tau:+.2f}" for tau in taus), style="bold")

    how = Table(title="Does the regularizer help? Means over seeds", title_justify="left")
    for heading in ("confusion set", "training", "test error %", "γ̂, normalized", "training loss"):
        how.add_column(heading, justify="left" if heading == "training" else "right")
    for confusion in summary["confusion"]:
        for arm in summary["arms"]:
            rows = select(summary["outcomes"], arm, confusion)
            how.add_row(
                confusion if arm == summary["arms"][0] else "",
                arm,
                f"{statistics.fmean([100 * row['test_error'] for row in rows]):.1f}",
                f"{statistics.fmean([row['indicators'][NORMALIZED] for row in rows]):.0f}",
                f"{statistics.fmean([row['indicators']['train_loss'] for row in rows]):.2g}",
            )
        how.add_section()
    return Group(what, "", how, "", *(f"• {line}" for line in conclusions(summary)))


def conclusions(summary: dict[str, Any]) -> list[str]:
    """What the data say, in sentences made from the numbers."""
    correlation = summary["rank_correlation"]
    gamma = correlation["log_det_fisher"]
    rivals = {name: correlation[name]["tau"] for name in INDICATORS if name != "log_det_fisher"}
    as_good = [INDICATORS[name] for name, tau in rivals.items() if tau is not None and tau >= gamma["tau"]]
    models = len(select(summary["outcomes"], "plain"))
    found = [
        f"γ̂ orders {models} plainly trained minima by test error with Kendall's τ = {gamma['tau']:.2f} "
        f"(95 % interval {gamma['low']:.2f} to {gamma['high']:.2f}), and the means of the {len(summary['confusion'])} "
        f"settings with τ = {gamma['tau_of_settings']:.2f}."
    ]
    if as_good:
        found.append(f"At this size γ̂ is not alone: {', '.join(as_good)} do at least as well.")
    else:
        found.append("No rival, nor the training loss, orders them better here.")
    for confusion in summary["confusion"]:
        effect = summary["regularized_minus"]["plain, equal cost"][confusion]["test_error"]
        points = {key: 100 * effect[key] for key in ("mean", "low", "high")}
        verdict = "helps" if points["high"] < 0 else "harms" if points["low"] > 0 else "makes no clear difference"
        found.append(
            f"With {confusion} randomly labelled images the regularizer {verdict}: test error {points['mean']:+.1f} "
            f"points ({points['low']:+.1f} to {points['high']:+.1f}) against plain training of equal cost."
        )
    off = [row for row in select(summary["outcomes"], "regularized") if row["warnings"]]
    if off:
        found.append(
            f"{len(off)} of {len(select(summary['outcomes'], 'regularized'))} regularized runs end at a training loss "
            "too high to be called a minimum: there the regularizer keeps the network from fitting the random labels, "
            "and only γ̂ at normalized logits compares."
        )
    return found


def write_report(summary: dict[str, Any], path: Path) -> None:
    """The page: what the data show, the pictures, the tables, every run."""
    write_page(
        path,
        "demo.html.j2",
        summary=summary,
        indicators=INDICATORS,
        normalized=NORMALIZED,
        select=select,
        mean=statistics.fmean,
        std=statistics.stdev,
        conclusions=conclusions(summary),
        pictures_what=[_indicator_picture(summary, name) for name in INDICATORS],
        pictures_how=[
            _arms_picture(summary, "Test error", "%", lambda row: 100 * row["test_error"]),
            _arms_picture(summary, "γ̂ at normalized logits", "nats", lambda row: row["indicators"][NORMALIZED]),
            _arms_picture(summary, "Training loss", "nats", lambda row: row["indicators"]["train_loss"], log=True),
        ],
    )


def _indicator_picture(summary: dict[str, Any], name: str) -> Picture:
    label, tau = INDICATORS[name], summary["rank_correlation"][name]["tau"]
    groups = {}
    for confusion in summary["confusion"]:
        rows = [row for row in select(summary["outcomes"], "plain", confusion) if row["indicators"][name] is not None]
        errors = [100 * row["test_error"] for row in rows]
        groups[f"{confusion} random labels"] = ([row["indicators"][name] for row in rows], errors)

    def draw(axes: Axes, theme: Theme) -> None:
        scatter(axes, theme, groups, log=not name.startswith("log_det"))
        axes.set_xlabel(label)
        axes.set_ylabel("test error (%)")
        if name == "log_det_fisher":
            axes.legend(frameon=False, fontsize=8)

    title = f"{label}: τ " + ("undefined" if tau is None else f"= {tau:+.2f}")
    return picture(title, f"Test error against {label} of every plainly trained network", draw)


def _arms_picture(
    summary: dict[str, Any], title: str, unit: str, value: Callable[[dict[str, Any]], float], *, log: bool = False
) -> Picture:
    groups = {
        arm: [[value(row) for row in select(summary["outcomes"], arm, confusion)] for confusion in summary["confusion"]]
        for arm in summary["arms"]
    }

    def draw(axes: Axes, theme: Theme) -> None:
        lines(axes, theme, [int(size) for size in summary["confusion"]], groups, log=log)
        axes.set_xlabel("randomly labelled training images")
        axes.set_ylabel(unit)
        axes.legend(frameon=False, fontsize=8)

    return picture(title, f"{title} of every training, mean and standard deviation over seeds", draw)


def _effects(records: Sequence[Record], arm: str, case: str) -> dict[str, Any]:
    """Every quantity of the regularized minima minus that of another arm's."""
    found = {name: difference(records, case, "regularized", arm, name) for name in ("test_error", *INDICATORS)}
    return {name: None if value is None else plain(value) for name, value in found.items()}
