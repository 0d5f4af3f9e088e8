"""The run folder: spec, resume point, checkpoint, history, result and measures of one training run.

Every file is replaced as a whole (written beside, synced, renamed), so a process killed at any moment leaves either the
old file or the new one. Tensors are stored as safetensors together with their digest; nothing is ever unpickled.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import filelock
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from flatminima.errors import DamagedFileError, FlatminimaError
from flatminima.lab.data import ImageSet, confuse, hold_out, load_data
from flatminima.lab.models import build_model
from flatminima.lab.specs import RunSpec

__all__ = [
    "EpochRecord",
    "ResumePoint",
    "RunFolder",
    "RunProgress",
    "RunResult",
    "TrainingSets",
    "load_run",
    "load_sets",
    "load_weights",
    "unwritable",
    "write_whole",
]

Record = TypeVar("Record")

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
_WATCH_SECONDS = 1.0  # between two notes of how far the run is
_NOTE = "flatminima"  # the one metadata entry of our safetensors files: safetensors writes several in random order
_NAMED_KEYS = 3  # parameter names an error message lists before it counts the rest


@dataclass(frozen=True)
class EpochRecord:
    """One line of ``history.jsonl``."""

    epoch: int
    """Counted from 1."""
    iteration: int
    """Updates made when the epoch ended."""
    lr: float
    """Learning rate of the epoch's last update."""
    train_loss: float
    """Mean loss of the epoch's mini-batches, as trained: augmented, smoothed, each at its own weights."""
    train_accuracy: float
    """Fraction of the mini-batches' images classified rightly, likewise."""
    fisher_trace: float | None
    """Mean over the updates with a penalty of mean_i ‖g_i‖², its trace estimate (Sec. 6); None without such updates."""
    test_error: float | None
    """Fraction of test images classified wrongly at the epoch's end, in evaluation mode; None if not evaluated."""
    seconds: float
    """Wall-clock time of the epoch, over all its sittings."""
    validation_error: float | None = None
    """Fraction of the held-out images classified wrongly, likewise; None without such."""


@dataclass
class EpochSums:
    """The unfinished epoch: what its record will be the mean of."""

    loss: float = 0.0
    """Sum of the mini-batch losses."""
    correct: int = 0
    """Images classified rightly."""
    trace: float = 0.0
    """Sum of the regularizer's trace estimates."""
    penalized: int = 0
    """Updates with a penalty."""
    seconds: float = 0.0
    """Wall-clock time."""


@dataclass(frozen=True)
class RunResult:
    """How a finished run ended. Loss and accuracy are those of the un-augmented training set in evaluation mode."""

    folder: Path
    """The run folder."""
    epochs: int
    """Epochs begun; the last may be cut short by a limit in iterations."""
    iterations: int
    """Updates made."""
    train_loss: float
    """Mean cross entropy (nats, no label smoothing) over the whole training set, confusion set included."""
    train_accuracy: float
    """Fraction of the training set classified rightly, confusion set included."""
    test_error: float
    """Fraction of the test set classified wrongly."""
    seconds: float
    """Wall-clock time of training, over all sittings."""
    data_digest: str
    """Digest of the training and test images and labels."""
    environment: Mapping[str, str | int]
    """Versions, device and threads."""
    validation_error: float | None = None
    """Fraction of the held-out training images classified wrongly; None without such."""


@dataclass(frozen=True)
class ResumePoint:
    """All that a run needs to go on to the same bits: every random draw is a function of (seed, epoch, iteration)."""

    tensors: Mapping[str, Tensor]
    """Weights, buffers and the optimizer's state, by name."""
    regularizer: Mapping[str, int]
    """The regularizer's counters; empty without one."""
    iteration: int
    """Updates made."""
    sums: EpochSums
    """The unfinished epoch so far."""
    history: tuple[EpochRecord, ...]
    """The finished epochs."""
    data_digest: str
    """Digest of the data trained on."""
    environment: Mapping[str, str | int]
    """Versions, device and threads."""


@dataclass(frozen=True)
class RunProgress:
    """How far a run in progress is: what a live view shows of it."""

    doing: Literal["training", "measuring"]
    """Training, or measuring the minimum."""
    iteration: int = 0
    """Updates made."""
    iterations: int = 0
    """Updates in all."""
    epoch: int = 0
    """The present one, counted from 1."""
    epochs: int = 0
    """How many there will be."""
    loss: float | None = None
    """Mean mini-batch loss of the last finished epoch, if there is one."""

    @property
    def fraction(self) -> float:
        """How much of the training is done."""
        return self.iteration / self.iterations if self.doing == "training" else 1.0


