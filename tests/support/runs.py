"""Small runs that between them use everything, and what may happen to a run."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from flatminima.lab.runs.folder import RunFolder
from flatminima.lab.runs.schedules import MultiStep, Plateau
from flatminima.lab.runs.session import Session
from flatminima.lab.runs.spec import (
    FisherPenaltySpec,
    GradientNormSpec,
    RegularizerSpec,
    RunSpec,
    SharpnessAwareSpec,
    UnitResidualSpec,
)
from flatminima.lab.runs.training import train
from support.commands import Command

# 4 updates an epoch; the third epoch is cut short by the limit of 10 updates.
PLAIN = RunSpec(
    model="mlp",
    data="digits",
    train_size=140,
    augmentation="no-aug",
    batch_size=32,
    epochs=4,
    iterations=10,
    lr=0.05,
    schedule=Plateau(patience=0, threshold=0.5),
)
# 4 updates in each of 3 epochs; everything that draws at random or switches on and off.
EVERYTHING = RunSpec(
    model="mlp",
    data="digits",
    train_size=100,
    confusion=30,
    augmentation="1-crop-f",
    batch_size=32,
    epochs=3,
    lr=0.05,
    schedule=MultiStep((0.5,)),
    nesterov=True,
    label_smoothing=0.1,
    regularizer=RegularizerSpec(num_sub_batches=4, beta=5.0, max_grad_norm=1.0, start_epoch=1),
    precision="bf16-mixed",
    seed=5,
    validation=50,
    evaluate_every=2,
)
# 2 updates in each of 3 epochs; running statistics, which the penalty must not touch.
BATCHNORM = RunSpec(
    model="resnet20",
    data="digits",
    train_size=20,
    augmentation="flip-only",
    batch_size=8,
    epochs=3,
    regularizer=RegularizerSpec(num_sub_batches=2, max_grad_norm=1.0),
)
# The regularizer's other ways: 4 updates in each of 3 epochs, the penalty at every third from the fifth on.
SPARSE = replace(
    EVERYTHING,
    regularizer=RegularizerSpec(
        num_sub_batches=3, estimator="hvp", main_gradient="sub-batches", every=3, start_epoch=1, max_grad_norm=1.0
    ),
)
# SAM in place of the regularizer, with running statistics that it must not touch, in half precision.
SHARPNESS = replace(BATCHNORM, regularizer=SharpnessAwareSpec(start_epoch=1, max_grad_norm=1.0), precision="bf16-mixed")
# Other rivals, each with all that draws at random, and in half precision.
RIVALS = {
    "gradient-norm": replace(EVERYTHING, regularizer=GradientNormSpec(start_epoch=1, max_grad_norm=1.0)),
    "fisher-penalty": replace(EVERYTHING, regularizer=FisherPenaltySpec(start_epoch=1, max_grad_norm=1.0)),
    "unit-residuals": replace(
        EVERYTHING, regularizer=UnitResidualSpec(num_sub_batches=4, start_epoch=1, max_grad_norm=1.0)
    ),
}
ALL = {
    "plain": PLAIN,
    "everything": EVERYTHING,
    "batchnorm": BATCHNORM,
    "sparse": SPARSE,
    "sam": SHARPNESS,
    **RIVALS,
}
SPECS = pytest.mark.parametrize("spec", ALL.values(), ids=ALL)


def bits(root: Path, spec: RunSpec) -> dict[str, Any]:
    """All that a run leaves, without the wall-clock times."""
    folder = RunFolder.of(root, spec)
    assert sorted(path.name for path in folder.path.iterdir()) == [
        "checkpoint.safetensors",
        "history.jsonl",
        "lock",
        "result.json",
        "spec.json",
        "tensorboard",
    ]
    result = json.loads((folder.path / "result.json").read_text())
    lines = (folder.path / "history.jsonl").read_text().splitlines()
    return {
        "spec": (folder.path / "spec.json").read_bytes(),
        "checkpoint": (folder.path / "checkpoint.safetensors").read_bytes(),
        "result": {name: value for name, value in result.items() if name != "seconds"},
        "history": [{n: v for n, v in json.loads(line).items() if n != "seconds"} for line in lines],
        "events": events(folder),
    }


def events(folder: RunFolder) -> dict[str, list[tuple[int, float]]]:
    """Epochs and values by name, as they are in the log: nothing is dropped that a later event would replace."""
    log = EventAccumulator(str(folder.path / "tensorboard"), size_guidance={"scalars": 0}, purge_orphaned_data=False)
    log.Reload()
    return {name: [(event.step, event.value) for event in log.Scalars(name)] for name in log.Tags()["scalars"]}


class Crash(BaseException):
    """The process is gone: nothing may catch this."""


@contextlib.contextmanager
def reading_late() -> Iterator[None]:
    """Runs read what updates observed when they would on a GPU."""
    build = Session.__init__

    def late(run: Session, *args: Any, **options: Any) -> None:
        build(run, *args, **options)
        run.reads_at_once = False

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Session, "__init__", late)
        yield


def start(spec: RunSpec, root: Path, checkpoint_seconds: float = 0.0) -> Command:
    """Train in a process of its own."""
    return Command(root.parent, _train, spec, root, checkpoint_seconds)


def _train(spec: RunSpec, root: Path, checkpoint_seconds: float) -> None:
    torch.set_num_threads(1)
    try:
        train(spec, root, checkpoint_seconds=checkpoint_seconds, progress=False)
    except KeyboardInterrupt as interrupt:
        sys.exit(f"{type(interrupt).__name__}: {interrupt}")


def wait_for_update(process: Command, folder: RunFolder, update: int) -> None:
    """Wait until the run's resume point is at ``update`` or later."""
    while process.poll() is None:
        point = folder.read_resume_point()
        if point is not None and point.iteration >= update:
            return
        time.sleep(0.02)  # what it asks costs as much as an update
    raise AssertionError(f"the process ended by itself: {process.communicate()[1]}")


def interrupting(monkeypatch: pytest.MonkeyPatch, *, at: int, times: int) -> None:
    """Press Ctrl-C in the middle of an update."""
    backward = Session.backward

    def pressing(run: Session, images: torch.Tensor, labels: torch.Tensor) -> Any:
        for _ in range(times if run.iteration == at else 0):
            signal.raise_signal(signal.SIGINT)
        return backward(run, images, labels)

    monkeypatch.setattr(Session, "backward", pressing)


def stopped_in_the_middle(spec: RunSpec, root: Path, **options: Any) -> RunFolder:
    """A run killed after a few updates, in its second epoch or later."""
    with pytest.MonkeyPatch.context() as patch:
        update = Session.update

        def dying(run: Session) -> None:
            if run.iteration == 5:
                raise Crash
            update(run)

        patch.setattr(Session, "update", dying)
        with pytest.raises(Crash):
            train(spec, root, checkpoint_seconds=0.0, **options)
    return RunFolder.of(root, spec)
