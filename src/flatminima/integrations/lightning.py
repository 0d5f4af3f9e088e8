"""The regularizer and the tracker in Lightning's Trainer, as callbacks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from flatminima.errors import FlatminimaError
from flatminima.integrations import regularizer_options
from flatminima.network import tensors_of
from flatminima.regularizer import FisherTraceRegularizer, Penalty, SeveralBatches
from flatminima.tracking import LOGGED_AS, Tracker

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
    from torchmetrics import Metric, MetricCollection
except ImportError as error:
    raise FlatminimaError(
        "flatminima.integrations.lightning needs Lightning: pip install 'flatminima[integrations]'"
    ) from error


class FisherTraceCallback(Callback):
    """Adds the penalty in automatic optimization: ``Trainer(callbacks=[FisherTraceCallback(beta=10.0)])``.

    The penalty joins ``.grad`` before Lightning's own backward pass, so that mixed precision, accumulation, clipping
    (``Trainer(gradient_clip_val=...)``), the exchange between processes and checkpoints stay Lightning's. Schedules
    follow ``trainer.global_step``. FSDP2 is Lightning's ``ModelParallelStrategy``, with ``fully_shard`` on the network
    in ``configure_model``.

    ``training_step`` is also called on sub-batches; it must return the loss, or a dictionary with ``"loss"``. In these
    calls ``self.log`` does nothing and metrics keep their state; anything else that ``training_step`` does beside
    computing a loss, such as writing to a logger itself, happens once more for each. A sub-batch for which it returns
    None weighs nothing. Batches of several loaders (CombinedLoader) are split side by side. Modules with manual
    optimization call :meth:`flatminima.FisherTraceRegularizer.backward` instead.

    Args:
        log: log the diagnostics as ``fisher_trace/...``, as often as the Trainer logs.
        **options: arguments of :class:`flatminima.FisherTraceRegularizer`, without ``max_grad_norm`` and
            ``main_gradient``, which are Lightning's business.

    Attributes:
        regularizer: the :class:`flatminima.FisherTraceRegularizer`, None before training starts.

    Raises:
        FlatminimaError: for arguments out of range (when training starts), manual optimization, a ``training_step``
            that takes a ``dataloader_iter``, an optimizer that evaluates its closure more than once a step, FSDP1
            (``FSDPStrategy``), tensor parallelism, or sharding that leaves trainable parameters whole.
    """

    def __init__(self, *, log: bool = True, **options: Any) -> None:
        self._options = regularizer_options(options, "Lightning")  # for every fit
        self.regularizer: FisherTraceRegularizer | None = None
        self._log = log
        self._penalty: Penalty | None = None
        self._is_added = False  # to the gradient of this batch

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the module."""
        if not pl_module.automatic_optimization:
            raise FlatminimaError(
                f"{type(pl_module).__name__} optimizes manually: call FisherTraceRegularizer.backward in training_step"
            )
        if is_param_in_hook_signature(pl_module.training_step, "dataloader_iter", explicit=True):
            raise FlatminimaError(
                f"{type(pl_module).__name__}'s training_step takes a dataloader_iter, so that its batches cannot be "
                "split before it sees them: let it take a batch"
            )
        self.regularizer = FisherTraceRegularizer(pl_module, **self._options)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Compute the penalty; Lightning zeroes ``.grad`` later on."""
        assert self.regularizer is not None
        self._is_added = False
        self.regularizer.step = trainer.global_step
        several = isinstance(trainer.train_dataloader, (dict, list, tuple))
        split = _several(batch, self.regularizer.num_sub_batches) if several else batch
        # where the precision is float64, it also is what training_step makes tensors in
        with trainer.precision_plugin.train_step_context(), _without_side_effects(pl_module):
            self._penalty = self.regularizer.penalize(lambda part: _loss(pl_module, part, batch_idx), split)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Add the penalty's gradient."""
        if self._penalty is None or self.regularizer is None:
            return
        if self._is_added:
            raise FlatminimaError(
                "the optimizer evaluates its closure more than once a step (as LBFGS does), at weights that the "
                "penalty was not computed at: choose another optimizer, or optimize manually and call "
                "FisherTraceRegularizer.backward in the closure"
            )
        self._is_added = True
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        scale: Any = 1.0 if scaler is None else scaler.scale(torch.ones_like(self._penalty.value))
        self._penalty.add_gradient_to_grad(self.regularizer.present_beta / trainer.accumulate_grad_batches * scale)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log, and free the penalty's memory."""
        self._penalty = None
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set by its logger connector; 0: never
        if self._log and self.regularizer is not None and every and trainer.global_step % every == 0:
            found = self.regularizer.diagnostics()
            pl_module.log_dict({f"fisher_trace/{name}": value for name, value in found.items()})


