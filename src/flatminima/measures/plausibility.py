"""Warnings of what is measured as asked for, but probably not meant: losses, labels and outputs that look wrong."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from flatminima.errors import (
    NotAMinimumWarning,
    NotLogitsWarning,
    UnshiftedLabelsWarning,
    require,
    warn,
)
from flatminima.losses import BinaryCrossEntropy, CrossEntropy, Loss, label_entropy, per_sample_form
from flatminima.measures.evaluation import Evaluation
from flatminima.network import Inputs, tensors_of

MINIMUM_LOSS, MINIMUM_ACCURACY = 0.1, 0.99
"""A cross entropy (nats) above the first with an accuracy below the second is not called a minimum."""

SAMPLES_LOOKED_AT = 16
"""Of so many samples the outputs are looked at."""

_REPEAT_TOLERANCE = 1e-3
"""Of the largest output: some kernels add up in another order every time."""

_SUM_TOLERANCE = 1e-3
"""How far probabilities, perhaps of low precision, may be from a sum of one."""


def warn_of_implausible(loss: Loss, inputs: Inputs, targets: Tensor, logits: Tensor, train: Evaluation) -> None:
    """Warn of what :func:`~flatminima.measure` says it warns of before its first trial.

    Args:
        loss: as measured.
        inputs: some samples.
        targets: theirs.
        logits: what the model returns for them.
        train: the loss over all of the training data.
    """
    entropy = label_entropy(loss)
    _warn_unless_minimum(entropy, logits, train)
    _warn_of_probabilities(loss, logits)
    if entropy is not None and targets.dim() == 2 and not entropy.next_token:
        _warn_of_unshifted_labels(entropy, inputs, targets)


def is_fitted(loss: float, accuracy: float | None) -> bool:
    """Whether a network that classifies is near enough to a minimum; of others (accuracy None) it is not known."""
    return accuracy is None or not (loss > MINIMUM_LOSS and accuracy < MINIMUM_ACCURACY)


def constant_outputs(logits: Tensor) -> bool:
    """Whether a network returns the same for several samples, up to rounding."""
    spread = (logits - logits[:1]).abs().max()
    return len(logits) > 1 and bool(spread <= 1e-6 * logits.abs().max())


def refuse_random(first: Tensor, second: Tensor) -> None:
    """Compare what a network returned for the same samples in two passes.

    Raises:
        FlatminimaError: if it differs by more than rounding.
    """
    difference, size = (first - second).abs().max().item(), first.abs().max().item()
    require(
        not difference > _REPEAT_TOLERANCE * size,
        f"the network is random in eval mode: its outputs for the same samples differ by {difference:.2g} (of at most "
        f"{size:.2g}) between two passes; switch its sampling or dropout off",
    )


def _warn_unless_minimum(entropy: CrossEntropy | None, logits: Tensor, train: Evaluation) -> None:
    if train.correct is not None:
        if not is_fitted(train.loss, train.accuracy):
            _warn_of_distance(f"training loss {train.loss:.3g} and accuracy {train.accuracy:.1%} are")
    elif entropy is not None:
        positions = logits[0].numel() // logits.shape[-1] if entropy.positions == "sum" else 1
        if train.loss > MINIMUM_LOSS * positions:
            _warn_of_distance(f"training loss {train.loss / positions:.3g} per position is")


def _warn_of_distance(what: str) -> None:
    warn(
        f"{what} too far from a minimum for the measures to mean what they say: train on, or read them with care",
        NotAMinimumWarning,
    )


def _warn_of_probabilities(loss: Loss, logits: Tensor) -> None:
    form = per_sample_form(loss)
    if isinstance(form, BinaryCrossEntropy):
        probabilities = logits.numel() >= SAMPLES_LOOKED_AT and bool(((logits >= 0) & (logits <= 1)).all())
    elif label_entropy(loss) is not None:
        sums = [logits.sum(dimension) for dimension in {1, logits.dim() - 1}]
        probabilities = bool((logits >= 0).all()) and any(((s - 1).abs() < _SUM_TOLERANCE).all() for s in sums)
    else:
        return
    if probabilities:
        warn(
            "the network's outputs look like probabilities, but the loss takes logits and would apply a softmax or "
            "sigmoid once more: remove the network's last Softmax or Sigmoid, or pass a loss of probabilities",
            NotLogitsWarning,
        )


def _warn_of_unshifted_labels(entropy: CrossEntropy, inputs: Inputs, targets: Tensor) -> None:
    counted = targets != entropy.ignore_index
    labels = targets[counted]
    if isinstance(inputs, Mapping) and "decoder_input_ids" in inputs:
        return
    for tensor in tensors_of(inputs):
        same = tensor.shape == targets.shape and not tensor.is_floating_point()
        if same and bool((labels != labels[:1]).any()) and bool((tensor[counted] == labels).all()):
            warn(
                "the labels equal the inputs, so every position is asked for the token that it is given: for a "
                "language model pass loss=CrossEntropy(next_token=True)",
                UnshiftedLabelsWarning,
            )
            return
