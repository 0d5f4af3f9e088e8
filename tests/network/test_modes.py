"""States that a model is put into, and out of again."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import flatminima as fm
from flatminima.errors import FlatminimaError, UnusedParametersWarning
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
    with pytest.warns(UnusedParametersWarning, match=r"\(0\.up, 0\.down\) act on the logits"):
        fm.gram(model, x, y)
    nn.functional.cross_entropy(model(x), y).backward()
    assert model[0].up.grad is not None


def test_weights_that_forward_changes_are_as_they_were_after_measuring() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 3, max_norm=0.1), nn.Flatten(), nn.Linear(6, 3))
    before = model[0].weight.detach().clone()
    tokens = torch.arange(8).view(4, 2) % 5
    fm.gram(model, tokens, torch.arange(4) % 3, path="generic")
    assert torch.equal(model[0].weight, before)
    model(tokens)
    assert not torch.equal(model[0].weight, before)  # by the model itself


@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::flatminima.errors.GenericPathWarning")
def test_torchscript_is_measured_and_trained_with_its_buffers_left_to_it() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)).double()
    scripted = torch.jit.script(copy.deepcopy(model))
    x, y = torch.randn(8, 5, dtype=torch.float64), torch.arange(8) % 3
    torch.testing.assert_close(fm.gram(scripted, x, y), fm.gram(model, x, y), rtol=1e-10, atol=0)
    for network in (model, scripted):
        torch.manual_seed(0)
        fm.FisherTraceRegularizer(network, num_sub_batches=2).backward(nn.functional.cross_entropy, x, y)
    for own, of_script in zip((*model.parameters(),), (*scripted.parameters(),), strict=True):
        torch.testing.assert_close(own.grad, of_script.grad, rtol=1e-8, atol=1e-12)
    for own, of_script in zip((*model.buffers(),), (*scripted.buffers(),), strict=True):
        torch.testing.assert_close(own, of_script)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::flatminima.errors.NotAMinimumWarning")
def test_batchnorm_of_torchscript_takes_no_other_statistics() -> None:
    scripted = torch.jit.script(nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)))
    x, y = torch.randn(8, 5), torch.arange(8) % 3
    with pytest.raises(FlatminimaError, match="BatchNorm layer '1' is TorchScript's"):
        fm.measure(scripted, (x, y), subset_size=4, trials=1, batchnorm=2, progress=False)
    regularizer = fm.FisherTraceRegularizer(scripted, num_sub_batches=2, batch_statistics="running")
    with pytest.raises(FlatminimaError, match="BatchNorm layer '1' is TorchScript's"):
        regularizer.backward(nn.functional.cross_entropy, x, y)


def test_buffers_that_forward_changes_are_as_they_were_after_measuring() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Counts(), nn.Linear(5, 3))
    own = list(model.buffers())
    x, y = torch.randn(6, 5), torch.arange(6) % 3
    fm.gram(model, x, y)
    assert [id(buffer) for buffer in model.buffers()] == [id(buffer) for buffer in own]
    assert int(model[0].calls) == 0
    assert bool(model[0].mean.isnan().all())
