"""What is looked at once, after a regularizer's first penalty: whether passes repeat, and how finely they round.

This takes one forward pass of a sub-batch, and two more where there is a reason to suspect something.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from flatminima.errors import CoarseRoundingWarning, UnrepeatableForwardWarning, warn
from flatminima.network import PENALTIES_NEED_FLOAT32, RefusedAutocast
from flatminima.regularizer.steps import Rounding
from flatminima.torch_compat import CustomFunctionNode, eager_stance, gradient_types, graph_of

_SUSPICIOUS = 0.1
"""The relative distance between R_α and α · trace from which on two passes at the same weights are compared."""

_EQUAL = 100
"""How far two losses of the same computation may be apart, in ε: devices add up in no fixed order."""

_CROSS_ENTROPIES = ("LogSoftmaxBackward0", "BinaryCrossEntropyWithLogitsBackward0", "BinaryCrossEntropyBackward0")
"""Operations whose gradient at the logits is, in the end, a probability less a label."""

_INTEGER_EPS = 2.0**-8
"""Half a step of the coarsest common quantization of weights, relative to the largest: 8 bits."""


def first_look(model: nn.Module, loss: Callable[[], Tensor], penalty: Tensor, limit: Tensor | None) -> Rounding:
    """Refuse autocast inside the passes; of finite differences, warn where these do not repeat or round coarsely.

    Args:
        model: the network.
        loss: runs one sub-batch from the same state of all generators and buffers.
        penalty: R_α.
        limit: α · trace, which finite differences come close to; None where the penalty is that itself.

    Returns:
        How coarsely the passes round.

    Raises:
        FlatminimaError: if a pass switches autocast on.
    """
    seen = _loss_without_autocast(loss)
    rounding = _rounding(model, seen, penalty.dtype)
    if limit is not None:
        _warn_of_coarse_rounding(rounding.eps, penalty.dtype)
        _warn_of_unrepeatable_passes(loss, penalty, limit)
    return rounding


def _warn_of_unrepeatable_passes(loss: Callable[[], Tensor], penalty: Tensor, expected: Tensor) -> None:
    """Compare two losses of one sub-batch at the same weights, if the penalty is not what these passes should give.

    Args:
        loss: runs one sub-batch from the same state of all generators and buffers.
        penalty: R_α by finite differences.
        expected: α · trace, its limit.
    """
    if bool((penalty - expected).abs() <= _SUSPICIOUS * expected):
        return
    with torch.no_grad():
        first, second = loss(), loss()
    if bool((first - second).abs() > _EQUAL * torch.finfo(first.dtype).eps * first.abs()):
        warn(
            f"two passes over the same sub-batch at the same weights gave the losses {float(first):.6g} and "
            f"{float(second):.6g}, so the penalty, their difference, is mostly noise: draw randomness in forward from "
            "torch's, Python's or numpy's global generators, keep a module's state in buffers, or choose "
            "estimator='hvp'",
            UnrepeatableForwardWarning,
        )


def _loss_without_autocast(loss: Callable[[], Tensor]) -> Tensor:
    """The loss of one sub-batch, with its graph, by a pass that is watched from its first operation to its last.

    Raises:
        FlatminimaError: if any of them is under autocast, which would round the penalty to half precision.
    """
    with eager_stance(), RefusedAutocast(PENALTIES_NEED_FLOAT32):  # a compiled pass shows no operations
        return loss()


def _rounding(model: nn.Module, loss: Tensor, own: torch.dtype) -> Rounding:
    """How coarsely the path from the weights to the loss rounds.

    Args:
        model: its frozen parameters and its buffers may be coarser than what is trained.
        loss: that of one sub-batch, with its graph.
        own: the type of the trained parameters.
    """
    finest = torch.finfo(own).eps
    coarse = {kind for kind in _types_of_weights(model) if _eps(kind) > finest}
    nodes = list(graph_of([loss]))
    on_the_way = {kind for node in nodes for kind in gradient_types(node)}
    if any(isinstance(node, CustomFunctionNode) for node in nodes):  # a kernel of its own: it does not say
        on_the_way |= coarse
    on_the_way |= {kind for kind in coarse if not kind.is_floating_point}  # these are multiplied out within a kernel
    residuals = {kind for node in nodes if node.name() in _CROSS_ENTROPIES for kind in gradient_types(node)}
    return Rounding(max([finest, *map(_eps, on_the_way)]), max(map(_eps, residuals), default=0.0))


def _warn_of_coarse_rounding(eps: float, own: torch.dtype) -> None:
    """Say what to do where the forward pass rounds more coarsely than the trained parameters."""
    finest = torch.finfo(own).eps
    if eps > max(finest, torch.finfo(torch.float32).eps):
        warn(
            f"part of the forward pass is in half precision or quantized (a frozen base, say), so it rounds "
            f"{eps / finest:.0f} times as coarsely as {str(own).removeprefix('torch.')}: the finite difference's "
            "gradient is mostly rounding. Choose estimator='hvp', or keep the whole model in float32",
            CoarseRoundingWarning,
        )


def _types_of_weights(model: nn.Module) -> set[torch.dtype]:
    """The types of all parameters and buffers; integers in buffers count where the name says that they are weights."""
    buffers = {buffer.dtype for name, buffer in model.named_buffers() if buffer.is_floating_point() or "weight" in name}
    return buffers | {parameter.dtype for parameter in model.parameters()}


def _eps(kind: torch.dtype) -> float:
    if kind.is_floating_point:
        return torch.finfo(kind).eps
    return _INTEGER_EPS if kind in (torch.int8, torch.uint8) else 0.0
