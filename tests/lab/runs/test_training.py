from __future__ import annotations

import itertools
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from flatminima.errors import FlatminimaError
from flatminima.lab.data.augmentation import augment
from flatminima.lab.data.sources import load_data
from flatminima.lab.errors import TrainingStopped
from flatminima.lab.networks.checkpoints import load_weights
from flatminima.lab.networks.paper import build_model
from flatminima.lab.runs.folder import RunFolder
from flatminima.lab.runs.schedules import MultiStep
from flatminima.lab.runs.session import Session
from flatminima.lab.runs.sets import load_sets
from flatminima.lab.runs.spec import RECIPES, RegularizerSpec, RunSpec, SharpnessAwareSpec, derived_seed
from flatminima.lab.runs.training import launch, train
from flatminima.measures.evaluation import evaluate
from flatminima.regularizer.regularizer import FisherTraceRegularizer
from support.runs import EVERYTHING, PLAIN, SPARSE, SPECS, events

pytest_plugins = ("support.run_fixtures",)
pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_digits_recipe_learns(tmp_path: Path) -> None:
    result = train(replace(RECIPES["digits"], epochs=5), tmp_path)
    assert result.train_accuracy > 0.99
    assert result.test_error < 0.05
    history = RunFolder(result.folder).read_history()
    assert history[-1].train_loss < 0.2 * history[0].train_loss
    assert history[-1].test_error == result.test_error


@pytest.mark.parametrize("changes", [{"data": "nowhere"}, {"validation": 5000}, {"batch_size": 5000}])
def test_what_is_refused_leaves_no_unfinished_run_behind(changes: dict[str, Any], tmp_path: Path) -> None:
    spec = replace(PLAIN, **changes)
    with pytest.raises(FlatminimaError):
        train(spec, tmp_path)
    assert RunFolder.of(tmp_path, spec).status == "new"


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
        batches.append(run.next_batch())
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
        taken.append(run.next_batch()[0])
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
        PLAIN.lr * PLAIN.schedule.multiplier(0, 1, losses[:epoch], []) for epoch in range(3)
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


def test_the_event_log_shows_no_breaks(tmp_path: Path) -> None:
    """Every sitting writes it anew, with the times of one sitting."""
    for number in range(3):
        with pytest.raises(TrainingStopped):
            train(EVERYTHING, tmp_path, stop=lambda epoch, of, error, number=number: epoch == number)
        time.sleep(0.3)
    train(EVERYTHING, tmp_path)
    folder = RunFolder.of(tmp_path, EVERYTHING)
    (file,) = (folder.path / "tensorboard").iterdir()
    log = EventAccumulator(str(file))
    log.Reload()
    times = [event.wall_time for event in log.Scalars("train_loss")]
    seconds = [record.seconds for record in folder.read_history()]
    assert [b - a for a, b in itertools.pairwise(times)] == pytest.approx(seconds[1:], abs=1e-5)


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


def test_evaluate_leaves_the_mode_alone() -> None:
    model, (_, test) = build_model("mlp", in_channels=1), load_data("digits")
    evaluate(model.train(), test)
    assert model.training
    evaluation = evaluate(model.eval(), test)
    assert not model.training
    assert evaluation.correct + round(evaluation.error * 500) == evaluation.total == 500
    assert evaluation.accuracy + evaluation.error == pytest.approx(1)


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
