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
import os
import platform
import shutil
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
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
from torch.nn.parallel import DistributedDataParallel

from flatminima.errors import (
    DamagedFileError,
    DamagedRunWarning,
    FlatminimaError,
    NonFiniteError,
    ResumedElsewhereWarning,
    TrainingInterrupted,
    TrainingStopped,
)
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
from flatminima.measures.evaluation import evaluate
from flatminima.network.precision import float32_products
from flatminima.parallel.processes import Processes
from flatminima.regularizer.regularizer import FisherTraceRegularizer, RegularizerStep

__all__ = [
    "RECIPES",
    "MultiStep",
    "Plateau",
    "RegularizerSpec",
    "RunResult",
    "RunSpec",
    "SharpnessAwareSpec",
    "Stop",
    "train",
]

Stop = Callable[[int, int, Callable[[], float | None]], bool]
"""Whether a run stops between two epochs, by the epochs finished, the epochs in all, and its validation error then.

The error is evaluated when it is asked for, which changes nothing in the run; it is None without held-out images.
"""

_EPOCH_END_SECONDS = 5.0  # at an epoch's end, save only if the last resume point is older than this
_ASKING_SECONDS = 1.0  # how often processes ask each other whether to save or to stop
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
    compile: bool = False,
    stop: Stop | None = None,
) -> RunResult:
    """Train one network, or go on where an earlier call was stopped, or return at once if it is done.

    On the CPU the result has the same bits whenever, and however often, the process was killed in between, as long as
    the machine, the number of threads, the versions and ``compile`` stay the same.

    Processes that ``torchrun`` started share one run, each on a device of its own: of every mini-batch of the spec they
    take equal parts, and of the regularizer's sub-batches too, so it is the run of one process up to rounding. Except
    for BatchNorm: each process normalizes its part by that part's own statistics, and the running statistics are those
    of the first. The first process alone writes the run folder; the data must be readable for all.

    Args:
        spec: What to train.
        root: Where run folders are kept; this run's is ``RunFolder.of(root, spec)``.
        progress: Show a bar with the time left on standard error, if that is a terminal and the run takes a while.
        checkpoint_seconds: Save a resume point this often (0: after every update).
        accelerator: Where to train, as Lightning Fabric names it: auto, cpu, cuda, mps.
        cache_dir: Where decoded data are cached (see :func:`flatminima.lab.data.load_data`).
        wait: If another process trains this run, wait for its result.
        compile: Train with ``torch.compile``: a minute or more of preparation, faster updates, the same run up to
            rounding. On a GPU, plain training in one process becomes CUDA graphs.
        stop: Asked before every epoch whether to go no further for now.

    Returns:
        The result, read from or written to the run folder.

    Raises:
        NonFiniteError: The loss became NaN or infinite; the folder is marked as failed.
        FlatminimaError: The data cannot be loaded, another process trains this run (and ``wait`` is False), it failed
            before, or it cannot be shared by as many processes as torchrun started.
        TrainingInterrupted: Ctrl-C; the resume point is saved.
        TrainingStopped: ``stop`` said so; the resume point is saved.

    Warns:
        DamagedRunWarning: A file of the folder was damaged, so the run starts over.
        ResumedElsewhereWarning: The run began with other versions, threads or processes, on another device, or
            compiled and goes on uncompiled, or the other way round.
    """
    fabric = _launch(spec, accelerator)
    processes = _processes(fabric)
    folder = RunFolder.of(root, spec)
    with contextlib.ExitStack() as held:
        found = processes.first(lambda: _open(folder, spec, wait, held))
        if isinstance(found, RunResult):
            return found
        sets = _load(spec, cache_dir, processes)
        with _reproducible(tf32=spec.precision == "tf32"):
            run = _Run(spec, sets, fabric, compile=compile)
            if found is not None and processes.first(lambda: _goes_on(run, found, folder)):
                run.restore(found, folder.path)
            return _finish(run, folder, progress, checkpoint_seconds, stop)


