"""Forward passes that take derivatives, make something require a gradient, switch autocast on, or squeeze."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import flatminima as fm
from flatminima.errors import FlatminimaError, GenericPathWarning
from flatminima.gramian import factored_gram
from support.oracles import explicit_gram

N, D = 6, 3
X, Y = torch.randn(N, D, dtype=torch.float64), torch.randn(N, D, dtype=torch.float64)


def squared(output: Tensor, targets: Tensor) -> Tensor:
    return (output - targets).square().reshape(len(targets), -1).sum(1)


class Network(nn.Module):
    def __init__(self, outputs: int = D) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(D, 8), nn.Tanh(), nn.Linear(8, outputs))
        self.double()


class Force(Network):
    """The output is a derivative by the input."""

    def __init__(self) -> None:
        super().__init__(outputs=1)

    def forward(self, x: Tensor) -> Tensor:
        x = x if x.requires_grad else x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(self.net(x).sum(), x, create_graph=True)
        return -gradient


class ForceByFunc(Force):
    def forward(self, x: Tensor) -> Tensor:
        return -torch.func.grad(lambda z: self.net(z).sum())(x)


class DirectionalDerivative(Network):
    def forward(self, x: Tensor) -> Tensor:
        return torch.func.jvp(self.net, (x,), (torch.ones_like(x),))[1]


class StepInForward(Network):
    """The last layer after a step of gradient descent on a task that comes with every sample."""

    def forward(self, x: Tensor) -> Tensor:
        h, last = self.net[:-1](x), self.net[-1]
        outputs = []
        for one in h:
            loss = (last(one) - one[:D]).square().sum()
            (step,) = torch.autograd.grad(loss, last.weight, create_graph=True)
            outputs.append(nn.functional.linear(one, last.weight - 0.1 * step, last.bias))
        return torch.stack(outputs)


class Saliency(Network):
    """Keeps the input's gradient for later."""

    def forward(self, x: Tensor) -> Tensor:
        self.seen = x.clone().requires_grad_()
        return self.net(self.seen)


class LeafInside(Network):
    def forward(self, x: Tensor) -> Tensor:
        h = self.net[:2](x)
        return self.net[2](h if h.requires_grad else h.requires_grad_())


@pytest.mark.parametrize("model", [Force, ForceByFunc, DirectionalDerivative, StepInForward])
def test_what_acts_through_derivatives_in_forward_takes_the_generic_path(model: type[Network]) -> None:
    network = model()
    result = factored_gram(network, X, Y, loss=squared)
    torch.testing.assert_close(result.matrix(), explicit_gram(network, X, Y, squared), rtol=1e-9, atol=1e-12)
    assert set(result.generic_parameters) == set(dict(network.named_parameters()))
    assert all(parameter.requires_grad for parameter in network.parameters())


@pytest.mark.filterwarnings("ignore::flatminima.errors.FlatminimaWarning")
def test_a_model_that_takes_derivatives_in_forward_is_measured() -> None:
    """Also where gradients are not recorded: for the training loss."""
    model = Force()
    measured = fm.measure(model, (X, Y), loss=squared, subset_size=N, trials=1, progress=False)
    expected = torch.linalg.slogdet(explicit_gram(model, X, Y, squared)).logabsdet.item()
    assert measured.log_det_fisher.mean == pytest.approx(expected, rel=1e-9)
    assert measured.train_loss == pytest.approx(squared(model(X), Y).mean().item(), rel=1e-9)


@pytest.mark.parametrize("model", [Saliency, LeafInside])
def test_leaves_made_in_forward_keep_no_parameter_from_its_rule(model: type[Network]) -> None:
    network = model()
    result = factored_gram(network, X, Y, loss=squared, spot_check=False)
    torch.testing.assert_close(result.matrix(), explicit_gram(network, X, Y, squared), rtol=1e-9, atol=1e-12)
    assert result.generic_parameters == ()


class Autocasting(Network):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            h = self.net(x)
        return h.to(x.dtype)


@pytest.mark.parametrize("path", ["rules", "generic"])
def test_autocast_in_forward_is_refused_and_the_remedy_works(path: Any) -> None:
    model, x, y = Autocasting().float(), X.float(), Y.float()
    with pytest.raises(
        FlatminimaError, match=r"switches autocast on inside its forward.*deepcopy\(model\)\.double\(\)"
    ):
        fm.gram(model, x, y, loss=squared, path=path)
    double = copy.deepcopy(model).double()
    xi = fm.gram(double, X, Y, loss=squared, path=path)
    torch.testing.assert_close(xi, explicit_gram(double, X, Y, squared), rtol=1e-9, atol=0)


def test_autocast_around_the_call_changes_nothing() -> None:
    model = Network()
    model.forward = model.net.forward  # type: ignore[method-assign]
    model, x, y = model.float(), X.float(), Y.float()
    expected = fm.gram(model, x, y, loss=squared)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fm.gram(model, x, y, loss=squared), expected)


class Squeezed(Network):
    """(N,) for a batch, () for one sample; (N, D), and (D,) for one."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).squeeze()


@pytest.mark.parametrize("outputs", [1, D])
@pytest.mark.parametrize("path", ["rules", "generic"])
@pytest.mark.parametrize("samples", [1, N])
def test_a_squeezed_output_of_one_sample_is_one_of_a_batch(outputs: int, path: Any, samples: int) -> None:
    model, y = Squeezed(outputs), Y[:, 0] if outputs == 1 else Y
    with warnings.catch_warnings():
        warnings.simplefilter("error", GenericPathWarning)
        xi = fm.gram(model, X[:samples], y[:samples], loss=squared, path=path)
    torch.testing.assert_close(xi, explicit_gram(model, X[:samples], y[:samples], squared), rtol=1e-9, atol=1e-12)


@pytest.mark.filterwarnings("ignore::flatminima.errors.FlatminimaWarning")
def test_a_squeezed_output_is_measured_where_the_last_batch_is_one_sample() -> None:
    model, x = Squeezed(1), torch.randn(501, D, dtype=torch.float64)
    measured = fm.measure(model, (x, x[:, 0]), loss=squared, subset_size=4, trials=1, progress=False)
    assert measured.train_loss == pytest.approx(squared(model(x), x[:, 0]).mean().item(), rel=1e-9)


class WrittenInAView(Network):
    """What is added to a view is overwritten through the view, where no gradient of its own arrives."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.randn(8, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        h = self.net[0](x)
        h.view(-1, 8).add_(self.shift).relu_()
        return self.net[2](h)


@pytest.mark.filterwarnings("ignore::flatminima.errors.GenericPathWarning")
def test_parameters_added_to_a_view_in_place_are_found_by_the_check() -> None:
    model = WrittenInAView()
    xi = fm.gram(model, X, Y, loss=squared)
    torch.testing.assert_close(xi, explicit_gram(model, X, Y, squared), rtol=1e-9, atol=1e-12)
