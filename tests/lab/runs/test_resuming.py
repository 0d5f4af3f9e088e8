from __future__ import annotations

import os
import random
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from flatminima.lab.errors import TrainingStopped
from flatminima.lab.runs.folder import RunFolder
from flatminima.lab.runs.schedules import OneCycle
from flatminima.lab.runs.session import Session
from flatminima.lab.runs.sets import load_run, load_sets
from flatminima.lab.runs.spec import RunSpec, SharpnessAwareSpec, derived_seed
from flatminima.lab.runs.training import launch, train
from support.runs import EVERYTHING, PLAIN, SHARPNESS, SPECS, Crash, bits, reading_late, start, wait_for_update

pytest_plugins = ("support.run_fixtures",)
pytestmark = pytest.mark.usefixtures("one_thread")


@SPECS
def test_the_same_spec_gives_the_same_bits(spec: RunSpec, tmp_path: Path, uninterrupted: Path) -> None:
    torch.manual_seed(123)
    state = torch.get_rng_state()
    train(spec, tmp_path)
    assert torch.equal(torch.get_rng_state(), state)  # and the caller's random numbers are not touched
    assert bits(tmp_path, spec) == bits(uninterrupted, spec)


@SPECS
def test_a_run_stopped_before_every_epoch_ends_in_the_same_bits(
    spec: RunSpec, tmp_path: Path, uninterrupted: Path
) -> None:
    epochs = RunFolder.of(uninterrupted, spec).read_history()[-1].epoch
    for number in range(epochs):
        with pytest.raises(TrainingStopped, match=f"stopped after {number} of {epochs} epochs"):
            train(spec, tmp_path, stop=lambda epoch, of, error, number=number: epoch == number)
        assert RunFolder.of(tmp_path, spec).status == "unfinished"
    train(spec, tmp_path, stop=lambda epoch, of, error: False)
    assert bits(tmp_path, spec) == bits(uninterrupted, spec)


def test_a_cycle_of_the_learning_rate_goes_on_where_it_was(tmp_path: Path) -> None:
    spec, whole, parts = replace(PLAIN, schedule=OneCycle()), tmp_path / "whole", tmp_path / "parts"
    train(spec, whole)
    with pytest.raises(TrainingStopped):
        train(spec, parts, stop=lambda epoch, of, error: epoch == 1)
    train(spec, parts)
    assert bits(parts, spec) == bits(whole, spec)
    assert len({record.lr for record in RunFolder.of(whole, spec).read_history()}) == 3


def test_stop_is_given_the_validation_error_and_changes_nothing_by_asking(tmp_path: Path, uninterrupted: Path) -> None:
    given: list[tuple[int, int, float | None]] = []
    train(EVERYTHING, tmp_path, stop=lambda epoch, of, error: given.append((epoch, of, error())) is not None)
    assert bits(tmp_path, EVERYTHING) == bits(uninterrupted, EVERYTHING)
    assert [(epoch, of) for epoch, of, _ in given] == [(0, 3), (1, 3), (2, 3)]
    shorter = replace(EVERYTHING, evaluate_every=1)
    train(shorter, tmp_path)
    history = RunFolder.of(tmp_path, shorter).read_history()
    assert [error for _, _, error in given[1:]] == [record.validation_error for record in history[:2]]


OWN_DRAWS = """
import random
import numpy as np
import torch

class Drawing(torch.nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.layer = torch.nn.Linear(64, num_classes)
        self.layer.weight.data.mul_(random.random()).add_(float(np.random.normal()))
        self.order = random.sample(range(64), 64)

    def forward(self, x):
        x = x.flatten(1)[:, self.order]
        return self.layer(x * (random.random() + np.random.normal()) if self.training else x)
"""


def global_states() -> tuple[Any, ...]:
    """Where Python's and numpy's generators stand."""
    return random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002 (that one is meant)


def test_a_network_of_ones_own_may_draw_from_any_generator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From Python's and numpy's as from torch's: a run is the same again, and where it was interrupted."""
    (tmp_path / "drawing_networks.py").write_text(OWN_DRAWS)
    monkeypatch.syspath_prepend(tmp_path)
    regularized = replace(EVERYTHING, model="drawing_networks:Drawing", augmentation="no-aug", precision="32-true")
    for name, spec in {"plain": replace(PLAIN, model="drawing_networks:Drawing"), "regularized": regularized}.items():
        found = []
        for number, way in enumerate(("whole", "again", "parts")):
            root = tmp_path / name / way
            if way == "parts":
                with pytest.raises(TrainingStopped):
                    train(spec, root, stop=lambda epoch, of, error: epoch == 1)
            random.seed(number)
            np.random.seed(number)  # noqa: NPY002 (that one is meant)
            before = global_states()
            train(spec, root)
            _, model, clean, _ = load_run(root / spec.name)
            assert global_states() == before  # the caller's random numbers are not touched
            found.append((bits(root, spec), model(clean.fetch(range(8))[0]).tolist()))
        assert found[1:] == found[:1] * 2


def test_another_seed_gives_another_run(tmp_path: Path, uninterrupted: Path) -> None:
    other = replace(PLAIN, seed=1)
    train(other, tmp_path)
    assert bits(tmp_path, other)["checkpoint"] != bits(uninterrupted, PLAIN)["checkpoint"]


