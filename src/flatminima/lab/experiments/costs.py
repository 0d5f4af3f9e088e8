"""What runs cost, before they are trained: in forward-backwards of one image, and from those in seconds.

A plain update's forward-backward of an image is the unit. A regularized update and a measure are so many of it, so that
a run's cost does not depend on the machine, and one timed update per network gives the seconds.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from flatminima.lab.data import ImageSet, load_data
from flatminima.lab.experiments.experiment import Record, Task
from flatminima.lab.networks import new_network, resolve_device
from flatminima.lab.runs import FisherPenaltySpec, Measuring, RegularizerSpec, RunSpec, UnitResidualSpec
from flatminima.measures import input_jacobian_passes, robustness_sample_count
from flatminima.progress import track

FORWARD = 1 / 3
"""A forward pass in forward-backwards: two products backward for each one forward."""

_GRAM = 2.0  # a sample in ξ: its forward-backward, and about as much again for the rows and their products

_EXACT_PENALTY = 4.0  # a Hessian-vector product beside its gradient, as measured (benchmarks/regularizer.py)

_TIMED_UPDATES = 3


@dataclass(frozen=True)
class Sizes:
    """Images of a data set."""

    train: int
    test: int
    classes: int
    shape: tuple[int, int, int]


@dataclass(frozen=True)
class Cost:
    """What a task takes if nothing of it is done, in forward-backwards of one image."""

    training: float
    """Updates and evaluations."""
    measuring: float
    """Measures."""

    @property
    def total(self) -> float:
        """Both."""
        return self.training + self.measuring


def cost(task: Task) -> Cost:
    """What a task takes from its beginning."""
    spec, sizes = task.setting.spec, sizes_of(task.setting.spec.source)
    clean = sizes.train - spec.validation - spec.confusion if spec.train_size is None else spec.train_size
    trained = clean + spec.confusion
    updates = spec.total_iterations(trained)
    per_epoch = spec.iterations_per_epoch(trained)
    epochs = -(-updates // per_epoch)
    evaluations = -(-epochs // spec.evaluate_every)
    evaluated = evaluations * (sizes.test + spec.validation) + trained
    if spec.stop_at_loss is not None:
        evaluated += epochs * trained  # how well it fits is looked at after every epoch
    penalized = updates - min(_start_epoch(spec) * per_epoch, updates)
    training = spec.batch_size * (updates + penalized * _extra(spec)) + FORWARD * evaluated
    return Cost(training, sum(_measuring(how, sizes.classes) for how in task.ways))


def _start_epoch(spec: RunSpec) -> int:
    return 0 if spec.regularizer is None else spec.regularizer.start_epoch


def _extra(spec: RunSpec) -> float:
    """What an update costs beyond a plain one."""
    regularizer = spec.regularizer
    if regularizer is None:
        return 0.0
    if isinstance(regularizer, FisherPenaltySpec):
        return 1.0 + _EXACT_PENALTY
    if isinstance(regularizer, UnitResidualSpec):
        return 2.0
    if not isinstance(regularizer, RegularizerSpec):
        return 1.0  # SAM and the gradient's norm: the gradient again at another point
    penalty = 2.0 if regularizer.estimator == "finite-difference" else 1.0 + _EXACT_PENALTY
    saved = 1.0 if regularizer.main_gradient == "sub-batches" else 0.0
    return (penalty - saved) / regularizer.every


def _measuring(how: Measuring, classes: int) -> float:
    robust = 0
    if not {"paper", "cheap", "all", "robustness"}.isdisjoint(how.measures):
        robust = robustness_sample_count(how.subset_size, classes, how.robustness_samples)
    jacobian = FORWARD * input_jacobian_passes(classes)  # backward passes are to the input alone
    return how.trials * (how.subset_size * _GRAM + robust * jacobian)


@functools.cache
def sizes_of(data: str) -> Sizes:
    """A data set's sizes; those of the hub are known without a download.

    Raises:
        FlatminimaError: a folder cannot be loaded.
    """
    if data in ("cifar10", "cifar100"):
        return Sizes(50_000, 10_000, 10 if data == "cifar10" else 100, (3, 32, 32))
    train, test = load_data(data)
    channels, height, width = train.images.shape[1:]
    return Sizes(len(train), len(test), train.num_classes, (channels, height, width))


def prices(tasks: Sequence[Task], records: Sequence[Record]) -> dict[tuple[str, int], float]:
    """Seconds for a forward-backward of one image, by network and batch size.

    From the finished runs where there are any, else from a few plain updates on noise, made here and now.

    Args:
        tasks: what is to be priced.
        records: what is finished of it.
    """
    finished = {record.run: record.seconds for record in records}
    found: dict[tuple[str, int], list[float]] = {}
    for task in tasks:
        seconds = finished.get(task.folder.path.name)
        found.setdefault(kind(task), [])
        if seconds is not None:
            found[kind(task)].append(seconds / cost(task).training)
    by_kind = {kind(task): task.setting.spec for task in tasks}
    return {
        kind: sum(known) / len(known) if known else _seconds_per_image(*kind, by_kind[kind].source)
        for kind, known in track(found.items(), "timing updates", total=len(found))
    }


def remaining(task: Task, *, trained: bool = False) -> Cost:
    """What is left of a task: all, or only the measures once the run is finished (or ``trained`` by then)."""
    return replace(cost(task), training=0.0) if trained or task.folder.status == "finished" else cost(task)


def seconds(task: Task, price: dict[tuple[str, int], float], *, trained: bool = False) -> float:
    """What is left of a task, at :func:`prices`."""
    return remaining(task, trained=trained).total * price[kind(task)]


def kind(task: Task) -> tuple[str, int]:
    """What tasks of one price share: network and batch size."""
    return task.setting.spec.model, task.setting.spec.batch_size


@functools.cache
def _seconds_per_image(network: str, batch_size: int, data: str) -> float:
    """One thread's, or the GPU's, as runs are trained."""
    sizes, device, threads = sizes_of(data), resolve_device("auto"), torch.get_num_threads()
    noise = ImageSet(
        torch.randint(256, (batch_size, *sizes.shape), dtype=torch.uint8, device="cpu"),
        torch.randint(sizes.classes, (batch_size,), device="cpu"),
        sizes.classes,
        mean=torch.full((sizes.shape[0],), 0.5),
        std=torch.full((sizes.shape[0],), 0.25),
    )
    model = new_network(network, noise)  # a user's own, too
    images, labels = noise.to(device).tensors()
    images = images.to(memory_format=torch.channels_last)
    model.train()
    model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    torch.set_num_threads(1)
    try:
        times = []
        for _ in range(1 + _TIMED_UPDATES):
            started = time.perf_counter()
            torch.autograd.backward(F.cross_entropy(model(images), labels))
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
        return min(times[1:]) / batch_size
    finally:
        torch.set_num_threads(threads)
