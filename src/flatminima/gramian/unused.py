"""Parameters for which something else stands: what the model computed from them once, and keeps.

Some modules keep in eval mode what they compute from their parameters, or merge it into other weights. The gradients of
these parameters are then zero, however much the network depends on them. Kept with its graph, it can be differentiated
once only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

from torch import nn

from flatminima.errors import FlatminimaError, UnusedParametersWarning, warn
from flatminima.gramian.autograd import Batch, used_parameters
from flatminima.gramian.parts import Part, listed
from flatminima.network import Buffers, Generators, take, tensors_of
from flatminima.torch_compat import meets_a_freed_graph


def warn_unused(
    batch: Batch, parts: Mapping[str, Part], without_gradient: Iterable[str], chunk: int, looked_at: set[str]
) -> None:
    """Warn of parameters without any gradient that have one in training mode; look at each of them once.

    Args:
        batch: the samples, and the model in eval mode.
        parts: all parameters.
        without_gradient: those whose rows of J are zero; on all processes the same.
        chunk: samples to run at once.
        looked_at: the parameters that have been looked at; added to.
    """
    new = {name: parts[name].parameter for name in without_gradient if name not in looked_at}
    looked_at.update(new)
    used = used_parameters(batch, new, chunk) if new else {}
    unused = {name: parameter for name, parameter in new.items() if name not in used}
    names = list(_used_in_training(batch, unused, chunk)) if unused else []
    if names:
        warn(
            f"{listed(names)} act on the logits in training mode but not in eval mode, in which measures are taken, "
            "and count as zero; if the model keeps or merges what it computes from them, the measures lack them: "
            "let it compute that in every pass, or freeze them (requires_grad_(False)) to measure the others alone",
            UnusedParametersWarning,
        )


@contextmanager
def refusing_kept_graphs(model: nn.Module) -> Iterator[None]:
    """Say what the model keeps where a second backward pass fails at it.

    Raises:
        FlatminimaError: in the place of PyTorch's own error.
    """
    try:
        yield
    except RuntimeError as error:
        kept = [
            f"{prefix}.{name}".lstrip(".")
            for prefix, module in model.named_modules()
            for name, value in vars(module).items()
            if any(not tensor.is_leaf for tensor in tensors_of(value))
        ]
        if not kept or not meets_a_freed_graph(error):
            raise
        raise FlatminimaError(
            f"the model keeps in {', '.join(kept[:5])} what it computed from its parameters in an earlier pass, and "
            "gradients go through that once only: let it compute that in every pass, or freeze these parameters"
        ) from error


def _used_in_training(batch: Batch, candidates: Mapping[str, nn.Parameter], chunk: int) -> Mapping[str, nn.Parameter]:
    """Those candidates that plain autograd finds in the graph of one pass in training mode, if the model takes that."""
    model, some = batch.model, slice(0, chunk)
    training = replace(batch, inputs=take(batch.inputs, some), targets=batch.targets[some])
    with Generators(model.parameters()).restored(), Buffers(model).scratch():
        try:
            model.train()
            return used_parameters(training, candidates, chunk)
        except (RuntimeError, TypeError, ValueError):  # one sample is no batch to normalize by, or logits among others
            return {}
        finally:
            model.eval()