class RunFolder:
    """The files of one run.

    Args:
        path: The folder; it need not exist yet.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    @classmethod
    def of(cls, root: Path | str, spec: RunSpec) -> RunFolder:
        """The folder of ``spec`` under ``root``: named by the network and the spec's digest."""
        return cls(Path(root) / f"{spec.model}-{spec.key}")

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

    @contextlib.contextmanager
    def lock(self, *, wait: bool = False) -> Iterator[None]:
        """Hold the folder alone; the operating system frees it when the process ends, however it ends.

        Args:
            wait: Wait until no other process holds it.

        Raises:
            FlatminimaError: Another process holds it, or the folder cannot be made.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = filelock.FileLock(self._file("lock"), blocking=wait).acquire(poll_interval=0.2)
        except filelock.Timeout:
            raise FlatminimaError(
                f"another process is training or measuring {self.path}; wait for it or stop it"
            ) from None
        except OSError as error:
            raise FlatminimaError(f"cannot write to {self.path}: {error.strerror}; choose another folder") from None
        with lock:
            yield

    def read_spec(self) -> RunSpec:
        """The run's specification.

        Raises:
            DamagedFileError: There is none (it is no run folder), or it is damaged.
        """
        if not self._file("spec.json").is_file():
            raise DamagedFileError(
                f"{self.path} is not a run folder: it has no spec.json; give a folder that `train` wrote"
            )
        try:
            return RunSpec.from_json(_read_text(self._file("spec.json")))
        except FlatminimaError as error:
            raise _damaged(self._file("spec.json"), str(error)) from None

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
        lines = _read_text(path).splitlines() if path.exists() else []
        records = []
        for number, line in enumerate(lines, start=1):
            record = _record(EpochRecord, line)
            if record is None or record.epoch != number:
                raise _damaged(path, f"line {number} is not the record of epoch {number}")
            records.append(record)
        return records

    def write_history(self, history: list[EpochRecord]) -> None:
        """Write ``history.jsonl``."""
        lines = [json.dumps(dataclasses.asdict(record)) + "\n" for record in history]
        write_whole(self._file("history.jsonl"), "".join(lines))

    def read_resume_point(self) -> ResumePoint | None:
        """Where the run was last saved; None if it never was.

        Raises:
            DamagedFileError: The file is truncated or altered.
        """
        path = self._file("state.safetensors")
        if not path.exists():
            return None
        tensors, note = _read_tensors(path)
        try:
            history = tuple(EpochRecord(**record) for record in note.pop("history"))
            return ResumePoint(tensors=tensors, sums=EpochSums(**note.pop("sums")), history=history, **note)
        except (KeyError, TypeError):
            raise _damaged(path, "it is not a resume point of this version") from None

    def write_resume_point(self, point: ResumePoint) -> None:
        """Write ``state.safetensors``, counters and history within, and ``history.jsonl`` for readers."""
        note = {
            field.name: getattr(point, field.name) for field in dataclasses.fields(point) if field.name != "tensors"
        }
        note["sums"] = dataclasses.asdict(point.sums)
        note["history"] = [dataclasses.asdict(record) for record in point.history]
        _write_tensors(self._file("state.safetensors"), point.tensors, note)
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
        result = _record(RunResult, _read_text(path), folder=self.path)
        if result is None:
            raise _damaged(path, "it is not a result")
        self.read_checkpoint()
        return result

    def read_checkpoint(self) -> Mapping[str, Tensor]:
        """The final weights and buffers by name.

        Raises:
            DamagedFileError: The checkpoint is missing, truncated or altered.
        """
        return _read_tensors(self._file("checkpoint.safetensors"))[0]

    def write_result(self, result: RunResult, weights: Mapping[str, Tensor], history: list[EpochRecord]) -> None:
        """Finish the run: checkpoint and history first, then the result that vouches for them."""
        _write_tensors(self._file("checkpoint.safetensors"), weights, {})
        self.write_history(history)
        values = dataclasses.asdict(result)
        del values["folder"]
        write_whole(self._file("result.json"), json.dumps(values, indent=2) + "\n")
        self._file("state.safetensors").unlink(missing_ok=True)

    def write_failure(self, message: str, history: list[EpochRecord]) -> None:
        """Mark the run as failed; it is deterministic, so it would fail again."""
        self.write_history(history)
        write_whole(self._file("failure.json"), json.dumps({"error": message}) + "\n")
        self._file("state.safetensors").unlink(missing_ok=True)

    def read_measures(self) -> str | None:
        """The JSON text of the run's measures; None if it was not measured."""
        path = self._file("measures.json")
        return _read_text(path) if path.exists() else None

    def write_measures(self, text: str) -> None:
        """Write ``measures.json``."""
        write_whole(self._file("measures.json"), text)

    @contextlib.contextmanager
    def watched(self) -> Iterator[Callable[[RunProgress], None]]:
        """What it yields notes down how far the run is, once a second at most; the note ends with the context.

        It is there for whoever watches. No run fails because it cannot be written.
        """
        path = self._file("progress.json")
        due = 0.0

        def note(progress: RunProgress) -> None:
            nonlocal due
            if time.monotonic() < due:
                return
            due = time.monotonic() + _WATCH_SECONDS
            temporary = _beside(path)
            with contextlib.suppress(OSError):
                temporary.write_text(json.dumps(dataclasses.asdict(progress)))
                temporary.replace(path)

        try:
            yield note
        finally:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)

    def read_progress(self) -> RunProgress | None:
        """How far the run is; None if nobody says so."""
        try:
            return _record(RunProgress, self._file("progress.json").read_text())
        except (OSError, ValueError):
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
        self.remove_leftovers()

    def remove_leftovers(self) -> None:
        """Delete the half-written files of a process that was killed."""
        for path in self.path.glob(".*.tmp"):
            path.unlink(missing_ok=True)

    def _failure(self) -> str:
        try:
            error = json.loads(_read_text(self._file("failure.json")))["error"]
        except (ValueError, TypeError, KeyError):
            error = "its failure.json is damaged"
        return f"this run failed before: {error} (delete {self.path} to train it again)"

    def _file(self, name: str) -> Path:
        return self.path / name


