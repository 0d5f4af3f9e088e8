from __future__ import annotations

import copy
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from flatminima import CrossEntropy, MeasureOptions, Tracker, measure
from flatminima.errors import FlatminimaError
from flatminima.regularizer.regularizer import FisherTraceRegularizer
from support.lazily import Lazily, needs
from support.regularizer_cases import SEED, gradients_of

transformers, integration = Lazily("transformers"), Lazily("flatminima.integrations.transformers")

EXAMPLE = Path(__file__).parents[2] / "examples" / "train_with_transformers.py"

pytestmark = [
    needs("transformers", "accelerate"),
    pytest.mark.xdist_group("transformers"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def tiny_model() -> Any:
    torch.manual_seed(SEED)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=16, n_positions=12, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )
    )  # fmt: skip


def arguments_of(folder: Path, **arguments: Any) -> Any:
    settings = {"use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no", **arguments}
    return transformers.TrainingArguments(str(folder), **settings)


def trainer_for(model: Any, folder: Path, **arguments: Any) -> Any:
    return integration.FisherTraceTrainer(
        model=model,
        args=arguments_of(folder, **arguments),
        regularizer={"alpha": 1e-2, "beta": 20.0, "num_sub_batches": 8, "every": 2},
    )


@pytest.mark.parametrize("precision", [{}, {"bf16": True}])
def test_same_gradient_as_by_hand(tmp_path: Path, precision: dict[str, bool]) -> None:
    """Two micro-batches of eight sub-batches of one sentence, before any optimizer step; dropout is off."""
    model = tiny_model()
    by_hand = copy.deepcopy(model)
    tokens = torch.randint(16, (2, 8, 12))
    trainer = trainer_for(model, tmp_path, gradient_accumulation_steps=2, **precision)
    wrapped = trainer.accelerator.prepare(model)
    trainer.current_gradient_accumulation_steps = 2
    for part in tokens:
        trainer.training_step(wrapped, {"input_ids": part, "labels": part})

    regularizer = FisherTraceRegularizer(by_hand, alpha=1e-2, beta=40.0, num_sub_batches=8)
    for k, part in enumerate(tokens):
        with torch.autocast("cpu", torch.bfloat16, enabled=bool(precision)):
            regularizer.backward(
                lambda output, _: output.loss, {"input_ids": part, "labels": part}, None, weight=0.5, last=k == 1
            )
    tolerance = {"rtol": 0.05, "atol": 2e-3} if precision else {"rtol": 1e-4, "atol": 1e-6}
    for name, gradient in gradients_of(by_hand).items():
        torch.testing.assert_close(dict(model.named_parameters())[name].grad, gradient, **tolerance)
    penalty = trainer.regularizer.diagnostics()["penalty"]
    assert penalty > 0
    trainer.state.global_step = 1  # every=2: no penalty, and no new diagnostics
    trainer.training_step(wrapped, {"input_ids": tokens[0], "labels": tokens[0]})
    assert trainer.regularizer.diagnostics()["penalty"] == penalty


def mean_of_tokens(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any) -> torch.Tensor:
    """As the documentation has it: a sum over tokens, divided by their number."""
    logits = outputs["logits"][:, :-1].flatten(0, 1)
    summed = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
    return summed / num_items_in_batch


