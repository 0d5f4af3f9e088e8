"""The regularizer and the tracker in the Trainer of Hugging Face Transformers."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from flatminima.errors import FlatminimaError
from flatminima.regularizer import FisherTraceRegularizer
from flatminima.tracking import Tracker

try:
    from transformers import Trainer, TrainerCallback
except ImportError as error:
    raise FlatminimaError(
        "flatminima.integrations.transformers needs Transformers and Accelerate: pip install 'flatminima[integrations]'"
    ) from error


class FisherTraceMixin:
    """Adds the penalty to any Trainer: ``class MyTrainer(FisherTraceMixin, Seq2SeqTrainer): ...``.

    The penalty joins ``.grad`` before the Trainer's own backward pass, so that mixed precision, accumulation, clipping
    (``TrainingArguments.max_grad_norm``), the exchange between processes and checkpoints stay the Trainer's. Schedules
    follow ``state.global_step``. Sub-batches are cut from each micro-batch, and each sub-batch's loss is
    ``compute_loss`` of it alone: for language models, the mean over its own tokens.

    Args:
        regularizer: arguments of :class:`flatminima.FisherTraceRegularizer`, without ``max_grad_norm`` and
            ``main_gradient``, which are the Trainer's business.
        *args: the Trainer's.
        **kwargs: the Trainer's.

    Attributes:
        regularizer: the :class:`flatminima.FisherTraceRegularizer`, another one once the Trainer has wrapped the model.

    Raises:
        FlatminimaError: for arguments out of range, DeepSpeed, FSDP1 or DataParallel.
    """

    def __init__(self, *args: Any, regularizer: dict[str, Any], **kwargs: Any) -> None:
        for name in ("max_grad_norm", "main_gradient"):
            if name in regularizer:
                raise FlatminimaError(f"{name} is not the regularizer's here: the Trainer owns the main backward pass")
        super().__init__(*args, **kwargs)
        self._regularizer_options = regularizer
        self.regularizer = FisherTraceRegularizer(self.model, **regularizer)  # type: ignore[attr-defined]

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """The Trainer's, after the penalty has been added to ``.grad``."""
        trainer: Any = self
        if trainer.is_deepspeed_enabled or (trainer.is_fsdp_enabled and not trainer.accelerator.is_fsdp2):
            raise FlatminimaError("DeepSpeed and FSDP1 are not supported: use DistributedDataParallel or FSDP2")
        if self.regularizer.model is not model:  # the Trainer wraps it for several processes
            self.regularizer = FisherTraceRegularizer(model, **self._regularizer_options)
        model.train()
        self.regularizer.step = trainer.state.global_step
        penalty = self.regularizer.penalize(
            lambda batch: trainer.compute_loss(model, batch, **_items(trainer, batch)), trainer._prepare_inputs(inputs)
        )
        if penalty is not None:
            scaler = trainer.accelerator.scaler
            scale: Any = 1.0 if scaler is None else scaler.scale(torch.ones_like(penalty.value))
            penalty.add_gradient_to_grad(
                self.regularizer.present_beta / trainer.current_gradient_accumulation_steps * scale
            )
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]
        return loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The Trainer's; training logs also hold the regularizer's diagnostics."""
        if "loss" in logs:
            logs = {**logs, **self.regularizer.diagnostics()}
        super().log(logs, *args, **kwargs)  # type: ignore[misc]


class MeasureCallback(TrainerCallback):
    """Measures the network after epochs: ``trainer.add_callback(MeasureCallback(trainer, Tracker(train_set)))``.

    Logged as ``flatminima/...`` by ``trainer.log``. With several processes all measure, and get the same.

    Args:
        trainer: which logs.
        tracker: what it measures on, how, and how often: a :class:`flatminima.Tracker`.

    Raises:
        FlatminimaError: as the tracker does, at the end of the first epoch that is due.
    """

    def __init__(self, trainer: Trainer, tracker: Tracker) -> None:
        self.tracker = tracker
        self._trainer = trainer

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure, if it is time."""
        tracked = self.tracker.track(kwargs["model"], math.ceil(state.epoch - 1e-6))  # an epoch cut short is its own
        if tracked is not None:
            self._trainer.log(tracked.logged())


def _items(trainer: Any, batch: Any) -> dict[str, Any]:
    """What a ``compute_loss_func`` divides its sum by: the number of labels that count, as the Trainer counts them."""
    if getattr(trainer, "compute_loss_func", None) is None or not isinstance(batch.get("labels"), Tensor):
        return {}
    labels = batch["labels"][..., 1:] if getattr(trainer, "_loss_shifts_labels", False) else batch["labels"]
    across = trainer.args.average_tokens_across_devices  # the Trainer then multiplies by the number of processes
    return {"num_items_in_batch": labels.ne(-100).sum() * (trainer.accelerator.num_processes if across else 1)}


class FisherTraceTrainer(FisherTraceMixin, Trainer):
    """``transformers.Trainer`` with the penalty: ``FisherTraceTrainer(..., regularizer={"beta": 10.0})``."""
