"""One training run: a spec in, a run folder out (Jia & Su, Sec. 7, App. E). It goes on to the same bits after a crash.

Every random draw is a function of (seed, purpose, epoch or iteration), and the learning rate one of the iteration and
the finished epochs' losses. So a run is its weights, its momentum and its counters; that is all a resume point holds.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import logging
import math
import platform
import shutil
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import FrameType, TracebackType

import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import Tensor, nn

from flatminima.errors import (
    DamagedFileError,
    DamagedRunWarning,
    NonFiniteError,
    ResumedElsewhereWarning,
    TrainingInterrupted,
)
from flatminima.evaluation import evaluate
from flatminima.lab.data import ImageSet, augment
from flatminima.lab.models import build_model
from flatminima.lab.results import (
    EpochRecord,
    EpochSums,
    ResumePoint,
    RunFolder,
    RunProgress,
    RunResult,
    TrainingSets,
    assign_weights,
    load_sets,
    unwritable,
)
from flatminima.lab.sharpness import SharpnessAwareGradient
from flatminima.lab.specs import RECIPES, MultiStep, Plateau, RegularizerSpec, RunSpec, SharpnessAwareSpec
from flatminima.regularizer import FisherTraceRegularizer, RegularizerStep

__all__ = [
    "RECIPES",
    "MultiStep",
    "Plateau",
    "RegularizerSpec",
    "RunResult",
    "RunSpec",
    "SharpnessAwareSpec",
    "train",
]

_EPOCH_END_SECONDS = 5.0  # at an epoch's end, save only if the last resume point is older than this
_BAR_DELAY = 2.0  # seconds a run must last before it is worth a progress bar

logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # it announces every run's precision and device


def train(
    spec: RunSpec,
    root: Path | str,
    *,
    progress: bool = True,
    checkpoint_seconds: float = 30.0,
    accelerator: str = "auto",
    cache_dir: Path | None = None,
    wait: bool = False,
) -> RunResult:
    """Train one network, or go on where an earlier call was stopped, or return at once if it is done.

    On the CPU the result has the same bits whenever, and however often, the process was killed in between, as long as
    the machine, the number of threads and the versions stay the same.

    Args:
        spec: What to train.
        root: Where run folders are kept; this run's is ``RunFolder.of(root, spec)``.
        progress: Show a bar with the time left on standard error, if that is a terminal and the run takes a while.
        checkpoint_seconds: Save a resume point this often (0: after every update).
        accelerator: Where to train, as Lightning Fabric names it: auto, cpu, cuda, mps.
        cache_dir: Where decoded data are cached (see :func:`flatminima.lab.data.load_data`).
        wait: If another process trains this run, wait for its result.

    Returns:
        The result, read from or written to the run folder.

    Raises:
        NonFiniteError: The loss became NaN or infinite; the folder is marked as failed.
        FlatminimaError: The data cannot be loaded, another process trains this run (and ``wait`` is False), or it
            failed before.
        TrainingInterrupted: Ctrl-C; the resume point is saved.

    Warns:
        DamagedRunWarning: A file of the folder was damaged, so the run starts over.
        ResumedElsewhereWarning: The run began with other versions, threads or another device.
    """
    folder = RunFolder.of(root, spec)
    with folder.lock(wait=wait):
        found = _reopen(folder, spec)
        if found is not None and folder.read_spec().data_folder != spec.data_folder:
            folder.write_spec(spec)  # who measures the run looks for the data there
        if isinstance(found, RunResult):
            return found
        folder.remove_leftovers()
        folder.write_spec(spec)
        sets = load_sets(spec, cache_dir=cache_dir)
        with _reproducible():
            run = _Run(spec, sets, accelerator)
            if found is not None:
                _resume(run, found, folder)
            return _finish(run, folder, progress, checkpoint_seconds)


class _Run:
    """A run in memory, between two updates."""

    def __init__(self, spec: RunSpec, sets: TrainingSets, accelerator: str) -> None:
        self.spec = spec
        self.data_digest = sets.digest()
        self.fabric = Fabric(accelerator=accelerator, devices=1, precision=spec.precision)
        device = self.fabric.device
        self.train_set, self.test_set = sets.train.to(device), sets.test.to(device)
        self.validation_set = sets.validation.to(device)
        self.iterations_per_epoch = spec.iterations_per_epoch(len(self.train_set))
        self.total_iterations = spec.total_iterations(len(self.train_set))

        torch.manual_seed(_derived_seed(spec.seed, "weights", 0))
        self.network = build_model(
            spec.model, num_classes=self.train_set.num_classes, in_channels=self.train_set.images.shape[1]
        )
        # 15 to 25 % faster on CIFAR, no slower on the digits; torch declares `to` without this argument
        self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.sgd = torch.optim.SGD(
            self.network.parameters(),
            lr=spec.lr,
            momentum=spec.momentum,
            nesterov=spec.nesterov,
            weight_decay=spec.weight_decay,
        )
        self.model, self.optimizer = self.fabric.setup(self.network, self.sgd)
        self.regularizer = _regularizer(self.network, spec.regularizer)

        self.iteration = 0
        self.sums = EpochSums()
        self.history: list[EpochRecord] = []
        self._permutation = torch.empty(0, dtype=torch.int64)
        self._permuted_epoch = -1
        self._clock = time.perf_counter()

    @property
    def epoch(self) -> int:
        """Finished epochs; the record of the current one will say ``epoch + 1``."""
        return len(self.history)

    @property
    def regularizer_is_on(self) -> bool:
        return self.spec.regularizer is not None and self.epoch >= self.spec.regularizer.start_epoch

    def update(self) -> None:
        """One update of the weights.

        Raises:
            NonFiniteError: The loss is NaN or infinite; the weights are those before the update.
        """
        images, labels = self._next_batch()
        self.sgd.param_groups[0]["lr"] = self._learning_rate()
        self.optimizer.zero_grad()
        torch.manual_seed(_derived_seed(self.spec.seed, "update", self.iteration))  # sub-batches, dropout
        loss, correct = self._backward(images, labels)
        if not math.isfinite(loss):
            raise NonFiniteError(f"the loss is {loss}")
        self.optimizer.step()
        self.sums.loss += loss
        self.sums.correct += correct
        self.iteration += 1

    def at_epoch_end(self) -> bool:
        return self.iteration % self.iterations_per_epoch == 0 or self.iteration == self.total_iterations

    def end_epoch(self) -> None:
        """Evaluate, if it is time, and add the record."""
        updates = self.iteration - self.epoch * self.iterations_per_epoch
        evaluated = (self.epoch + 1) % self.spec.evaluate_every == 0 or self.iteration == self.total_iterations
        test_error = self._error(self.test_set) if evaluated else None
        validation_error = self._error(self.validation_set) if evaluated else None
        self._count_seconds()
        record = EpochRecord(
            epoch=self.epoch + 1,
            iteration=self.iteration,
            lr=self.sgd.param_groups[0]["lr"],
            train_loss=self.sums.loss / updates,
            train_accuracy=self.sums.correct / (updates * self.spec.batch_size),
            fisher_trace=self.sums.trace / self.sums.penalized if self.sums.penalized else None,
            test_error=test_error,
            seconds=self.sums.seconds,
            validation_error=validation_error,
        )
        self.history.append(record)
        self.sums = EpochSums()

    def resume_point(self) -> ResumePoint:
        self._count_seconds()
        tensors = {f"weights/{name}": tensor for name, tensor in self.network.state_dict().items()}
        for name, parameter in self.network.named_parameters():
            momentum = self.sgd.state[parameter].get("momentum_buffer")
            if momentum is not None:
                tensors[f"momentum/{name}"] = momentum
        return ResumePoint(
            tensors=tensors,
            regularizer={} if self.regularizer is None else self.regularizer.state_dict(),
            iteration=self.iteration,
            sums=replace(self.sums),
            history=tuple(self.history),
            data_digest=self.data_digest,
            environment=_environment(self.fabric.device),
        )

    def restore(self, point: ResumePoint, source: Path) -> None:
        """Become the run that was saved; tensors are copied into memory laid out as in a run from the start."""
        weights = {
            name.removeprefix("weights/"): tensor
            for name, tensor in point.tensors.items()
            if name.startswith("weights/")
        }
        assign_weights(self.network, weights, source=source)
        for name, parameter in self.network.named_parameters():
            momentum = point.tensors.get(f"momentum/{name}")
            if momentum is not None:
                self.sgd.state[parameter]["momentum_buffer"] = torch.empty_like(parameter).copy_(momentum).detach()
        if self.regularizer is not None:
            self.regularizer.load_state_dict(point.regularizer)
        self.iteration = point.iteration
        self.sums = replace(point.sums)
        self.history = list(point.history)

    def result(self, folder: Path) -> RunResult:
        """Evaluate the trained network."""
        trained, last = evaluate(self.network, self.train_set), self.history[-1]
        assert last.test_error is not None
        return RunResult(
            folder=folder,
            epochs=self.epoch,
            iterations=self.iteration,
            train_loss=trained.loss,
            train_accuracy=trained.accuracy,
            test_error=last.test_error,
            seconds=sum(record.seconds for record in self.history),
            data_digest=self.data_digest,
            environment=_environment(self.fabric.device),
            validation_error=last.validation_error,
        )

    def _error(self, images: ImageSet) -> float | None:
        return evaluate(self.network, images).error if len(images) else None

    def _next_batch(self) -> tuple[Tensor, Tensor]:
        """The next mini-batch, augmented and normalized, on the device."""
        if self._permuted_epoch != self.epoch:
            permutation = torch.randperm(len(self.train_set), generator=self._generator("permutation", self.epoch))
            self._permutation, self._permuted_epoch = permutation.to(self.fabric.device), self.epoch
        start = self.iteration % self.iterations_per_epoch * self.spec.batch_size
        chosen = self._permutation[start : start + self.spec.batch_size]
        generator = self._generator("augmentation", self.iteration)
        images = augment(self.train_set.images[chosen], self.spec.augmentation, generator)
        return self.train_set.normalize(images), self.train_set.labels[chosen]

    def _generator(self, purpose: str, index: int) -> torch.Generator:
        """On the CPU whatever the device, so that all devices see the same batches."""
        return torch.Generator().manual_seed(_derived_seed(self.spec.seed, purpose, index))

    def _learning_rate(self) -> float:
        losses = [record.train_loss for record in self.history]
        return self.spec.lr * self.spec.schedule.multiplier(self.iteration, self.total_iterations, losses)

    def _backward(self, images: Tensor, labels: Tensor) -> tuple[float, int]:
        """Set the gradients; return the mini-batch's loss and the number of images classified rightly."""
        correct = 0
        counted: list[Tensor] = []
        spec = self.spec.regularizer
        main_pass_is_split = isinstance(spec, RegularizerSpec) and spec.main_gradient == "sub-batches"

        def loss_fn(logits: Tensor, targets: Tensor) -> Tensor:
            nonlocal correct
            # A pass at moved weights comes after the one at w, with the same targets.
            in_main_pass = targets is labels or main_pass_is_split
            if in_main_pass and not any(targets is before for before in counted):
                correct += int((logits.argmax(1) == targets).sum())
                counted.append(targets)
            return F.cross_entropy(logits, targets, label_smoothing=self.spec.label_smoothing)

        if self.regularizer is None or not self.regularizer_is_on:
            loss = loss_fn(self.model(images), labels)
            self.fabric.backward(loss)
            return float(loss.detach()), correct
        seen = self._regularizer_step()
        with self.fabric.autocast():
            loss = self.regularizer.backward(loss_fn, images, labels)
        step = self._regularizer_step()
        if step is not None and step is not seen:  # an update without penalty leaves the old one
            self.sums.trace += float(step.trace)
            self.sums.penalized += 1
        return float(loss), correct

    def _regularizer_step(self) -> RegularizerStep | None:
        return self.regularizer.last_step if isinstance(self.regularizer, FisherTraceRegularizer) else None

    def _count_seconds(self) -> None:
        now = time.perf_counter()
        self.sums.seconds += now - self._clock
        self._clock = now


