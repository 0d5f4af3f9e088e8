"""The run folder: spec, resume point, checkpoint, history, result and measures of one training run."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Literal

from torch import Tensor

from flatminima.errors import FlatminimaError, one_line
from flatminima.files import abandoned, beside, write_whole
from flatminima.lab.errors import DamagedFileError
from flatminima.lab.runs.records import (
    CheckpointNote,
    EpochRecord,
    ResumeNote,
    ResumePoint,
    RunFailure,
    RunProgress,
    RunResult,
)
from flatminima.lab.runs.spec import RunSpec
from flatminima.lab.schema import parse, plain
from flatminima.lab.storage import damaged, locked, read_record, read_tensors, read_text, write_tensors

_FILES = (
    "spec.json",
    "state.safetensors",
    "checkpoint.safetensors",
    "history.jsonl",
    "result.json",
    "failure.json",
    "measures.json",
    "progress.json",
)

_NOTED = tuple(field.name for field in dataclasses.fields(ResumeNote))


class RunFolder:
    """The files of one run.

    Args:
        path: The folder; it need not exist yet.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    @classmethod
    def of(cls, root: Path | str, spec: RunSpec) -> RunFolder:
        """The folder of ``spec`` under ``root``: named by the network, or its factory, and the spec's digest."""
        return cls(Path(root) / spec.name)

    @property
    def is_empty(self) -> bool:
        """Whether nothing of a run is there yet."""
        return not any(self._file(name).exists() for name in _FILES)

    @property
    def status(self) -> Literal["new", "unfinished", "failed", "finished"]:
        """How far the run is, judged by which files exist."""
        if self._file("result.json").exists():
            return "finished"
        if self._file("failure.json").exists():
            return "failed"
        return "unfinished" if self._file("spec.json").exists() else "new"

    @property
    def is_writable(self) -> bool:
        """Whether anything can be kept in it: neither the folder nor its lock file is read-only."""
        needed = [path for path in (self.path, self._file("lock")) if path.exists()]
        return all(os.access(path, os.W_OK) for path in needed)

    @contextlib.contextmanager
    def lock(self, *, wait: bool = False) -> Iterator[None]:
        """Hold the folder alone; the operating system frees it when the process ends, however it ends.

        What a killed process has left there is deleted.

        Args:
            wait: Wait until no other process holds it.

        Raises:
            FlatminimaError: Another process holds it, or the folder cannot be made or written to.
        """
        busy = f"another process is training or measuring {self.path}; wait for it or stop it"
        with locked(self._file("lock"), busy=None if wait else busy):
            for path in self._leftovers():
                path.unlink(missing_ok=True)
            yield

    def tidy(self) -> None:
        """Delete what a killed process has left, unless another is at work there; nothing happens if it cannot be."""
        if self._leftovers():
            with contextlib.suppress(FlatminimaError), self.lock():
                pass

    def _leftovers(self) -> list[Path]:
        """Half-written files, a note of progress, and the resume point of a run that has ended."""
        found = [*abandoned(self.path), self._file("progress.json")]
        found += [self._file("state.safetensors")] if self.status in ("finished", "failed") else []
        return [path for path in found if path.exists()]

    def refuse_link(self) -> None:
        """Refuse a folder that is a symbolic link, where the folder's name was not given but derived.

        Raises:
            FlatminimaError: It is one: what stands where it leads is not this run's to change.
        """
        if self.path.is_symlink():
            raise FlatminimaError(f"{self.path} is a symbolic link, which is not followed; delete it or rename it")

    def read_spec(self) -> RunSpec:
        """The run's specification.

        Raises:
            DamagedFileError: There is none (it is no run folder), or it is damaged.
        """
        if not self._file("spec.json").is_file():
            if not self.path.exists():
                raise DamagedFileError(f"{self.path} is not a run folder: there is no such folder")
            if self.path.is_file():
                raise DamagedFileError(
                    f"{self.path} is not a run folder but a file: for a checkpoint name its model and its data too"
                )
            raise DamagedFileError(
                f"{self.path} is not a run folder: it has no spec.json; give a folder that `train` wrote"
            )
        try:
            return RunSpec.from_json(read_text(self._file("spec.json")))
        except FlatminimaError as error:
            raise damaged(self._file("spec.json"), str(error)) from None

    def require_spec(self, spec: RunSpec) -> None:
        """Refuse the folder of another run.

        Raises:
            DamagedFileError: ``spec.json`` is missing or damaged.
            FlatminimaError: It is another run's.
        """
        if self.read_spec() != spec:
            raise FlatminimaError(f"{self.path} holds another run than its name says; delete or rename it")

    def write_spec(self, spec: RunSpec) -> None:
        """Write ``spec.json``."""
        write_whole(self._file("spec.json"), spec.to_json() + "\n")

    def read_history(self) -> list[EpochRecord]:
        """The finished epochs, up to the last resume point of an unfinished run.

        Raises:
            DamagedFileError: A line is not a record, or the epochs are not 1, 2, 3, ...
        """
        path = self._file("history.jsonl")
        lines = read_text(path).splitlines() if path.exists() else []
        records = []
        for number, line in enumerate(lines, start=1):
            try:
                records.append(parse(EpochRecord, line))
            except FlatminimaError as error:
                raise damaged(path, f"line {number} is not the record of epoch {number}: {error}") from None
            if records[-1].epoch != number:
                raise damaged(path, f"line {number} is not the record of epoch {number}")
        return records

    def write_history(self, history: list[EpochRecord]) -> None:
        """Write ``history.jsonl``."""
        lines = [json.dumps(plain(record)) + "\n" for record in history]
        write_whole(self._file("history.jsonl"), "".join(lines))

    def read_resume_point(self) -> ResumePoint | None:
        """Where the run was last saved; None if it never was.

        Raises:
            DamagedFileError: The file is truncated or altered.
        """
        path = self._file("state.safetensors")
        if not path.exists():
            return None
        tensors, note = read_tensors(path, signed=True)
        try:
            known = parse(ResumeNote, note)
        except FlatminimaError as error:
            raise damaged(path, f"it is not a resume point of this version: {error}") from None
        return ResumePoint(**{name: getattr(known, name) for name in _NOTED}, tensors=tensors)

    def write_resume_point(self, point: ResumePoint) -> None:
        """Write ``state.safetensors``, counters and history within, and ``history.jsonl`` for readers."""
        note = ResumeNote(**{name: getattr(point, name) for name in _NOTED})
        write_tensors(self._file("state.safetensors"), point.tensors, plain(note))
        self.write_history(list(point.history))

    def read_result(self) -> RunResult | None:
        """The result, once its checkpoint is found whole; None if the run is not finished.

        Raises:
            DamagedFileError: The result or the checkpoint is missing, truncated or altered.
            FlatminimaError: The run failed; the message says why.
        """
        if self.status == "failed":
            raise FlatminimaError(self._failure())
        path = self._file("result.json")
        if not path.exists():
            return None
        result = read_record(path, RunResult, folder=str(self.path))
        self.read_checkpoint()
        return result

    def require_result(self) -> RunResult:
        """The result of a finished run.

        Raises:
            FlatminimaError: As :meth:`read_result`, or the run is not finished.
        """
        result = self.read_result()
        if result is None:
            raise FlatminimaError(f"the run in {self.path} is not finished; train it to the end first")
        return result

    def read_checkpoint(self) -> Mapping[str, Tensor]:
        """The final weights and buffers by name.

        Raises:
            DamagedFileError: The checkpoint is missing, truncated or altered.
        """
        return read_tensors(self.checkpoint, signed=True)[0]

    @property
    def checkpoint(self) -> Path:
        """The file of the final weights and buffers."""
        return self._file("checkpoint.safetensors")

    def write_result(
        self,
        result: RunResult,
        weights: Mapping[str, Tensor],
        history: list[EpochRecord],
        note: CheckpointNote | None = None,
    ) -> None:
        """Finish the run: checkpoint and history first, then the result that vouches for them."""
        write_tensors(self.checkpoint, weights, plain(note or CheckpointNote()))
        self.write_history(history)
        values = {name: value for name, value in plain(result).items() if name != "folder"}
        write_whole(self._file("result.json"), json.dumps(values, indent=2) + "\n")
        self._file("state.safetensors").unlink(missing_ok=True)

    def write_failure(self, message: str, history: list[EpochRecord]) -> None:
        """Mark the run as failed; it is deterministic, so it would fail again."""
        self.write_history(history)
        write_whole(self._file("failure.json"), json.dumps(plain(RunFailure(message))) + "\n")
        self._file("state.safetensors").unlink(missing_ok=True)

    def read_measures(self) -> str | None:
        """The JSON text of the run's measures; None if it was not measured."""
        path = self._file("measures.json")
        return read_text(path) if path.exists() else None

    def write_measures(self, text: str) -> None:
        """Write ``measures.json``."""
        write_whole(self._file("measures.json"), text)

    @contextlib.contextmanager
    def watched(self, *, seconds: float = 1.0) -> Iterator[Callable[[RunProgress], None]]:
        """What it yields notes down how far the run is; the note ends with the context.

        It is there for whoever watches. No run fails because it cannot be written.

        Args:
            seconds: At least this long between two notes; what is said in between is not written.
        """
        path = self._file("progress.json")
        due = 0.0

        def note(progress: RunProgress) -> None:
            nonlocal due
            if time.monotonic() < due:
                return
            due = time.monotonic() + seconds
            temporary = beside(path)
            with contextlib.suppress(OSError):
                temporary.write_text(json.dumps(plain(progress)))
                temporary.replace(path)

        try:
            yield note
        finally:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)

    def read_progress(self) -> RunProgress | None:
        """How far the run is; None if nobody says so."""
        try:
            return read_record(self._file("progress.json"), RunProgress)
        except DamagedFileError:
            return None

    def progress_written(self) -> int | None:
        """When that was written (nanoseconds, by the file system's clock); a killed process leaves it behind."""
        try:
            return self._file("progress.json").stat().st_mtime_ns
        except OSError:
            return None

    def clear(self) -> None:
        """Delete this run's files, so that nothing of an earlier attempt can be taken for this one's."""
        for name in _FILES:
            self._file(name).unlink(missing_ok=True)

    def _failure(self) -> str:
        try:
            error = read_record(self._file("failure.json"), RunFailure).error
        except DamagedFileError:
            error = "its failure.json is damaged"
        return f"this run failed before: {one_line(error)} (delete {self.path} to train it again)"

    def _file(self, name: str) -> Path:
        return self.path / name
