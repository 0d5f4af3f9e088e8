"""One model with all that its trials need."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from flatminima.errors import (
    FlatminimaError,
    NotAMinimumWarning,
    RankDeficientError,
    SingularTrialWarning,
    warn,
)
from flatminima.gramian import Checks, factored_gram, plan_for, trainable_parts, unwrapped, warn_generic
from flatminima.measures.evaluation import evaluate
from flatminima.measures.fisher import FisherRows
from flatminima.measures.options import Options
from flatminima.measures.results import Characterization, Estimate, Settings, Share
from flatminima.measures.robustness import has_input_jacobian, input_jacobian_norms
from flatminima.measures.trials import Trial
from flatminima.network import Inputs, Samples, device_of, draw_subsets, to_device
from flatminima.parallel import Processes, Result, processes_of, shared

MINIMUM_LOSS, MINIMUM_ACCURACY = 0.1, 0.99
"""A cross entropy (nats) above the first with an accuracy below the second is not called a minimum."""


@contextmanager
def ending_together(models: Iterable[nn.Module], options: Options) -> Iterator[None]:
    """:meth:`Processes.together`, for the processes that split the trials, or those that share a model's parameters."""
    with ExitStack() as stack:
        if options.distributed:
            stack.enter_context(Processes.all().together())
        for model in models:
            stack.enter_context(shared(unwrapped(model)))
        yield


class Subject:
    """One model with all that its trials need: what :func:`measure` has one of, and a comparison several.

    Making one evaluates the training loss, and raises and warns of what :func:`measure` does before its first trial.
    """

    def __init__(self, model: nn.Module, samples: Samples, options: Options) -> None:
        self.model, self.samples, self.options = model, samples, options
        self.processes = processes_of(unwrapped(model))
        if self.processes.size > 1 and options.distributed:
            raise FlatminimaError(
                "the processes that share a sharded model's parameters perform every trial together: "
                "leave distributed=True out"
            )
        self.processes.require_same("numbers of samples", lambda: len(samples))
        parts = trainable_parts(unwrapped(model), self.processes)
        self.num_parameters = sum(part.parameter.numel() for part in parts.values())
        self.subsets = draw_subsets(len(samples), options.subset_size, options.trials, options.seed)
        first = self._batch(0)
        self.rows = FisherRows.of(options.fisher, options.loss, model, first[0])
        self._refuse_more_rows_than_parameters()
        self.checks = Checks()
        self.train = self._together(lambda: evaluate(model, samples, options.loss, progress=options.progress))
        self._warn_unless_minimum()
        self.plan = plan_for(model, self.rows.of_batch(*first)[0], memory_budget=options.memory_budget)
        if options.progress and len(self.plan.passes) > 1:
            Console(stderr=True).print(f"plan: {self.plan}", highlight=False)

    def perform(self, number: int) -> Trial:
        """The trial on subset ``number``."""
        return self._together(lambda: self._perform(number))

    def _perform(self, number: int) -> Trial:
        inputs, targets = self._batch(number)
        factored = factored_gram(
            self.model,
            *self.rows.of_batch(inputs, targets),
            loss=self.rows.loss,
            logit_normalization=self.options.logit_normalization,
            batchnorm=self.options.batchnorm,
            scale_invariant=self.options.scale_invariant,
            shares=self.options.per_parameter,
            plan=self.plan,
            checks=self.checks,
        )
        names = self.rows.names(self.subsets[number])
        return Trial.of(
            factored, self.rows.per_sample, self._robustness(inputs), number, names, self.options.on_singular
        )

    def characterize(self, done: Sequence[Trial]) -> Characterization:
        """What the trials so far say of the model; warns of what :func:`measure` does after its last trial."""
        options, loss = self.options, self.options.loss
        warn_generic(done[0].generic_parameters)
        return _characterize(
            done,
            train_loss=self.train.loss,
            train_accuracy=None if self.train.correct is None else self.train.accuracy,
            num_parameters=self.num_parameters,
            num_samples=len(self.samples),
            settings=Settings(
                loss=loss if isinstance(loss, str) else getattr(loss, "__name__", type(loss).__name__),
                fisher=options.fisher,
                subset_size=options.subset_size,
                trials=len(done),
                seed=options.seed,
                batchnorm=options.batchnorm,
                logit_normalization=options.logit_normalization,
                scale_invariant=options.scale_invariant,
                robustness_samples=self._robustness_samples,
                generic_parameters=list(done[0].generic_parameters),
                dtype=done[0].dtype,
                device=str(device_of(self.model)),
            ),
        )

    @property
    def _robustness_samples(self) -> int:
        asked, size = self.options.robustness_samples, self.options.subset_size
        return size if asked is None else min(asked, size)

    def _batch(self, number: int) -> tuple[Inputs, Tensor]:
        batch = self.processes.attempt(lambda: self.samples.fetch(self.subsets[number]))
        return to_device(batch, device_of(self.model))

    def _together(self, action: Callable[[], Result]) -> Result:
        """What the first of the model's processes finds: the same to the last bit on all."""
        return self.processes.gather(action)[0]

    def _robustness(self, inputs: Inputs) -> float:
        """The mean over the samples it was asked for; NaN where there is none."""
        if not self._robustness_samples or not has_input_jacobian(inputs):
            return math.nan
        return input_jacobian_norms(self.model, inputs[: self._robustness_samples]).mean().item()

    def _refuse_more_rows_than_parameters(self) -> None:
        size, per_sample = self.options.subset_size, self.rows.per_sample
        if size * per_sample > self.num_parameters:
            rows = "" if per_sample == 1 else f" times {per_sample} rows per sample (fisher={self.options.fisher!r})"
            raise FlatminimaError(
                f"subset_size={size}{rows} exceeds the model's {self.num_parameters} trainable parameters, "
                f"so every ξ is singular: lower subset_size to at most {self.num_parameters // per_sample}"
            )

    def _warn_unless_minimum(self) -> None:
        train = self.train
        if train.correct is not None and train.loss > MINIMUM_LOSS and train.accuracy < MINIMUM_ACCURACY:
            warn(
                f"training loss {train.loss:.3g} and accuracy {train.accuracy:.1%} are too far from a minimum for the "
                "measures to mean what they say: train on, or read them with care",
                NotAMinimumWarning,
            )