def _reopen(folder: RunFolder, spec: RunSpec) -> RunResult | ResumePoint | None:
    """What the folder holds of this run; if any of it is damaged, nothing."""
    if folder.is_empty:
        return None
    try:
        folder.require_spec(spec)
        return folder.read_result() or folder.read_resume_point()
    except DamagedFileError as error:
        warnings.warn(f"this run starts over: {error}", DamagedRunWarning, stacklevel=3)
        folder.clear()
        return None


def _resume(run: _Run, point: ResumePoint, folder: RunFolder) -> None:
    """Restore the run, unless the data have changed."""
    if point.data_digest != run.data_digest:
        warnings.warn(
            f"this run starts over: the data {run.spec.source!r} have changed since {folder.path} was begun",
            DamagedRunWarning,
            stacklevel=3,
        )
        folder.clear()
        folder.write_spec(run.spec)
        return
    here = _environment(run.fabric.device)
    if point.environment != here:
        warnings.warn(
            f"{folder.path} was begun with {_describe(point.environment)} and goes on with {_describe(here)}: "
            "the result is valid, but not the same bits as in one sitting",
            ResumedElsewhereWarning,
            stacklevel=3,
        )
    run.restore(point, folder.path)


def _finish(run: _Run, folder: RunFolder, progress: bool, checkpoint_seconds: float) -> RunResult:
    """Train to the end and write the result; a loss that is not finite marks the folder as failed."""
    try:
        _train_to_end(run, folder, progress, checkpoint_seconds)
        result = run.result(folder.path)
    except NonFiniteError as error:
        message = (
            f"training failed in epoch {run.epoch + 1}, iteration {run.iteration + 1}: {error}; lower lr "
            f"(it is {run.spec.lr}), or clip the regularizer's gradient with max_grad_norm"
        )
        folder.write_failure(message, run.history)
        raise NonFiniteError(message) from None
    folder.write_result(result, run.network.state_dict(), run.history)
    return result