class MeasureCallback(Callback):
    """Measures the network while it trains: ``Trainer(callbacks=[MeasureCallback(Tracker(train_set, every=5))])``.

    At the end of a training epoch, after its validation. Logged as ``flatminima/...``; the Trainer's own metrics of the
    epoch are kept beside the measures. With several processes all measure, and get the same. In a ``fast_dev_run`` the
    tracker measures, and keeps nothing.

    Args:
        tracker: what it measures on, how, and how often: a :class:`flatminima.Tracker`.
        network: what of the module is measured, from inputs to logits (None: the module itself, by its ``forward``).
        log: log the measures, to whatever logger the Trainer has.

    Raises:
        FlatminimaError: for a module without a ``forward`` (when training starts), and as the tracker does, at the end
            of the first epoch that is due.
    """

    def __init__(
        self, tracker: Tracker, *, network: Callable[[LightningModule], nn.Module] | None = None, log: bool = True
    ) -> None:
        self.tracker = tracker
        self._network, self._log = network, log
        self._metrics_before: dict[str, Tensor] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the module."""
        if self._network is None and type(pl_module).forward is LightningModule.forward:
            raise FlatminimaError(
                f"{type(pl_module).__name__} has no forward that could be measured: define one, or say what is to be "
                "measured, MeasureCallback(tracker, network=lambda module: module.network)"
            )

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember the metrics of earlier epochs, which the Trainer keeps until they are logged anew."""
        self._metrics_before = dict(trainer.callback_metrics)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure, if it is time."""
        network = pl_module if self._network is None else self._network(pl_module)
        before = self._metrics_before
        logged = {name: value for name, value in trainer.callback_metrics.items() if value is not before.get(name)}
        # among them is what another of these callbacks has logged
        others = {n: float(v) for n, v in logged.items() if v.numel() == 1 and not n.startswith(LOGGED_AS)}
        tracker = self.tracker.rehearsal() if trainer.fast_dev_run else self.tracker  # type: ignore[attr-defined]
        tracked = tracker.track(network, trainer.current_epoch + 1, others)
        if tracked is not None and self._log:
            pl_module.log_dict(tracked.logged())


def _loss(module: LightningModule, batch: Any, batch_idx: int) -> Tensor:
    takes_index = is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)  # as Lightning asks
    output: Any = module.training_step(batch, batch_idx) if takes_index else module.training_step(batch)
    loss: Tensor | None = output["loss"] if isinstance(output, dict) else output
    return torch.zeros((), device=module.device) if loss is None else loss  # None skips the batch


def _several(batch: Any, count: int) -> Any:
    """What a CombinedLoader gives, batches of different sizes in a mapping or list, to be split side by side."""
    if isinstance(batch, (dict, list, tuple)) and len({len(t) for t in tensors_of(batch) if t.dim()}) > 1:
        return SeveralBatches.of(batch, count)
    return batch


@contextmanager
def _without_side_effects(module: LightningModule) -> Iterator[None]:
    """``self.log`` does nothing, and metrics come out as they went in."""
    metrics = {metric: _state(metric) for metric in module.modules() if isinstance(metric, (Metric, MetricCollection))}
    try:
        module.__dict__["log"] = lambda *args, **kwargs: None
        yield
    finally:
        module.__dict__.pop("log", None)
        for metric, state in metrics.items():
            metric.__dict__.update(state)


def _state(metric: Metric | MetricCollection) -> dict[str, Any]:
    """A metric's attributes; tensors and lists, which it may change in place, are copied.

    A collection's say which of its metrics are one: those that agree after its first update, as on one sample many do.
    """

    def copy_of(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.clone()
        return list(value) if isinstance(value, list) else value

    if isinstance(metric, MetricCollection):
        return {name: copy.deepcopy(value) for name, value in vars(metric).items() if name.startswith("_groups")}
    return {name: copy_of(value) for name, value in vars(metric).items()}
