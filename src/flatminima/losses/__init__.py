"""A per-sample loss and its gradient at the logits, formed in float64 and handed on in factored form."""

from flatminima.losses.forms import (
    LOGIT_NORMALIZATION,
    Loss,
    is_single_label,
    label_entropy,
    logit_gradient,
    mean_loss,
    per_sample_form,
    per_sample_loss,
)
from flatminima.losses.gradients import FactoredLoss, LogitGradient, PerSampleLoss, refuse_non_finite
from flatminima.losses.identity import brief_form, brief_forms, form_in_words
from flatminima.losses.known import BinaryCrossEntropy, CrossEntropy, off_target_log_probabilities

__all__ = [
    "LOGIT_NORMALIZATION",
    "BinaryCrossEntropy",
    "CrossEntropy",
    "FactoredLoss",
    "LogitGradient",
    "Loss",
    "PerSampleLoss",
    "brief_form",
    "brief_forms",
    "form_in_words",
    "is_single_label",
    "label_entropy",
    "logit_gradient",
    "mean_loss",
    "off_target_log_probabilities",
    "per_sample_form",
    "per_sample_loss",
    "refuse_non_finite",
]
