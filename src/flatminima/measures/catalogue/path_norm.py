"""The path norm of Neyshabur et al. (2015): what all paths from the inputs to the outputs weigh together."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from flatminima.errors import UndefinedMeasureError, first_line
from flatminima.measures.registry import catalogued
from flatminima.measures.trial import Trial
from flatminima.network import call_model, float64_device, take, tensors_of
from flatminima.torch_compat import eager_stance

_LINEAR = frozenset({"linear", "conv1d", "conv2d", "conv3d"})
_POOLINGS = frozenset(
    f"{kind}_pool{d}d" for kind in ("avg", "max", "adaptive_avg", "adaptive_max") for d in (1, 2, 3)
) | {"mean", "sum"}
_POSITIVE = frozenset({"relu", "relu_", "dropout", "dropout1d", "dropout2d", "dropout3d"})
_SUMS = frozenset({"add", "add_", "__add__", "__radd__", "__iadd__"})
_ARRANGEMENTS = frozenset(
    {"flatten", "reshape", "view", "permute", "transpose", "squeeze", "unsqueeze", "contiguous", "clone", "detach"}
) | {"__getitem__", "cat", "concat", "pad", "chunk", "split", "to", "float", "double"}


@catalogued("path norm", cost="weights", source="Neyshabur et al. 2015; Jiang et al. 2020, App. C")
def path_norm(trial: Trial) -> float:
    """Σ over all paths from an input, or from a bias, to an output of Π w², w the weights on the path.

    Computed as what the network gives for an input of ones with all weights squared, summed over the outputs, in
    float64. A BatchNorm in evaluation mode is its scale and shift, both squared; pooling layers are left as they are.

    Raises:
        UndefinedMeasureError: for networks of anything but linear layers, convolutions, poolings, ReLU, BatchNorm in
            evaluation mode, sums, and new arrangements of these; for sharded models; for inputs that are not one
            floating-point tensor.
    """
    if trial.sharded:
        raise UndefinedMeasureError("it needs the weights whole, and the model's are split over processes")
    inputs = trial.inputs
    if not (isinstance(inputs, Tensor) and inputs.is_floating_point()):
        raise UndefinedMeasureError("the input is not one floating-point tensor")
    if any(isinstance(module, torch.jit.ScriptModule) for module in trial.model.modules()):
        raise UndefinedMeasureError("the network is TorchScript's in part, which hides what it calls")
    ones = torch.ones_like(take(inputs, slice(1)).to(float64_device(inputs.device)), dtype=torch.float64)
    try:
        with torch.no_grad(), eager_stance(), _SquaredWeights(trial.model):
            return call_model(trial.model, ones).sum().item()
    except (RuntimeError, TypeError) as error:  # float32 weights in what is no layer, say
        raise UndefinedMeasureError(f"the network cannot be run on ones in float64: {first_line(error)}") from None


class _SquaredWeights(TorchFunctionMode):
    """Every function of the forward pass with its weights squared; others than a sum over paths has are refused."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._own = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name, kwargs = getattr(func, "__name__", str(func)), kwargs or {}
        if name in _LINEAR:
            return _with_squared_weights(func, *args, **kwargs)
        if name == "batch_norm":
            return _batch_norm(**inspect.signature(F.batch_norm).bind(*args, **kwargs).arguments)
        output = func(*args, **kwargs)
        if name == "__get__" or not tensors_of(output):  # shapes and the like
            return output
        if name not in _POSITIVE | _POOLINGS | _SUMS | _ARRANGEMENTS or not self._of_activations(name, args, kwargs):
            raise UndefinedMeasureError(
                f"path norms are those of linear layers, convolutions, pooling, ReLU and BatchNorm, and the network "
                f"calls {name}"
            )
        return output

    def _of_activations(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a function adds nothing to the activations that is not on a path: a weight, or a constant."""
        given = [*tensors_of(args), *tensors_of(kwargs)]
        if any(id(tensor) in self._own for tensor in given):
            return False
        if name in _SUMS:
            return not kwargs and all(isinstance(argument, Tensor) or argument == 0 for argument in args)
        return name != "pad" or not any(kwargs.get("value", value) for value in [args[3] if len(args) > 3 else None])


def _with_squared_weights(
    function: Callable[..., Tensor],
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    squared = None if bias is None else _like(input, bias).square()
    return function(input.double(), _like(input, weight).square(), squared, *args, **kwargs)


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if training or running_mean is None or running_var is None:
        raise UndefinedMeasureError("a BatchNorm layer without running statistics has no scale of its own")
    scale = (_like(input, running_var) + eps).rsqrt()
    scale = scale if weight is None else scale * _like(input, weight)
    shift = -scale * _like(input, running_mean)
    shift = shift if bias is None else shift + _like(input, bias)
    shape = (1, -1) + (1,) * (input.dim() - 2)
    return input.double() * scale.square().view(shape) + shift.square().view(shape)


def _like(activation: Tensor, weight: Tensor) -> Tensor:
    return weight.detach().to(activation.device).double()
