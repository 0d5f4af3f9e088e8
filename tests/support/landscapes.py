"""A small network around whose weights landscapes are drawn, and what a landscape should say of it."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatminima import landscape


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)).double()
    model(torch.randn(50, 2, 4, 4, dtype=torch.float64))  # running statistics of its own
    return model.eval()


def moved_by_hand(model: nn.Module, direction: dict[str, Tensor], step: float) -> nn.Module:
    other = copy.deepcopy(model)
    other.load_state_dict({name: t + step * direction.get(name, 0) for name, t in model.state_dict().items()})
    return other


def mean_loss(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    with torch.no_grad():
        return F.cross_entropy(model(data[0]), data[1]).item()


def direction_of(model: nn.Module, data: tuple[Tensor, Tensor], **options: Any) -> dict[str, Tensor]:
    """What a landscape moves the weights by at 1, seen from inside the network."""
    seen: list[dict[str, Tensor]] = []
    handle = model.register_forward_pre_hook(
        lambda module, _: seen.append({name: t.clone() for name, t in module.state_dict().items()})
    )
    landscape(model, data, steps=3, progress=False, **options)
    handle.remove()
    return {name: seen[-1][name] - seen[0][name] for name in seen[0]}  # the minimum is seen first, 1 last
