"""Other libraries' ways to ξ = JJᵀ, each used as its own documentation says, behind one signature.

Each function readies a model (in eval mode; hooks are put on it, so hand over a copy) and returns a function
(inputs, targets) → (N, N) float64 Gram matrix of the per-sample loss gradients. Rows are multiplied in the model's
precision and summed in float64, as in our own. Libraries are imported where they are used: none is required.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

PerSampleLoss = Callable[[Tensor, Tensor], Tensor]
GramOf = Callable[[Any, Tensor], Tensor]
Peer = Callable[[nn.Module, PerSampleLoss], GramOf]


def vmap_grad(model: nn.Module, loss: PerSampleLoss) -> GramOf:
    """``torch.func.vmap(grad)``: all per-sample gradients of all parameters at once."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def loss_of_one(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return loss(torch.func.functional_call(model, parameters, (x[None],)), y[None])[0]

    gradients = torch.func.vmap(torch.func.grad(loss_of_one), in_dims=(None, 0, 0))
    return lambda x, y: gram_of_rows(gradients({n: p.detach() for n, p in parameters.items()}, x, y).values())


def backpack(model: nn.Module, loss: PerSampleLoss) -> GramOf:
    """BackPACK's ``BatchGrad``."""
    from backpack import backpack as extensions_active
    from backpack import extend
    from backpack.extensions import BatchGrad

    extend(model)
    parameters = [p for p in model.parameters() if p.requires_grad]

    def gram_of(x: Tensor, y: Tensor) -> Tensor:
        with extensions_active(BatchGrad()):
            loss(model(x), y).sum().backward()
        used = [p for p in parameters if p.grad is not None]
        xi = gram_of_rows(p.grad_batch for p in used)
        for p in used:
            p.grad = p.grad_batch = None
        return xi

    return gram_of


def opacus(model: nn.Module, loss: PerSampleLoss) -> GramOf:
    """Opacus' ``GradSampleModule``. It sees nothing in eval mode, so the model must be the same in training mode.

    Not strict, because strict refuses BatchNorm in eval mode at once; what is left then is its layer-wise refusal.
    """
    from opacus import GradSampleModule

    sampled = GradSampleModule(model, loss_reduction="sum", strict=False).train()
    parameters = [p for p in model.parameters() if p.requires_grad]

    def gram_of(x: Tensor, y: Tensor) -> Tensor:
        loss(sampled(x), y).sum().backward()
        xi = gram_of_rows(p.grad_sample for p in parameters if p.grad is not None)
        sampled.zero_grad()
        return xi

    return gram_of


def nngeometry(model: nn.Module, loss: PerSampleLoss) -> GramOf:
    """NNGeometry's Jacobian of the per-sample losses, held whole."""
    from nngeometry import Jacobian
    from torch.utils.data import DataLoader, TensorDataset

    def gram_of(x: Tensor, y: Tensor) -> Tensor:
        loader = DataLoader(TensorDataset(x, y), batch_size=len(y))
        jacobian = Jacobian(model, loader, function=lambda x, y: loss(model(x), y)[:, None])
        return gram_of_rows([jacobian.to_torch()[0]])

    return gram_of


def torchjd(model: nn.Module, loss: PerSampleLoss) -> GramOf:
    """TorchJD's autogram ``Engine``, one batched dimension."""
    from torchjd.autogram import Engine

    engine = Engine(model, batch_dim=0)
    return lambda x, y: engine.compute_gramian(loss(model(x), y)).double()


PEERS: dict[str, Peer] = {
    "vmap_grad": vmap_grad,
    "backpack": backpack,
    "opacus": opacus,
    "nngeometry": nngeometry,
    "torchjd": torchjd,
}


def gram_of_rows(rows: Iterable[Tensor]) -> Tensor:
    """Σ_p J_p J_pᵀ of (N, ...) per-sample gradients, one parameter after the other."""
    xi: Tensor | None = None
    for one in rows:
        flat = one.detach().flatten(1) if one.dim() > 1 else one.detach()[:, None]
        product = (flat @ flat.T).double()
        xi = product if xi is None else xi.add_(product)
    assert xi is not None
    return xi
