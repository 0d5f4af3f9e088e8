"""By how much the label's logit exceeds the others."""

from __future__ import annotations

import torch

from flatminima.measures.registry import catalogued
from flatminima.measures.trial import Trial

PERCENTILE = 10


@catalogued("margin (10th percentile)", cost="forward", source="Jiang et al. 2020", larger_is_better=True)
def margin(trial: Trial) -> float:
    """The 10th percentile over the subset of z_y − max_{c≠y} z_c: few samples lie closer to the decision boundary."""
    logits = trial.class_logits
    label = trial.targets.to(logits.device).long()[:, None]  # torch.uint8 is a type of labels too
    others = logits.scatter(1, label, -torch.inf).amax(1)
    return (logits.gather(1, label)[:, 0] - others).quantile(PERCENTILE / 100).item()
