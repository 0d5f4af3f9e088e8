"""Checkpoints of runs, as a table and as a picture over their trainings."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from flatminima.errors import needing
from flatminima.lab.runs import TrackedCheckpoint
from flatminima.measures import settings_in_words
from flatminima.tables import Table, rounded
from flatminima.tracking import EPOCHS_ROWS, PARTS, TrackedEpoch, draw_epochs

_COLUMNS = {
    "log_det_fisher": "γ̂",
    **{name: name for name in PARTS[1:]},
    "log_det_unit_fisher": "γ̂ at unit residuals",
}


def tracked_table(tracked: Sequence[TrackedCheckpoint]) -> Table:
    """A row for every checkpoint: γ̂ and its parts, losses and errors."""
    several = len({each.checkpoint.run for each in tracked}) > 1
    units = {each.checkpoint.unit for each in tracked}
    tests = dict.fromkeys(name for each in tracked for name in sorted(each.test))
    rows, rules = [], []
    for number, each in enumerate(tracked):
        here, measured = each.checkpoint, each.characterization
        if number and here.run != tracked[number - 1].checkpoint.run:
            rules.append(number)
        named = f"{here.run} {here.unit if len(units) > 1 else ''}".rstrip() + " " if several else ""
        estimates = measured.estimates()
        accuracy = measured.train_accuracy
        rows.append(
            (
                f"{named}{here.number}",
                *(str(estimates[name]) if name in estimates else "" for name in _COLUMNS),
                rounded(measured.train_loss),
                "" if accuracy is None else f"{1 - accuracy:.2%}",
                *(f"{each.test[name]:.2%}" if name.endswith("error") else rounded(each.test[name]) for name in tests),
            )
        )
    return Table(
        "Measures while training, on the same subsets, mean ± standard error",
        (
            "checkpoint" if several else next(iter(units)),
            *_COLUMNS.values(),
            "training loss",
            "training error",
            *(name.replace("_", " ") for name in tests),
        ),
        tuple(rows),
        settings_in_words({"": tracked[0].characterization}),
        rules=tuple(rules),
    )


def write_tracked_picture(tracked: Sequence[TrackedCheckpoint], path: Path) -> None:
    """The picture of :meth:`flatminima.Tracker.plot` for every run, one below the other.

    Raises:
        FlatminimaError: without matplotlib, or if the file cannot be written.
    """
    with needing("plot", "a picture"):
        from flatminima.pictures import drawn_below, write_picture

    runs: dict[str, list[TrackedEpoch]] = {}
    for each in tracked:
        epoch = TrackedEpoch(each.checkpoint.number, 0.0, each.characterization.to_metrics(), each.test)
        runs.setdefault(each.checkpoint.run, []).append(epoch)
    units = {each.checkpoint.run: each.checkpoint.unit for each in tracked}
    measures = [name for name in PARTS if name in tracked[0].characterization.estimates()]
    draws = {
        run: partial(draw_epochs, epochs=epochs, measures=measures, unit=units[run]) for run, epochs in runs.items()
    }
    write_picture(drawn_below(draws, EPOCHS_ROWS), path)
