"""A run in progress: the network, its optimizer and its counters, one update after the other."""

from __future__ import annotations

import importlib.metadata
import math
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from flatminima.errors import NonFiniteError
from flatminima.lab.data import ImageSet, augment
from flatminima.lab.networks import assign_weights
from flatminima.lab.runs.records import EpochRecord, EpochSums, ResumePoint, RunResult
from flatminima.lab.runs.sets import TrainingSets, code_of_model, initial_network, seed_python_and_numpy
from flatminima.lab.runs.spec import RegularizerSpec, RunSpec, derived_seed
from flatminima.lab.runs.ways import way_of
from flatminima.measures import evaluate
from flatminima.parallel import Processes
from flatminima.regularizer import FisherTraceRegularizer, RegularizerStep

if TYPE_CHECKING:
    from lightning_fabric import Fabric


@dataclass(frozen=True)
class Update:
    """What one update observed, in scalar tensors: reading one waits for all that a GPU has still to do."""

    iteration: int
    loss: Tensor
    correct: Tensor
    trace: Tensor | None  # the regularizer's estimate, where there was a penalty


class Session:
    """A run in memory, between two updates."""

    def __init__(self, spec: RunSpec, sets: TrainingSets, fabric: Fabric, *, compile: bool = False) -> None:
        self.spec, self.is_compiled = spec, compile
        self.data_digest = sets.digest()
        self.fabric, self.processes = fabric, processes_of(fabric)
        self.processes.require_same("the training data", lambda: self.data_digest)
        device = fabric.device
        self.train_set, self.test_set = sets.train.to(device), sets.test.to(device)
        self.validation_set = sets.validation.to(device)
        self.iterations_per_epoch = spec.iterations_per_epoch(len(self.train_set))
        self.total_iterations = spec.total_iterations(len(self.train_set))

        self.network = initial_network(spec, sets.train)
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
        self.regularizer = way_of(wrapped, spec, self.processes.size)

        self.iteration = 0
        self.sums = EpochSums()
        self.history: list[EpochRecord] = []
        self.unread: list[Update] = []
        self.reads_at_once = device.type == "cpu" and self.processes.size == 1  # where there is nothing to wait for
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
        """Whether the present epoch is regularized."""
        return self.spec.regularizer is not None and self.epoch >= self.spec.regularizer.start_epoch

    def update(self) -> None:
        """One update of the weights.

        Raises:
            NonFiniteError: The loss is NaN or infinite; the weights are those before the update. On a GPU, and with
                several processes, such a loss is found when it is :meth:`read` or, with the regularizer, here.
        """
        images, labels = self.next_batch()
        self.sgd.param_groups[0]["lr"] = self._learning_rate()
        self.optimizer.zero_grad()
        self._seed(derived_seed(self.spec.seed, self._update_purpose(), self.iteration))
        loss, correct, trace = self.backward(images, labels)
        self.unread.append(Update(self.iteration, loss, correct, trace))
        if self.reads_at_once:
            self.read()
        self.optimizer.step()
        self.iteration += 1

    def _seed(self, seed: int) -> None:
        """Seed what the update draws from, anew for each, so that a resumed run draws the same.

        Of torch's, on a CPU that one generator: ``torch.manual_seed`` would note down the stack for every other kind of
        device that is not there, at a third of a small network's update, and keep the notes.
        """
        if self.fabric.device.type == "cpu":
            torch.default_generator.manual_seed(seed)
        else:
            torch.manual_seed(seed)
        seed_python_and_numpy(seed)

    def read(self) -> None:
        """Add what the updates have observed since the last reading to the epoch's sums.

        Raises:
            NonFiniteError: A loss was NaN or infinite. :attr:`iteration` is then the update's; if others followed it,
                the weights are NaN, and nothing of them has been saved: whoever saves reads first.
        """
        if not self.unread:
            return
        updates, self.unread = self.unread, []
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
        """Whether the latest update ended an epoch."""
        return self.iteration % self.iterations_per_epoch == 0 or self.iteration == self.total_iterations

    @property
    def is_done(self) -> bool:
        """Whether there is nothing left to train: it fits well enough, or has come to its limit."""
        return self.fits or self.iteration >= self.total_iterations

    @property
    def fits(self) -> bool:
        """Whether the last epoch's fit is what the run was to stop at."""
        return self._is_good_fit(self.history[-1].fit if self.history else None)

    def _is_good_fit(self, fit: float | None) -> bool:
        target = self.spec.stop_at_loss
        return target is not None and fit is not None and fit <= target

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
        fit = None if self.spec.stop_at_loss is None else evaluate(self.network, self.train_set).loss
        ends = self.iteration == self.total_iterations or self._is_good_fit(fit)
        evaluated = ends or (self.epoch + 1) % self.spec.evaluate_every == 0
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
            fit=fit,
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
        return found | ({"compiled": True} if self.is_compiled else {}) | code_of_model(self.spec.model)

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

    def next_batch(self) -> tuple[Tensor, Tensor]:
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
        return torch.Generator().manual_seed(derived_seed(self.spec.seed, purpose, index))

    def _update_purpose(self) -> str:
        """What an update draws: dropout and the split into sub-batches.

        Each process draws its own: the same masks for all would be repeated over the mini-batch.
        """
        return "update" if self.processes.rank == 0 else f"update, process {self.processes.rank}"

    def _learning_rate(self) -> float:
        losses, target = [record.train_loss for record in self.history], self.spec.stop_at_loss
        fits = [record.fit / target for record in self.history if target is not None and record.fit is not None]
        return self.spec.lr * self.spec.schedule.multiplier(self.iteration, self.total_iterations, losses, fits)

    def backward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Set the gradients; return the loss, the number of images classified rightly, and the trace if penalized."""
        correct: list[Tensor] = []
        rows = torch.arange(len(labels), device=labels.device)
        counted = torch.zeros_like(labels, dtype=torch.bool)
        whole_batch = labels, rows
        spec = self.spec.regularizer
        main_pass_is_split = isinstance(spec, RegularizerSpec) and spec.main_gradient == "sub-batches"

        def loss_fn(logits: Tensor, targets: tuple[Tensor, Tensor]) -> Tensor:
            labels, rows = targets
            if targets is whole_batch or main_pass_is_split:
                first = ~counted[rows]  # a pass at moved weights comes after the one at w, of the same images
                correct.append(((logits.argmax(1) == labels) & first).sum())
                counted[rows] = True
            return F.cross_entropy(logits, labels, label_smoothing=self.spec.label_smoothing)

        if self.regularizer is None or not self.regularizer_is_on:
            loss = loss_fn(self.model(images), whole_batch)
            self.fabric.backward(loss)
            return loss.detach(), correct[0], None
        seen = self._regularizer_step()
        with self.fabric.autocast():
            loss = self.regularizer.backward(loss_fn, images, whole_batch)
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


def processes_of(fabric: Fabric) -> Processes:
    """The processes that Fabric has joined; without any others, this one alone."""
    return Processes.all() if fabric.world_size > 1 else Processes()
