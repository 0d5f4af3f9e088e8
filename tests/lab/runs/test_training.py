from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils._python_dispatch import TorchDispatchMode

from flatminima.errors import FlatminimaError, NonFiniteError
from flatminima.lab.data.augmentation import augment
from flatminima.lab.data.sources import load_data
from flatminima.lab.errors import DamagedRunWarning, ResumedElsewhereWarning, TrainingInterrupted, TrainingStopped
from flatminima.lab.networks.checkpoints import load_weights
from flatminima.lab.networks.paper import build_model
from flatminima.lab.runs import sets, training
from flatminima.lab.runs.folder import RunFolder
from flatminima.lab.runs.records import RunResult
from flatminima.lab.runs.session import Session, derived_seed
from flatminima.lab.runs.sets import load_run, load_sets
from flatminima.lab.runs.spec import RECIPES, MultiStep, Plateau, RegularizerSpec, RunSpec, SharpnessAwareSpec
from flatminima.lab.runs.training import launch, train
from flatminima.measures.evaluation import evaluate
from flatminima.network.precision import float32_products, float32_switches
from flatminima.regularizer.regularizer import FisherTraceRegularizer

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
ALL = {"plain": PLAIN, "everything": EVERYTHING, "batchnorm": BATCHNORM, "sparse": SPARSE, "sam": SHARPNESS}
SPECS = pytest.mark.parametrize("spec", ALL.values(), ids=ALL)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The same number of threads here and in the processes that get killed: sums depend on it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with all runs, each trained in one go."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("uninterrupted")
    for spec in ALL.values():
        train(spec, root)
    torch.set_num_threads(threads)
    return root


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


# ---------------------------------------------------------------------------------------------------------------------
# What training computes
# ---------------------------------------------------------------------------------------------------------------------


def test_the_digits_recipe_learns(tmp_path: Path) -> None:
    result = train(replace(RECIPES["digits"], epochs=5), tmp_path)
    assert result.train_accuracy > 0.99
    assert result.test_error < 0.05
    history = RunFolder(result.folder).read_history()
    assert history[-1].train_loss < 0.2 * history[0].train_loss
    assert history[-1].test_error == result.test_error


@pytest.mark.parametrize(("nesterov", "smoothing", "augmentation"), [(False, 0.0, "no-aug"), (True, 0.2, "1-crop-f")])
def test_updates_are_those_of_a_plain_loop(tmp_path: Path, nesterov: bool, smoothing: float, augmentation: str) -> None:
    """Against a loop in plain PyTorch; one mini-batch is the whole set, so its order does not matter without crops."""
    spec = replace(
        PLAIN,
        train_size=64,
        batch_size=64,
        iterations=3,
        nesterov=nesterov,
        label_smoothing=smoothing,
        augmentation=augmentation,
        weight_decay=0.01,
        schedule=MultiStep((0.5,)),
    )
    train(spec, tmp_path)
    trained = RunFolder.of(tmp_path, spec).read_checkpoint()

    torch.manual_seed(derived_seed(spec.seed, "weights", 0))
    model = build_model("mlp", in_channels=1)
    sets = load_sets(spec)
    optimizer = torch.optim.SGD(model.parameters(), lr=spec.lr, momentum=0.9, nesterov=nesterov, weight_decay=0.01)
    for update, lr in enumerate([0.05, 0.05, 0.005]):
        optimizer.param_groups[0]["lr"] = lr
        order = torch.randperm(
            64, generator=torch.Generator().manual_seed(derived_seed(spec.seed, "permutation", update))
        )
        generator = torch.Generator().manual_seed(derived_seed(spec.seed, "augmentation", update))
        images = augment(sets.train.images[order], augmentation, generator)
        loss = F.cross_entropy(model(sets.train.normalize(images)), sets.train.labels[order], label_smoothing=smoothing)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(trained[name], tensor, rtol=1e-5, atol=1e-7)


