"""One training run: a spec in, a run folder out (Jia & Su, Sec. 7, App. E). It goes on to the same bits after a crash.

Every random draw is a function of (seed, purpose, epoch or iteration), and the learning rate one of the iteration and
the finished epochs' losses. So a run is its weights, its momentum and its counters; that is all a resume point holds.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from flatminima.errors import FlatminimaError, NonFiniteError, warn
from flatminima.lab.data import Normalization
from flatminima.lab.errors import (
    ChangedCodeWarning,
    DamagedFileError,
    DamagedRunWarning,
    ResumedElsewhereWarning,
    TrainingInterrupted,
    TrainingStopped,
    UnreachedLossError,
)
from flatminima.lab.runs.event_log import event_log
from flatminima.lab.runs.folder import RunFolder
from flatminima.lab.runs.interrupts import Breaks, deferred_interrupt
from flatminima.lab.runs.records import CheckpointNote, ResumePoint, RunProgress, RunResult
from flatminima.lab.runs.session import Session, processes_of
from flatminima.lab.runs.sets import TrainingSets, has_changed_code, load_sets
from flatminima.lab.runs.spec import RegularizerSpec, RunSpec
from flatminima.lab.runs.ways import name_of
from flatminima.network import float32_products, restored_generators
from flatminima.parallel import Processes
from flatminima.progress import ProgressBar, silent

if TYPE_CHECKING:
    from lightning_fabric import Fabric

Stop = Callable[[int, int, Callable[[], float | None]], bool]
"""Whether a run stops between two epochs, by the epochs finished, the epochs in all, and its validation error then.

The error is evaluated when it is asked for, which changes nothing in the run; it is None without held-out images.
"""


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
        cache_dir: Where decoded data are cached (see :func:`flatminima.lab.data.sources.load_data`).
        wait: If another process trains this run, wait for its result.
        compile: Train with ``torch.compile``: a minute or more of preparation, faster updates, the same run up to
            rounding. On a GPU, plain training in one process becomes CUDA graphs.
        stop: Asked before every epoch whether to go no further for now.

    Returns:
        The result, read from or written to the run folder.

    Raises:
        NonFiniteError: The loss became NaN or infinite; the folder is marked as failed.
        UnreachedLossError: The spec's ``stop_at_loss`` was never reached; likewise.
        FlatminimaError: The data cannot be loaded, another process trains this run (and ``wait`` is False), it failed
            before, or it cannot be shared by as many processes as torchrun started.
        TrainingInterrupted: Ctrl-C; the resume point is saved.
        TrainingStopped: ``stop`` said so; the resume point is saved.

    Warns:
        DamagedRunWarning: A file of the folder was damaged, so the run starts over.
        ChangedCodeWarning: The run is finished, and the module that a user's own network is from has changed since.
        ResumedElsewhereWarning: The run began with other versions, threads or processes, on another device, or
            compiled and goes on uncompiled, or the other way round.
    """
    fabric = launch(spec, accelerator)
    processes = processes_of(fabric)
    folder = RunFolder.of(root, spec)
    with contextlib.ExitStack() as held:
        found = processes.first(lambda: _open(folder, spec, wait, held))
        if isinstance(found, RunResult):
            if has_changed_code(spec, found):
                warn(
                    f"the code of model {spec.model} has changed since {folder.path}, whose result this is, was "
                    "trained: remove that folder to train it anew",
                    ChangedCodeWarning,
                )
            return found
        with silent(not progress):
            sets = _load(spec, cache_dir, processes)
        with _reproducible(tf32=spec.precision == "tf32"):
            run = Session(spec, sets, fabric, compile=compile)
            processes.first(lambda: folder.write_spec(spec))  # what is refused before leaves no unfinished run behind
            if found is not None and processes.first(lambda: _goes_on(run, found, folder)):
                run.restore(found, folder.path)
            return _finish(run, folder, progress, checkpoint_seconds, stop)


def launch(spec: RunSpec, accelerator: str) -> Fabric:
    """Fabric on one device; under torchrun on one for each process, which then have joined."""
    from lightning_fabric import Fabric  # seconds to import, which finished runs need not wait for

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
    shared = {"batch_size": spec.batch_size}
    if isinstance(spec.regularizer, RegularizerSpec):
        shared["regularizer.num_sub_batches"] = spec.regularizer.num_sub_batches
    elif spec.regularizer is not None:
        raise FlatminimaError(f"{name_of(spec.regularizer)} runs in one process: start it without torchrun")
    for name, count in shared.items():
        if count % processes:
            raise FlatminimaError(
                f"{name} {count} cannot be shared equally by {processes} processes: "
                f"choose a multiple of {processes}, or another number of processes"
            )


