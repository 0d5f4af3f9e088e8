"""``.grad`` as a whole: its norm and clipping, and what a step leaves in it for the optimizer."""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_

from flatminima.errors import AccumulationWarning, warn
from flatminima.parallel import whole
from flatminima.torch_compat import TensorWeakRef, foreach_norm, version_of


def norm_of(tensors: list[Tensor]) -> Tensor:
    """The 2-norm of all together; 0 of none.

    ``torch.nn.utils.get_total_norm`` sorts them by device and type first, for as long as a small layer's pass takes.
    """
    if not tensors:
        return torch.tensor(0.0, device="cpu")
    norms = foreach_norm(tensors)
    norm: Tensor = torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))
    return norm


class Gradients:
    """What parameters have in ``.grad``; of sparse ones, every row once."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._all = [(p, p.grad.coalesce() if p.grad.is_sparse else p.grad) for p in parameters if p.grad is not None]
        self._values = [grad.values() if grad.is_sparse else grad for _, grad in self._all]

    def norm(self) -> Tensor:
        """The global 2-norm."""
        return whole(norm_of(self._values))

    def clip(self, max_norm: float, norm: Tensor) -> None:
        """Scale them down to the global norm ``max_norm`` if ``norm`` is larger."""
        holders: Any = [SimpleNamespace(grad=value) for value in self._values]  # it looks at .grad alone
        clip_grads_with_norm_(holders, max_norm, norm)
        for parameter, gradient in self._all:
            if gradient.is_sparse:
                parameter.grad = gradient


class GradientsLeft:
    """Notices that the gradients of one step are still there, untouched, when the next begins."""

    def __init__(self) -> None:
        self._seen: tuple[Any, Any, int, int] | None = None
        self._has_warned = False

    def __reduce__(self) -> tuple[type[GradientsLeft], tuple[()]]:
        return type(self), ()  # copies and pickles have other tensors

    def note(self, parameters: Iterable[nn.Parameter]) -> None:
        """A step has ended: the optimizer is expected to change the parameters, or the program to clear ``.grad``."""
        self._seen = None
        for parameter in parameters:
            gradient = parameter.grad
            if gradient is not None:
                references = TensorWeakRef(parameter), TensorWeakRef(gradient)
                self._seen = *references, version_of(parameter), version_of(gradient)
                return

    def warn_if_untouched(self) -> None:
        """Warn, once, if neither has happened."""
        if self._seen is None or self._has_warned:
            return
        parameter, gradient = (reference() for reference in self._seen[:2])
        if parameter is None or gradient is None or parameter.grad is not gradient:
            return
        if (version_of(parameter), version_of(gradient)) == self._seen[2:]:
            self._has_warned = True
            warn(
                "backward was called again though the optimizer has not stepped since and .grad is not cleared: each "
                "of these calls counted as a step of its own, clipped what it found, and gave its penalty the whole "
                "weight. To accumulate K micro-batches, pass weight=1/K, and last=False for all but the last",
                AccumulationWarning,
            )
