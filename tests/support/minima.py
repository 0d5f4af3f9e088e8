"""Small networks with data, and what a measure says of all of it in one trial."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flatminima as fm

CLASSES = 4


def network(activation: nn.Module | None = None) -> tuple[nn.Module, Tensor, Tensor]:
    """An untrained network of 88 parameters, in float64, with twelve samples."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), activation or nn.Tanh(), nn.Linear(8, CLASSES, bias=False)).double()
    return model, torch.randn(12, 6, dtype=torch.float64), torch.arange(12) % CLASSES


def fitted(loss: float, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor, Tensor]:
    """A convolutional network with BatchNorm whose last layer is scaled to this training loss, with 24 samples."""
    torch.manual_seed(0)
    y = torch.arange(24) % CLASSES
    x = (3 * torch.randn(CLASSES, 2, 5, 5))[y] + 0.3 * torch.randn(24, 2, 5, 5)
    model = nn.Sequential(nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.Tanh(), nn.Flatten(), nn.Linear(45, CLASSES))
    with torch.no_grad():
        features = model[:-1](x)  # which sets the running statistics too
        features = model.eval()[:-1](x)
        weight = torch.stack([features[y == c].mean(0) for c in range(CLASSES)])
        weight -= weight.mean(0)
        logits = (features @ weight.T).double()
        off_label = logits.scatter(1, y[:, None], -torch.inf) - logits.gather(1, y[:, None])
        low, high = 1e-3, 1e3
        for _ in range(40):
            scale = (low * high) ** 0.5
            found = F.softplus((scale * off_label).logsumexp(1)).mean()  # −ln p_y with all its digits
            low, high = (scale, high) if found > loss else (low, scale)
        model[-1].weight.copy_(scale * weight)
        model[-1].bias.zero_()
    return model.to(dtype), x.to(dtype), y


def value_of(measure: str, model: nn.Module, data: tuple[Tensor, Tensor], **options: object) -> float:
    """A measure's value on all samples at once."""
    options = {"subset_size": len(data[1]), "trials": 1, "progress": False, **options}
    return fm.measure(model, data, measures=measure, **options).estimates()[measure].mean
