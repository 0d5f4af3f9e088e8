from __future__ import annotations

import copy
import functools
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from flatminima import MeasureOptions, Tracker, measure
from flatminima.errors import FlatminimaError
from flatminima.regularizer.regularizer import FisherTraceRegularizer
from support.lazily import Lazily, needs
from support.regularizer_cases import SEED, mlp

lightning, torchmetrics = Lazily("lightning.pytorch"), Lazily("torchmetrics")
integration = Lazily("flatminima.integrations.lightning")

EXAMPLE = Path(__file__).parents[2] / "examples" / "train_with_lightning.py"

pytestmark = [
    needs("lightning", "torchmetrics"),
    pytest.mark.xdist_group("lightning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*num_workers.*"),
]


@functools.cache
def module_type() -> Any:
    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(SEED)
            self.network = mlp()
            self.seen = torchmetrics.SumMetric()

        def training_step(self, batch: Any) -> dict[str, Any]:
            inputs, targets = batch
            self.seen.update(len(targets))
            self.log("loss", F.cross_entropy(self.network(inputs), targets).detach())
            return {"loss": F.cross_entropy(self.network(inputs), targets)}

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    return Module


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(SEED)
    return TensorDataset(torch.randn(48, 6, generator=generator), torch.randint(3, (48,), generator=generator))


def quiet_trainer(*callbacks: Any, **arguments: Any) -> Any:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return lightning.Trainer(accelerator="cpu", callbacks=list(callbacks), **{**quiet, **arguments})


def fit(module: Any, callback: Any, **arguments: Any) -> Any:
    trainer = quiet_trainer(callback, max_epochs=1, log_every_n_steps=1, **arguments)
    trainer.fit(module, DataLoader(data(), batch_size=8))
    return trainer


OPTIONS: dict[str, Any] = {"alpha": 1e-2, "beta": 20.0, "num_sub_batches": 8, "every": 2}