def test_every_epoch_uses_other_batches_and_crops() -> None:
    spec = replace(EVERYTHING, regularizer=None)
    run = Session(spec, load_sets(spec), launch(spec, "cpu"))
    batches = []
    for iteration in range(run.total_iterations):
        run.iteration = iteration
        run.history = [None] * (iteration // run.iterations_per_epoch)  # type: ignore[list-item]
        batches.append(run._next_batch())
    first_epoch = torch.cat([labels for _, labels in batches[:4]])
    second_epoch = torch.cat([labels for _, labels in batches[4:8]])
    assert len(first_epoch) == len(second_epoch) == 128
    assert not torch.equal(first_epoch, second_epoch)
    assert len({images.numpy().tobytes() for images, _ in batches}) == len(batches)


def test_an_epoch_takes_no_image_twice() -> None:
    spec = replace(PLAIN, batch_size=35)  # divides the 140 images: an epoch takes every one
    run = Session(spec, load_sets(spec), launch(spec, "cpu"))
    taken = []
    for iteration in range(4):
        run.iteration = iteration
        taken.append(run._next_batch()[0])
    everything = run.train_set.tensors()[0]
    assert sorted(image.numpy().tobytes() for image in torch.cat(taken)) == sorted(
        image.numpy().tobytes() for image in everything
    )


def test_history_and_result_say_what_happened(uninterrupted: Path) -> None:
    folder = RunFolder.of(uninterrupted, PLAIN)
    history, result = folder.read_history(), folder.read_result()
    assert result is not None
    assert [(record.epoch, record.iteration) for record in history] == [(1, 4), (2, 8), (3, 10)]
    assert (result.epochs, result.iterations) == (3, 10)
    assert result.seconds == sum(record.seconds for record in history)
    assert all(record.seconds > 0 for record in history)
    assert all(record.fisher_trace is None for record in history)
    losses = [record.train_loss for record in history]
    assert [record.lr for record in history] == [
        PLAIN.lr * PLAIN.schedule.multiplier(0, 1, losses[:epoch]) for epoch in range(3)
    ]


@SPECS
def test_the_event_log_shows_the_history(spec: RunSpec, uninterrupted: Path) -> None:
    folder = RunFolder.of(uninterrupted, spec)
    lines = [json.loads(line) for line in (folder.path / "history.jsonl").read_text().splitlines()]
    expected = {
        name: [(line["epoch"], pytest.approx(line[name], rel=1e-6)) for line in lines if line[name] is not None]
        for name in ("lr", "train_loss", "train_accuracy", "fisher_trace", "test_error", "validation_error")
    }
    assert events(folder) == {name: points for name, points in expected.items() if points}


def test_evaluation_is_as_often_as_asked_and_after_the_last_epoch(uninterrupted: Path) -> None:
    folder = RunFolder.of(uninterrupted, EVERYTHING)
    history, result = folder.read_history(), folder.read_result()
    assert result is not None
    assert [record.test_error is not None for record in history] == [False, True, True]
    assert [record.validation_error is not None for record in history] == [False, True, True]
    assert (result.test_error, result.validation_error) == (history[-1].test_error, history[-1].validation_error)
    model = build_model("mlp", in_channels=1)
    load_weights(model, folder.path / "checkpoint.safetensors")
    assert result.validation_error == evaluate(model, load_sets(EVERYTHING).validation).error
    assert all(record.validation_error is None for record in RunFolder.of(uninterrupted, PLAIN).read_history())


def test_the_final_loss_is_that_of_the_unaugmented_training_set(uninterrupted: Path) -> None:
    result = RunFolder.of(uninterrupted, EVERYTHING).read_result()
    assert result is not None
    model = build_model("mlp", in_channels=1)
    load_weights(model, result.folder / "checkpoint.safetensors")
    images, labels = load_sets(EVERYTHING).train.tensors()
    assert len(images) == 130
    logits = model.eval()(images).detach().double()
    assert result.train_loss == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-6)
    assert result.train_accuracy == float((logits.argmax(1) == labels).sum()) / 130


def test_the_penalty_starts_at_its_epoch_and_its_trace_is_recorded(uninterrupted: Path) -> None:
    traces = [record.fisher_trace for record in RunFolder.of(uninterrupted, EVERYTHING).read_history()]
    assert traces[0] is None
    assert all(trace is not None and trace > 0 for trace in traces[1:])