@dataclass(frozen=True)
class TrainingSets:
    """The data of a run."""

    clean: ImageSet
    """The training images with their own labels: what measures are taken on."""
    train: ImageSet
    """What is trained on: the clean images and the confusion set."""
    test: ImageSet
    """The test set."""
    validation: ImageSet
    """Training images held out."""

    def digest(self) -> str:
        """A digest of all images and labels."""
        digest = hashlib.sha256()
        for images in (self.train, self.test, self.validation):
            digest.update(_bytes(images.images))
            digest.update(_bytes(images.labels))
        return digest.hexdigest()


def load_sets(spec: RunSpec, *, cache_dir: Path | None = None) -> TrainingSets:
    """Load the data of a run; its subset and its confusion set follow from the spec's seed.

    Raises:
        FlatminimaError: The data cannot be loaded, or has too few images.
    """
    full, test = load_data(spec.source, cache_dir=cache_dir)
    full, validation = hold_out(full, spec.validation)
    if spec.train_size is None and spec.confusion == 0:
        return TrainingSets(full, full, test, validation)  # in the order of the files, whatever the seed
    clean, train = confuse(full, num_clean=spec.train_size, num_confused=spec.confusion, seed=spec.seed)
    return TrainingSets(clean, train, test, validation)


def load_run(path: Path | str, *, cache_dir: Path | None = None) -> tuple[RunSpec, nn.Module, ImageSet, ImageSet]:
    """A finished run: its spec, the trained network in evaluation mode, and the data to measure it on.

    Returns:
        The spec, the network on the CPU, the un-augmented clean training set, and the test set.

    Raises:
        FlatminimaError: The folder is no run's, the run is unfinished or failed, a file is damaged, or the data are
            no longer those the network was trained on.
    """
    folder = RunFolder(path)
    spec = folder.read_spec()
    result = folder.read_result()
    if result is None:
        raise FlatminimaError(f"the run in {folder.path} is not finished; train it to the end first")
    sets = load_sets(spec, cache_dir=cache_dir)
    if sets.digest() != result.data_digest:
        raise FlatminimaError(f"the data {spec.source!r} have changed since {folder.path} was trained; train it again")
    model = build_model(spec.model, num_classes=sets.train.num_classes, in_channels=sets.train.images.shape[1])
    load_weights(model, folder.path / "checkpoint.safetensors")
    return spec, model.eval(), sets.clean, sets.test


def load_weights(model: nn.Module, path: Path | str) -> None:
    """Load a checkpoint into ``model``, in place, without ever running code from it.

    Args:
        model: The network the checkpoint was saved from.
        path: A ``.safetensors`` file, or a ``.pt`` or ``.pth`` file that holds ``model.state_dict()`` and nothing else.

    Raises:
        FlatminimaError: The file is missing, unreadable or holds pickled code, or its tensors are not the model's.
    """
    path = Path(path)
    if not path.is_file():
        raise FlatminimaError(f"there is no checkpoint {path}")
    if path.suffix == ".safetensors":
        tensors, _ = _read_tensors(path)
    elif path.suffix in (".pt", ".pth"):
        tensors = _read_torch_file(path)
    else:
        raise FlatminimaError(f"{path} is no checkpoint I can read safely; save it as .safetensors (or as .pt or .pth)")
    assign_weights(model, tensors, source=path)


