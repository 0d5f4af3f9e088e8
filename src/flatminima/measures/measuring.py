"""ξ → γ̂ and its rivals, over many subsets of the training data, with their standard errors."""

from __future__ import annotations

from functools import partial
from typing import Literal

from torch import nn

from flatminima.choices import Fisher
from flatminima.gramian import PathName
from flatminima.losses import Loss
from flatminima.measures.characterization import characterize
from flatminima.measures.options import Initial, MeasureOptions, Measures, warn_of_imprecision, with_options_explained
from flatminima.measures.preparation import prepare, preparing, processes_together
from flatminima.measures.results import Characterization
from flatminima.measures.trials import perform_trial, perform_trials
from flatminima.network import Data, samples_of, undone_if_interrupted


@with_options_explained
@undone_if_interrupted
def measure(  # noqa: D417 (the options are explained in one place)
    model: nn.Module,
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
) -> Characterization:
    """Characterize a trained minimum: γ̂ (Jia & Su, Eq. 5) and its rivals over ``trials`` subsets of the training data.

    The model is run in eval mode and left as it was found. Pass the *un-augmented training set*.

    Args:
        model: any module; its output is the logits, or an object with ``.logits``. Sharded by FSDP2 (``fully_shard``),
            it is measured by all its processes together: all call with the same arguments and data, and get the same.
            An error on one is raised on all.
        data: the training data: a map-style Dataset, a DataLoader, or a tuple of tensors (inputs, targets).
        All others: see :class:`~flatminima.measures.MeasureOptions`.

    Raises:
        FlatminimaError: for bad input: too few samples, data that change between passes, unsuitable targets or loss.
        NonFiniteError: for NaN or infinity in weights, logits or losses.
        RankDeficientError: for a singular ξ; names the samples and the rank.
        WrongGradientError: if a spot check against plain autograd fails.

    Warns:
        NotAMinimumWarning: if the training loss is too high.
        NotLogitsWarning: if the outputs look like probabilities.
        UnshiftedLabelsWarning: if a language model is asked for the tokens that it is given.
        GenericPathWarning: if some parameters have no layer rule.
        ImpreciseWarning: if ``max_standard_error`` is not reached.

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
    with processes_together([model], options), preparing(options):
        (prepared,) = prepare({"": model}, samples_of(data), options).values()
        done = perform_trials(
            partial(perform_trial, prepared),
            trials,
            lambda so_far: options.precise_enough([trial.log_det_fisher for trial in so_far]),
            distributed=distributed,
            progress=progress,
        )
        characterization = characterize(prepared, done)
        warn_of_imprecision(options, characterization.log_det_fisher.per_trial, "γ̂")
        return characterization