def _open(folder: RunFolder, spec: RunSpec, wait: bool, held: contextlib.ExitStack) -> RunResult | ResumePoint | None:
    """Lock the folder for as long as ``held`` and make it ready; what it holds of this run."""
    folder.refuse_link()
    held.enter_context(folder.lock(wait=wait))
    found = _reopen(folder, spec)
    if found is not None and folder.read_spec().data_folder != spec.data_folder:
        folder.write_spec(spec)  # who measures the run looks for the data there
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
        warn(f"this run starts over: {error}", DamagedRunWarning)
        folder.clear()
        return None


def _goes_on(run: Session, point: ResumePoint, folder: RunFolder) -> bool:
    """Whether the run goes on from there: not if the data have changed."""
    if point.data_digest != run.data_digest:
        warn(
            f"this run starts over: the data {run.spec.source!r} have changed since {folder.path} was begun",
            DamagedRunWarning,
        )
        folder.clear()
        folder.write_spec(run.spec)
        return False
    here = run.environment()
    if point.environment != here:
        warn(
            f"{folder.path} was begun with {_describe(point.environment)} and goes on with {_describe(here)}: "
            "the result is valid, but not the same bits as in one sitting",
            ResumedElsewhereWarning,
        )
    return True


def _finish(run: Session, folder: RunFolder, progress: bool, checkpoint_seconds: float, stop: Stop | None) -> RunResult:
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
    except UnreachedLossError as error:
        if first:
            folder.write_failure(str(error), run.history)
        raise
    images = Normalization.of(run.train_set)
    note = CheckpointNote(images.mean, images.std)
    run.processes.first(lambda: folder.write_result(result, run.network.state_dict(), run.history, note))
    return result


def _train_to_end(
    run: Session, folder: RunFolder, progress: bool, checkpoint_seconds: float, stop: Stop | None
) -> None:
    breaks = Breaks(run.processes, run.iteration, checkpoint_seconds)
    with (
        deferred_interrupt() as interrupted,
        ProgressBar("", run.total_iterations, completed=run.iteration, enabled=progress) as bar,
        event_log(run, folder) as log,
        folder.watched() as note,
    ):
        while not run.is_done:
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
    if run.spec.stop_at_loss is not None and not run.fits:
        raise UnreachedLossError(
            f"training ended after {run.epoch} epochs with a loss of {run.history[-1].fit:.3g} on the training set, "
            f"above stop_at_loss {run.spec.stop_at_loss:g}: allow more epochs, or a higher loss"
        )


def _progress(run: Session) -> RunProgress:
    return RunProgress(
        doing="training",
        iteration=run.iteration,
        iterations=run.total_iterations,
        epoch=min(run.epoch + 1, run.epochs),
        epochs=run.epochs,
        loss=run.history[-1].train_loss if run.history else None,
    )


def _stops(run: Session, stop: Stop) -> bool:
    return run.processes.first(lambda: stop(run.epoch, run.epochs, run.validation_error))


def _headline(run: Session) -> str:
    progress = _progress(run)
    headline = f"{run.spec.model}, epoch {progress.epoch}/{progress.epochs}"
    if run.history:
        headline += f", loss {progress.loss:.3g}"
        evaluated = [record.test_error for record in run.history if record.test_error is not None]
        headline += f", test error {evaluated[-1]:.1%}" if evaluated else ""
    return headline


def _describe(environment: object) -> str:
    return ", ".join(f"{name} {value}" for name, value in dict(environment).items())  # type: ignore[call-overload]


@contextlib.contextmanager
def _reproducible(*, tf32: bool) -> Iterator[None]:
    """Leave the caller's random state and settings alone, ask cuDNN for deterministic kernels, and choose float32's."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    with contextlib.ExitStack() as restored:
        restored.enter_context(restored_generators(()))  # Python's and numpy's, too
        restored.enter_context(torch.random.fork_rng(devices))
        restored.enter_context(float32_products(tf32=tf32))
        for name, value in {"enabled": True, "benchmark": False, "deterministic": True}.items():
            restored.callback(setattr, torch.backends.cudnn, name, getattr(torch.backends.cudnn, name))
            setattr(torch.backends.cudnn, name, value)
        yield
