"""Several minima measured on the same subsets of the same data, compared pair by pair."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rich.table import Table
from torch import Tensor, nn

from flatminima.choices import Fisher
from flatminima.errors import (
    FlatminimaError,
    UnequalLossWarning,
    UnlikeModelsWarning,
    did_you_mean,
    naming,
    naming_errors,
    require,
    warn,
)
from flatminima.gramian import PathName
from flatminima.losses import LOGIT_NORMALIZATION, Loss
from flatminima.measures.characterization import characterize
from flatminima.measures.options import MeasureOptions, Measures, warn_of_imprecision, with_options_explained
from flatminima.measures.preparation import prepare, processes_together
from flatminima.measures.registry import CATALOGUE, in_table_order
from flatminima.measures.results import Characterization, Estimate, jsonable
from flatminima.measures.tables import comparison_table, rendered
from flatminima.measures.trials import TrialValues, perform_trial, perform_trials
from flatminima.network import Data, samples_of, undone_if_interrupted

SIMILAR_LOSS_RATIO = 1.5
"""Training losses further apart than this factor are not called similar: it moves γ̂ by about 2 N' ln 1.5."""


@dataclass(frozen=True)
class Comparison:
    """Several minima measured on the same subsets.

    Attributes:
        characterizations: by name, in the order given.
    """

    characterizations: dict[str, Characterization]

    def difference(self, first: str, second: str, measure: str = "log_det_fisher") -> Estimate:
        """``first`` − ``second``, paired by subset; negative: ``first`` is the better minimum by this measure.

        Pairing removes what the subsets share: its standard error is usually far below that of either mean. Where one
        was measured on fewer trials, the trials both have are paired.

        Raises:
            FlatminimaError: for an unknown name or measure, or a measure that one of the two lacks.
        """
        pair = []
        for name in (first, second):
            if name not in self.characterizations:
                raise FlatminimaError(f"no model named {name!r}: choose from {', '.join(self.characterizations)}")
            estimates = self.characterizations[name].estimates()
            if measure not in estimates:
                raise FlatminimaError(f"{name!r} has no measure {measure!r}: choose from {', '.join(estimates)}")
            pair.append(estimates[measure].per_trial)
        return Estimate.of([a - b for a, b in zip(*pair, strict=False)])

    def ranks(self, measure: str = "log_det_fisher") -> dict[str, int]:
        """Every model's rank by the measure's mean, 1 = best; models without one left out.

        The smallest is the best, but for measures of which theory expects it of the largest.

        Raises:
            FlatminimaError: for a name that is no measure's.
        """
        names = self.measures()
        require(
            measure in (*names, *CATALOGUE),
            f"no measure {measure!r}{did_you_mean(measure, names)}: choose from {', '.join(names)}",
        )
        found = {
            name: c.estimates()[measure].mean for name, c in self.characterizations.items() if measure in c.estimates()
        }
        means = {name: mean for name, mean in found.items() if not math.isnan(mean)}
        larger = any(measure in c.settings.larger_is_better for c in self.characterizations.values())
        order = sorted(means, key=means.__getitem__, reverse=larger)
        return {name: rank for rank, name in enumerate(order, start=1)}

    def measures(self) -> list[str]:
        """The names of all measures that any of the minima has, in the order of tables."""
        return list(in_table_order(name for c in self.characterizations.values() for name in c.estimates()))

    def to_json(self) -> str:
        """One JSON object: the characterizations, and the paired differences of all pairs for every measure."""
        differences = {
            measure: {
                f"{a} - {b}": dataclasses.asdict(self.difference(a, b, measure))
                for a, b in itertools.combinations(self.characterizations, 2)
                if measure in self.characterizations[a].estimates() and measure in self.characterizations[b].estimates()
            }
            for measure in self.measures()
        }
        body = {name: dataclasses.asdict(c) for name, c in self.characterizations.items()}
        return json.dumps(jsonable({"characterizations": body, "differences": differences}), allow_nan=False)

    def __rich__(self) -> Table:
        return comparison_table(self)

    def __str__(self) -> str:
        return rendered(self)


