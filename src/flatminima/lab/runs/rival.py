"""What the regularizer's rivals have in common: its interface, and nothing to remember between steps."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_


class Rival:
    """The interface of :class:`~flatminima.FisherTraceRegularizer` but for ``backward``.

    Args:
        model: the network; its trainable parameters are float32 or float64.
        max_grad_norm: the global norm to which ``.grad`` is clipped, or None.
    """

    def __init__(self, model: nn.Module, max_grad_norm: float | None) -> None:
        self.model = model
        self.max_grad_norm = max_grad_norm

    def clip(self, parameters: list[Tensor]) -> None:
        """The last thing that a step does to ``.grad``."""
        if self.max_grad_norm is not None:
            clip_grad_norm_(parameters, self.max_grad_norm)

    def state_dict(self) -> dict[str, int]:
        """Empty: nothing is kept between steps."""
        return {}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on from :meth:`state_dict`."""
