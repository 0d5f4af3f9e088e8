"""The demo: both questions on handwritten digits, in minutes. Which minimum generalizes better, and how to reach one.

Scenario I of the paper (Sec. 7.1) in small: the same clean images plus a confusion set of randomly labelled ones that
grows from setting to setting, so that minima of equally small training loss generalize ever worse. Then the same
settings with the regularizer, and with plain training of the same cost.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from flatminima.lab.experiments import (
    MATCHED_COST,
    NORMALIZED,
    PRESETS,
    Experiment,
    Setting,
    Summary,
    described,
)
from flatminima.lab.jobs import Executor, WorkerPool, available_cores
from flatminima.lab.runs import Measuring
from flatminima.lab.study import Study

CONFUSION = (0, 100, 200, 300)
SEEDS = (100, 101, 102, 103, 104)
"""β was chosen by looking at runs with seeds 0 to 2, which take no part here."""

PLAIN = replace(
    PRESETS["digits"].scenario,
    batch_size=100,  # with the learning rate twice the preset's: half the updates, and half the time
    lr=0.1,
    epochs=32,
    evaluate_every=1000,  # only at the end: errors on the way are not shown
)
REGULARIZER = PRESETS["digits"].regularizer

ARMS = {
    "regularized": replace(PLAIN, regularizer=REGULARIZER),
    "plain": PLAIN,
    "plain, equal cost": replace(PLAIN, epochs=MATCHED_COST * (PLAIN.epochs or 0)),
}
DRAWN = (
    "test_error",
    *("log_det_fisher", "residual", "sensitivity", "diversity", "log_det_unit_fisher"),
    *("spectral_radius", "frobenius_norm", "fisher_trace", "robustness", NORMALIZED, "train_loss"),
)
MEASURING = Measuring(subset_size=100, trials=10, robustness_samples=10, on_singular="skip")


@dataclass(frozen=True)
class DemoResult:
    """What the demo has found."""

    summaries: list[Summary]
    """Which minimum generalizes better; what the regularizer does."""
    seconds: float
    """How long it took."""


@dataclass(frozen=True)
class DemoStudy(Study):
    """Two experiments on one page; the second's plain runs are the first's."""

    out: Path
    """Folder."""
    executor: Executor
    workers: int
    names: tuple[str, ...] = ("minima", "regularizer")
    by_setting = True

    @property
    def folder(self) -> Path:
        """Where everything is."""
        return self.out

    @property
    def page(self) -> Path:
        """The page of both."""
        return self.out / "report.html"

    @property
    def heading(self) -> str:
        """The page's."""
        return "Which minimum generalizes better, and how to train to one"

    @property
    def lead(self) -> str:
        """What the page begins with."""
        return (
            "Networks that fit their training data equally well differ on new data. The Fisher information at the "
            "minimum tells them apart, and a penalty on its trace changes which minimum training finds."
        )

    def experiment(self, name: str) -> Experiment:
        """One of the two."""
        return _minima() if name == "minima" else _regularizer()


def demo(out: Path, *, workers: int | None = None, progress: bool = True) -> DemoResult:
    """Train and measure every minimum, and write ``report.html``, ``.md`` and ``.json`` into ``out``.

    Finished runs are kept under ``out/runs``: a second call, or one after an interruption, does not repeat them.

    Args:
        out: folder; made if missing.
        workers: processes at once (default: the cores available).
        progress: show every setting in a line on standard error once its runs are known, and on a terminal a live view.
    """
    started, workers = time.monotonic(), workers or available_cores()
    tell: Callable[[str], None] | None = _say if progress else None
    pool = WorkerPool(workers)
    pool.prepare()
    summaries = DemoStudy(out, pool, workers).run(progress=progress, tell=tell)
    return DemoResult(summaries, round(time.monotonic() - started, 1))


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def _minima() -> Experiment:
    """Which measure orders plainly trained minima as their test errors do."""
    return Experiment(
        name="minima",
        title="Which minimum generalizes better?",
        question=(
            f"Every network sees the same kind of data: {PLAIN.train_size} handwritten digits with their own labels. "
            "Some are also made to fit a confusion set, other digits with random labels. The larger it is, the worse "
            "the minimum generalizes, though the training loss stays small. All measures are taken on the clean "
            f"images, over {MEASURING.trials} subsets of {MEASURING.subset_size}. The training loss is no measure but "
            "the check on them all: γ̂ compares minima of similar training loss; where the loss differs, γ̂ follows it."
        ),
        answers="ranking",
        factor="randomly labelled images",
        settings=tuple(Setting(str(size), "plain", replace(ARMS["plain"], confusion=size)) for size in CONFUSION),
        measuring=MEASURING,
        seeds=SEEDS,
        drawn=DRAWN,
    )


def _regularizer() -> Experiment:
    """The same settings with the regularizer, and with plain training of its cost."""
    return Experiment(
        name="regularizer",
        title="Does the regularizer find a better one?",
        question=(
            f"The same settings again with Algorithm 1 (α = {REGULARIZER.alpha:g}, {described(REGULARIZER)}), beside "
            "plain training with the same epochs and beside plain training of the same cost (a regularized step costs "
            f"about {MATCHED_COST} plain ones). β was chosen on other seeds than those shown. Where training losses "
            "differ, γ̂ is compared at normalized logits, z / (0.04 ‖z‖)."
        ),
        answers="comparison",
        contrast=("regularized", "plain, equal cost"),
        factor="randomly labelled images",
        settings=tuple(
            Setting(str(size), arm, replace(spec, confusion=size)) for size in CONFUSION for arm, spec in ARMS.items()
        ),
        measuring=MEASURING,
        seeds=SEEDS,
        drawn=("test_error", NORMALIZED, "log_det_fisher", "train_loss"),
    )
