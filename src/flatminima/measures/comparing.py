"""Several minima measured on the same subsets of the same data."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Literal

from torch import nn

from flatminima.choices import Fisher
from flatminima.errors import FlatminimaError, naming, naming_errors, require
from flatminima.gramian import PathName
from flatminima.losses import Loss
from flatminima.measures.characterization import characterize
from flatminima.measures.comparison import Comparison, comparison_of
from flatminima.measures.options import Initial, MeasureOptions, Measures, warn_of_imprecision, with_options_explained
from flatminima.measures.preparation import prepare, preparing, processes_together
from flatminima.measures.trials import TrialValues, perform_trial, perform_trials
from flatminima.network import Data, samples_of, undone_if_interrupted


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
    initial: Initial | None = None,
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
    names = [name for name in models if not isinstance(name, str)]
    require(not names, f"models' names are strings, got {names[:1]}: write {{'0': model, ...}}")
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
    with processes_together(models.values(), options), preparing(options):
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