def test_a_penalty_of_weight_zero_changes_nothing(tmp_path: Path) -> None:
    plain = replace(EVERYTHING, regularizer=None, precision="32-true")
    penalized = replace(plain, regularizer=RegularizerSpec(beta=0.0, num_sub_batches=4))
    train(plain, tmp_path)
    train(penalized, tmp_path)
    plain_history, penalized_history = (RunFolder.of(tmp_path, spec).read_history() for spec in (plain, penalized))
    for a, b in zip(plain_history, penalized_history, strict=True):
        assert replace(a, fisher_trace=b.fisher_trace, seconds=b.seconds) == b


def test_the_trace_is_the_mean_over_the_updates_with_a_penalty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    traces: list[float | None] = []
    backward = FisherTraceRegularizer.backward

    def observed(regularizer: FisherTraceRegularizer, *args: Any) -> torch.Tensor:
        penalized = regularizer.step % 3 == 0
        loss = backward(regularizer, *args)
        assert regularizer.last_step is not None
        traces.append(float(regularizer.last_step.trace) if penalized else None)
        return loss

    monkeypatch.setattr(FisherTraceRegularizer, "backward", observed)
    train(SPARSE, tmp_path)
    assert [trace is not None for trace in traces] == [True, False, False, True, False, False, True, False]
    first, second, third = (trace for trace in traces if trace is not None)
    records = RunFolder.of(tmp_path, SPARSE).read_history()
    assert [record.fisher_trace for record in records] == [None, pytest.approx((first + second) / 2), third]


def test_sharpness_aware_runs_record_the_loss_and_the_accuracy_at_the_weights(tmp_path: Path) -> None:
    """With a tiny ρ they are those of plain training, and no trace is estimated; with a large one they are not."""
    specs = [replace(PLAIN, regularizer=spec) for spec in (None, SharpnessAwareSpec(1e-6), SharpnessAwareSpec(0.5))]
    for spec in specs:
        train(spec, tmp_path)
    plain, near, far = (RunFolder.of(tmp_path, spec).read_history() for spec in specs)
    assert [record.train_accuracy for record in near] == [record.train_accuracy for record in plain]
    assert [record.train_loss for record in near] == pytest.approx([record.train_loss for record in plain], rel=1e-3)
    assert [record.train_loss for record in far] != pytest.approx([record.train_loss for record in plain], rel=1e-2)
    assert {record.fisher_trace for record in near} == {None}


@pytest.mark.parametrize("estimator", ["finite-difference", "hvp"])
def test_accuracy_is_counted_once_however_the_gradient_is_formed(tmp_path: Path, estimator: Any) -> None:
    """Without BatchNorm the sub-batches' outputs are the whole batch's."""
    regularizer = RegularizerSpec(num_sub_batches=3, estimator=estimator, beta=0.0)
    whole = replace(PLAIN, regularizer=regularizer)
    split = replace(PLAIN, regularizer=replace(regularizer, main_gradient="sub-batches"))
    train(whole, tmp_path)
    train(split, tmp_path)
    accuracies = [[r.train_accuracy for r in RunFolder.of(tmp_path, s).read_history()] for s in (whole, split)]
    assert accuracies[0] == accuracies[1]
    assert 0 < accuracies[0][0] < 1