@pytest.mark.parametrize("accumulate", [1, 3])
def test_same_weights_as_by_hand(accumulate: int) -> None:
    """Sub-batches of one sample, so that no random split stands in between."""
    module = module_type()()
    by_hand = copy.deepcopy(module.network)
    trainer = fit(
        module, integration.FisherTraceCallback(**OPTIONS), accumulate_grad_batches=accumulate, gradient_clip_val=0.2
    )

    regularizer = FisherTraceRegularizer(by_hand, max_grad_norm=0.2, **OPTIONS)
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.1)
    for k, (x, y) in enumerate(DataLoader(data(), batch_size=8)):
        if k % accumulate == 0:
            optimizer.zero_grad()
        last = k % accumulate == accumulate - 1
        regularizer.backward(F.cross_entropy, x, y, weight=1 / accumulate, last=last)
        if last:
            optimizer.step()

    for ours, theirs in zip(module.network.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert trainer.callback_metrics["fisher_trace/fisher_trace"] > 0
    assert trainer.callback_metrics["fisher_trace/beta"] == 40.0


def test_skipped_batches_and_sub_batches_weigh_nothing() -> None:
    class SkippingModule(module_type()):
        """Returns None for the batch 1, and where no label counts."""

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            inputs, targets = batch
            counts = targets > 0
            if batch_idx == 1 or not counts.any():
                return None
            return F.cross_entropy(self.network(inputs[counts]), targets[counts])

    module = SkippingModule()
    by_hand = copy.deepcopy(module.network)
    options = {**OPTIONS, "every": 1}
    fit(module, integration.FisherTraceCallback(**options))

    def masked(batch: Any) -> torch.Tensor:
        counts = (batch[1] > 0).float()
        losses = F.cross_entropy(by_hand(batch[0]), batch[1], reduction="none")
        return (losses * counts).sum() / counts.sum().clamp_min(1)

    regularizer = FisherTraceRegularizer(by_hand, **options)
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.1)
    for k, batch in enumerate(DataLoader(data(), batch_size=8)):
        if k != 1:
            optimizer.zero_grad()
            regularizer.backward_closure(masked, batch)
            optimizer.step()
    for ours, theirs in zip(module.network.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_batches_of_several_loaders_are_split_side_by_side() -> None:
    parts: list[Any] = []

    class Both(module_type()):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            if not parts or len(batch["a"][0]) < 8:
                parts.append(batch)
            return (
                F.cross_entropy(self.network(batch["a"][0]), batch["a"][1])
                + self.network(batch["b"][0]).square().mean()
            )

    module = Both()
    start = copy.deepcopy(module)
    loaders = {"a": DataLoader(data(), batch_size=8), "b": DataLoader(data(), batch_size=24)}
    callback = integration.FisherTraceCallback(**{**OPTIONS, "num_sub_batches": 4})
    trainer = quiet_trainer(callback, max_steps=1)
    trainer.fit(module, lightning.utilities.CombinedLoader(loaders, "min_size"))

    pieces = parts[:-1:2]  # of each piece two passes, and the last looks at the first once more
    assert [(len(piece["a"][0]), len(piece["b"][0])) for piece in pieces] == [(2, 6)] * 4
    for name, size in (("a", 8), ("b", 24)):
        rows = torch.cat([piece[name][0] for piece in pieces])
        assert sorted(rows[:, 0].tolist()) == sorted(data().tensors[0][:size, 0].tolist())
    squares = [
        sum(g.square().sum() for g in torch.autograd.grad(start.training_step(piece, 0), list(start.parameters())))
        for piece in pieces
    ]
    expected = float(torch.stack(squares).mean())
    assert callback.regularizer.diagnostics()["fisher_trace"] == pytest.approx(expected, rel=1e-4)


def test_penalty_passes_neither_log_nor_count_in_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    logged = []
    original = lightning.LightningModule.log
    monkeypatch.setattr(
        lightning.LightningModule,
        "log",
        lambda self, name, *a, **k: (logged.append(name), original(self, name, *a, **k)),
    )
    module = module_type()()
    fit(module, integration.FisherTraceCallback(**OPTIONS))
    assert module.seen.compute() == 48
    assert logged.count("loss") == 6
    assert logged.count("fisher_trace/penalty") == 6
    assert "log" not in module.__dict__


def test_bfloat16_leaves_the_penalty_in_float32() -> None:
    metrics = [
        fit(
            module_type()(), integration.FisherTraceCallback(**OPTIONS), precision=precision, max_steps=1
        ).callback_metrics
        for precision in ("32-true", "bf16-mixed")
    ]
    assert metrics[0]["fisher_trace/fisher_trace"] == metrics[1]["fisher_trace/fisher_trace"]
    assert metrics[0]["loss"] != metrics[1]["loss"]


def test_gradient_scaler_scales_the_penalty_too() -> None:
    """Half precision on the CPU is not Lightning's, so its plugin is stood in for at the hook."""
    module, callback = module_type()(), integration.FisherTraceCallback(**OPTIONS)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    gradients = []
    for used in (None, scaler):
        module.zero_grad()
        trainer = quiet_trainer()
        trainer.precision_plugin.scaler = used
        callback.on_train_start(trainer, module)
        callback.on_train_batch_start(trainer, module, data()[:8], 0)
        callback.on_before_backward(trainer, module, torch.zeros(()))
        gradients.append([p.grad.clone() for p in module.network.parameters()])
    for plain, scaled in zip(*gradients, strict=True):
        torch.testing.assert_close(scaled, 256 * plain)


def test_refuses_what_lightning_owns_and_manual_optimization() -> None:
    with pytest.raises(FlatminimaError, match="max_grad_norm is not the regularizer's here"):
        integration.FisherTraceCallback(max_grad_norm=1.0)
    module = module_type()()
    module.automatic_optimization = False
    with pytest.raises(FlatminimaError, match="Module optimizes manually"):
        fit(module, integration.FisherTraceCallback())


@pytest.mark.parametrize("beta", [0.0, 20.0])
def test_refuses_an_optimizer_that_evaluates_elsewhere_than_the_penalty(beta: float) -> None:
    class SecondOrder(module_type()):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.LBFGS(self.parameters(), max_iter=3)

    with pytest.raises(FlatminimaError, match=r"evaluates its closure more than once a step \(as LBFGS does\)"):
        fit(SecondOrder(), integration.FisherTraceCallback(beta=beta))
    fit(SecondOrder(), integration.FisherTraceCallback(start_step=1000))


@pytest.mark.parametrize("never_logs", [{"log_every_n_steps": 0}, {"barebones": True}])
def test_a_trainer_that_never_logs_is_no_error(never_logs: dict[str, Any]) -> None:
    trainer = quiet_trainer(integration.FisherTraceCallback(**OPTIONS), max_epochs=1, **never_logs)
    trainer.fit(module_type()(), DataLoader(data(), batch_size=8))
    assert trainer.global_step == 6
    assert not [name for name in trainer.callback_metrics if name.startswith("fisher_trace")]


def test_training_step_gets_what_lightning_gives_it() -> None:
    class TakesMore(module_type()):
        def training_step(self, batch: Any, **unused: Any) -> torch.Tensor:
            return F.cross_entropy(self.network(batch[0]), batch[1])

    assert fit(TakesMore(), integration.FisherTraceCallback(**OPTIONS)).global_step == 6

    class TakesIterator(module_type()):
        def training_step(self, dataloader_iter: Any) -> torch.Tensor:
            (inputs, targets), *_ = next(dataloader_iter)
            return F.cross_entropy(self.network(inputs), targets)

    with pytest.raises(FlatminimaError, match="TakesIterator's training_step takes a dataloader_iter"):
        fit(TakesIterator(), integration.FisherTraceCallback(**OPTIONS))


def test_penalty_passes_make_tensors_in_the_trainers_precision() -> None:
    types: list[torch.dtype] = []

    class MakesTensors(module_type()):
        def training_step(self, batch: Any) -> torch.Tensor:
            made = torch.ones(3)
            types.append(made.dtype)
            return F.cross_entropy(self.network(batch[0]) @ made.diag(), batch[1])

    fit(MakesTensors(), integration.FisherTraceCallback(**OPTIONS), precision="64-true")
    assert set(types) == {torch.float64}


def test_what_belongs_to_the_batch_as_a_whole_is_not_split() -> None:
    """Class weights, say, of another length than the samples: only several loaders have batches of several sizes."""

    class Weighted(module_type()):
        def training_step(self, batch: Any) -> torch.Tensor:
            inputs, targets, class_weights = batch
            return F.cross_entropy(self.network(inputs), targets, class_weights)

    def with_weights(samples: Any) -> Any:
        inputs, targets = torch.utils.data.default_collate(samples)
        return inputs, targets, torch.tensor([1.0, 2.0, 3.0])

    trainer = quiet_trainer(integration.FisherTraceCallback(**OPTIONS), max_steps=1)
    with pytest.raises(FlatminimaError, match="must be tensors that share their first dimension"):
        trainer.fit(Weighted(), DataLoader(data(), batch_size=8, collate_fn=with_weights))


def test_penalty_passes_do_not_join_the_metrics_of_a_collection() -> None:
    """A collection has one state for metrics that agree after its first update, as on a sub-batch these two do."""
    inputs = data().tensors[0]
    unsure = inputs[7, 0]  # the last sample of the first batch

    class Collecting(module_type()):
        def __init__(self) -> None:
            super().__init__()
            accuracies = {f"at {at} %": torchmetrics.classification.BinaryAccuracy(at / 100) for at in (50, 90)}
            self.accuracies = torchmetrics.MetricCollection(accuracies)

        def training_step(self, batch: Any) -> torch.Tensor:
            scores = torch.where(batch[0][:, 0] == unsure, 0.7, 0.95)
            self.accuracies.update(scores, torch.ones_like(scores, dtype=torch.int))
            return F.cross_entropy(self.network(batch[0]), batch[1])

    module = Collecting()
    fit(module, integration.FisherTraceCallback(**OPTIONS))
    found = {name: value.item() for name, value in module.accuracies.compute().items()}
    assert found == {"at 50 %": 1.0, "at 90 %": pytest.approx(1 - 1 / len(inputs))}


def test_a_generator_of_parameters_serves_every_fit() -> None:
    module = module_type()()
    callback = integration.FisherTraceCallback(**OPTIONS, parameters=module.network[0].parameters())
    fit(module, callback)
    assert fit(module, callback).callback_metrics["fisher_trace/fisher_trace"] > 0


def test_example_trains() -> None:
    trainer = runpy.run_path(str(EXAMPLE))["main"]()
    assert trainer.global_step == 64
    assert trainer.callback_metrics["loss"] < 0.8
    assert trainer.callback_metrics["fisher_trace/fisher_trace"] > 0


@pytest.mark.slow
def test_example_runs_on_two_processes() -> None:
    subprocess.run([sys.executable, str(EXAMPLE), "2"], check=True, timeout=200)


def test_says_which_package_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    monkeypatch.delitem(sys.modules, "flatminima.integrations.lightning", raising=False)
    with pytest.raises(FlatminimaError, match=r"pip install 'flatminima\[integrations\]'"):
        import flatminima.integrations.lightning  # noqa: F401


@functools.cache
def logging_module_type() -> Any:
    class Logging(lightning.LightningModule):
        """Validates, and has a forward of its own."""

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(SEED)
            self.network = mlp()

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return self.network(inputs)

        def training_step(self, batch: Any) -> torch.Tensor:
            return F.cross_entropy(self(batch[0]), batch[1])

        def validation_step(self, batch: Any) -> None:
            self.log("validation_loss", F.cross_entropy(self(batch[0]), batch[1]))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    return Logging


@functools.cache
def logger_type() -> Any:
    class Logger(lightning.loggers.logger.DummyLogger):
        def __init__(self) -> None:
            super().__init__()
            self.seen: dict[str, float] = {}

        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            self.seen |= metrics

    return Logger


def tracked_run(callback: Any, module: Any, **arguments: Any) -> Any:
    trainer = quiet_trainer(*filter(None, [callback]), max_epochs=4, **arguments)
    trainer.fit(module, DataLoader(data(), batch_size=8), DataLoader(data(), batch_size=48))
    return trainer


@pytest.mark.filterwarnings("ignore::flatminima.errors.NotAMinimumWarning")  # `measure` itself gives it
def test_measures_are_tracked_and_logged_and_change_nothing() -> None:
    options = MeasureOptions(subset_size=12, trials=2, progress=False)
    callback, logger = integration.MeasureCallback(Tracker(data(), options, every=2)), logger_type()()
    module, untracked = logging_module_type()(), logging_module_type()()
    tracked_run(callback, module, logger=logger)
    tracked_run(None, untracked, logger=False)
    first, last = callback.tracker.epochs
    assert (first.epoch, last.epoch) == (2, 4)
    expected = measure(untracked, data(), subset_size=12, trials=2, progress=False).to_metrics()
    assert last.measures == expected
    assert logger.seen["flatminima/sensitivity"] == pytest.approx(expected["sensitivity"], rel=1e-6)
    assert last.others["validation_loss"] < first.others["validation_loss"]
    assert not [name for name in last.others if name.startswith("flatminima/")]
    assert logger.seen["validation_loss"] == pytest.approx(last.others["validation_loss"])


def test_an_epoch_without_validation_has_none_of_an_earlier_one() -> None:
    callback = integration.MeasureCallback(
        Tracker(data(), MeasureOptions(subset_size=12, trials=2, progress=False)), log=False
    )
    tracked_run(callback, logging_module_type()(), logger=False, check_val_every_n_epoch=2)
    assert [sorted(tracked.others) for tracked in callback.tracker.epochs] == [[], ["validation_loss"]] * 2


def test_a_fast_dev_run_measures_and_leaves_the_record_of_a_real_one(tmp_path: Path) -> None:
    file = tmp_path / "epochs.jsonl"
    tracker = Tracker(data(), MeasureOptions(subset_size=12, trials=2, progress=False), path=file)
    before = tracker(logging_module_type()().network, epoch=1)
    assert before is not None
    content, found = file.read_text(encoding="utf-8"), {}

    class Logged(integration.MeasureCallback):
        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            super().on_train_epoch_end(trainer, module)
            found.update(trainer.callback_metrics)

    tracked_run(Logged(tracker), logging_module_type()(), logger=False, fast_dev_run=True)
    assert "flatminima/log_det_fisher" in found
    assert file.read_text(encoding="utf-8") == content
    assert [epoch.measures for epoch in tracker.epochs] == [before]


def test_a_module_without_forward_is_refused_before_it_trains() -> None:
    module = module_type()()
    with pytest.raises(FlatminimaError, match=r"Module has no forward that could be measured: .* network="):
        fit(module, integration.MeasureCallback(Tracker(data())))
    assert module.seen.update_count == 0


@pytest.mark.filterwarnings("ignore::flatminima.errors.NotAMinimumWarning")  # `measure` itself gives it
def test_a_part_of_the_module_can_be_tracked() -> None:
    callback = integration.MeasureCallback(
        Tracker(data(), MeasureOptions(subset_size=12, trials=2, progress=False), every=4),
        network=lambda module: module.network,
        log=False,
    )
    module = logging_module_type()()
    tracked_run(callback, module, logger=False)
    expected = measure(module.network, data(), subset_size=12, trials=2, progress=False).to_metrics()
    assert callback.tracker.epochs[0].measures == expected