def _train_to_end(run: _Run, folder: RunFolder, progress: bool, checkpoint_seconds: float) -> None:
    last_saved = time.monotonic()
    with (
        _deferred_interrupt() as interrupted,
        _ProgressBar(run.iteration, run.total_iterations, shown=progress) as bar,
        contextlib.closing(_EventLog(folder.path / "tensorboard", run.history)) as log,
        folder.watched() as note,
    ):
        while run.iteration < run.total_iterations:
            run.update()
            patience = checkpoint_seconds
            if run.at_epoch_end():
                run.end_epoch()
                log.add(run.history[-1])
                patience = min(checkpoint_seconds, _EPOCH_END_SECONDS)
            if interrupted.is_set() or time.monotonic() - last_saved >= patience:
                folder.write_resume_point(run.resume_point())
                last_saved = time.monotonic()
            if interrupted.is_set():
                raise TrainingInterrupted(
                    f"stopped after {run.iteration} of {run.total_iterations} updates; "
                    f"the same command goes on from there (saved in {folder.path})"
                )
            bar.update(run.iteration, _headline(run))
            note(_progress(run))


def _progress(run: _Run) -> RunProgress:
    epochs = math.ceil(run.total_iterations / run.iterations_per_epoch)
    return RunProgress(
        doing="training",
        iteration=run.iteration,
        iterations=run.total_iterations,
        epoch=min(run.epoch + 1, epochs),
        epochs=epochs,
        loss=run.history[-1].train_loss if run.history else None,
    )


