"""ξ → γ̂ and its rivals, over many subsets of the training data, with their standard errors."""

from __future__ import annotations

from typing import Literal

from torch import nn

from flatminima.losses import Loss
from flatminima.measures.fisher import Fisher
from flatminima.measures.options import Options
from flatminima.measures.results import Characterization
from flatminima.measures.subject import Subject, ending_together
from flatminima.measures.trials import perform_trials
from flatminima.network import Data, samples_of


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
