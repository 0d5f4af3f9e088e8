"""The regularizer and the tracker in the Trainer of Hugging Face Transformers."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from flatminima.errors import FlatminimaError
from flatminima.integrations import regularizer_options
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
        options = regularizer_options(regularizer, "the Trainer")
        super().__init__(*args, **kwargs)
        self._regularizer_options = options  # for the model as the Trainer will wrap it, too
        self.regularizer = FisherTraceRegularizer(self.model, **options)  # type: ignore[attr-defined]

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """The Trainer's, after the penalty has been added to ``.grad``."""
        trainer: Any = self
        if trainer.is_deepspeed_enabled or (trainer.is_fsdp_enabled and not trainer.accelerator.is_fsdp2):
            raise FlatminimaError("DeepSpeed and FSDP1 are not supported: use DistributedDataParallel or FSDP2")
        if self.regularizer.model is not model:  # the Trainer wraps it for several processes
            self.regularizer = FisherTraceRegularizer(model, **self._regularizer_options)
        model.train()
        if callable(getattr(trainer.optimizer, "train", None)):  # schedule-free ones evaluate at other weights
            trainer.optimizer.train()
        self.regularizer.step = trainer.state.global_step
        if self.regularizer.is_due:
            self._add_penalty(trainer, model, trainer._prepare_inputs(inputs), num_items_in_batch)
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]
        return loss

    def _add_penalty(self, trainer: Any, model: nn.Module, batch: Any, num_items_in_batch: Any) -> None:
        # what has no label that counts adds nothing to a loss that is divided by the labels of all micro-batches
        weighs = num_items_in_batch is None or _labels_that_count(trainer, batch) != 0

        def closure(part: Any) -> Any:
            if not weighs:
                return torch.zeros((), device=trainer.args.device)
            return trainer.compute_loss(model, part, **_items(trainer, part))

        together = trainer.is_fsdp_enabled  # all processes gather the weights, with whatever batch
        penalty = self.regularizer.penalize(closure, batch) if weighs or together else None
        if penalty is not None:
            scaler = trainer.accelerator.scaler
            scale: Any = 1.0 if scaler is None else scaler.scale(torch.ones_like(penalty.value))
            penalty.add_gradient_to_grad(
                self.regularizer.present_beta / trainer.current_gradient_accumulation_steps * scale
            )

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
            is_due = control.should_log
            self._trainer.log(tracked.logged())
            control.should_log = is_due  # which this log has reset, and the Trainer's own of the epoch is to come


def _items(trainer: Any, batch: Any) -> dict[str, Any]:
    """What a ``compute_loss_func``, or a ``compute_loss`` of a user's, divides its sum by."""
    own = type(trainer).compute_loss is not Trainer.compute_loss and trainer.model_accepts_loss_kwargs
    if getattr(trainer, "compute_loss_func", None) is None and not own:
        return {}
    count = _labels_that_count(trainer, batch)
    if count is None:
        return {}
    across = trainer.args.average_tokens_across_devices  # the Trainer then multiplies by the number of processes
    return {"num_items_in_batch": count * (trainer.accelerator.num_processes if across else 1)}


def _labels_that_count(trainer: Any, batch: Any) -> Tensor | None:
    """Their number, as the Trainer counts them; None where it counts none."""
    labels = batch.get("labels")
    if not isinstance(labels, Tensor):
        return None
    return (labels[..., 1:] if getattr(trainer, "_loss_shifts_labels", False) else labels).ne(-100).sum()


class FisherTraceTrainer(FisherTraceMixin, Trainer):
    """``transformers.Trainer`` with the penalty: ``FisherTraceTrainer(..., regularizer={"beta": 10.0})``."""
