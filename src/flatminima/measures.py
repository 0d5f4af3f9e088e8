"""What: ξ → γ̂ and its rivals, over many subsets of the training data, with their standard errors."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from io import StringIO
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from flatminima.batching import Inputs, device_of, to_device
from flatminima.determinant import log_determinant, numerical_rank
from flatminima.errors import (
    FlatminimaError,
    NotAMinimumWarning,
    RankDeficientError,
    SingularTrialWarning,
)
from flatminima.evaluation import evaluate
from flatminima.gramian import FactoredGram, factored_gram, plan_for, trainable_parameters, warn_generic
from flatminima.losses import Loss
from flatminima.robustness import has_input_jacobian, input_jacobian_norms
from flatminima.sampling import Data, draw_subsets, samples_of
from flatminima.trials import perform_trials

MINIMUM_LOSS, MINIMUM_ACCURACY = 0.1, 0.99
"""A cross entropy (nats) above the first with an accuracy below the second is not called a minimum."""

MINIMUM_TRIALS = 5
"""Before so many trials a standard error is too uncertain itself to stop by."""


@dataclass(frozen=True)
class Estimate:
    """A mean over trials with its uncertainty.

    Attributes:
        mean: the average over trials.
        standard_error: sample standard deviation / √T; NaN for a single trial.
        per_trial: the T values, in the order of the subsets; NaN where a trial was left out (then not in the mean).
    """

    mean: float
    standard_error: float
    per_trial: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """The estimate from one value per trial; at least one must not be NaN."""
        kept = [value for value in values if not math.isnan(value)]
        error = statistics.stdev(kept) / math.sqrt(len(kept)) if len(kept) > 1 else math.nan
        return cls(statistics.fmean(kept), error, tuple(values))

    def __str__(self) -> str:
        return f"{self.mean:.6g} ± {self.standard_error:.2g}"


@dataclass(frozen=True)
class Share:
    """One parameter's part of ξ = Σ_p J_p J_pᵀ.

    Attributes:
        fisher_trace: its part of the trace of the Fisher information; the parts add up to the whole.
        log_det: ln det J_p J_pᵀ; None where that is singular in some trial, as it must be for a parameter with fewer
            than N' entries. These do not add up: ln det of a sum is at least that of each summand.
        rank: the smallest rank of J_p J_pᵀ over the trials.
    """

    fisher_trace: Estimate
    log_det: Estimate | None
    rank: int


@dataclass(frozen=True)
class Characterization:
    """The measures of one trained minimum; smaller means better generalization, at similar training loss.

    Attributes:
        log_det_fisher: γ̂ = (1/T) Σ_t ln det ξ_t (Eq. 5), natural logarithm.
        spectral_radius: (1/T) Σ_t ‖J_t‖₂², the largest eigenvalue of ξ_t (App. D; Keskar et al.).
        frobenius_norm: mean_i ‖g_i g_iᵀ‖_F² = mean_i ξ_ii² (App. D; Wu et al.), exact instead of sampled.
        fisher_frobenius_norm: ‖(1/N') J_tᵀJ_t‖_F² = ‖ξ_t‖_F² / N'², of the subset's Fisher information itself.
        fisher_trace: mean_i ‖g_i‖² = mean_i ξ_ii (Sec. 6).
        robustness: mean_i ‖J_x[f_w(x_i)]‖₂² (Sokolić et al.); None where the input is not one floating-point tensor.
        spectrum: (N',) eigenvalues of ξ_t in descending order, averaged over trials.
        train_loss: mean loss over all of ``data``; measures compare at similar values only.
        train_accuracy: fraction of ``data`` classified right; None for losses other than the cross entropy.
        num_parameters: W, trainable parameters.
        num_samples: N, the size of ``data``.
        singular_trials: trials left out of ``log_det_fisher`` (``on_singular="skip"``).
        shares: every parameter's :class:`Share` of ξ by name, where asked for.
        settings: everything needed to get the numbers again.
    """

    log_det_fisher: Estimate
    spectral_radius: Estimate
    frobenius_norm: Estimate
    fisher_frobenius_norm: Estimate
    fisher_trace: Estimate
    robustness: Estimate | None
    spectrum: tuple[float, ...]
    train_loss: float
    train_accuracy: float | None
    num_parameters: int
    num_samples: int
    singular_trials: tuple[int, ...]
    shares: dict[str, Share] | None
    settings: Settings

    def estimates(self) -> dict[str, Estimate]:
        """The measures by name, γ̂ first; those not defined for this network left out."""
        return {name: value for name in MEASURES if (value := getattr(self, name)) is not None}

    def to_json(self) -> str:
        """One JSON object; NaN becomes null."""
        return json.dumps(nan_to_none(dataclasses.asdict(self)), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Characterization:
        """The inverse of :meth:`to_json`.

        Raises:
            FlatminimaError: if ``text`` is not a characterization.
        """
        try:
            values = json.loads(text)
            for name in MEASURES:
                if values[name] is not None:
                    values[name] = _estimate_from(values[name])
            values["settings"] = Settings(**values["settings"])
            for name in ("spectrum", "singular_trials"):
                values[name] = tuple(values[name])
            if values["shares"] is not None:
                values["shares"] = {name: _share_from(share) for name, share in values["shares"].items()}
            return cls(**values)
        except (KeyError, TypeError, ValueError) as error:
            raise FlatminimaError(f"not a characterization ({error!r}): measure the model again") from error

    def __rich__(self) -> Table:
        s = self.settings
        table = Table(title=f"Minimum with {self.num_parameters:,} parameters")
        for heading in ("measure", "mean", "standard error"):
            table.add_column(heading, justify="left" if heading == "measure" else "right")
        for name, estimate in self.estimates().items():
            table.add_row(MEASURES[name], f"{estimate.mean:.6g}", f"{estimate.standard_error:.2g}")
        table.add_section()
        table.add_row("training loss", f"{self.train_loss:.6g}", "")
        if self.train_accuracy is not None:
            table.add_row("training accuracy", f"{self.train_accuracy:.4%}", "")
        drawn = f"{s.trials} subsets of {s.subset_size} from {self.num_samples:,} samples, seed {s.seed}"
        table.caption = f"{drawn}, BatchNorm {s.batchnorm}"
        return table

    def __str__(self) -> str:
        return rendered(self)


@dataclass(frozen=True)
class Settings:
    """How a :class:`Characterization` was obtained.

    Attributes:
        loss: ``"cross_entropy"``, or the callable's name.
        subset_size: N'.
        trials: T.
        seed: draws the subsets.
        batchnorm: how BatchNorm normalized; ``"eval"``: by its running statistics, n: by chunks of n samples.
        logit_normalization: κ, where the loss was taken at normalized logits.
        scale_invariant: whether gradients were weighted by the parameters' magnitudes.
        robustness_samples: samples per trial that the robustness was computed on.
        generic_parameters: parameters without a layer rule, differentiated one sample at a time.
        dtype: the network's floating-point type.
        device: where it ran.
        torch_version: PyTorch's version.
        flatminima_version: this library's version.
    """

    loss: str
    subset_size: int
    trials: int
    seed: int
    batchnorm: str | int
    logit_normalization: float | None
    scale_invariant: bool
    robustness_samples: int
    generic_parameters: list[str]
    dtype: str
    device: str
    torch_version: str = field(default_factory=lambda: str(torch.__version__))
    flatminima_version: str = field(default_factory=lambda: version("flatminima"))


MEASURES = {
    "log_det_fisher": "γ̂ = ln det ξ",
    "spectral_radius": "spectral radius",
    "frobenius_norm": "Frobenius norm² (per sample)",
    "fisher_frobenius_norm": "Frobenius norm² (Fisher)",
    "fisher_trace": "trace of the Fisher",
    "robustness": "robustness",
}
"""Every measure's field and its name in tables."""


def measure(
    model: nn.Module,
    data: Data,
    *,
    loss: Loss = "cross_entropy",
    subset_size: int = 100,
    trials: int = 100,
    seed: int = 0,
    batchnorm: Literal["eval"] | int = "eval",
    logit_normalization: float | None = None,
    scale_invariant: bool = False,
    per_parameter: bool = False,
    max_standard_error: float | None = None,
    robustness_samples: int | None = None,
    on_singular: Literal["raise", "skip"] = "raise",
    memory_budget: int | None = None,
    distributed: bool = False,
    progress: bool = True,
) -> Characterization:
    """Characterize a trained minimum: γ̂ (Jia & Su, Eq. 5) and its rivals over ``trials`` subsets of the training data.

    The model is run in eval mode and left as it was found. Pass the *un-augmented training set*.

    Args:
        model: any module; its output is the logits, or an object with ``.logits``.
        data: the training data: a map-style Dataset, a DataLoader, or a tuple of tensors (inputs, targets).
        loss: ``"cross_entropy"``, or ``loss(logits, targets)`` → (N',) tensor of per-sample losses.
        subset_size: N', samples per subset (paper: 100).
        trials: T, number of subsets (paper: 100); at most, with ``max_standard_error``.
        seed: draws the subsets; the same seed draws the same ones for every model.
        batchnorm: ``"eval"``: BatchNorm normalizes by its running statistics, so a sample's gradient is its own. Or a
            number n: by the statistics of chunks of n samples, as the authors' release does (n = 10), where a sample's
            gradient depends on its chunk; n must divide ``subset_size``, and it costs n backward passes.
        logit_normalization: None, or κ = 0.04 to compare minima of unequal training loss as the authors do (their
            release, Table 2): gradients are those of the loss at logits z / (κ ‖z‖₂). The training loss reported stays
            the plain one, and robustness is not affected.
        scale_invariant: weight the gradient of every parameter by the parameter's magnitude, J diag(|w|), so that
            rescaling a layer whose successor undoes it (ReLU, BatchNorm) cannot change the measures. (Dinh et al.
            2017 showed that it otherwise can; Sec. 5.1.)
        per_parameter: also report every parameter's share of ξ, in ``Characterization.shares``.
        max_standard_error: stop before ``trials`` as soon as γ̂'s standard error is at most this (and at least
            five trials are done). Trials are added in the same order whatever the model, so results stay
            paired as far as both go.
        robustness_samples: on how many of each subset's samples robustness is computed (default: all; 0: not at
            all). It takes K − 1 backward passes and dominates the cost.
        on_singular: what to do with a subset whose ξ is singular (duplicate samples, zero gradients): ``"raise"``, or
            ``"skip"`` to leave it out of ln det ξ with a :class:`~flatminima.errors.SingularTrialWarning`.
        memory_budget: bytes that may be used beside the model (default: half of what is free). Where the samples or
            the rows of J do not fit at once, ξ is formed in several passes, exactly; see
            :func:`flatminima.gramian.plan_for`.
        distributed: split the trials over the ranks of the default process group (``torchrun``). Every rank calls with
            the same arguments and gets the whole result, which is that of a single process.
        progress: show a bar with the time left on a terminal.

    Raises:
        FlatminimaError: for bad input: too few samples, data that change between passes, unsuitable targets or loss.
        NonFiniteError: for NaN or infinity in weights, logits or losses.
        RankDeficientError: for a singular ξ; names the samples and the rank.
        WrongGradientError: if a spot check against plain autograd fails.

    Warns:
        NotAMinimumWarning: if the training loss is too high.
        GenericPathWarning: if some parameters have no layer rule.

    Example:
        >>> import torch, flatminima
        >>> x, y = torch.randn(60, 20), torch.arange(60) % 3
        >>> x = x + 20 * torch.nn.functional.one_hot(y, 20)
        >>> model = torch.nn.Linear(20, 3)
        >>> _ = model.weight.data.copy_(torch.eye(3, 20)), model.bias.data.zero_()
        >>> c = flatminima.measure(model, (x, y), subset_size=10, trials=5)
        >>> len(c.log_det_fisher.per_trial)
        5
    """
    _check_options(batchnorm, on_singular, robustness_samples, max_standard_error)
    num_parameters = sum(p.numel() for p in trainable_parameters(model).values())
    if subset_size > num_parameters:
        raise FlatminimaError(
            f"subset_size={subset_size} exceeds the model's {num_parameters} trainable parameters, "
            f"so every ξ is singular: lower subset_size to at most {num_parameters}"
        )
    samples = samples_of(data)
    subsets = draw_subsets(len(samples), subset_size, trials, seed)
    train = evaluate(model, samples, loss, progress=progress)
    if train.correct is not None and train.loss > MINIMUM_LOSS and train.accuracy < MINIMUM_ACCURACY:
        warnings.warn(
            f"training loss {train.loss:.3g} and accuracy {train.accuracy:.1%} are too far from a minimum for the "
            "measures to mean what they say: train on, or read them with care",
            NotAMinimumWarning,
            stacklevel=2,
        )
    kept = subset_size if robustness_samples is None else min(robustness_samples, subset_size)
    first, _ = to_device(samples.fetch(subsets[0]), device_of(model))
    plan = plan_for(model, first, memory_budget=memory_budget)
    if progress and len(plan.passes) > 1:
        Console(stderr=True).print(f"plan: {plan}", highlight=False)

    def perform(number: int) -> _Trial:
        inputs, targets = to_device(samples.fetch(subsets[number]), device_of(model))
        factored = factored_gram(
            model,
            inputs,
            targets,
            loss=loss,
            logit_normalization=logit_normalization,
            batchnorm=batchnorm,
            scale_invariant=scale_invariant,
            shares=per_parameter,
            plan=plan,
            spot_check=number == 0,
        )
        return _Trial.of(factored, _robustness(model, inputs, kept), number, subsets[number], on_singular)

    def precise_enough(done: Sequence[_Trial]) -> bool:
        return max_standard_error is not None and _standard_error(done) <= max_standard_error

    done = perform_trials(perform, trials, precise_enough, distributed=distributed, progress=progress)
    warn_generic(done[0].generic_parameters)
    return _characterize(
        done,
        train_loss=train.loss,
        train_accuracy=None if train.correct is None else train.accuracy,
        num_parameters=num_parameters,
        num_samples=len(samples),
        settings=Settings(
            loss=loss if isinstance(loss, str) else getattr(loss, "__name__", type(loss).__name__),
            subset_size=subset_size,
            trials=len(done),
            seed=seed,
            batchnorm=batchnorm,
            logit_normalization=logit_normalization,
            scale_invariant=scale_invariant,
            robustness_samples=kept,
            generic_parameters=list(done[0].generic_parameters),
            dtype=done[0].dtype,
            device=str(device_of(model)),
        ),
    )


def _check_options(
    batchnorm: str | int, on_singular: str, robustness_samples: int | None, max_standard_error: float | None
) -> None:
    if batchnorm != "eval" and not isinstance(batchnorm, int):
        raise FlatminimaError(
            f"unknown batchnorm={batchnorm!r}: use 'eval' (running statistics) or the number of samples in a chunk"
        )
    if max_standard_error is not None and not max_standard_error > 0:
        raise FlatminimaError(f"max_standard_error must be positive, got {max_standard_error}")
    if on_singular not in ("raise", "skip"):
        raise FlatminimaError(f"unknown on_singular={on_singular!r}: use 'raise' or 'skip'")
    if robustness_samples is not None and robustness_samples < 0:
        raise FlatminimaError(f"robustness_samples must be 0 or more, got {robustness_samples}")


def _robustness(model: nn.Module, inputs: Inputs, samples: int) -> float:
    """The mean over the first ``samples`` samples; NaN where there is none."""
    if not samples or not has_input_jacobian(inputs):
        return math.nan
    return input_jacobian_norms(model, inputs[:samples]).mean().item()


@dataclass(frozen=True)
class _Trial:
    """One subset's values; ``log_det_fisher`` is NaN where ξ is singular and that is to be skipped."""

    log_det_fisher: float
    spectral_radius: float
    frobenius_norm: float
    fisher_frobenius_norm: float
    fisher_trace: float
    robustness: float
    spectrum: Tensor
    shares: dict[str, tuple[float, float, int]] | None
    generic_parameters: tuple[str, ...]
    dtype: str

    @classmethod
    def of(
        cls, factored: FactoredGram, robustness: float, number: int, subset: Sequence[int], on_singular: str
    ) -> _Trial:
        try:
            log_det = log_determinant(factored, subset)
        except RankDeficientError as error:
            if on_singular == "raise":
                raise RankDeficientError(
                    f"trial {number}: {error}; or pass on_singular='skip' to leave such trials out"
                ) from None
            log_det = math.nan
        xi = factored.matrix()
        spectrum = torch.linalg.eigvalsh(xi).flip(0).clamp_min(0).cpu()
        return cls(
            log_det_fisher=log_det,
            spectral_radius=spectrum[0].item(),
            frobenius_norm=xi.diagonal().square().mean().item(),
            fisher_frobenius_norm=xi.square().sum().item() / len(xi) ** 2,
            fisher_trace=xi.diagonal().mean().item(),
            robustness=robustness,
            spectrum=spectrum,
            shares=None if factored.shares is None else {name: _share(factored, name) for name in factored.shares},
            generic_parameters=factored.generic_parameters,
            dtype=str(factored.dtype).removeprefix("torch."),
        )


def _share(factored: FactoredGram, name: str) -> tuple[float, float, int]:
    """(trace, ln det or NaN, rank) of one parameter's part of ξ."""
    assert factored.shares is not None
    part = dataclasses.replace(factored, unit=factored.shares[name], shares=None)
    rank = numerical_rank(part)
    log_det = log_determinant(part) if rank == len(part.unit) else math.nan
    return part.matrix().diagonal().mean().item(), log_det, rank


def _joined_shares(trials: Sequence[_Trial]) -> dict[str, Share] | None:
    parts = [trial.shares for trial in trials if trial.shares is not None]
    if not parts:
        return None
    joined = {}
    for name in parts[0]:
        traces, log_dets, ranks = zip(*(part[name] for part in parts), strict=True)
        log_det = None if any(map(math.isnan, log_dets)) else Estimate.of(log_dets)
        joined[name] = Share(Estimate.of(traces), log_det, min(ranks))
    return joined


def _standard_error(trials: Sequence[_Trial]) -> float:
    """Of γ̂; infinite before there are enough trials to tell."""
    kept = [trial.log_det_fisher for trial in trials if not math.isnan(trial.log_det_fisher)]
    return Estimate.of(kept).standard_error if len(kept) >= MINIMUM_TRIALS else math.inf


def _characterize(trials: Sequence[_Trial], **known: Any) -> Characterization:
    singular = tuple(i for i, trial in enumerate(trials) if math.isnan(trial.log_det_fisher))
    if len(singular) == len(trials):
        raise RankDeficientError("ξ is singular in every trial: use on_singular='raise' to see why")
    if singular:
        warnings.warn(
            f"{len(singular)} of {len(trials)} trials (first: {singular[:5]}) have a singular ξ: left out of ln det ξ",
            SingularTrialWarning,
            stacklevel=3,
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


def rendered(renderable: Any) -> str:
    """What a terminal of 120 columns would show."""
    buffer = StringIO()
    Console(file=buffer, width=120).print(renderable)
    return buffer.getvalue().rstrip()


def _estimate_from(values: dict[str, Any]) -> Estimate:
    def number(value: float | None) -> float:
        return math.nan if value is None else value

    return Estimate(number(values["mean"]), number(values["standard_error"]), tuple(map(number, values["per_trial"])))


def _share_from(values: dict[str, Any]) -> Share:
    log_det = values["log_det"]
    return Share(
        _estimate_from(values["fisher_trace"]), None if log_det is None else _estimate_from(log_det), values["rank"]
    )


def nan_to_none(value: Any) -> Any:
    """``value`` with NaN replaced by None throughout, as JSON has no NaN."""
    if isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, dict):
        return {key: nan_to_none(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [nan_to_none(item) for item in value]
    return value