@dataclass(frozen=True)
class _Update:
    """What one update observed, in scalar tensors: reading one waits for all that a GPU has still to do."""

    iteration: int
    loss: Tensor
    correct: Tensor
    trace: Tensor | None  # the regularizer's estimate, where there was a penalty


class _Run:
    """A run in memory, between two updates."""

    def __init__(self, spec: RunSpec, sets: TrainingSets, fabric: Fabric, *, compile: bool = False) -> None:
        self.spec, self.is_compiled = spec, compile
        self.data_digest = sets.digest()
        self.fabric, self.processes = fabric, _processes(fabric)
        self.processes.require_same("the training data", lambda: self.data_digest)
        device = fabric.device
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
        trained = self._compiled() if compile else self.network  # what is saved and evaluated is never compiled
        self.model, self.optimizer = fabric.setup(trained, self.sgd, _reapply_compile=False)
        wrapped = next((m for m in self.model.modules() if isinstance(m, DistributedDataParallel)), trained)
        self.regularizer = _regularizer(wrapped, spec.regularizer, self.processes.size)

        self.iteration = 0
        self.sums = EpochSums()
        self.history: list[EpochRecord] = []
        self._unread: list[_Update] = []
        self._reads_at_once = device.type == "cpu" and self.processes.size == 1  # where there is nothing to wait for
        self._permutation = torch.empty(0, dtype=torch.int64)
        self._permuted_epoch = -1
        self._clock = time.perf_counter()

    @property
    def epoch(self) -> int:
        """Finished epochs; the record of the current one will say ``epoch + 1``."""
        return len(self.history)

    @property
    def epochs(self) -> int:
        """Epochs of the whole run; the last may be cut short by a limit in iterations."""
        return math.ceil(self.total_iterations / self.iterations_per_epoch)

    @property
    def regularizer_is_on(self) -> bool:
        return self.spec.regularizer is not None and self.epoch >= self.spec.regularizer.start_epoch

    def update(self) -> None:
        """One update of the weights.

        Raises:
            NonFiniteError: The loss is NaN or infinite; the weights are those before the update. On a GPU, and with
                several processes, such a loss is found when it is :meth:`read` or, with the regularizer, here.
        """
        images, labels = self._next_batch()
        self.sgd.param_groups[0]["lr"] = self._learning_rate()
        self.optimizer.zero_grad()
        torch.manual_seed(_derived_seed(self.spec.seed, self._update_purpose(), self.iteration))
        loss, correct, trace = self._backward(images, labels)
        self._unread.append(_Update(self.iteration, loss, correct, trace))
        if self._reads_at_once:
            self.read()
        self.optimizer.step()
        self.iteration += 1

    def read(self) -> None:
        """Add what the updates have observed since the last reading to the epoch's sums.

        Raises:
            NonFiniteError: A loss was NaN or infinite. :attr:`iteration` is then the update's; if others followed it,
                the weights are NaN, and nothing of them has been saved: whoever saves reads first.
        """
        if not self._unread:
            return
        updates, self._unread = self._unread, []
        own = (
            _values([update.loss for update in updates]),
            _values([update.correct for update in updates]),
            _values([update.trace for update in updates if update.trace is not None]),
        )
        losses, correct, traces = zip(*self.processes.gather(lambda: own), strict=True)
        for update, loss in zip(updates, _means(losses), strict=True):
            if not math.isfinite(loss):
                self.iteration = update.iteration
                raise NonFiniteError(f"the loss is {loss}")
            self.sums.loss += loss
        self.sums.correct += sum(map(sum, correct))
        for trace in _means(traces):
            self.sums.trace += trace
            self.sums.penalized += 1

    def at_epoch_end(self) -> bool:
        return self.iteration % self.iterations_per_epoch == 0 or self.iteration == self.total_iterations

    def end_epoch(self) -> None:
        """Evaluate, if it is time, and add the record.

        Raises:
            NonFiniteError: As :meth:`read`, or the weights give logits that are not finite.
        """
        self.read()
        self.history.append(self.processes.first(self._epoch_record))  # it decides the learning rate: one for all
        self.sums = EpochSums()

    def _epoch_record(self) -> EpochRecord:
        updates = self.iteration - self.epoch * self.iterations_per_epoch
        evaluated = (self.epoch + 1) % self.spec.evaluate_every == 0 or self.iteration == self.total_iterations
        test_error = self._error(self.test_set) if evaluated else None
        validation_error = self._error(self.validation_set) if evaluated else None
        self._count_seconds()
        return EpochRecord(
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

    def validation_error(self) -> float | None:
        """The held-out images' error at the end of the last epoch."""
        known = self.history[-1].validation_error if self.history else None
        return self._error(self.validation_set) if known is None else known

    def resume_point(self) -> ResumePoint:
        """The run as it is now.

        Raises:
            NonFiniteError: As :meth:`read`.
        """
        self.read()
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
            environment=self.environment(),
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
            environment=self.environment(),
            validation_error=last.validation_error,
        )

    def environment(self) -> dict[str, str | int]:
        """What a run's bits depend on beside its spec and its data."""
        device = self.fabric.device
        on_gpu = device.type == "cuda"
        processor = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
        found: dict[str, str | int] = {
            "flatminima": importlib.metadata.version("flatminima"),
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name(device) if on_gpu else f"{device.type} {processor}",
            "threads": torch.get_num_threads(),
        }
        found |= {"processes": self.processes.size} if self.processes.size > 1 else {}
        return found | ({"compiled": True} if self.is_compiled else {})

    def _compiled(self) -> nn.Module:
        torch.compiler.reset()  # graphs of earlier runs count towards a limit, past which the network runs eagerly
        # CUDA graphs keep to the memory they were captured with, and the passes of regularizers use copies of buffers.
        captured = self.fabric.device.type == "cuda" and self.spec.regularizer is None and self.processes.size == 1
        compiled: nn.Module = torch.compile(  # type: ignore[assignment]
            self.network, dynamic=False, mode="reduce-overhead" if captured else "default"
        )
        return compiled

    def _error(self, images: ImageSet) -> float | None:
        return evaluate(self.network, images).error if len(images) else None

    def _next_batch(self) -> tuple[Tensor, Tensor]:
        """This process's part of the next mini-batch, augmented and normalized, on the device."""
        if self._permuted_epoch != self.epoch:
            permutation = torch.randperm(len(self.train_set), generator=self._generator("permutation", self.epoch))
            self._permutation, self._permuted_epoch = permutation.to(self.fabric.device), self.epoch
        start = self.iteration % self.iterations_per_epoch * self.spec.batch_size
        chosen = self._permutation[start : start + self.spec.batch_size]
        generator = self._generator("augmentation", self.iteration)
        images = augment(self.train_set.images[chosen], self.spec.augmentation, generator)
        size = self.spec.batch_size // self.processes.size
        part = slice(self.processes.rank * size, (self.processes.rank + 1) * size)
        return self.train_set.normalize(images[part]), self.train_set.labels[chosen[part]]

    def _generator(self, purpose: str, index: int) -> torch.Generator:
        """On the CPU whatever the device, so that all devices see the same batches."""
        return torch.Generator().manual_seed(_derived_seed(self.spec.seed, purpose, index))

    def _update_purpose(self) -> str:
        """What an update draws: dropout and the split into sub-batches.

        Each process draws its own: the same masks for all would be repeated over the mini-batch.
        """
        return "update" if self.processes.rank == 0 else f"update, process {self.processes.rank}"

    def _learning_rate(self) -> float:
        losses = [record.train_loss for record in self.history]
        return self.spec.lr * self.spec.schedule.multiplier(self.iteration, self.total_iterations, losses)

    def _backward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Set the gradients; return the loss, the number of images classified rightly, and the trace if penalized."""
        correct: list[Tensor] = []
        counted: list[Tensor] = []
        spec = self.spec.regularizer
        main_pass_is_split = isinstance(spec, RegularizerSpec) and spec.main_gradient == "sub-batches"

        def loss_fn(logits: Tensor, targets: Tensor) -> Tensor:
            # A pass at moved weights comes after the one at w, with the same targets.
            in_main_pass = targets is labels or main_pass_is_split
            if in_main_pass and not any(targets is before for before in counted):
                correct.append((logits.argmax(1) == targets).sum())
                counted.append(targets)
            return F.cross_entropy(logits, targets, label_smoothing=self.spec.label_smoothing)

        if self.regularizer is None or not self.regularizer_is_on:
            loss = loss_fn(self.model(images), labels)
            self.fabric.backward(loss)
            return loss.detach(), correct[0], None
        seen = self._regularizer_step()
        with self.fabric.autocast():
            loss = self.regularizer.backward(loss_fn, images, labels)
        step = self._regularizer_step()
        trace = None if step is None or step is seen else step.trace  # an update without penalty leaves the old one
        return loss, torch.stack(correct).sum(), trace

    def _regularizer_step(self) -> RegularizerStep | None:
        return self.regularizer.last_step if isinstance(self.regularizer, FisherTraceRegularizer) else None

    def _count_seconds(self) -> None:
        now = time.perf_counter()
        self.sums.seconds += now - self._clock
        self._clock = now


def _values(tensors: list[Tensor]) -> list[float]:
    """The numbers in scalar tensors, fetched together."""
    return torch.stack(tensors).tolist() if tensors else []


def _means(by_process: Sequence[Sequence[float]]) -> list[float]:
    """The mean over the processes of each of their numbers."""
    return [sum(values) / len(values) for values in zip(*by_process, strict=True)]


def _launch(spec: RunSpec, accelerator: str) -> Fabric:
    """Fabric on one device; under torchrun on one for each process, which then have joined."""
    size = Processes.launched().size
    precision = "32-true" if spec.precision == "tf32" else spec.precision  # what float32 is, `_reproducible` decides
    if size == 1:
        return Fabric(accelerator=accelerator, devices=1, precision=precision)
    _require_shares(spec, size)
    on_this_node = int(os.environ["LOCAL_WORLD_SIZE"])
    fabric = Fabric(
        accelerator=accelerator,
        devices=on_this_node,
        num_nodes=size // on_this_node,
        strategy="ddp",
        precision=precision,
    )
    fabric.launch()
    return fabric


def _require_shares(spec: RunSpec, processes: int) -> None:
    if isinstance(spec.regularizer, SharpnessAwareSpec):
        raise FlatminimaError("sharpness-aware minimization runs in one process: start it without torchrun")
    shared = {"batch_size": spec.batch_size}
    if spec.regularizer is not None:
        shared["regularizer.num_sub_batches"] = spec.regularizer.num_sub_batches
    for name, count in shared.items():
        if count % processes:
            raise FlatminimaError(
                f"{name} {count} cannot be shared equally by {processes} processes: "
                f"choose a multiple of {processes}, or another number of processes"
            )


def _processes(fabric: Fabric) -> Processes:
    return Processes.all() if fabric.world_size > 1 else Processes()


def _open(folder: RunFolder, spec: RunSpec, wait: bool, held: contextlib.ExitStack) -> RunResult | ResumePoint | None:
    """Lock the folder for as long as ``held`` and make it ready; what it holds of this run."""
    held.enter_context(folder.lock(wait=wait))
    found = _reopen(folder, spec)
    if found is not None and folder.read_spec().data_folder != spec.data_folder:
        folder.write_spec(spec)  # who measures the run looks for the data there
    if not isinstance(found, RunResult):
        folder.remove_leftovers()
        folder.write_spec(spec)
    return found


def _load(spec: RunSpec, cache_dir: Path | None, processes: Processes) -> TrainingSets:
    """The data, on the first process before the others: it decodes the images, and they find them in the cache."""
    sets = processes.attempt(lambda: load_sets(spec, cache_dir=cache_dir) if processes.rank == 0 else None)
    return processes.attempt(lambda: sets or load_sets(spec, cache_dir=cache_dir))


def _reopen(folder: RunFolder, spec: RunSpec) -> RunResult | ResumePoint | None:
    """What the folder holds of this run; if any of it is damaged, nothing."""
    if folder.is_empty:
        return None
    try:
        folder.require_spec(spec)
        return folder.read_result() or folder.read_resume_point()
    except DamagedFileError as error:
        warnings.warn(f"this run starts over: {error}", DamagedRunWarning, stacklevel=8)  # the line that called `train`
        folder.clear()
        return None


def _goes_on(run: _Run, point: ResumePoint, folder: RunFolder) -> bool:
    """Whether the run goes on from there: not if the data have changed."""
    if point.data_digest != run.data_digest:
        warnings.warn(
            f"this run starts over: the data {run.spec.source!r} have changed since {folder.path} was begun",
            DamagedRunWarning,
            stacklevel=7,
        )
        folder.clear()
        folder.write_spec(run.spec)
        return False
    here = run.environment()
    if point.environment != here:
        warnings.warn(
            f"{folder.path} was begun with {_describe(point.environment)} and goes on with {_describe(here)}: "
            "the result is valid, but not the same bits as in one sitting",
            ResumedElsewhereWarning,
            stacklevel=7,
        )
    return True


def _finish(run: _Run, folder: RunFolder, progress: bool, checkpoint_seconds: float, stop: Stop | None) -> RunResult:
    """Train to the end and write the result; a loss that is not finite marks the folder as failed."""
    first = run.processes.rank == 0
    try:
        _train_to_end(run, folder, progress and first, checkpoint_seconds, stop)
        result = run.processes.first(lambda: run.result(folder.path))
    except NonFiniteError as error:
        message = (
            f"training failed in epoch {run.epoch + 1}, iteration {run.iteration + 1}: {error}; lower lr "
            f"(it is {run.spec.lr}), or clip the regularizer's gradient with max_grad_norm"
        )
        if first or folder.path.is_dir():  # whoever met it: the first process may be waiting for this one
            folder.write_failure(message, run.history)
        raise NonFiniteError(message) from None
    run.processes.first(lambda: folder.write_result(result, run.network.state_dict(), run.history))
    return result


def _train_to_end(run: _Run, folder: RunFolder, progress: bool, checkpoint_seconds: float, stop: Stop | None) -> None:
    breaks = _Breaks(run.processes, run.iteration, checkpoint_seconds)
    with (
        _deferred_interrupt() as interrupted,
        _ProgressBar(run.iteration, run.total_iterations, shown=progress) as bar,
        _event_log(run, folder) as log,
        folder.watched() as note,
    ):
        while run.iteration < run.total_iterations:
            if stop is not None and run.at_epoch_end() and _stops(run, stop):
                run.processes.first(partial(folder.write_resume_point, run.resume_point()))
                raise TrainingStopped(f"stopped after {run.epoch} of {run.epochs} epochs (saved in {folder.path})")
            run.update()
            ended = run.at_epoch_end()
            if ended:
                run.end_epoch()
                log(run.history[-1])
            saves, stops = breaks.agree(run.iteration, ended, interrupted.is_set())
            if saves:
                run.processes.first(partial(folder.write_resume_point, run.resume_point()))
                breaks.saved()
            if stops:
                raise TrainingInterrupted(
                    f"stopped after {run.iteration} of {run.total_iterations} updates; "
                    f"the same command goes on from there (saved in {folder.path})"
                )
            bar.update(run.iteration, _headline(run))
            if run.processes.rank == 0:
                note(_progress(run))


def _progress(run: _Run) -> RunProgress:
    return RunProgress(
        doing="training",
        iteration=run.iteration,
        iterations=run.total_iterations,
        epoch=min(run.epoch + 1, run.epochs),
        epochs=run.epochs,
        loss=run.history[-1].train_loss if run.history else None,
    )


def _stops(run: _Run, stop: Stop) -> bool:
    return run.processes.first(lambda: stop(run.epoch, run.epochs, run.validation_error))


class _Breaks:
    """After which updates to save, and after which to stop: the same ones for all processes.

    To ask each other after every update would make them wait for each other's devices, so several processes ask only
    about once a second, and at an epoch's end, where they meet anyway.
    """

    def __init__(self, processes: Processes, iteration: int, checkpoint_seconds: float) -> None:
        self._processes, self._checkpoint_seconds = processes, checkpoint_seconds
        self._saved = self._asked = time.monotonic()
        self._asked_after = self._asks_next = iteration

    def agree(self, iteration: int, epoch_ended: bool, interrupted: bool) -> tuple[bool, bool]:
        """Whether to save now, and whether to stop; an interruption of any process stops all."""
        if iteration < self._asks_next and not epoch_ended:
            return False, False
        now = time.monotonic()
        patience = min(self._checkpoint_seconds, _EPOCH_END_SECONDS) if epoch_ended else self._checkpoint_seconds
        answers = self._processes.gather(
            lambda: (interrupted, now - self._saved >= patience, self._ahead(iteration, now))
        )
        self._asked, self._asked_after = now, iteration
        _, overdue, ahead = answers[0]
        self._asks_next = iteration + ahead
        stops = any(answer[0] for answer in answers)
        return stops or overdue, stops

    def saved(self) -> None:
        """The run was saved just now."""
        self._saved = time.monotonic()

    def _ahead(self, iteration: int, now: float) -> int:
        """Updates until the processes ask again, at the pace since they last did."""
        if self._processes.size == 1:
            return 1
        seconds = max(now - self._asked, 1e-9)
        wanted = min(_ASKING_SECONDS, self._checkpoint_seconds)
        return max(1, int((iteration - self._asked_after) / seconds * wanted))


def _headline(run: _Run) -> str:
    progress = _progress(run)
    headline = f"{run.spec.model}, epoch {progress.epoch}/{progress.epochs}"
    if run.history:
        headline += f", loss {progress.loss:.3g}"
        evaluated = [record.test_error for record in run.history if record.test_error is not None]
        headline += f", test error {evaluated[-1]:.1%}" if evaluated else ""
    return headline


def _regularizer(
    network: nn.Module, spec: RegularizerSpec | SharpnessAwareSpec | None, processes: int
) -> FisherTraceRegularizer | SharpnessAwareGradient | None:
    """What sets the gradients, if it is not plain; each process takes its part of the sub-batches."""
    if spec is None:
        return None
    options = asdict(spec)
    del options["start_epoch"]
    if isinstance(spec, SharpnessAwareSpec):
        return SharpnessAwareGradient(network, **options)
    options["num_sub_batches"] //= processes
    return FisherTraceRegularizer(network, **options)


def _derived_seed(seed: int, purpose: str, index: int) -> int:
    """An independent seed for each purpose and each epoch or iteration."""
    return int.from_bytes(hashlib.sha256(f"{seed} {purpose} {index}".encode()).digest()[:8], "big") >> 1


def _describe(environment: object) -> str:
    return ", ".join(f"{name} {value}" for name, value in dict(environment).items())  # type: ignore[call-overload]


@contextlib.contextmanager
def _reproducible(*, tf32: bool) -> Iterator[None]:
    """Leave the caller's random state and settings alone, ask cuDNN for deterministic kernels, and choose float32's."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(devices), float32_products(tf32=tf32), contextlib.ExitStack() as restored:
        for name, value in {"enabled": True, "benchmark": False, "deterministic": True}.items():
            restored.callback(setattr, torch.backends.cudnn, name, getattr(torch.backends.cudnn, name))
            setattr(torch.backends.cudnn, name, value)
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


@contextlib.contextmanager
def _event_log(run: _Run, folder: RunFolder) -> Iterator[Callable[[EpochRecord], None]]:
    """What to call with every new record; only the first process writes it."""
    if run.processes.rank > 0:
        yield lambda record: None
        return
    with contextlib.closing(_EventLog(folder.path / "tensorboard", run.history)) as log:
        yield log.add


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
