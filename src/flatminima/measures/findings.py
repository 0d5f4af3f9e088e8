"""What a comparison says, and what it cannot say."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flatminima.losses import LOGIT_NORMALIZATION
from flatminima.measures.plausibility import is_fitted
from flatminima.measures.registry import label_of

if TYPE_CHECKING:  # comparisons judge themselves by these functions
    from flatminima.measures.comparison import Comparison

SIMILAR_LOSS_RATIO = 1.5
"""Training losses further apart than this factor are not called similar: it moves γ̂ by about 2 N' ln 1.5."""


def unequal_sizes(comparison: Comparison) -> tuple[str, str] | None:
    """The smallest and the largest model; None if all have as many parameters."""
    sizes = {name: comparison[name].num_parameters for name in comparison}
    small, large = min(sizes, key=sizes.__getitem__), max(sizes, key=sizes.__getitem__)
    return None if sizes[small] == sizes[large] else (small, large)


def unequal_losses(comparison: Comparison) -> tuple[str, str] | None:
    """The minima of lowest and of highest training loss; None if these are similar, or taken out of the measures."""
    losses = {name: comparison[name].train_loss for name in comparison}
    low, high = min(losses, key=losses.__getitem__), max(losses, key=losses.__getitem__)
    similar = not losses[high] > SIMILAR_LOSS_RATIO * losses[low]
    return None if similar or comparison[low].settings.logit_normalization is not None else (low, high)


def unfitted(comparison: Comparison) -> list[str]:
    """Networks that classify, and have not fitted their training data: these are no minima."""
    return [name for name in comparison if not is_fitted(comparison[name].train_loss, comparison[name].train_accuracy)]


def decisive_measure(comparison: Comparison) -> str | None:
    """See :attr:`~flatminima.measures.Comparison.decisive`."""
    if unequal_sizes(comparison) is not None or unfitted(comparison):
        return None
    if unequal_losses(comparison) is None:
        return "log_det_fisher"
    return "log_det_unit_fisher" if comparison.has_parts else None


def caveats(comparison: Comparison) -> list[str]:
    """Why γ̂ does not order these minima, a sentence for each reason."""
    found = []
    sizes, losses = unequal_sizes(comparison), unequal_losses(comparison)
    if sizes is not None:
        counts = " and ".join(f"{name} {comparison[name].num_parameters:,}" for name in sizes)
        found.append(f"The models differ in kind ({counts} parameters), and between kinds γ̂ follows their scale.")
    if losses is not None:
        low, high = (f"{name} {comparison[name].train_loss:.3g}" for name in losses)
        found.append(
            f"Training losses differ ({low}, {high}), and the measures of ξ fall with the loss, whatever the minimum: "
            + (
                "read γ̂ at unit residuals, not γ̂."
                if comparison.has_parts
                else f"train on to similar losses, or measure with logit_normalization={LOGIT_NORMALIZATION}."
            )
        )
    found += [
        f"{name} has not fitted its training data (accuracy {comparison[name].train_accuracy:.1%}): it is no minimum."
        for name in unfitted(comparison)
    ]
    return found


def findings(comparison: Comparison) -> list[str]:
    """Which minimum is the best, by how much, whether that is sure, and how much of it is fit.

    Intervals are Student's, over subsets (scipy).

    Raises:
        FlatminimaError: without scipy.
    """
    lines = caveats(comparison) or [_similarity(comparison)]
    measure, best = comparison.decisive, comparison.best
    if measure is None or best is None:
        return [*lines, "No minimum can be called the best."]
    said = "γ̂" if measure == "log_det_fisher" else label_of(measure)
    lines.append(f"{best} has the lowest {said}: {comparison[best].estimates()[measure]}.")
    if measure != "log_det_fisher":
        lines.append("That takes the loss out of γ̂, and nothing else that comes with it: train all to one loss.")
    ranks = comparison.ranks(measure)
    others = [name for name in sorted(ranks, key=ranks.__getitem__) if name != best]
    lines += [_distance(comparison, name, best, measure) for name in others]
    return lines + [line for name in others if (line := _residual_part(comparison, name, best))]


def _similarity(comparison: Comparison) -> str:
    losses = [comparison[name].train_loss for name in comparison]
    normalized = comparison.characterizations[next(iter(comparison))].settings.logit_normalization
    if normalized is not None:
        return f"How far the logits have grown is taken out (they are divided by {normalized:g} times their norm)."
    return f"Training losses are similar ({min(losses):.3g} to {max(losses):.3g}), so that γ̂ can be compared."


def _distance(comparison: Comparison, name: str, best: str, measure: str) -> str:
    difference = comparison.difference(name, best, measure)
    low, high = difference.interval()
    lower = sum(value < 0 for value in difference.per_trial)
    paired = sum(value == value for value in difference.per_trial)
    verdict = "the difference is clear" if low > 0 else "they are not clearly apart"
    return (
        f"{name} is higher by {difference} (95 % interval {low:.3g} to {high:.3g}), and lower in {lower} of {paired} "
        f"trials: {verdict}."
    )


def _residual_part(comparison: Comparison, name: str, best: str) -> str:
    """How much of the difference in γ̂ is residual; nothing where there is no residual."""
    if any(comparison[one].residual is None for one in (name, best)):
        return ""
    whole, residual, rest = (
        comparison.difference(name, best, measure).mean
        for measure in ("log_det_fisher", "residual", "log_det_unit_fisher")
    )
    return (
        f"Of the difference in γ̂ between {name} and {best} ({whole:+.1f}), {residual:+.1f} is residual, that is how "
        f"closely samples are fitted, and {rest:+.1f} is left at unit residuals."
    )
