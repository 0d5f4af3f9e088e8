"""Networks whose Fisher information has full rank: one class's logit is pinned to zero."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PinnedLinear(nn.Module):
    """Multinomial logistic regression with W = (K − 1)(D + 1) parameters."""

    def __init__(self, inputs: int, classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, classes - 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(self.linear(x), (1, 0))


class PinnedNetwork(nn.Module):
    """One smooth hidden layer; W = (D + 1) H + (H + 1)(K − 1)."""

    def __init__(self, inputs: int = 4, hidden: int = 5, classes: int = 3) -> None:
        super().__init__()
        self.hidden = nn.Linear(inputs, hidden)
        self.output = nn.Linear(hidden, classes - 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(self.output(torch.tanh(self.hidden(x))), (1, 0))


def number_of_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def pinned_linear(samples: int, *, inputs: int = 3, classes: int = 3, seed: int = 0) -> tuple[nn.Module, Tensor]:
    """An untrained classifier and as many Gaussian inputs, float64."""
    torch.manual_seed(seed)
    return PinnedLinear(inputs, classes).double(), torch.randn(samples, inputs, dtype=torch.float64)


def trained_network(samples: int, *, seed: int = 1) -> tuple[nn.Module, Tensor, Tensor]:
    """A network of 37 parameters trained on smoothed labels until KL(y ‖ f_w(x)) ≈ 0; its inputs and the labels y."""
    torch.manual_seed(seed)
    model, teacher = PinnedNetwork().double(), PinnedNetwork().double()
    for parameter in teacher.parameters():
        parameter.data *= 2
    x = torch.randn(samples, 4, dtype=torch.float64)
    y = 0.9 * teacher(x).softmax(1).detach() + 0.1 / 3
    optimizer = torch.optim.LBFGS(
        model.parameters(),
        max_iter=500,
        tolerance_grad=1e-14,
        tolerance_change=0,
        history_size=50,
        line_search_fn="strong_wolfe",
    )

    def closure() -> float:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss.item()

    optimizer.step(closure)
    return model, x, y


def divergence(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """The mean of KL(y ‖ f_w(x)), in nats."""
    return F.kl_div(model(x).log_softmax(1), y, reduction="batchmean").item()
