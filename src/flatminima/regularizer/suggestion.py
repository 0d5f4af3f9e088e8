"""Which α, β, M and τ to start from, by what a few penalties say of a model and its batches."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from torch import Tensor, nn

from flatminima.choices import Estimator
from flatminima.errors import (
    FlatminimaError,
    NotTrainingWarning,
    one_line,
    require,
    require_integer,
    require_positive,
    warn,
)
from flatminima.network import (
    batch_size,
    device_of,
    map_tensors,
    require_usable,
    restored_generators,
    run_model,
    undisturbed,
    undone_if_interrupted,
)
from flatminima.regularizer.penalty import Penalty
from flatminima.regularizer.regularizer import FisherTraceRegularizer, LossFunction
from flatminima.regularizer.steps import RegularizerStep, shares_of
from flatminima.tables import Table, rendered
from flatminima.torch_compat import BatchNorm

PENALTY_TO_GRADIENT = 2.0
"""What β aims at by default. Chosen on seeds that the records of ``benchmarks/suggest.py`` leave out. In these a weaker
one, 0.5, gains less with wrong labels on two of four networks, and still harms one that does not fit clean labels."""

_ALPHA = 1e-4  # the paper's, kept unless rounding or curvature speak against it
_LARGER_ALPHAS, _SMALLER_ALPHAS = (1e-3, 1e-2), (1e-5, 1e-6)
_ROUNDING = 0.1  # a rounding share beyond this asks for a larger α
_CURVATURE = 0.1  # a penalty further from α · trace than this share of it asks for a smaller one

_SAMPLES = 8  # of a sub-batch, if the batch has enough for
_FEWEST, _MOST = 4, 16  # sub-batches: the range that the paper searches
_SMALLEST_TAU, _LARGEST_TAU = 1.0, 5.0  # gradients may grow after a quiet beginning, and fall after a steep one


@dataclass(frozen=True, repr=False)
class Suggestion:
    """Settings of :class:`~flatminima.FisherTraceRegularizer` to start from, and what they follow from.

    ``print`` shows a table with the reasons; :attr:`settings` goes into the regularizer.

    Attributes:
        alpha: α.
        beta: β, rounded to two digits.
        num_sub_batches: M.
        max_grad_norm: τ.
        estimator: ``"hvp"`` where no α rounds little enough, in half precision above all.
        fisher_trace: mean_i ‖g_i‖² at these settings; like all that follows the median over the batches.
        gradient_norm: ‖mean_i g_i‖₂.
        penalty_to_gradient: β‖∇R_α‖ / ‖mean_i g_i‖ at these settings: what was aimed at, but for β's rounding.
        rounding_share: the estimated part of ‖∇R_α‖ that is rounding error.
        penalty_to_trace: R_α / (α · trace): 1 where the loss is straight on the way of the finite difference.
        clip_rate: the fraction of penalized gradients that τ clips at these weights.
        batch_size: samples of the largest batch.
        batches: how many were looked at.
    """

    alpha: float
    beta: float
    num_sub_batches: int
    max_grad_norm: float
    estimator: Estimator
    fisher_trace: float
    gradient_norm: float
    penalty_to_gradient: float
    rounding_share: float
    penalty_to_trace: float
    clip_rate: float
    batch_size: int
    batches: int

    @property
    def settings(self) -> dict[str, Any]:
        """Arguments of the regularizer: ``FisherTraceRegularizer(model, **suggestion.settings)``.

        Trainers that clip themselves take them without ``max_grad_norm``.
        """
        names = ("alpha", "beta", "num_sub_batches", "max_grad_norm", "estimator")
        return {name: getattr(self, name) for name in names}

    def table(self) -> Table:
        """Every setting with its reason."""
        samples = self.batch_size / self.num_sub_batches
        curvature = abs(self.penalty_to_trace - 1)
        rows = [
            ("α, alpha", f"{self.alpha:g}", f"{self.rounding_share:.1%} rounding, {curvature:.1%} curvature"),
            ("β, beta", f"{self.beta:g}", f"β∇R is {self.penalty_to_gradient:.2g} of the main gradient"),
            ("M, num_sub_batches", f"{self.num_sub_batches}", f"sub-batches of {samples:.3g} samples"),
            (
                "τ, max_grad_norm",
                f"{self.max_grad_norm:g}",
                f"clips {self.clip_rate:.0%} of gradients by now",
            ),
        ]
        if self.estimator == "hvp":
            rows.append(("estimator", "hvp", "the finite difference is rounding"))
        batches = "1 batch" if self.batches == 1 else f"{self.batches} batches"
        caption = (
            f"From {batches} of {self.batch_size} at the model's present weights: trace {self.fisher_trace:.3g}, "
            f"gradient {self.gradient_norm:.3g}. A start: both change while a network trains"
        )
        return Table("Where to start with the regularizer", ("setting", "value", "why"), tuple(rows), caption)

    def __repr__(self) -> str:
        return f"Suggestion({', '.join(f'{name}={value!r}' for name, value in self.settings.items())})"

    def __str__(self) -> str:
        return rendered(self.table())

    def _repr_html_(self) -> str:
        return self.table().html()


@undone_if_interrupted
def suggest(
    model: nn.Module,
    loss_fn: LossFunction,
    batches: Any,
    *,
    penalty_to_gradient: float = PENALTY_TO_GRADIENT,
    max_batches: int = 8,
) -> Suggestion:
    """Settings of :class:`~flatminima.FisherTraceRegularizer` to start from, by a few penalties at the present weights.

    α is the paper's unless its finite difference rounds or curves too much. M is the largest up to 16 with sub-batches
    of 8 samples, or fewer where a batch is small, that divides the batch if one does. τ is the largest plain gradient's
    norm, within 1 and 5. β makes the penalty's gradient ``penalty_to_gradient`` times the main one, so it follows the
    network, the data and α.

    Nothing is trained, and the model, its ``.grad`` and the global generators are left as they were. Give it the model
    as the penalty will find it: in training mode, fresh from its initialization, or where ``start_step`` is.
    With wrong labels the suggestion was on no network clearly worse than plain training, with clean ones on two of
    five: begin there at ``penalty_to_gradient=0.5``. ``docs/how-to/does-it-work.md`` has figures, and what to do next.

    Args:
        model: as for the regularizer.
        loss_fn: ``loss_fn(model_output, targets)`` → scalar, a mean over the samples.
        batches: a batch ``(inputs, targets)`` as in training, or a loader or list of several. The last, short one of
            BatchNorm's model is left out if it is too short for M.
        penalty_to_gradient: how strong the penalty is to be, > 0.
        max_batches: how many are looked at, ≥ 1.

    Returns:
        The settings and their reasons.

    Raises:
        FlatminimaError: for what are no batches, a value outside its range, a penalty that has no gradient or rounds
            in every form, or what the regularizer refuses.

    Warns:
        NotTrainingWarning: if the model is in eval mode.

    Example:
        >>> import torch
        >>> import flatminima as fm
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        >>> batch = torch.randn(128, 4), torch.randint(3, (128,))
        >>> suggestion = fm.suggest(model, torch.nn.CrossEntropyLoss(), batch)
        >>> suggestion.num_sub_batches
        16
        >>> regularizer = fm.FisherTraceRegularizer(model, **suggestion.settings)
    """
    require_usable(model)
    require_positive("penalty_to_gradient", penalty_to_gradient)
    require_integer("max_batches", max_batches)
    require(max_batches >= 1, f"max_batches must be at least 1, got {max_batches}")
    require(callable(loss_fn), f"loss_fn must be a function of the model's output and targets, got {loss_fn!r}")
    if not model.training:
        warn(
            "the model is in eval mode, without dropout and with BatchNorm's running statistics, so the settings are "
            "not those of its training: call model.train() before suggest",
            NotTrainingWarning,
        )
    with undisturbed(model), restored_generators(model.parameters()):
        device = device_of(model)
        chosen = [map_tensors(lambda t: t.to(device), batch) for batch in islice(_each_of(batches), max_batches)]
        require(len(chosen) > 0, "there are no batches: pass (inputs, targets), or a loader or list of such")
        size = max(map(batch_size, chosen))
        require(size > 0, "the batches are empty: pass samples")
        fewest = 2 if _has_batch_statistics(model) else 1
        require(size >= fewest, "BatchNorm has no statistics on a batch of 1 sample: pass larger batches")
        count = _number_of_sub_batches(size, at_least=fewest)
        if fewest > 1:
            chosen = [batch for batch in chosen if batch_size(batch) >= fewest * count]
        regularizer = FisherTraceRegularizer(model, alpha=_ALPHA, beta=0.0, num_sub_batches=count)
        looks = _with_good_alpha(regularizer, loss_fn, chosen)
    gradient_norm, to_gradient = _median(looks, "gradient_norm"), _median(looks, "to_gradient")
    require(gradient_norm > 0, "the loss has no gradient at these weights: there is nothing to penalize")
    require(to_gradient > 0, "the penalty has no gradient at these weights, so no beta is right: is the loss linear?")
    beta = _rounded(penalty_to_gradient / to_gradient, digits=2)
    largest = max(look.gradient_norm for look in looks)
    tau = min(max(_SMALLEST_TAU, _rounded_up(largest)), _LARGEST_TAU)
    return Suggestion(
        alpha=regularizer.alpha,
        beta=beta,
        num_sub_batches=count,
        max_grad_norm=tau,
        estimator=regularizer.estimator,
        fisher_trace=_median(looks, "trace"),
        gradient_norm=gradient_norm,
        penalty_to_gradient=beta * to_gradient,
        rounding_share=_median(looks, "rounding_share"),
        penalty_to_trace=_median(looks, "penalty_to_trace"),
        clip_rate=statistics.fmean(look.norm_with(beta) > tau for look in looks),
        batch_size=size,
        batches=len(chosen),
    )


def _each_of(batches: Any) -> Iterator[tuple[Any, Any]]:
    """The batches one by one: a tuple is a batch, and so is the list ``[inputs, targets]`` that a loader gives."""
    require(
        isinstance(batches, Iterable) and not isinstance(batches, (Tensor, Mapping, str)),
        f"batches must be (inputs, targets), or a loader or list of such, got {type(batches).__name__}",
    )
    is_one = isinstance(batches, tuple) or (
        isinstance(batches, list) and any(isinstance(part, (Tensor, Mapping)) for part in batches)
    )
    for batch in [batches] if is_one else batches:
        require(
            isinstance(batch, (tuple, list)) and len(batch) == 2,
            f"a batch must be (inputs, targets), got {type(batch).__name__}"
            + (f" of {len(batch)}" if isinstance(batch, (tuple, list)) else ""),
        )
        yield batch[0], batch[1]


def _has_batch_statistics(model: nn.Module) -> bool:
    return any(isinstance(module, BatchNorm) and module.training for module in model.modules())


def _number_of_sub_batches(size: int, *, at_least: int) -> int:
    """M for a batch of ``size`` samples, where a sub-batch needs ``at_least`` so many."""
    most = max(1, min(_MOST, max(size // _SAMPLES, min(_FEWEST, size // at_least))))
    even = [count for count in range(most, most // 2, -1) if size % count == 0]
    return even[0] if even else most


@dataclass(frozen=True)
class _Look:
    """A penalty of the weight 1 at one batch, beside the main gradient."""

    trace: float
    penalty_to_trace: float
    gradient_norm: float
    to_gradient: float
    rounding_share: float
    cosine: float
    """Of the two gradients."""

    @classmethod
    def at(cls, penalty: Penalty, step: RegularizerStep, alpha: float) -> _Look:
        """From a penalty and what the regularizer kept of it."""
        (shares,) = shares_of([step], [1.0])
        trace, norm = float(step.trace), float(step.main_gradient_norm)
        pairs = zip(penalty.gradient, penalty.main_gradient, strict=True)
        product = float(sum((a * b).sum() for a, b in pairs))
        norms = norm * float(step.penalty_gradient_norm)
        return cls(
            trace=trace,
            penalty_to_trace=float(step.penalty) / (alpha * trace) if trace else 1.0,
            gradient_norm=norm,
            to_gradient=shares.penalty_to_gradient,
            rounding_share=shares.rounding_share,
            cosine=product / norms if norms else 0.0,
        )

    def norm_with(self, beta: float) -> float:
        """‖∇L + β∇R_α‖."""
        ratio = beta * self.to_gradient
        return self.gradient_norm * math.sqrt(max(0.0, 1 + 2 * ratio * self.cosine + ratio**2))


def _with_good_alpha(regularizer: FisherTraceRegularizer, loss_fn: LossFunction, batches: list[Any]) -> list[_Look]:
    """What the batches say with the paper's α, or the nearest power of ten that neither rounds nor curves too much.

    The regularizer is left with that α; with the other estimator if none rounds little enough.
    """

    def closure(batch: tuple[Any, Any]) -> Tensor:
        return loss_fn(run_model(regularizer.model, batch[0]), batch[1])

    def looks_with(alpha: float) -> list[_Look]:
        regularizer.alpha = alpha
        looks = []
        for batch in batches:
            penalty = regularizer.penalize(closure, batch)
            assert penalty is not None
            assert regularizer.last_step is not None
            looks.append(_Look.at(penalty, regularizer.last_step, alpha))
        return looks

    looks = looks_with(_ALPHA)
    for larger in _LARGER_ALPHAS:
        if _median(looks, "rounding_share") > _ROUNDING:
            looks = looks_with(larger)
    if _median(looks, "rounding_share") > _ROUNDING:
        regularizer.estimator = "hvp"
        try:
            return looks_with(_ALPHA)
        except FlatminimaError as error:
            raise FlatminimaError(
                f"the finite difference is mostly rounding at every alpha up to {_LARGER_ALPHAS[-1]:g}, and the exact "
                f"form is no way out ({one_line(error)}): keep the whole model in float32"
            ) from error
    for smaller in _SMALLER_ALPHAS if regularizer.alpha == _ALPHA else ():  # a larger one was needed against rounding
        if abs(_median(looks, "penalty_to_trace") - 1) <= _CURVATURE:
            break
        before, found = regularizer.alpha, looks_with(smaller)
        if _median(found, "rounding_share") > _ROUNDING:
            regularizer.alpha = before
            break
        looks = found
    return looks


def _median(looks: list[_Look], name: str) -> float:
    """Over batches, as a single kink of ReLU may make a penalty's gradient a hundred times larger."""
    found: float = statistics.median(getattr(look, name) for look in looks)
    return found


def _rounded(value: float, *, digits: int) -> float:
    return float(f"{value:.{digits - 1}e}")


def _rounded_up(value: float) -> float:
    """To one digit."""
    power = 10.0 ** math.floor(math.log10(value))
    return _rounded(math.ceil(value / power) * power, digits=1)
