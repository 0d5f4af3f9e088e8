"""The demo: both questions on handwritten digits, in minutes. Which minimum generalizes better, and how to reach one.

Scenario I of the paper (Sec. 7.1) in small: the same clean images plus a confusion set of randomly labelled ones that
grows from setting to setting, so that minima of equally small training loss generalize ever worse. Then the same
settings with the regularizer, and with plain training of the same cost.
"""

from __future__ import annotations

import dataclasses
import json
import math
import operator
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from rich.console import Group
from rich.table import Table

from flatminima.lab.executors import Processes, available_cores
from flatminima.lab.experiments import (
    INDICATORS,
    NORMALIZED,
    Difference,
    Outcome,
    paired_difference,
    rank_correlation,
    run_experiment,
)
from flatminima.lab.measuring import Measuring
from flatminima.lab.report import Picture, Theme, lines, picture, scatter, write_page
from flatminima.lab.specs import MultiStep, RegularizerSpec, RunSpec

CONFUSION = (0, 100, 200, 300)
SEEDS = (100, 101, 102, 103, 104)
"""β below was chosen by looking at runs with seeds 0 to 2, which take no part here."""

PLAIN = RunSpec(
    model="mlp",
    data="digits",
    train_size=600,
    augmentation="no-aug",
    batch_size=50,
    epochs=40,
    lr=0.05,
    schedule=MultiStep((0.5, 0.75)),
    nesterov=True,
    weight_decay=5e-4,
)
REGULARIZER = RegularizerSpec(alpha=1e-4, beta=2000.0, num_sub_batches=5, max_grad_norm=5.0)
COST_OF_REGULARIZED_STEP = 3
"""Forward-backwards of a regularized step, in plain steps: the epochs that plain training gets at equal cost."""

