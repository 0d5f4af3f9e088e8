"""From the values of single trials to a model's characterization."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from flatminima.errors import RankDeficientError, SingularTrialWarning, warn
from flatminima.gramian import warn_generic
from flatminima.losses import form_in_words
from flatminima.measures.preparation import PreparedModel
from flatminima.measures.results import ATTRIBUTES, Characterization, Estimate, Settings, Share
from flatminima.measures.trials import ShareValues, TrialValues
from flatminima.network import device_of


def characterize(prepared: PreparedModel, trials: Sequence[TrialValues]) -> Characterization:
    """What the trials say of the model; warns of what :func:`~flatminima.measure` does after its last trial.

    Raises:
        RankDeficientError: if ξ was singular in every trial.
    """
    if prepared.options.path == "rules":
        warn_generic(trials[0].generic_parameters, prepared.checks)
    singular = _singular_trials(trials)
    left_out = {name: reason for trial in reversed(trials) for name, reason in trial.undefined.items()}
    estimates = {
        measure.name: Estimate.of([trial.values[measure.name] for trial in trials])
        for measure in prepared.selection.measures
        if measure.name not in left_out
    }
    return Characterization(
        **{name: estimates.get(name) for name in ATTRIBUTES},  # type: ignore[arg-type]
        others={name: estimate for name, estimate in estimates.items() if name not in ATTRIBUTES},
        spectrum=tuple(torch.stack([trial.spectrum for trial in trials]).mean(0).tolist()),
        train_loss=prepared.train.loss,
        train_accuracy=None if prepared.train.correct is None else prepared.train.accuracy,
        num_parameters=prepared.num_parameters,
        num_samples=len(prepared.samples),
        singular_trials=singular,
        shares=_joined_shares(trials),
        settings=_settings(prepared, trials, left_out),
    )


def _settings(prepared: PreparedModel, trials: Sequence[TrialValues], left_out: dict[str, str]) -> Settings:
    options = prepared.options
    loss = options.loss
    return Settings(
        loss=loss if isinstance(loss, str) else getattr(loss, "__name__", type(loss).__name__),
        fisher=options.fisher,
        subset_size=options.subset_size,
        trials=len(trials),
        seed=options.seed,
        batchnorm=options.batchnorm,
        logit_normalization=options.logit_normalization,
        scale_invariant=options.scale_invariant,
        robustness_samples=options.robustness_samples,
        generic_parameters=list(trials[0].generic_parameters),
        dtype=trials[0].dtype,
        device=str(device_of(prepared.model)),
        left_out={name: reason for name, reason in left_out.items() if name not in ATTRIBUTES},
        larger_is_better=[measure.name for measure in prepared.selection.measures if measure.larger_is_better],
        loss_form=form_in_words(loss),
    )


def _singular_trials(trials: Sequence[TrialValues]) -> tuple[int, ...]:
    """The trials without a ln det ξ, which is warned of."""
    singular = tuple(number for number, trial in enumerate(trials) if math.isnan(trial.log_det_fisher))
    if len(singular) == len(trials):
        raise RankDeficientError("ξ is singular in every trial: use on_singular='raise' to see why")
    if singular:
        warn(
            f"{len(singular)} of {len(trials)} trials (first: {singular[:5]}) have a singular ξ: left out of ln det ξ",
            SingularTrialWarning,
        )
    return singular


def _joined_shares(trials: Sequence[TrialValues]) -> dict[str, Share] | None:
    parts = [trial.shares for trial in trials if trial.shares is not None]
    if not parts:
        return None
    return {name: _joined_share([part[name] for part in parts]) for name in parts[0]}


def _joined_share(values: Sequence[ShareValues]) -> Share:
    traces, log_dets, ranks = zip(*values, strict=True)
    return Share(
        fisher_trace=Estimate.of(traces),
        log_det=None if any(map(math.isnan, log_dets)) else Estimate.of(log_dets),
        rank=min(ranks),
    )