@pytest.mark.parametrize(
    "changes",
    [{}, {"estimator": "hvp"}, {"main_gradient": "sub-batches"}, {"every": 3}],
    ids=["defaults", "hvp", "sub-batches", "every"],
)
def test_penalized_updates_are_those_of_algorithm_1(tmp_path: Path, changes: dict[str, Any]) -> None:
    """One update on the whole set, against the regularizer called by hand with the spec's own settings."""
    settings = {"alpha": 1e-3, "beta": 20.0, "num_sub_batches": 4, "max_grad_norm": 0.5, **changes}
    spec = replace(
        PLAIN, train_size=64, batch_size=64, iterations=1, weight_decay=0.0, regularizer=RegularizerSpec(**settings)
    )
    train(spec, tmp_path)
    (record,) = RunFolder.of(tmp_path, spec).read_history()

    torch.manual_seed(derived_seed(spec.seed, "weights", 0))
    model = build_model("mlp", in_channels=1)
    generator = torch.Generator().manual_seed(derived_seed(spec.seed, "permutation", 0))
    images, labels = load_sets(spec).train.subset(torch.randperm(64, generator=generator)).tensors()
    regularizer = FisherTraceRegularizer(model, **settings)
    torch.manual_seed(derived_seed(spec.seed, "update", 0))
    loss = regularizer.backward(F.cross_entropy, images, labels)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        expected = parameter.detach() - spec.lr * parameter.grad
        torch.testing.assert_close(RunFolder.of(tmp_path, spec).read_checkpoint()[name], expected)
    assert regularizer.last_step is not None
    assert float(regularizer.last_step.grad_norm) > settings["max_grad_norm"]  # so the clipping was at work
    assert (record.train_loss, record.fisher_trace) == (float(loss), float(regularizer.last_step.trace))


@pytest.mark.parametrize("regularizer", [None, RegularizerSpec(num_sub_batches=4, beta=1.0), SharpnessAwareSpec(0.01)])
def test_bf16_trains_and_is_evaluated_in_float32(tmp_path: Path, regularizer: RegularizerSpec | None) -> None:
    full = replace(PLAIN, iterations=8, regularizer=regularizer)
    mixed = replace(full, precision="bf16-mixed")
    in_full, in_mixed = train(full, tmp_path), train(mixed, tmp_path)
    assert in_full.train_loss != in_mixed.train_loss
    assert in_full.train_loss == pytest.approx(in_mixed.train_loss, rel=0.1)
    weights = RunFolder.of(tmp_path, mixed).read_checkpoint()
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    model = build_model("mlp", in_channels=1)
    model.load_state_dict(weights)
    assert evaluate(model, load_sets(mixed).train).loss == in_mixed.train_loss


def test_evaluate_leaves_the_mode_alone() -> None:
    model, (_, test) = build_model("mlp", in_channels=1), load_data("digits")
    evaluate(model.train(), test)
    assert model.training
    evaluation = evaluate(model.eval(), test)
    assert not model.training
    assert evaluation.correct + round(evaluation.error * 500) == evaluation.total == 500
    assert evaluation.accuracy + evaluation.error == pytest.approx(1)


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


def test_stop_is_given_the_validation_error_and_changes_nothing_by_asking(tmp_path: Path, uninterrupted: Path) -> None:
    given: list[tuple[int, int, float | None]] = []
    train(EVERYTHING, tmp_path, stop=lambda epoch, of, error: given.append((epoch, of, error())) is not None)
    assert bits(tmp_path, EVERYTHING) == bits(uninterrupted, EVERYTHING)
    assert [(epoch, of) for epoch, of, _ in given] == [(0, 3), (1, 3), (2, 3)]
    shorter = replace(EVERYTHING, evaluate_every=1)
    train(shorter, tmp_path)
    history = RunFolder.of(tmp_path, shorter).read_history()
    assert [error for _, _, error in given[1:]] == [record.validation_error for record in history[:2]]


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


# ---------------------------------------------------------------------------------------------------------------------
# As on a GPU: updates do not wait for their numbers
# ---------------------------------------------------------------------------------------------------------------------


class Readings(TorchDispatchMode):
    """Counts the numbers that leave the device one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += operation is torch.ops.aten._local_scalar_dense.default
        return operation(*args, **(kwargs or {}))


@contextlib.contextmanager
def reading_late() -> Iterator[None]:
    """Runs read what updates observed when they would on a GPU."""
    build = Session.__init__

    def late(run: Session, *args: Any, **options: Any) -> None:
        build(run, *args, **options)
        run._reads_at_once = False

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Session, "__init__", late)
        yield


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
        float(run._unread[0].loss)
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


# ---------------------------------------------------------------------------------------------------------------------
# Crashes: the same bits, whenever the process dies
# ---------------------------------------------------------------------------------------------------------------------

TRAIN = """
import signal, sys
import torch
from flatminima.lab.runs.spec import RunSpec
from flatminima.lab.runs.training import train

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever the parent made of it
try:
    train(RunSpec.from_json(sys.argv[1]), sys.argv[2], checkpoint_seconds=float(sys.argv[3]), progress=False)
