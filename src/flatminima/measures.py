"""What: ξ → γ̂ and its rivals, over many subsets of the training data, with their standard errors."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from io import StringIO
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from flatminima.errors import (
    FlatminimaError,
    NotAMinimumWarning,
    RankDeficientError,
    SingularTrialWarning,
)
from flatminima.evaluation import evaluate
from flatminima.fisher import Fisher, FisherRows
from flatminima.gramian.engine import factored_gram, plan_for, unwrapped, warn_generic
from flatminima.gramian.factored import FactoredGram, log_determinant, numerical_rank
from flatminima.gramian.parts import trainable_parts
from flatminima.losses import Loss
from flatminima.network.batches import Inputs, device_of, to_device
from flatminima.network.samples import Data, Samples, draw_subsets, samples_of
from flatminima.parallel.fsdp import processes_of, shared
from flatminima.parallel.processes import Processes, Result
from flatminima.robustness import has_input_jacobian, input_jacobian_norms
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
        """The estimate from one value per trial; NaN where all of them are."""
        kept = [value for value in values if not math.isnan(value)]
        mean = statistics.fmean(kept) if kept else math.nan
        error = statistics.stdev(kept) / math.sqrt(len(kept)) if len(kept) > 1 else math.nan
        return cls(mean, error, tuple(values))

    def __str__(self) -> str:
        return f"{self.mean:.6g} ± {self.standard_error:.2g}"


@dataclass(frozen=True)
class Share:
    """One parameter's part of ξ = Σ_p J_p J_pᵀ.

    Attributes:
        fisher_trace: its part of the trace of the Fisher information; the parts add up to the whole.
        log_det: ln det J_p J_pᵀ; None where that is singular in some trial, as it must be for a parameter with fewer
            entries than J has rows. These do not add up: ln det of a sum is at least that of each summand.
        rank: the smallest rank of J_p J_pᵀ over the trials.
    """

    fisher_trace: Estimate
    log_det: Estimate | None
    rank: int


@dataclass(frozen=True)
class Characterization:
    """The measures of one trained minimum; smaller means better generalization, at similar training loss.

    F_i is sample i's part of the Fisher information: g_i g_iᵀ of its loss gradient g_i (Eq. 4), so that ‖F_i‖_F² is
    ξ_ii²; with ``fisher="labels"`` or ``"model"`` it is Σ_c y_c ∇ℓ_c ∇ℓ_cᵀ (Eq. 2), and J has K − 1 rows per sample.

    Attributes:
        log_det_fisher: γ̂ = (1/T) Σ_t ln det ξ_t (Eq. 5), natural logarithm.
        spectral_radius: (1/T) Σ_t ‖J_t‖₂², the largest eigenvalue of ξ_t (App. D; Keskar et al.).
        frobenius_norm: mean_i ‖F_i‖_F² over samples (App. D; Wu et al.), exact instead of sampled.
        fisher_frobenius_norm: ‖(1/N') J_tᵀJ_t‖_F² = ‖ξ_t‖_F² / N'², of the subset's Fisher information itself.
        fisher_trace: mean_i tr F_i over samples = tr ξ_t / N' (Sec. 6).
        robustness: mean_i ‖J_x[f_w(x_i)]‖₂² (Sokolić et al.); None where the input is not one floating-point tensor.
        spectrum: eigenvalues of ξ_t in descending order, averaged over trials; as many as J has rows.
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
        fisher = "" if s.fisher == "empirical" else f", exact Fisher by {s.fisher}"
        table.caption = f"{drawn}, BatchNorm {s.batchnorm}{fisher}"
        return table

    def __str__(self) -> str:
        return rendered(self)


@dataclass(frozen=True)
class Settings:
    """How a :class:`Characterization` was obtained.

    Attributes:
        loss: ``"cross_entropy"``, or the callable's name.
        fisher: which Fisher information, see :data:`~flatminima.fisher.Fisher`.
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
    fisher: Fisher
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
    fisher: Fisher = "empirical",
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
        model: any module; its output is the logits, or an object with ``.logits``. Sharded by FSDP2 (``fully_shard``),
            it is measured by all its processes together: all call with the same arguments and data, and get the same.
            An error on one is raised on all.
        data: the training data: a map-style Dataset, a DataLoader, or a tuple of tensors (inputs, targets).
        loss: ``"cross_entropy"``, or ``loss(logits, targets)`` → (N',) tensor of per-sample losses.
        fisher: ``"empirical"``: one gradient per sample, that of its loss (Eq. 4; the paper's measures). Or the exact
            Fisher information (Eq. 2), of all K classes weighted by the loss's label distribution (``"labels"``, which
            is the same unless the loss smooths its labels) or by the model's own probabilities (``"model"``). J then
            has K − 1 rows per sample: time and memory are K − 1 times as large, those of ξ itself (K − 1)² times, and
            subset_size · (K − 1) may not exceed the number of parameters. γ̂ is then another quantity, which compares
            with its like alone.
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
            five trials are done). In :func:`flatminima.compare`: the standard error of the differences.
        robustness_samples: on how many of each subset's samples robustness is computed (default: all; 0: not at
            all). It takes K − 1 backward passes and dominates the cost.
        on_singular: what to do with a subset whose ξ is singular (duplicate samples, zero gradients): ``"raise"``, or
            ``"skip"`` to leave it out of ln det ξ with a :class:`~flatminima.errors.SingularTrialWarning`.
        memory_budget: bytes that may be used beside the model (default: half of what is free). Where the samples or
            the rows of J do not fit at once, ξ is formed in several passes, exactly; see
            :func:`flatminima.gramian.engine.plan_for`.
        distributed: split the trials over the ranks of the default process group (``torchrun``). Every rank calls with
            the same arguments and gets the whole result, which is that of a single process, or the error of any. Not
            for sharded models, whose processes share every trial anyway.
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
    options = Options(
        loss=loss,
        fisher=fisher,
        subset_size=subset_size,
        trials=trials,
        seed=seed,
        batchnorm=batchnorm,
        logit_normalization=logit_normalization,
        scale_invariant=scale_invariant,
        per_parameter=per_parameter,
        max_standard_error=max_standard_error,
        robustness_samples=robustness_samples,
        on_singular=on_singular,
        memory_budget=memory_budget,
        distributed=distributed,
        progress=progress,
    )
    with ending_together([model], options):
        subject = Subject(model, samples_of(data), options)
        done = perform_trials(
            subject.perform,
            trials,
            lambda done: options.precise_enough([trial.log_det_fisher for trial in done]),
            distributed=distributed,
            progress=progress,
        )
        return subject.characterize(done)


@dataclass(frozen=True)
class Options:
    """The arguments of :func:`measure` beside model and data, checked; they are explained there."""

    loss: Loss
    fisher: Fisher
    subset_size: int
    trials: int
    seed: int
    batchnorm: Literal["eval"] | int
    logit_normalization: float | None
    scale_invariant: bool
    per_parameter: bool
    max_standard_error: float | None
    robustness_samples: int | None
    on_singular: Literal["raise", "skip"]
    memory_budget: int | None
    distributed: bool
    progress: bool

    def __post_init__(self) -> None:
        if self.batchnorm != "eval" and not isinstance(self.batchnorm, int):
            raise FlatminimaError(
                f"unknown batchnorm={self.batchnorm!r}: use 'eval' (running statistics) or the number of samples in a "
                "chunk"
            )
        if self.fisher != "empirical" and (self.batchnorm != "eval" or self.logit_normalization is not None):
            raise FlatminimaError(
                f"fisher={self.fisher!r} is the exact Fisher of the network in eval mode at its own logits: "
                "leave batchnorm and logit_normalization out, or use fisher='empirical'"
            )
        if self.max_standard_error is not None and not self.max_standard_error > 0:
            raise FlatminimaError(f"max_standard_error must be positive, got {self.max_standard_error}")
        if self.on_singular not in ("raise", "skip"):
            raise FlatminimaError(f"unknown on_singular={self.on_singular!r}: use 'raise' or 'skip'")
        if self.robustness_samples is not None and self.robustness_samples < 0:
            raise FlatminimaError(f"robustness_samples must be 0 or more, got {self.robustness_samples}")

    def precise_enough(self, values: Sequence[float]) -> bool:
        """Whether the mean of so many trials' values (NaN: left out) is as precise as was asked for."""
        if self.max_standard_error is None:
            return False
        kept = [value for value in values if not math.isnan(value)]
        return len(kept) >= MINIMUM_TRIALS and Estimate.of(kept).standard_error <= self.max_standard_error


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
            spot_check=number == 0,
        )
        names = self.rows.names(self.subsets[number])
        return Trial.of(
            factored, self.rows.per_sample, self._robustness(inputs), number, names, self.options.on_singular
        )

    def characterize(self, done: Sequence[Trial]) -> Characterization:
        """What the trials so far say of the model; warns of what :func:`measure` does after its last trial."""
        options, loss = self.options, self.options.loss
        warn_generic(done[0].generic_parameters, stacklevel=4)
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
            warnings.warn(
                f"training loss {train.loss:.3g} and accuracy {train.accuracy:.1%} are too far from a minimum for the "
                "measures to mean what they say: train on, or read them with care",
                NotAMinimumWarning,
                stacklevel=4,
            )


