"""The history of a run for TensorBoard."""

from __future__ import annotations

import contextlib
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.summary.writer.record_writer import RecordWriter

from flatminima.files import unwritable
from flatminima.lab.runs.folder import RunFolder
from flatminima.lab.runs.records import EpochRecord
from flatminima.lab.runs.session import Session


@contextlib.contextmanager
def event_log(run: Session, folder: RunFolder) -> Iterator[Callable[[EpochRecord], None]]:
    """What to call with every new record; only the first process writes it."""
    if run.processes.rank > 0:
        yield lambda record: None
        return
    with contextlib.closing(_EventLog(folder.path / "tensorboard", run.history)) as log:
        yield log.add


class _EventLog:
    """The history for TensorBoard, by epochs. Every sitting writes it anew, so that no epoch is there twice.

    Written here and now, in the format's own messages and records: all public writers (torch's ``SummaryWriter``, which
    Fabric's logger uses, and ``tensorboard.summary.Writer``) hand them to a thread, which on a full disk prints a
    traceback of its own beside our error.
    """

    def __init__(self, folder: Path, history: list[EpochRecord]) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        self._path = folder / f"events.out.tfevents.{int(time.time())}.{platform.node()}"
        self._wall_time = time.time() - sum(record.seconds for record in history)  # breaks are not shown
        try:
            folder.mkdir()
            self._file = self._path.open("wb")
        except OSError as error:
            raise unwritable(self._path, error) from None
        self._write(Event(wall_time=self._wall_time, file_version="brain.Event:2"))
        for record in history:
            self.add(record)

    def add(self, record: EpochRecord) -> None:
        self._wall_time += record.seconds
        event = Event(wall_time=self._wall_time, step=record.epoch)
        for name, value in asdict(record).items():
            if name not in ("epoch", "iteration", "seconds") and value is not None:
                event.summary.value.add(tag=name, simple_value=value)
        self._write(event)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what a full disk did not take was said when it was written
            self._file.close()

    def _write(self, event: Event) -> None:
        try:
            RecordWriter(self._file).write(event.SerializeToString())
            self._file.flush()
        except OSError as error:
            raise unwritable(self._path, error) from None