except KeyboardInterrupt as interrupt:
    sys.exit(f"{type(interrupt).__name__}: {interrupt}")
"""


def start(spec: RunSpec, root: Path, checkpoint_seconds: float = 0.0) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", TRAIN, spec.to_json(), str(root), str(checkpoint_seconds)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def wait_for_update(process: subprocess.Popen[str], folder: RunFolder, update: int) -> None:
    """Wait until the run's resume point is at ``update`` or later."""
    while process.poll() is None:
        point = folder.read_resume_point()
        if point is not None and point.iteration >= update:
            return
        time.sleep(0.01)
    raise AssertionError(f"the process ended by itself: {process.communicate()[1]}")


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
    backward = Session._backward

    def dying(run: Session, images: torch.Tensor, labels: torch.Tensor) -> Any:
        nonlocal updates
        computed = backward(run, images, labels)
        updates += 1
        if updates == limit:
            raise Crash
        return computed

    monkeypatch.setattr(Session, "_backward", dying)
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


# ---------------------------------------------------------------------------------------------------------------------
# Compiled, and in TF32
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[torch.fx.GraphModule]:
    """What dynamo takes from networks is run as it is, without the minutes that Inductor needs, and listed."""
    found: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        found.append(graph)
        return graph.forward

    compile_ = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda model, *, dynamic, mode: compile_(model, backend=backend, dynamic=dynamic)
    )
    return found


@pytest.mark.parametrize("name", ["plain", "everything", "sparse", "sam"])
def test_a_compiled_run_is_the_same_up_to_rounding_and_resumes(
    name: str, tmp_path: Path, uninterrupted: Path, graphs: list[torch.fx.GraphModule]
) -> None:
    spec = replace(SHARPNESS, model="mlp") if name == "sam" else ALL[name]
    result = train(spec, tmp_path / "compiled", compile=True)
    assert len(graphs) > 0
    assert result.environment["compiled"] is True
    if name != "sam":
        expected = RunFolder.of(uninterrupted, spec).read_checkpoint()
        found = RunFolder.of(tmp_path / "compiled", spec).read_checkpoint()
        assert found.keys() == expected.keys()  # the network's own names
        for key, tensor in expected.items():
            torch.testing.assert_close(found[key], tensor, rtol=1e-2, atol=1e-3)
    with pytest.MonkeyPatch.context() as patch:
        interrupting(patch, at=5, times=1)
        handler = signal.signal(signal.SIGINT, signal.default_int_handler)
        with pytest.raises(TrainingInterrupted):
            train(spec, tmp_path / "stopped", compile=True)
        signal.signal(signal.SIGINT, handler)
    train(spec, tmp_path / "stopped", compile=True)
    assert bits(tmp_path / "stopped", spec) == bits(tmp_path / "compiled", spec)


def test_a_run_that_goes_on_compiled_says_so(tmp_path: Path, graphs: list[torch.fx.GraphModule]) -> None:
    stopped_in_the_middle(PLAIN, tmp_path)
    with pytest.warns(ResumedElsewhereWarning, match="goes on with .* compiled True"):
        train(PLAIN, tmp_path, compile=True)


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="there is no C++ compiler")
@pytest.mark.parametrize("spec", [PLAIN, BATCHNORM, EVERYTHING], ids=["plain", "batchnorm", "everything"])
def test_a_run_compiled_by_inductor(spec: RunSpec, tmp_path: Path) -> None:
    spec = replace(spec, precision="32-true")
    eager = train(spec, tmp_path / "eager")
    compiled = train(spec, tmp_path / "compiled", compile=True)
    assert compiled.train_loss == pytest.approx(eager.train_loss, rel=1e-2)
    stopped_in_the_middle(spec, tmp_path / "stopped", compile=True)
    train(spec, tmp_path / "stopped", compile=True)
    assert bits(tmp_path / "stopped", spec) == bits(tmp_path / "compiled", spec)