@dataclass(frozen=True)
class Trial:
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
        cls,
        factored: FactoredGram,
        per_sample: int,
        robustness: float,
        number: int,
        names: Sequence[int],
        on_singular: str,
    ) -> Trial:
        """The values of one ξ with ``per_sample`` rows for each sample; ``names`` says whose each row is."""
        try:
            log_det = log_determinant(factored, names)
        except RankDeficientError as error:
            if on_singular == "raise":
                raise RankDeficientError(
                    f"trial {number}: {error}; or pass on_singular='skip' to leave such trials out"
                ) from None
            log_det = math.nan
        xi = factored.matrix()
        spectrum = torch.linalg.eigvalsh(xi).flip(0).clamp_min(0).cpu()
        samples = len(xi) // per_sample
        own = xi.view(samples, per_sample, samples, per_sample).diagonal(dim1=0, dim2=2)  # the samples' blocks
        return cls(
            log_det_fisher=log_det,
            spectral_radius=spectrum[0].item(),
            frobenius_norm=own.square().sum().item() / samples,
            fisher_frobenius_norm=xi.square().sum().item() / samples**2,
            fisher_trace=xi.trace().item() / samples,
            robustness=robustness,
            spectrum=spectrum,
            shares=_shares(factored, samples),
            generic_parameters=factored.generic_parameters,
            dtype=str(factored.dtype).removeprefix("torch."),
        )


def _shares(factored: FactoredGram, samples: int) -> dict[str, tuple[float, float, int]] | None:
    if factored.shares is None:
        return None
    return {name: _share(factored, name, samples) for name in factored.shares}


def _share(factored: FactoredGram, name: str, samples: int) -> tuple[float, float, int]:
    """(trace, ln det or NaN, rank) of one parameter's part of ξ."""
    assert factored.shares is not None
    part = dataclasses.replace(factored, unit=factored.shares[name], shares=None)
    rank = numerical_rank(part)
    log_det = log_determinant(part) if rank == len(part.unit) else math.nan
    return part.matrix().trace().item() / samples, log_det, rank


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
        warnings.warn(
            f"{len(singular)} of {len(trials)} trials (first: {singular[:5]}) have a singular ξ: left out of ln det ξ",
            SingularTrialWarning,
            stacklevel=4,
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