def _headline(run: _Run) -> str:
    progress = _progress(run)
    headline = f"{run.spec.model}, epoch {progress.epoch}/{progress.epochs}"
    if run.history:
        headline += f", loss {progress.loss:.3g}"
        evaluated = [record.test_error for record in run.history if record.test_error is not None]
        headline += f", test error {evaluated[-1]:.1%}" if evaluated else ""
    return headline


def _regularizer(
    network: nn.Module, spec: RegularizerSpec | SharpnessAwareSpec | None
) -> FisherTraceRegularizer | SharpnessAwareGradient | None:
    if spec is None:
        return None
    options = asdict(spec)
    del options["start_epoch"]
    if isinstance(spec, SharpnessAwareSpec):
        return SharpnessAwareGradient(network, **options)
    return FisherTraceRegularizer(network, **options)


def _derived_seed(seed: int, purpose: str, index: int) -> int:
    """An independent seed for each purpose and each epoch or iteration."""
    return int.from_bytes(hashlib.sha256(f"{seed} {purpose} {index}".encode()).digest()[:8], "big") >> 1


def _environment(device: torch.device) -> dict[str, str | int]:
    """What a run's bits depend on beside its spec and its data."""
    on_gpu = device.type == "cuda"
    processor = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return {
        "flatminima": importlib.metadata.version("flatminima"),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if on_gpu else f"{device.type} {processor}",
        "threads": torch.get_num_threads(),
    }