def assign_weights(model: nn.Module, tensors: Mapping[str, Tensor], *, source: Path) -> None:
    """Copy tensors into ``model``; ``source`` is the file an error names.

    Raises:
        FlatminimaError: Names or shapes are not the model's.
    """
    _check_fit(model.state_dict(), tensors, source)
    model.load_state_dict(tensors)


def _read_torch_file(path: Path) -> dict[str, Tensor]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a pickle protocol, before the error that names it
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # whatever a broken or hostile file makes torch raise, it is many lines long and means this
        raise FlatminimaError(
            f"{path} is unreadable or holds pickled code, which is never run; save model.state_dict() as .safetensors"
        ) from None
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise FlatminimaError(f"{path} does not hold a plain state dict; save model.state_dict() itself")
    return dict(content)


def _check_fit(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], path: Path) -> None:
    missing, unexpected = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing or unexpected:
        raise FlatminimaError(
            f"{path} is not of this model: missing {_list_names(missing)}; unexpected {_list_names(unexpected)}; "
            "build the model it was saved from"
        )
    for name, tensor in expected.items():
        if found[name].shape != tensor.shape:
            raise FlatminimaError(
                f"{path} is not of this model: {name} is {tuple(found[name].shape)} in the file and "
                f"{tuple(tensor.shape)} in the model; is its number of classes or its width another?"
            )


def _list_names(names: list[str]) -> str:
    shown = ", ".join(names[:_NAMED_KEYS]) or "nothing"
    return shown + (f" and {len(names) - _NAMED_KEYS} more" if len(names) > _NAMED_KEYS else "")


def _record(kind: Callable[..., Record], text: str, **extra: Any) -> Record | None:
    """The dataclass written as JSON in ``text``; None if it is anything else."""
    try:
        return kind(**json.loads(text), **extra)
    except (ValueError, TypeError):
        return None


def _write_tensors(path: Path, tensors: Mapping[str, Tensor], note: Mapping[str, Any]) -> None:
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(note)
    metadata = {_NOTE: json.dumps({"digest": _digest(stored, text), "note": text})}
    write_whole(path, safetensors.torch.save(stored, metadata=metadata))


def _read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and note; the digest is checked, except in files that others wrote, which have none."""
    try:
        content = (
            path.read_bytes()
        )  # one look: `safe_open` would open the file twice, and it may be replaced in between
        tensors = safetensors.torch.load(content)
        signed: dict[str, Any] = json.loads(_metadata(content).get(_NOTE, '{"digest": null, "note": "{}"}'))
        digest, text = signed["digest"], signed["note"]
        note: dict[str, Any] = json.loads(text)
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        raise _damaged(path, f"it is missing, truncated or not a safetensors file: {_one_line(error)}") from None
    if digest is not None and digest != _digest(tensors, text):
        raise _damaged(path, "it was altered after it was written: its digest does not match")
    return tensors, note


def _metadata(content: bytes) -> dict[str, str]:
    """The free-form part of a safetensors header: 8 bytes of length (little-endian), then JSON."""
    length = int.from_bytes(content[:8], "little")
    metadata: dict[str, str] = json.loads(content[8 : 8 + length]).get("__metadata__", {})
    return metadata


def _digest(tensors: Mapping[str, Tensor], note: str) -> str:
    digest = hashlib.sha256(note.encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        digest.update(_bytes(tensors[name]))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise _damaged(path, f"it cannot be read: {_one_line(error)}") from None


def write_whole(path: Path, content: str | bytes) -> None:
    """Replace ``path`` as a whole, and return once the disk has it.

    Raises:
        FlatminimaError: The disk is full, or the folder cannot be written to; ``path`` is as before.
    """
    temporary = _beside(path)
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)  # a full disk has better use for its space
        raise unwritable(path, error) from None


def _beside(path: Path) -> Path:
    """Where a process writes what will become ``path``."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def unwritable(path: Path, error: OSError) -> FlatminimaError:
    """What to raise where ``path`` could not be written."""
    return FlatminimaError(f"cannot write {path}: {error.strerror}; free some space or choose another folder")


def _damaged(path: Path, what: str) -> DamagedFileError:
    return DamagedFileError(f"{path} is damaged ({what}); restore it or make it again")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