def test_seeds_differ_for_every_purpose_and_index() -> None:
    drawn = {
        derived_seed(seed, purpose, index)
        for seed in range(5)
        for purpose in ("weights", "permutation", "augmentation", "update")
        for index in range(50)
    }
    assert len(drawn) == 5 * 4 * 50
    assert all(0 <= seed < 2**63 for seed in drawn)


class Readings(TorchDispatchMode):
    """Counts the numbers that leave the device one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += operation is torch.ops.aten._local_scalar_dense.default
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "spec",
    [PLAIN, replace(EVERYTHING, regularizer=None), replace(SHARPNESS, regularizer=SharpnessAwareSpec())],
    ids=["plain", "augmented", "sam"],
)
def test_no_update_waits_for_a_number(spec: RunSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    with reading_late():
        run = Session(spec, load_sets(spec), launch(spec, "cpu"))
    for name in ("tolist", "cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, lambda tensor: pytest.fail("a tensor left the device"))
    with Readings() as readings:
        for _ in range(2):
            run.update()
    assert readings.count == 0
    with Readings() as readings:
        float(run.unread[0].loss)
    assert readings.count == 1
    monkeypatch.undo()
    run.read()
    assert run.sums.loss > 0


@SPECS
@pytest.mark.parametrize("checkpoint_seconds", [0.0, 1e9])
def test_reading_late_changes_no_bit(
    spec: RunSpec, checkpoint_seconds: float, tmp_path: Path, uninterrupted: Path
) -> None:
    with reading_late():
        train(spec, tmp_path, checkpoint_seconds=checkpoint_seconds)
    assert bits(tmp_path, spec) == bits(uninterrupted, spec)


@pytest.mark.xdist_group("processes")
def test_a_run_killed_again_and_again_ends_in_the_same_bits(tmp_path: Path) -> None:
    """SIGKILL at random moments; as a resume point is written after every update, many fall into its writing."""
    spec = replace(EVERYTHING, epochs=30)
    train(spec, tmp_path / "uninterrupted")
    killed = RunFolder.of(tmp_path / "killed", spec)
    moments = random.Random(0)
    reached = 0
    for _ in range(3):
        process = start(spec, tmp_path / "killed")
        wait_for_update(process, killed, reached + moments.randint(1, 15))
        time.sleep(moments.uniform(0, 0.05))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        point = killed.read_resume_point()
        assert point is not None
        assert point.iteration > reached
        reached = point.iteration
    assert killed.status == "unfinished"
    train(spec, tmp_path / "killed")
    assert bits(tmp_path / "killed", spec) == bits(tmp_path / "uninterrupted", spec)


@SPECS
@pytest.mark.parametrize("checkpoint_seconds", [0.0, 1e9])
def test_a_crash_at_any_file_operation_is_survived(
    spec: RunSpec,
    checkpoint_seconds: float,
    tmp_path: Path,
    uninterrupted: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Die at the k-th sync or rename or removal, then at the next, ... until one sitting is enough."""
    operations = 0
    limit = 0

    def dying(operation: Any) -> Any:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            nonlocal operations
            operations += 1
            if operations == limit:
                raise Crash
            return operation(*args, **kwargs)

        return wrapper

    monkeypatch.setattr(os, "fsync", dying(os.fsync))
    monkeypatch.setattr(Path, "replace", dying(Path.replace))
    monkeypatch.setattr(Path, "unlink", dying(Path.unlink))
    crashes = 0
    while True:
        operations, limit = 0, 3 + 5 * crashes  # 3, 8, 13, ...: each kind of operation, ever later
        try:
            train(spec, tmp_path, checkpoint_seconds=checkpoint_seconds)
            break
        except Crash:
            crashes += 1
    assert crashes > 0
    monkeypatch.undo()
    assert bits(tmp_path, spec) == bits(uninterrupted, spec)


@SPECS
def test_a_crash_in_any_update_is_survived(
    spec: RunSpec, tmp_path: Path, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Die half-way through an update, when gradients are set and weights are not."""
    updates, limit = 0, 0
    backward = Session.backward

    def dying(run: Session, images: torch.Tensor, labels: torch.Tensor) -> Any:
        nonlocal updates
        computed = backward(run, images, labels)
        updates += 1
        if updates == limit:
            raise Crash
        return computed

    monkeypatch.setattr(Session, "backward", dying)
    crashes = 0
    for die_at in (1, 2, 1, 2, 2):
        updates, limit = 0, die_at
        try:
            train(spec, tmp_path, checkpoint_seconds=0.0)
        except Crash:
            crashes += 1
    assert crashes == 5
    monkeypatch.undo()
    train(spec, tmp_path)
    assert bits(tmp_path, spec) == bits(uninterrupted, spec)


def test_training_works_in_a_thread(tmp_path: Path, uninterrupted: Path) -> None:
    thread = threading.Thread(target=train, args=(PLAIN, tmp_path))
    thread.start()
    thread.join()
    assert bits(tmp_path, PLAIN) == bits(uninterrupted, PLAIN)
