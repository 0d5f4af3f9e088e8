"""What models keep of their parameters in eval mode, and which parameters are cut off by it.

Some modules compute something from their parameters once and keep it for later passes in eval mode, or merge it into
other weights. The gradients of these parameters are then zero, however much the network depends on them; and what is
kept with its graph can be differentiated once only.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from flatminima.errors import FlatminimaError, UnusedParametersWarning, warn
from flatminima.network.batches import Inputs, call_model, take
from flatminima.network.generators import Generators
from flatminima.torch_compat import meets_a_freed_graph


def listed(names: Sequence[str]) -> str:
    """Parameters as messages name them: how many, and the first of them."""
    return f"{len(names)} parameters ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})"


def depended_on(output: Tensor, parameters: Mapping[str, nn.Parameter]) -> set[str]:
    """The names of those parameters that plain autograd finds in the output's graph, which is freed."""
    if not output.requires_grad:
        return set()
    gradients = torch.autograd.grad(output.sum(), list(parameters.values()), allow_unused=True)
    return {name for name, gradient in zip(parameters, gradients, strict=True) if gradient is not None}


def warn_unused(model: nn.Module, inputs: Inputs, names: Collection[str]) -> None:
    """Warn of those parameters that act on the logits in training mode.

    Args:
        model: in eval mode; a copy of it is run in training mode.
        inputs: some samples.
        names: trainable parameters that the logits of all samples do not depend on.
    """
    found = _used_in_training(model, inputs, names) if names else []
    if found:
        warn(
            f"{listed(found)} act on the logits of these samples in training mode but not in eval mode, where measures "
            "are taken, and count as zero; if the model keeps or merges what it computes from them, the measures lack "
            "them: let it compute that in every pass, or freeze them (requires_grad_(False)) to measure the rest alone",
            UnusedParametersWarning,
        )


def _used_in_training(model: nn.Module, inputs: Inputs, names: Collection[str]) -> list[str]:
    """Those parameters that plain autograd finds in the graph of a pass in training mode, without dropout.

    None where the model cannot be copied, or takes no such pass: what training does is its own affair.
    """
    with Generators(model.parameters()).restored(), suppress(Exception):
        copied = copy.deepcopy(model).train()
        for module in copied.modules():
            if isinstance(module, _DROPOUTS):
                module.eval()
        parameters = {name: p for name, p in copied.named_parameters() if name in names}
        used = depended_on(call_model(copied, take(inputs, slice(None))), parameters)
        return [name for name in parameters if name in used]
    return []


_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


@contextmanager
def refusing_kept_graphs(model: nn.Module) -> Iterator[None]:
    """Say what the model keeps where a second backward pass fails at it.

    Raises:
        FlatminimaError: in the place of PyTorch's own error.
    """
    try:
        yield
    except RuntimeError as error:
        kept = list(_kept_with_a_graph(model)) if meets_a_freed_graph(error) else []
        if not kept:
            raise
        raise FlatminimaError(
            f"the model keeps in {', '.join(kept[:5])} what it computed from its parameters in an earlier pass, and "
            "gradients go through that once only: let it compute that in every pass, or freeze these parameters"
        ) from error


def _kept_with_a_graph(model: nn.Module) -> Iterator[str]:
    """The attributes that hold tensors with a graph, by name."""
    for prefix, module in model.named_modules():
        for name, value in vars(module).items():
            if any(isinstance(one, Tensor) and not one.is_leaf for one in _values(value)):
                yield f"{prefix}.{name}".lstrip(".")


def _values(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return list(value) if isinstance(value, (list, tuple)) else [value]
