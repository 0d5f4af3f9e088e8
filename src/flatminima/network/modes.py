"""States that a model is put into for some passes, and out of again: evaluating, differentiating, frozen, moved."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from flatminima.errors import FlatminimaError
from flatminima.network.batches import device_of, replaced_forward
from flatminima.network.batchnorm import sound_batchnorm
from flatminima.network.precision import PENALTIES_NEED_FLOAT32, true_precision
from flatminima.torch_compat import foreach_add_, foreach_copy_, hold, own_buffers, own_parameters, without_checkpoints


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode; every module's own mode, and its buffers, are restored afterwards.

    A module's ``train`` may do work (merge adapters into weights, say) and is called where the mode changes. What it
    did to the module's own parameters is then undone to the bit, which its own way back would round; and so is what an
    embedding with ``max_norm`` does to its own in every pass.
    """
    modes = [(module, module.training) for module in model.modules()]
    working = [module for module, _ in modes if type(module).train is not nn.Module.train or _writes_to_weights(module)]
    weights = [(p, p.detach().clone()) for module in working for p in own_parameters(module).values() if p is not None]
    buffers = Buffers(model)
    saved = [buffer.detach().clone() for buffer in buffers.own]
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes:  # outer modules first: their train() sets the inner ones as well
            if module.training != mode:
                module.train(mode)
        buffers.put_back()
        with torch.no_grad():
            for tensor, before in (*weights, *zip(buffers.own, saved, strict=True)):
                if not _same_bits(tensor, before):
                    tensor.copy_(before)


def _writes_to_weights(module: nn.Module) -> bool:
    return isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is not None


def _same_bits(tensor: Tensor, other: Tensor) -> bool:
    return torch.equal(tensor, other) or (
        tensor.is_floating_point() and torch.allclose(tensor, other, rtol=0, atol=0, equal_nan=True)
    )


@contextmanager
def differentiating(model: nn.Module) -> Iterator[None]:
    """For passes in eval mode whose gradients, and gradients of these, are to be right whatever the model consists of.

    In its own precision, through batch normalizations of a single sample, and through checkpoints, of which the
    reentrant ones would leave out what comes before the first input that requires a gradient.
    """
    with evaluating(model), true_precision(), torch.enable_grad(), sound_batchnorm(), without_checkpoints():
        yield


@contextmanager
def frozen(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """No gradients for those parameters that require them: the backward pass computes those of activations only."""
    held = [parameter for parameter in parameters if parameter.requires_grad]
    try:
        for parameter in held:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in held:
            parameter.requires_grad_(True)


@contextmanager
def moved(parameters: list[Tensor], direction: list[Tensor], step: float) -> Iterator[None]:
    """Move the weights by step · direction, and back to the very same bits: by copy, as adding would round."""
    saved = [parameter.detach().clone() for parameter in parameters]
    are_back = False
    try:
        try:
            with torch.no_grad():
                foreach_add_(parameters, direction, alpha=step)
            yield
        finally:
            with torch.no_grad():
                foreach_copy_(parameters, saved)
            are_back = True
    finally:  # where the way back itself is interrupted
        if not are_back:
            with torch.no_grad():
                foreach_copy_(parameters, saved)


class Buffers:
    """A model's buffers, wherever its modules hold them. The modules are walked once, here, for all passes of a step.

    Attributes:
        own: every buffer once, in the order of ``model.buffers()``.
    """

    def __init__(self, model: nn.Module) -> None:
        self._holders = [(held, dict(held)) for module in model.modules() if (held := own_buffers(module))]
        places = {
            id(buffer): (buffer, held, name)
            for held, own in self._holders
            for name, buffer in own.items()
            if buffer is not None
        }
        self._places = list(places.values())
        self.own = [buffer for buffer, _, _ in self._places]

    def now(self) -> list[Tensor]:
        """What the modules hold in the places of :attr:`own`; the own buffer where a module has dropped it."""
        present = (
            held[name] if name in held else None  # noqa: SIM401 (TorchScript's mapping has no get)
            for _, held, name in self._places
        )
        return [own if buffer is None else buffer for own, buffer in zip(self.own, present, strict=True)]

    @contextmanager
    def scratch(self) -> Iterator[None]:
        """Let the model work on copies of its buffers, and give it back its own.

        This covers every layer that keeps statistics, whatever its class, and both passes of a sub-batch start alike.
        """
        copies = {id(buffer): buffer.detach().clone() for buffer in self.own}
        try:
            for held, own in self._holders:
                hold(held, {name: copies.get(id(buffer)) for name, buffer in own.items()})
            yield
        finally:
            self.put_back()

    def put_back(self) -> None:
        """Let the modules hold their own buffers again, where they have taken others."""
        for held, own in self._holders:
            hold(held, own)


@contextmanager
def without_autocast(model: nn.Module) -> Iterator[None]:
    """Undo Accelerate's autocast wrapper, and notice, at small cost, others that switch autocast back on.

    Where a forward does so after its first module, :class:`RefusedAutocast` notices.
    """
    modules = [module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]  # takes no hooks
    innermost = (module for module in modules if own_parameters(module) and not list(module.children()))
    with ExitStack() as stack:
        for module in modules:
            if "_original_forward" in module.__dict__:
                stack.enter_context(replaced_forward(module, module.__dict__["_original_forward"]))
        for module in itertools.islice(itertools.chain(innermost, modules), 1):
            stack.callback(module.register_forward_pre_hook(_refuse_autocast).remove)
        yield


def _refuse_autocast(module: nn.Module, inputs: tuple[Any, ...]) -> None:
    if torch.is_autocast_enabled(device_of(module).type):
        raise FlatminimaError(f"the model switches autocast on inside its forward, {PENALTIES_NEED_FLOAT32}")