@pytest.mark.parametrize("precision", ["32-true", "tf32"])
def test_tf32_is_used_if_and_only_if_it_is_asked_for(
    precision: Any, tmp_path: Path, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the caller has chosen, which is left as it was; on the CPU there is none, so the bits are the same."""

    def switches() -> list[Any]:
        return [getattr(holder, name) for holder, name, _, _ in float32_switches()]

    seen: list[list[Any]] = []
    backward = Session._backward

    def observed(run: Session, *batch: torch.Tensor) -> Any:
        seen.append(switches())
        return backward(run, *batch)

    monkeypatch.setattr(Session, "_backward", observed)
    spec = replace(PLAIN, precision=precision)
    with float32_products(tf32=precision == "32-true"):
        before = switches()
        train(spec, tmp_path)
        assert switches() == before
    exact, fast = ([switch[i] for switch in float32_switches()] for i in (2, 3))
    assert seen == [fast if precision == "tf32" else exact] * 10
    checkpoints = [
        RunFolder.of(root, s).path / "checkpoint.safetensors" for root, s in ((tmp_path, spec), (uninterrupted, PLAIN))
    ]
    assert checkpoints[0].read_bytes() == checkpoints[1].read_bytes()


# ---------------------------------------------------------------------------------------------------------------------
# Ctrl-C and the lock
# ---------------------------------------------------------------------------------------------------------------------


def test_ctrl_c_in_a_process_saves_and_the_same_command_goes_on(tmp_path: Path) -> None:
    spec = replace(PLAIN, epochs=250, iterations=1000)
    train(spec, tmp_path / "uninterrupted")
    folder = RunFolder.of(tmp_path / "stopped", spec)
    process = start(spec, tmp_path / "stopped")
    wait_for_update(process, folder, 3)
    with pytest.raises(FlatminimaError, match="another process is training") as caught:
        train(spec, tmp_path / "stopped")
    assert "\n" not in str(caught.value)
    process.send_signal(signal.SIGINT)
    message = process.communicate()[1].strip()
    assert process.returncode == 1
    assert message.startswith("TrainingInterrupted: stopped after ")
    assert "of 1000 updates; the same command goes on from there" in message
    assert "\n" not in message
    train(spec, tmp_path / "stopped")
    assert bits(tmp_path / "stopped", spec) == bits(tmp_path / "uninterrupted", spec)


def interrupting(monkeypatch: pytest.MonkeyPatch, *, at: int, times: int) -> None:
    """Press Ctrl-C in the middle of an update."""
    backward = Session._backward

    def pressing(run: Session, images: torch.Tensor, labels: torch.Tensor) -> Any:
        for _ in range(times if run.iteration == at else 0):
            signal.raise_signal(signal.SIGINT)
        return backward(run, images, labels)

    monkeypatch.setattr(Session, "_backward", pressing)


@pytest.fixture
def default_handler() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, before)


@SPECS
@pytest.mark.usefixtures("default_handler")
def test_ctrl_c_finishes_the_update_first(
    spec: RunSpec, tmp_path: Path, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupting(monkeypatch, at=3, times=1)
    with pytest.raises(TrainingInterrupted, match=r"stopped after 4 of \d+ updates"):
        train(spec, tmp_path, checkpoint_seconds=1e9)
    point = RunFolder.of(tmp_path, spec).read_resume_point()
    assert point is not None
    assert point.iteration == 4
    train(spec, tmp_path)
    assert bits(tmp_path, spec) == bits(uninterrupted, spec)


@pytest.mark.usefixtures("default_handler")
def test_a_second_ctrl_c_stops_at_once(tmp_path: Path, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupting(monkeypatch, at=5, times=2)
    with pytest.raises(KeyboardInterrupt) as caught:
        train(PLAIN, tmp_path, checkpoint_seconds=0.0)
    assert caught.type is KeyboardInterrupt
    monkeypatch.undo()
    train(PLAIN, tmp_path)
    assert bits(tmp_path, PLAIN) == bits(uninterrupted, PLAIN)


def test_a_callers_own_handler_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    presses: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: presses.append(number))
    try:
        interrupting(monkeypatch, at=5, times=1)
        train(PLAIN, tmp_path)
    finally:
        signal.signal(signal.SIGINT, before)
    assert presses == [signal.SIGINT]


def test_training_works_in_a_thread(tmp_path: Path, uninterrupted: Path) -> None:
    thread = threading.Thread(target=train, args=(PLAIN, tmp_path))
    thread.start()
    thread.join()
    assert bits(tmp_path, PLAIN) == bits(uninterrupted, PLAIN)


# ---------------------------------------------------------------------------------------------------------------------
# Folders that are finished, damaged or somebody else's
# ---------------------------------------------------------------------------------------------------------------------


def test_a_finished_run_is_returned_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = train(PLAIN, tmp_path)
    monkeypatch.setattr(training, "load_sets", lambda *args, **kwargs: pytest.fail("it was trained again"))
    assert train(PLAIN, tmp_path) == first
    assert isinstance(first, RunResult)


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


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def scribble(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) * 3 // 4] ^= 0x10
    path.write_bytes(content)


DAMAGE = pytest.mark.parametrize("damage", [truncate, scribble, Path.unlink], ids=["truncated", "altered", "missing"])


@DAMAGE
@pytest.mark.parametrize("name", ["spec.json", "state.safetensors", "history.jsonl"])
def test_a_damaged_unfinished_run_never_mixes(name: str, damage: Any, tmp_path: Path, uninterrupted: Path) -> None:
    folder = stopped_in_the_middle(PLAIN, tmp_path)
    damage(folder.path / name)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(PLAIN, tmp_path)
    messages = [str(warning.message) for warning in caught if warning.category is DamagedRunWarning]
    harmless = name == "history.jsonl" or (name, damage) == ("state.safetensors", Path.unlink)
    assert len(messages) == (0 if harmless else 1)
    assert all("this run starts over: " in message and "\n" not in message for message in messages)
    assert bits(tmp_path, PLAIN) == bits(uninterrupted, PLAIN)


@DAMAGE
@pytest.mark.parametrize("name", ["result.json", "checkpoint.safetensors"])
def test_a_damaged_finished_run_is_trained_again(name: str, damage: Any, tmp_path: Path, uninterrupted: Path) -> None:
    folder = RunFolder(train(PLAIN, tmp_path).folder)
    folder.write_measures("of the damaged checkpoint")
    if (name, damage) == ("result.json", scribble):
        (folder.path / name).write_text("{}")  # one changed digit of a JSON file cannot be told
    else:
        damage(folder.path / name)
    if (name, damage) == ("result.json", Path.unlink):  # unfinished, as far as anybody can tell
        folder.clear()
        train(PLAIN, tmp_path)
    else:
        with pytest.warns(DamagedRunWarning, match="this run starts over"):
            train(PLAIN, tmp_path)
    assert folder.read_measures() is None
    assert bits(tmp_path, PLAIN) == bits(uninterrupted, PLAIN)


def test_a_folder_with_another_run_is_refused(tmp_path: Path) -> None:
    folder = stopped_in_the_middle(PLAIN, tmp_path)
    folder.write_spec(EVERYTHING)
    with pytest.raises(FlatminimaError, match="holds another run than its name says"):
        train(PLAIN, tmp_path)


def test_changed_data_start_the_run_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def altered(source: str, *, cache_dir: Path | None) -> Any:
        full, test = load_data(source, cache_dir=cache_dir)
        return replace(full, images=255 - full.images), test

    stopped_in_the_middle(PLAIN, tmp_path / "changed")
    monkeypatch.setattr(sets, "load_data", altered)
    with pytest.warns(DamagedRunWarning, match="the data 'digits' have changed since"):
        train(PLAIN, tmp_path / "changed")
    train(PLAIN, tmp_path / "from the start")
    assert bits(tmp_path / "changed", PLAIN) == bits(tmp_path / "from the start", PLAIN)


def test_a_run_whose_data_were_moved_goes_on_and_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_folder(source: str, *, cache_dir: Path | None) -> Any:
        assert Path(source).is_dir()
        return load_data("digits")

    monkeypatch.setattr(sets, "load_data", load_folder)
    images = tmp_path / "images"
    images.mkdir()
    spec = replace(PLAIN, data="cifar10", data_folder=str(images))
    stopped_in_the_middle(spec, tmp_path / "runs")
    moved = images.rename(tmp_path / "moved")
    result = train(replace(spec, data_folder=str(moved)), tmp_path / "runs")
    assert load_run(result.folder)[0].source == str(moved)

    again = moved.rename(tmp_path / "moved again")
    assert train(replace(spec, data_folder=str(again)), tmp_path / "runs").test_error == result.test_error
    assert load_run(result.folder)[0].source == str(again)


def test_another_environment_is_named(tmp_path: Path) -> None:
    stopped_in_the_middle(PLAIN, tmp_path)
    torch.set_num_threads(2)
    with pytest.warns(ResumedElsewhereWarning, match="threads 1 and goes on with .* threads 2"):
        train(PLAIN, tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# Failures
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("regularizer", [None, RegularizerSpec(num_sub_batches=4), SharpnessAwareSpec()])
def test_a_loss_that_is_not_finite_fails_the_run(tmp_path: Path, regularizer: RegularizerSpec | None) -> None:
    spec = replace(PLAIN, lr=1e20, schedule=MultiStep(()), regularizer=regularizer)
    with pytest.raises(NonFiniteError) as caught:
        train(spec, tmp_path)
    message = str(caught.value)
    assert message.startswith("training failed in epoch 1, iteration ")
    assert "lower lr (it is 1e+20)" in message
    assert "\n" not in message
    folder = RunFolder.of(tmp_path, spec)
    assert folder.status == "failed"
    assert not (folder.path / "checkpoint.safetensors").exists()
    with pytest.raises(FlatminimaError) as again:
        train(spec, tmp_path)
    assert str(again.value) == f"this run failed before: {message} (delete {folder.path} to train it again)"


@pytest.mark.parametrize("checkpoint_seconds", [0.0, 1e9])
def test_a_loss_that_is_read_late_fails_the_run_at_its_own_update(tmp_path: Path, checkpoint_seconds: float) -> None:
    """With the message it has where it is read at once; nothing that came after it is kept."""
    spec = replace(PLAIN, lr=1e15, schedule=MultiStep(()))
    with pytest.raises(NonFiniteError) as soon:
        train(spec, tmp_path / "soon")
    with reading_late(), pytest.raises(NonFiniteError) as late:
        train(spec, tmp_path / "late", checkpoint_seconds=checkpoint_seconds)
    assert str(late.value) == str(soon.value)
    assert "in epoch 1, iteration 4" not in str(late.value)  # the last one of its epoch
    folder = RunFolder.of(tmp_path / "late", spec)
    assert folder.status == "failed"
    assert {path.name for path in folder.path.iterdir()} == {
        *("spec.json", "failure.json", "history.jsonl", "lock", "tensorboard"),
    }


def test_a_network_ruined_by_its_last_update_fails_the_run(tmp_path: Path) -> None:
    spec = replace(PLAIN, lr=1e38, iterations=1)
    with pytest.raises(NonFiniteError, match="NaN or infinite logits"):
        train(spec, tmp_path)
    assert RunFolder.of(tmp_path, spec).status == "failed"


def test_too_small_a_training_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FlatminimaError, match="batch_size 64 is larger than the training set of 50 images"):
        train(replace(PLAIN, train_size=50, batch_size=64), tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# Progress
# ---------------------------------------------------------------------------------------------------------------------


def test_there_is_no_bar_without_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(PLAIN, tmp_path)
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


@pytest.mark.parametrize("progress", [True, False])
def test_a_long_run_on_a_terminal_shows_a_bar(
    progress: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # makes rich take any stream for a terminal
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr("flatminima.progress.PATIENCE_SECONDS", 0.0)
    train(replace(PLAIN, iterations=None, epochs=5), tmp_path, progress=progress)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert ("mlp, epoch 5/5, loss" in captured.err) == progress


def test_a_short_run_on_a_terminal_shows_no_bar(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr("flatminima.progress.PATIENCE_SECONDS", 1e9)
    train(PLAIN, tmp_path)
    assert "epoch" not in capsys.readouterr().err