ARMS = {
    "plain": PLAIN,
    "plain, equal cost": dataclasses.replace(PLAIN, epochs=COST_OF_REGULARIZED_STEP * (PLAIN.epochs or 0)),
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
    settings = {
        _setting(arm, confusion): dataclasses.replace(spec, confusion=confusion)
        for confusion in CONFUSION
        for arm, spec in ARMS.items()
    }
    outcomes = run_experiment(
        settings,
        seeds=SEEDS,
        measuring=MEASURING,
        root=out / "runs",
        executor=Processes(workers or available_cores()),
        progress=progress,
    )
    summary = summarize(outcomes)
    summary["seconds"] = round(time.monotonic() - started, 1)
    out.mkdir(parents=True, exist_ok=True)
    (out / "summary.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
    write_report(summary, out / "report.html")
    return summary


def summarize(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """What the outcomes show, as plain numbers; NaN as None."""
    groups = {arm: [o for o in outcomes if o.setting.startswith(f"{arm} / ")] for arm in ARMS}
    correlations = {name: _plain(dataclasses.asdict(rank_correlation(groups["plain"], name))) for name in INDICATORS}
    return {
        "confusion": list(CONFUSION),
        "arms": list(ARMS),
        "seeds": list(SEEDS),
        "training_images": PLAIN.train_size,
        "regularizer": dataclasses.asdict(REGULARIZER),
        "measuring": dataclasses.asdict(MEASURING),
        "outcomes": [_record(outcome) for outcome in outcomes],
        "rank_correlation": correlations,
        "regularized_minus": {
            arm: {str(confusion): _effects(groups, arm, confusion) for confusion in CONFUSION}
            for arm in ARMS
            if arm != "regularized"
        },
        "settings": dataclasses.asdict(outcomes[0].characterization.settings),
        "environment": dict(outcomes[0].result.environment),
    }


def table(summary: dict[str, Any]) -> Group:
    """The summary for a terminal."""
    what = Table(title="Which minimum generalizes better? Means over seeds, plain training", title_justify="left")
    what.add_column("confusion set", justify="right")
    what.add_column("test error %", justify="right")
    for name in INDICATORS:
        what.add_column(_short(name), justify="right")
    for confusion in summary["confusion"]:
        rows = select(summary, "plain", confusion)
        values = [_mean([row["indicators"][name] for row in rows]) for name in INDICATORS]
        errors = [100 * row["test_error"] for row in rows]
        what.add_row(str(confusion), f"{_mean(errors):.1f}", *(f"{value:.4g}" for value in values))
    what.add_section()
    taus = [summary["rank_correlation"][name]["tau"] for name in INDICATORS]
    what.add_row("Kendall's τ", "1", *("–" if tau is None else f"{tau:+.2f}" for tau in taus), style="bold")

    how = Table(title="Does the regularizer help? Means over seeds", title_justify="left")
    for heading in ("confusion set", "training", "test error %", "γ̂, normalized", "training loss"):
        how.add_column(heading, justify="left" if heading == "training" else "right")
    for confusion in summary["confusion"]:
        for arm in summary["arms"]:
            rows = select(summary, arm, confusion)
            how.add_row(
                str(confusion) if arm == summary["arms"][0] else "",
                arm,
                f"{_mean([100 * row['test_error'] for row in rows]):.1f}",
                f"{_mean([row['indicators'][NORMALIZED] for row in rows]):.0f}",
                f"{_mean([row['indicators']['train_loss'] for row in rows]):.2g}",
            )
        how.add_section()
    return Group(what, "", how, "", *(f"• {line}" for line in conclusions(summary)))


def conclusions(summary: dict[str, Any]) -> list[str]:
    """What the data say, in sentences made from the numbers."""
    correlation = summary["rank_correlation"]
    gamma = correlation["log_det_fisher"]
    rivals = {name: correlation[name]["tau"] for name in INDICATORS if name != "log_det_fisher"}
    as_good = [INDICATORS[name] for name, tau in rivals.items() if tau is not None and tau >= gamma["tau"]]
    models = len(select(summary, "plain"))
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
        effect = summary["regularized_minus"]["plain, equal cost"][str(confusion)]["test_error"]
        points = {key: 100 * effect[key] for key in ("mean", "low", "high")}
        verdict = "helps" if points["high"] < 0 else "harms" if points["low"] > 0 else "makes no clear difference"
        found.append(
            f"With {confusion} randomly labelled images the regularizer {verdict}: test error {points['mean']:+.1f} "
            f"points ({points['low']:+.1f} to {points['high']:+.1f}) against plain training of equal cost."
        )
    off = [row for row in select(summary, "regularized") if row["warnings"]]
    if off:
        found.append(
            f"{len(off)} of {len(select(summary, 'regularized'))} regularized runs end at a training loss too high "
            "to be called a minimum: there the regularizer keeps the network from fitting the random labels, and only "
            "γ̂ at normalized logits compares."
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
        mean=_mean,
        std=_standard_deviation,
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
        rows = [row for row in select(summary, "plain", confusion) if row["indicators"][name] is not None]
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
        arm: [[value(row) for row in select(summary, arm, confusion)] for confusion in summary["confusion"]]
        for arm in summary["arms"]
    }

    def draw(axes: Axes, theme: Theme) -> None:
        lines(axes, theme, summary["confusion"], groups, log=log)
        axes.set_xlabel("randomly labelled training images")
        axes.set_ylabel(unit)
        axes.legend(frameon=False, fontsize=8)

    return picture(title, f"{title} of every training, mean and standard deviation over seeds", draw)


def select(summary: dict[str, Any], arm: str, confusion: int | None = None) -> list[dict[str, Any]]:
    """The outcomes of one arm, in all settings or one."""
    rows = [row for row in summary["outcomes"] if row["arm"] == arm]
    return [row for row in rows if confusion is None or row["confusion"] == confusion]


def _setting(arm: str, confusion: int) -> str:
    return f"{arm} / {confusion}"


def _record(outcome: Outcome) -> dict[str, Any]:
    return {
        "arm": outcome.setting.split(" / ")[0],
        "confusion": outcome.spec.confusion,
        "seed": outcome.spec.seed,
        "run": outcome.result.folder.name,
        "test_error": outcome.result.test_error,
        "train_accuracy": outcome.characterization.train_accuracy,
        "indicators": {name: _number(outcome.indicator(name)) for name in INDICATORS},
        "log_det_fisher_standard_error": _number(outcome.characterization.log_det_fisher.standard_error),
        "seconds": outcome.result.seconds,
        "warnings": list(outcome.warnings),
    }


def _effects(groups: dict[str, list[Outcome]], arm: str, confusion: int) -> dict[str, Any]:
    regularized, other = ([o for o in groups[name] if o.spec.confusion == confusion] for name in ("regularized", arm))

    def effect(difference: Difference) -> dict[str, Any]:
        return _plain(dataclasses.asdict(difference))

    return {
        "test_error": effect(paired_difference(regularized, other, lambda o: o.result.test_error)),
        **{
            name: effect(paired_difference(regularized, other, operator.methodcaller("indicator", name)))
            for name in INDICATORS
        },
    }


def _short(name: str) -> str:
    return {
        "log_det_fisher": "γ̂",
        "frobenius_norm": "Frobenius²",
        "fisher_frobenius_norm": "Frobenius² (Fisher)",
        "fisher_trace": "trace",
        NORMALIZED: "γ̂, normalized",
        "train_loss": "training loss",
    }.get(name, INDICATORS[name])


def _mean(values: Iterable[float]) -> float:
    return statistics.fmean(values)


def _standard_deviation(values: Iterable[float]) -> float:
    return statistics.stdev(values)


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {key: _number(value) if isinstance(value, float) else value for key, value in values.items()}