@with_options_explained
@undone_if_interrupted
def compare(  # noqa: D417 (the options are explained in one place)
    models: Mapping[str, nn.Module],
    data: Data,
    *,
    loss: Loss = "cross_entropy",
    subset_size: int = 100,
    trials: int = 100,
    seed: int = 0,
    fisher: Fisher = "empirical",
    batchnorm: Literal["eval"] | int = "eval",
    logit_normalization: float | None = None,
    scale_invariant: bool = False,
    max_standard_error: float | None = None,
    measures: Measures = ("paper",),
    initial: Mapping[str, Tensor] | None = None,
    robustness_samples: int | None = None,
    on_singular: Literal["raise", "skip"] = "raise",
    per_parameter: bool = False,
    path: PathName = "rules",
    memory_budget: int | None = None,
    distributed: bool = False,
    progress: bool = True,
) -> Comparison:
    """Measure several minima on the same subsets of the same data, so that they can be compared pair by pair.

    Args:
        models: name → trained model.
        data: the training data all were trained on, as for :func:`measure`.
        All others: see :class:`~flatminima.measures.MeasureOptions`.

    Raises:
        FlatminimaError: with fewer than two models; and whatever :func:`measure` raises, naming the model.

    Warns:
        UnequalLossWarning: if training losses differ by more than a factor of 1.5: γ̂ follows the loss then.
        UnlikeModelsWarning: if they differ in their number of trainable parameters.
        ImpreciseWarning: if ``max_standard_error`` is not reached by some pair.

    Example:
        >>> import torch, flatminima
        >>> x, y = torch.randn(60, 20), torch.arange(60) % 3
        >>> x = x + 20 * torch.nn.functional.one_hot(y, 20)
        >>> models = {"small": torch.nn.Linear(20, 3), "large": torch.nn.Linear(20, 3)}
        >>> for scale, model in zip((1.0, 1.01), models.values()):
        ...     _ = model.weight.data.copy_(scale * torch.eye(3, 20)), model.bias.data.zero_()
        >>> comparison = flatminima.compare(models, (x, y), subset_size=10, trials=5)
        >>> comparison.ranks()
        {'large': 1, 'small': 2}
    """
    require(
        isinstance(models, Mapping), f"compare needs models by name, {{'a': model, ...}}, got {type(models).__name__}"
    )
    if len(models) < 2:
        raise FlatminimaError(f"compare needs at least two models, got {len(models)}: use measure for one")
    options = MeasureOptions(
        loss=loss,
        subset_size=subset_size,
        trials=trials,
        seed=seed,
        fisher=fisher,
        batchnorm=batchnorm,
        logit_normalization=logit_normalization,
        scale_invariant=scale_invariant,
        max_standard_error=max_standard_error,
        measures=measures,
        initial=initial,
        robustness_samples=robustness_samples,
        on_singular=on_singular,
        per_parameter=per_parameter,
        path=path,
        memory_budget=memory_budget,
        distributed=distributed,
        progress=progress,
    )
    with processes_together(models.values(), options):
        prepared = prepare(models, samples_of(data), options)

        def perform(number: int) -> dict[str, TrialValues]:
            performed = {}
            for name in prepared:
                with naming_errors(name):
                    performed[name] = perform_trial(prepared[name], number)
            return performed

        def precise_enough(done: Sequence[dict[str, TrialValues]]) -> bool:
            return all(
                options.precise_enough([trial[a].log_det_fisher - trial[b].log_det_fisher for trial in done])
                for a, b in itertools.combinations(models, 2)
            )

        done = perform_trials(perform, trials, precise_enough, distributed=distributed, progress=progress)
        characterizations = {}
        for name in prepared:
            with naming(name):
                characterizations[name] = characterize(prepared[name], [trial[name] for trial in done])
    comparison = comparison_of(characterizations)
    for a, b in itertools.combinations(models, 2):
        warn_of_imprecision(options, comparison.difference(a, b).per_trial, f"γ̂'s difference between {a!r} and {b!r}")
    return comparison


def comparison_of(characterizations: Mapping[str, Characterization]) -> Comparison:
    """A comparison of minima that are measured already, on the same subsets.

    Raises:
        FlatminimaError: if they were measured with different subsets, data sizes or losses.

    Warns:
        UnequalLossWarning: as for :func:`compare`.
        UnlikeModelsWarning: as for :func:`compare`.
    """
    if len({_drawn(c) for c in characterizations.values()}) > 1:
        raise FlatminimaError(
            "the minima were measured on different subsets or with different settings: measure all with the same data, "
            "subset_size, seed, loss, fisher, batchnorm, logit_normalization and scale_invariant"
        )
    sizes = {name: c.num_parameters for name, c in characterizations.items()}
    if len(set(sizes.values())) > 1:
        small, large = min(sizes, key=sizes.__getitem__), max(sizes, key=sizes.__getitem__)
        warn(
            f"the models differ in kind ({small!r} has {sizes[small]:,} trainable parameters, {large!r} "
            f"{sizes[large]:,}): γ̂ orders minima of one architecture, and between several it follows their scale",
            UnlikeModelsWarning,
        )
    comparison = Comparison(dict(characterizations))
    losses = {name: c.train_loss for name, c in characterizations.items()}
    low, high = min(losses, key=losses.__getitem__), max(losses, key=losses.__getitem__)
    settings = characterizations[low].settings
    if losses[high] > SIMILAR_LOSS_RATIO * losses[low] and settings.logit_normalization is None:
        warn(
            f"training losses differ ({low!r}: {losses[low]:.3g}, {high!r}: {losses[high]:.3g}), and γ̂ falls with its "
            f"loss, whatever the minimum{_residual_share(comparison, high, low)}; compare at similar training loss, by "
            f"log_det_unit_fisher, or with logit_normalization={LOGIT_NORMALIZATION}",
            UnequalLossWarning,
        )
    return comparison


def _residual_share(comparison: Comparison, first: str, second: str) -> str:
    """How much of their difference in γ̂ is residual; nothing where there is no residual."""
    pair = [comparison.characterizations[name] for name in (first, second)]
    if any(c.residual is None for c in pair):
        return ""
    residual, whole = (comparison.difference(first, second, name).mean for name in ("residual", "log_det_fisher"))
    return f": {residual:+.0f} of the {whole:+.0f} between these two is residual"


def _drawn(c: Characterization) -> tuple[Any, ...]:
    """What must be equal for per-trial values to be paired."""
    s = c.settings
    same = (s.subset_size, s.seed, s.loss, s.fisher, s.batchnorm, s.logit_normalization, s.scale_invariant)
    return c.num_samples, *same
