"""States that a model is put into, and out of again."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import flatminima as fm
from flatminima.network import evaluating


class Merging(nn.Linear):
    """An adapter that its ``train`` merges into the weight and takes out again, as loralib's does."""

    def __init__(self) -> None:
        super().__init__(5, 5)
        self.weight.requires_grad_(False)
        self.up, self.down = nn.Parameter(torch.randn(5, 2)), nn.Parameter(torch.randn(2, 5))
        self.merged = False

    def train(self, mode: bool = True) -> Merging:
        nn.Linear.train(self, mode)
        if mode is self.merged:
            self.weight.data += (-1 if mode else 1) * (self.up @ self.down).detach()
            self.merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        plain = nn.Linear.forward(self, x)
        return plain if self.merged else plain + x @ (self.up @ self.down).T


class Freezes(nn.Sequential):
    """Keeps its first part in evaluation mode, whatever it is told."""

    def train(self, mode: bool = True) -> Freezes:
        super().train(mode)
        self[0].eval()
        return self


class Counts(nn.Module):
    """Buffers that forward changes in place and replaces, in evaluation mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("mean", torch.full((5,), torch.nan))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.mean = x.detach().mean(0)
        return x


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Freezes(Merging(), nn.Dropout()), Merging(), nn.Tanh(), nn.Linear(5, 3))


def modes(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


def test_modules_whose_train_does_work_are_led_back_by_it() -> None:
    model = network().train()
    model[3].eval()
    before, weights = modes(model), {name: p.clone() for name, p in model.state_dict().items()}
    with evaluating(model):
        assert not any(modes(model))
        assert model[1].merged
    assert modes(model) == before
    assert model[0][0].merged
    assert not model[1].merged
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_adapters_still_learn_after_they_were_measured() -> None:
    model = nn.Sequential(Merging(), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = torch.randn(6, 5, dtype=torch.float64), torch.arange(6) % 3
    fm.gram(model, x, y)
    nn.functional.cross_entropy(model(x), y).backward()
    assert model[0].up.grad is not None


def test_buffers_that_forward_changes_are_as_they_were_after_measuring() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Counts(), nn.Linear(5, 3))
    own = list(model.buffers())
    x, y = torch.randn(6, 5), torch.arange(6) % 3
    fm.gram(model, x, y)
    assert [id(buffer) for buffer in model.buffers()] == [id(buffer) for buffer in own]
    assert int(model[0].calls) == 0
    assert bool(model[0].mean.isnan().all())