@pytest.mark.parametrize("how", ["compute_loss_func", "compute_loss", "label_smoothing_factor"])
def test_losses_that_take_the_labels_out_of_the_batch(tmp_path: Path, how: str) -> None:
    """Each has the model's own loss as its value, smoothing by zero nearly, and so the same penalty."""
    tokens = torch.randint(1, 16, (8, 12))
    counted = tokens.clone()
    counted[:, 0] = -100  # nothing predicts the first token, and versions differ in whether they count it

    class PopsLabels(integration.FisherTraceTrainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            labels = inputs.pop("labels")
            return mean_of_tokens(model(**inputs), labels, labels[:, 1:].numel())

    def penalty_of(kind: Any, **arguments: Any) -> dict[str, float]:
        model = tiny_model()
        smoothing = arguments.pop("label_smoothing_factor", 0.0)
        settings = transformers.TrainingArguments(
            str(tmp_path), use_cpu=True, report_to=[], label_smoothing_factor=smoothing
        )
        trainer = kind(model=model, args=settings, regularizer={"alpha": 1e-2, "num_sub_batches": 4}, **arguments)
        trainer.current_gradient_accumulation_steps = 1
        torch.manual_seed(SEED)
        trainer.training_step(model, {"input_ids": tokens, "labels": counted}, num_items_in_batch=torch.tensor(8 * 11))
        return trainer.regularizer.diagnostics()

    cases: dict[str, tuple[Any, dict[str, Any]]] = {
        "compute_loss_func": (integration.FisherTraceTrainer, {"compute_loss_func": mean_of_tokens}),
        "compute_loss": (PopsLabels, {}),
        "label_smoothing_factor": (integration.FisherTraceTrainer, {"label_smoothing_factor": 1e-7}),
    }
    kind, arguments = cases[how]
    assert penalty_of(kind, **arguments) == pytest.approx(
        penalty_of(integration.FisherTraceTrainer), rel=1e-3, abs=1e-4
    )


def test_a_compute_loss_that_divides_by_the_number_of_items_has_that_of_its_sub_batch(tmp_path: Path) -> None:
    class Divides(integration.FisherTraceTrainer):
        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            return mean_of_tokens(model(inputs["input_ids"]), inputs["labels"], num_items_in_batch)

    def logged(kind: Any) -> dict[str, float]:
        tokens = torch.randint(16, (16, 12), generator=torch.Generator().manual_seed(SEED))
        counted = torch.cat([torch.full((16, 1), -100), tokens[:, 1:]], 1)  # as the model counts, whatever the version
        trainer = kind(
            model=tiny_model(),
            args=arguments_of(tmp_path, max_steps=1, logging_steps=1, gradient_accumulation_steps=2),
            train_dataset=[{"input_ids": row, "labels": own} for row, own in zip(tokens, counted, strict=True)],
            regularizer={"alpha": 1e-2, "num_sub_batches": 4},
        )
        trainer.train()
        return {name: trainer.state.log_history[0][name] for name in ("loss", "penalty", "grad_norm")}

    assert logged(Divides) == pytest.approx(logged(integration.FisherTraceTrainer), rel=1e-3, abs=1e-4)


def test_a_micro_batch_without_labels_that_count_weighs_nothing(tmp_path: Path) -> None:
    """Its loss in the Trainer is nothing divided by the labels of all micro-batches."""
    model = tiny_model()
    without = copy.deepcopy(model)
    tokens = torch.randint(16, (8, 12))
    counted, none = ({"input_ids": tokens, "labels": labels} for labels in (tokens, torch.full_like(tokens, -100)))
    for trained, batches in ((model, [none, counted]), (without, [counted])):
        trainer = trainer_for(trained, tmp_path)
        trainer.current_gradient_accumulation_steps = 2
        for batch in batches:
            trainer.training_step(trained, batch, num_items_in_batch=torch.tensor(8 * 11))
    for name, gradient in gradients_of(without).items():
        torch.testing.assert_close(dict(model.named_parameters())[name].grad, gradient)


def test_the_penalty_is_at_the_weights_that_the_optimizer_trains(tmp_path: Path) -> None:
    """Schedule-free optimizers hold others while the model is evaluated."""
    model = tiny_model()
    trainer = trainer_for(model, tmp_path)
    seen: list[bool] = []

    class ScheduleFree(torch.optim.SGD):
        trains = False

        def train(self) -> None:
            self.trains = True

    trainer.optimizer = ScheduleFree(model.parameters())
    trainer.current_gradient_accumulation_steps = 1
    model.register_forward_pre_hook(lambda *_: seen.append(trainer.optimizer.trains))
    tokens = torch.randint(16, (8, 12))
    trainer.training_step(model, {"input_ids": tokens, "labels": tokens})
    assert all(seen)
    assert len(seen) > 8


def test_a_generator_of_parameters_serves_a_wrapped_model(tmp_path: Path) -> None:
    model = tiny_model()

    class Wrapped(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = model

        def forward(self, **inputs: Any) -> Any:
            return self.module(**inputs)

    trainer = integration.FisherTraceTrainer(
        model=model,
        args=arguments_of(tmp_path),
        regularizer={"num_sub_batches": 4, "parameters": model.transformer.h.parameters()},
    )
    trainer.current_gradient_accumulation_steps = 1
    tokens = torch.randint(16, (8, 12))
    trainer.training_step(Wrapped(), {"input_ids": tokens, "labels": tokens})
    assert trainer.regularizer.diagnostics()["fisher_trace"] > 0


def test_refuses_what_the_trainer_owns(tmp_path: Path) -> None:
    with pytest.raises(FlatminimaError, match="max_grad_norm is not the regularizer's here"):
        integration.FisherTraceTrainer(model=tiny_model(), regularizer={"max_grad_norm": 1.0})
    trainer = trainer_for(tiny_model(), tmp_path)
    with pytest.raises(FlatminimaError, match="alpha must be"):
        integration.FisherTraceTrainer(model=trainer.model, args=trainer.args, regularizer={"alpha": -1})
    trainer.is_fsdp_enabled = True  # and Accelerate does not say that it is FSDP2
    with pytest.raises(FlatminimaError, match="DeepSpeed and FSDP1 are not supported"):
        trainer.training_step(trainer.model, {})


def test_example_trains_and_resumes_to_the_same_bits(tmp_path: Path) -> None:
    main = runpy.run_path(str(EXAMPLE))["main"]
    whole = main(str(tmp_path / "whole"))
    training = [entry for entry in whole if "loss" in entry]
    assert training[-1]["loss"] < 0.8 * training[0]["loss"]
    assert all(entry["fisher_trace"] > 0 for entry in training)

    checkpoint = tmp_path / "whole" / "checkpoint-6"
    (tmp_path / "resumed").mkdir()
    checkpoint.rename(tmp_path / "resumed" / "checkpoint-6")
    resumed = [entry for entry in main(str(tmp_path / "resumed"), resume_from_checkpoint=True) if "loss" in entry]
    assert resumed == training


@pytest.mark.slow
def test_example_runs_on_two_processes(tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([*launcher, str(EXAMPLE), str(tmp_path)], check=True, timeout=200)


def test_says_which_package_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "flatminima.integrations.transformers", raising=False)
    with pytest.raises(FlatminimaError, match=r"pip install 'flatminima\[integrations\]'"):
        import flatminima.integrations.transformers  # noqa: F401


@pytest.mark.filterwarnings("ignore::flatminima.errors.NotAMinimumWarning")
def test_a_run_in_half_precision_that_ends_within_an_epoch_is_tracked(tmp_path: Path) -> None:
    sentences = [{"input_ids": tokens, "labels": tokens} for tokens in torch.randint(16, (24, 12))]
    trainer = transformers.Trainer(
        tiny_model(),
        transformers.TrainingArguments(
            str(tmp_path),
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            max_steps=4,
            save_strategy="no",
            per_device_train_batch_size=8,
            bf16=True,
        ),
        train_dataset=sentences,
    )
    loss = CrossEntropy(next_token=True)
    tracker = Tracker(sentences, MeasureOptions(loss=loss, subset_size=4, trials=2, progress=False))
    trainer.add_callback(integration.MeasureCallback(trainer, tracker))
    trainer.train()
    assert [tracked.epoch for tracked in tracker.epochs] == [1, 2]
    expected = measure(trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False), sentences, loss=loss,
                       subset_size=4, trials=2, progress=False)  # fmt: skip
    assert tracker.epochs[-1].measures == expected.to_metrics()


@pytest.mark.filterwarnings("ignore::flatminima.errors.NotAMinimumWarning")  # `measure` itself gives it
def test_measures_are_tracked_and_logged_and_change_nothing(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(SEED)
    sentences = [{"input_ids": tokens, "labels": tokens} for tokens in torch.randint(16, (24, 12), generator=generator)]
    options = MeasureOptions(loss=CrossEntropy(next_token=True), subset_size=4, trials=2, progress=False)
    arguments = {
        "num_train_epochs": 2, "per_device_train_batch_size": 8, "logging_strategy": "epoch",
    }  # fmt: skip

    def trained(tracker: Tracker | None) -> Any:
        trainer = transformers.Trainer(tiny_model(), arguments_of(tmp_path, **arguments), train_dataset=sentences)
        if tracker is not None:
            trainer.add_callback(integration.MeasureCallback(trainer, tracker))
        trainer.train()
        return trainer

    tracker = Tracker(sentences, options)
    log = trained(tracker).state.log_history
    untracked = trained(None)
    expected = measure(
        untracked.model, sentences, loss=options.loss, subset_size=4, trials=2, progress=False
    ).to_metrics()
    assert [tracked.epoch for tracked in tracker.epochs] == [1, 2]
    assert tracker.epochs[-1].measures == expected
    logged = [entry["flatminima/sensitivity"] for entry in log if "flatminima/sensitivity" in entry]
    assert logged == [tracked.measures["sensitivity"] for tracked in tracker.epochs]
    losses, expected_losses = (
        [entry["loss"] for entry in entries if "loss" in entry] for entries in (log, untracked.state.log_history)
    )
    assert losses == expected_losses
    assert len(losses) == 2