def _joined_shares(trials: Sequence[Trial]) -> dict[str, Share] | None:
    parts = [trial.shares for trial in trials if trial.shares is not None]
    if not parts:
        return None
    joined = {}
    for name in parts[0]:
        traces, log_dets, ranks = zip(*(part[name] for part in parts), strict=True)
        log_det = None if any(map(math.isnan, log_dets)) else Estimate.of(log_dets)
        joined[name] = Share(Estimate.of(traces), log_det, min(ranks))
    return joined


def _characterize(trials: Sequence[Trial], **known: Any) -> Characterization:
    singular = tuple(i for i, trial in enumerate(trials) if math.isnan(trial.log_det_fisher))
    if len(singular) == len(trials):
        raise RankDeficientError("ξ is singular in every trial: use on_singular='raise' to see why")
    if singular:
        warn(
            f"{len(singular)} of {len(trials)} trials (first: {singular[:5]}) have a singular ξ: left out of ln det ξ",
            SingularTrialWarning,
        )
    robustness = [trial.robustness for trial in trials]
    return Characterization(
        log_det_fisher=Estimate.of([trial.log_det_fisher for trial in trials]),
        spectral_radius=Estimate.of([trial.spectral_radius for trial in trials]),
        frobenius_norm=Estimate.of([trial.frobenius_norm for trial in trials]),
        fisher_frobenius_norm=Estimate.of([trial.fisher_frobenius_norm for trial in trials]),
        fisher_trace=Estimate.of([trial.fisher_trace for trial in trials]),
        robustness=None if all(math.isnan(value) for value in robustness) else Estimate.of(robustness),
        spectrum=tuple(torch.stack([trial.spectrum for trial in trials]).mean(0).tolist()),
        singular_trials=singular,
        shares=_joined_shares(trials),
        **known,
    )
