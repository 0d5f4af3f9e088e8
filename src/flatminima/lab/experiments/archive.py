"""Runs that are finished elsewhere, as the JSON of experiments holds them: done, though their folders are gone."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from flatminima.errors import FlatminimaError
from flatminima.lab.errors import DamagedFileError
from flatminima.lab.experiments.experiment import Experiment, Record, Task
from flatminima.lab.experiments.files import WINNERS, read_summaries
from flatminima.lab.experiments.summary import Summary
from flatminima.lab.runs import Measuring, name_of_run, with_kinds
from flatminima.lab.storage import damaged

Entry = tuple[Measuring | None, Record]
"""A finished run, and how it was measured."""


@dataclass(frozen=True)
class Archive:
    """Finished runs; empty unless some were read."""

    files: tuple[tuple[Path, tuple[Summary, ...]], ...] = ()
    """What every file holds."""

    @classmethod
    def read(cls, folder: Path) -> Archive:
        """All experiments' JSON in a folder, such as one of results/.

        Raises:
            FlatminimaError: There is no such folder, or a file holds something else, or a record of a run that is not
                described there.
        """
        if not folder.is_dir():
            raise FlatminimaError(f"there is no folder {folder} to read records from")
        paths = sorted(path for path in folder.glob("*.json") if path.name != WINNERS)
        if not paths:
            raise FlatminimaError(f"{folder} holds no records: give a folder of experiments' JSON")
        found = cls(tuple((path, read_summaries(path)) for path in paths))
        found._entries  # noqa: B018 (refused now, not when a run is looked for)
        return found

    def of(self, task: Task) -> Record | None:
        """The run of the same description, measured in the same way; where there are several, the first file's.

        Whatever machine and versions it was made with: its environment stays with it. Measures of a user's own are
        measured again, as nobody can say whether their code is still the same.
        """
        how = task.measuring
        if how is not None and how.own:
            return None
        for measured, record in self._entries.get(task.name, ()):
            placed = replace(record, case=task.setting.case, arm=task.setting.arm)
            if measured == how:
                return placed
            if how is None:
                return replace(placed, indicators={}, warnings=(), log_det_fisher_standard_error=None)
        return None

    def chosen(self, search: Experiment) -> dict[str, str]:
        """The best arm of every case that a search among the same settings has decided, by whichever way; the first's.

        A search by trials leaves most settings without a run, so its choice cannot be made again of the records.
        """
        found: dict[str, str] = {}
        for case in search.cases:
            settings = {setting.name: setting.spec for setting in search.settings if setting.case == case}
            names = {name: replace(spec, seed=search.seeds[0]).name for name, spec in settings.items()}
            for _, summaries in self.files:
                for summary in summaries:
                    if summary.name == search.name and case in summary.chosen and _names(summary, case) == names:
                        found.setdefault(case, summary.chosen[case])
        return found

    @functools.cached_property
    def _entries(self) -> dict[str, list[Entry]]:
        """By the names of run folders, which are digests of the runs' descriptions."""
        entries: dict[str, list[Entry]] = {}
        for path, summaries in self.files:
            for summary in summaries:
                for record in _described(path, summary):
                    entries.setdefault(record.run, []).append((summary.measuring, record))
        return entries


def _names(summary: Summary, case: str) -> dict[str, str]:
    """The run folders' names of a case's settings, at the first seed."""
    described = {name: spec for name, spec in summary.specs.items() if name.startswith(f"{case} / ")}
    return {name: name_of_run({**with_kinds(spec), "seed": summary.seeds[0]}) for name, spec in described.items()}


def _described(path: Path, summary: Summary) -> Iterator[Record]:
    """A summary's records, each held against the description of its run.

    The first version left the kinds of schedules and regularizers out of descriptions, and had the data's path in
    names: what it described is known by the description, under the name that this version gives it.
    """
    for record in summary.records:
        spec = summary.specs.get(f"{record.case} / {record.arm}")
        if spec is None:
            raise _no_run(path, record, "has no description")
        whole = with_kinds(spec)
        name = name_of_run({**whole, "seed": record.seed})
        if name != record.run and whole == spec:
            raise _no_run(path, record, "is another than its description says")
        yield replace(record, run=name)


def _no_run(path: Path, record: Record, what: str) -> DamagedFileError:
    return damaged(path, f"the run {record.run} ({record.case}, {record.arm}, seed {record.seed}) {what}")
