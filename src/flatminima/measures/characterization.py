"""From the values of single trials to a model's characterization."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from flatminima.errors import RankDeficientError, SingularTrialWarning, warn
from flatminima.gramian import warn_generic
from flatminima.measures.preparation import PreparedModel
from flatminima.measures.results import Characterization, Estimate, Settings, Share
from flatminima.measures.trials import ShareValues, TrialValues
from flatminima.network import device_of


def characterize(prepared: PreparedModel, trials: Sequence[TrialValues]) -> Characterization:
    """What the trials say of the model; warns of what :func:`~flatminima.measure` does after its last trial.

    Raises:
        RankDeficientError: if ξ was singular in every trial.
    """
    if prepared.options.path == "rules":
        warn_generic(trials[0].generic_parameters, prepared.checks)
    robustness = [trial.robustness for trial in trials]
    return Characterization(
        log_det_fisher=Estimate.of([trial.log_det_fisher for trial in trials]),
        spectral_radius=Estimate.of([trial.spectral_radius for trial in trials]),
        frobenius_norm=Estimate.of([trial.frobenius_norm for trial in trials]),
        fisher_frobenius_norm=Estimate.of([trial.fisher_frobenius_norm for trial in trials]),
        fisher_trace=Estimate.of([trial.fisher_trace for trial in trials]),
        robustness=None if all(map(math.isnan, robustness)) else Estimate.of(robustness),
        spectrum=tuple(torch.stack([trial.spectrum for trial in trials]).mean(0).tolist()),
        train_loss=prepared.train.loss,
        train_accuracy=None if prepared.train.correct is None else prepared.train.accuracy,
        num_parameters=prepared.num_parameters,
        num_samples=len(prepared.samples),
        singular_trials=_singular_trials(trials),
        shares=_joined_shares(trials),
        settings=_settings(prepared, trials),
    )


def _settings(prepared: PreparedModel, trials: Sequence[TrialValues]) -> Settings:
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
        robustness_samples=prepared.robustness_samples,
        generic_parameters=list(trials[0].generic_parameters),
        dtype=trials[0].dtype,
        device=str(device_of(prepared.model)),
        no_robustness=prepared.no_robustness,
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