def _describe(environment: object) -> str:
    return ", ".join(f"{name} {value}" for name, value in dict(environment).items())  # type: ignore[call-overload]


@contextlib.contextmanager
def _reproducible() -> Iterator[None]:
    """Leave the caller's random state alone, and ask cuDNN for deterministic kernels."""
    cudnn = torch.backends.cudnn
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    with (
        torch.random.fork_rng(devices),
        cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=cudnn.allow_tf32),
    ):
        yield


@contextlib.contextmanager
def _deferred_interrupt() -> Iterator[threading.Event]:
    """Set the event on Ctrl-C instead of breaking off in the middle of an update; a second Ctrl-C breaks off.

    Only where Ctrl-C (or SIGTERM, in worker processes) would raise KeyboardInterrupt: not in threads, and not where the
    caller has its own handler.
    """
    requested = threading.Event()

    def handle(signal_number: int, frame: FrameType | None) -> None:
        if requested.is_set():
            raise KeyboardInterrupt
        requested.set()

    in_main_thread = threading.current_thread() is threading.main_thread()
    interrupting = [s for s in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(s) is signal.default_int_handler]
    if not in_main_thread:
        interrupting = []
    for number in interrupting:
        signal.signal(number, handle)
    try:
        yield requested
    finally:
        for number in interrupting:
            signal.signal(number, signal.default_int_handler)


class _EventLog:
    """The history for TensorBoard, by epochs. Every sitting writes it anew, so that no epoch is there twice.

    Written here and now, not by the thread of torch's ``SummaryWriter``, which dies with a traceback on a full disk.
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
        values = [
            Summary.Value(tag=name, simple_value=value)
            for name, value in asdict(record).items()
            if name not in ("epoch", "iteration", "seconds") and value is not None
        ]
        self._write(Event(wall_time=self._wall_time, step=record.epoch, summary=Summary(value=values)))

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what a full disk did not take was said when it was written
            self._file.close()

    def _write(self, event: Event) -> None:
        try:
            RecordWriter(self._file).write(event.SerializeToString())
            self._file.flush()
        except OSError as error:
            raise unwritable(self._path, error) from None


class _ProgressBar:
    """A bar with the time left, on standard error; it appears on a terminal only, after a wait that was worth one."""

    def __init__(self, completed: int, total: int, *, shown: bool) -> None:
        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self._task = self._progress.add_task("", total=total, completed=completed)
        self._appears_at = time.monotonic() + _BAR_DELAY if shown and console.is_terminal else math.inf

    def __enter__(self) -> _ProgressBar:
        return self

    def update(self, completed: int, headline: str) -> None:
        self._progress.update(self._task, completed=completed, description=headline)
        if time.monotonic() >= self._appears_at:
            self._appears_at = math.inf
            self._progress.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._progress.live.is_started:  # otherwise `stop` prints an empty line
            self._progress.stop()
