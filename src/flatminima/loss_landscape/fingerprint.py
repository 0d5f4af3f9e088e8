"""What tells one landscape from another: a digest of all that decides its losses."""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from flatminima.losses import Loss, per_sample_form
from flatminima.network import Samples, index_batches, tensors_of

_SAMPLES_AT_ONCE = 500
"""As in evaluations."""

_ADDRESS = re.compile(r" at 0x[0-9A-Fa-f]+")
"""What functions and plain objects print that another process gives otherwise."""


class Digest(Protocol):
    """One of ``hashlib``."""

    def update(self, data: Any, /) -> None:
        """Go on with the bytes of a buffer."""
        ...


def fingerprint(settings: Any, loss: Loss, weights: Iterable[Mapping[str, Tensor]], samples: Samples) -> str:
    """SHA-256 of the settings, the loss with its options, the weights, and every sample: a pass over the data.

    A loss is known by how it and its public attributes print (a function: by its name), and by its parameters and
    buffers. What code computes is not known: neither a function's nor the model's.
    """
    form = per_sample_form(loss)
    digest = hashlib.sha256(json.dumps([settings, _printed(form), len(samples)]).encode())
    state = itertools.chain(form.named_parameters(), form.named_buffers()) if isinstance(form, nn.Module) else ()
    for named in (dict(state), *weights):
        for name, tensor in named.items():
            digest.update(name.encode())
            add_tensor(digest, tensor)
    for indices in index_batches(len(samples), _SAMPLES_AT_ONCE):
        for tensor in tensors_of(samples.fetch(indices)):
            add_tensor(digest, tensor)
    return digest.hexdigest()


def add_tensor(digest: Digest, tensor: Tensor) -> None:
    """Go on with a tensor's type, shape and values, of any number, without numpy and without a copy on the CPU."""
    held = tensor.detach().cpu().contiguous()
    digest.update(f"{held.dtype} {tuple(held.shape)}".encode())
    if held.numel():
        digest.update((ctypes.c_char * held.nbytes).from_address(held.data_ptr()))


def _printed(form: object) -> str:
    attributes = getattr(form, "__dict__", {})
    public = {name: value for name, value in attributes.items() if not name.startswith("_")}
    return _ADDRESS.sub("", f"{form!r} {public}")
