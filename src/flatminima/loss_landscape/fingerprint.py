"""What tells one landscape from another: a digest of all that decides its losses."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from flatminima.losses import Loss, form_in_words
from flatminima.network import Samples, add_state, add_tensor, index_batches, tensors_of

_SAMPLES_AT_ONCE = 500
"""As in evaluations."""


def fingerprint(settings: Any, loss: Loss, weights: Iterable[Mapping[str, Tensor]], samples: Samples) -> str:
    """SHA-256 of the settings, the loss with its options, the weights, and every sample: a pass over the data.

    A loss is known as :func:`~flatminima.losses.form_in_words` knows it. What code computes is not known: neither a
    function's nor the model's.
    """
    digest = hashlib.sha256(json.dumps([settings, form_in_words(loss, learned=True), len(samples)]).encode())
    for named in weights:
        add_state(digest, named)
    for indices in index_batches(len(samples), _SAMPLES_AT_ONCE):
        for tensor in tensors_of(samples.fetch(indices)):
            add_tensor(digest, tensor)
    return digest.hexdigest()
