from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import flatminima as fm
from flatminima.errors import UndefinedMeasureError
from support.minima import network, value_of
from support.oracles import explicit_jacobian

pytestmark = pytest.mark.filterwarnings("ignore::flatminima.errors.NotAMinimumWarning")

HALF_SQUARED_RADIUS = 0.1**2 / 2


def weights_of(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_with_the_models_labels_it_is_the_second_order_of_the_loss_for_a_piecewise_linear_network() -> None:
    """E L(w + Dε) − L(w) = ½ρ² Σ_j D_j² H_jj to second order; H is the Hessian by plain autograd."""
    model, x, y = network(nn.ReLU())
    curvature = fm.exact_hessian(model, x, y).diagonal()
    average = value_of("average_sharpness", model, (x, y), fisher="model")
    assert average == pytest.approx(HALF_SQUARED_RADIUS * curvature.sum().item(), rel=1e-9)
    adaptive = value_of("adaptive_average_sharpness", model, (x, y), fisher="model")
    expected = HALF_SQUARED_RADIUS * (weights_of(model).square() * curvature).sum().item()
    assert adaptive == pytest.approx(expected, rel=1e-9)


def test_it_is_how_much_random_perturbations_raise_the_loss() -> None:
    """Pairs w ± ρ|w|ε cancel the first order, so that few draws are enough. No kink is as near."""
    model, x, y = network(nn.ReLU())
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    radius, draws = 1e-4, 400
    noise = {name: radius * p.abs() * torch.randn(draws, *p.shape, dtype=p.dtype) for name, p in parameters.items()}

    def loss(values: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(functional_call(model, values, (x,)), y)

    def growth(perturbation: dict[str, Tensor]) -> Tensor:
        up, down = ({n: p + s * perturbation[n] for n, p in parameters.items()} for s in (1, -1))
        return (loss(up) + loss(down)) / 2 - loss(parameters)

    found = torch.func.vmap(growth)(noise)
    adaptive = value_of("adaptive_average_sharpness", model, (x, y), fisher="model") * (radius / 0.1) ** 2
    error = (found.std() / draws**0.5).item()
    assert found.mean().item() == pytest.approx(adaptive, abs=4 * error)
    assert error < 0.1 * adaptive


def test_the_empirical_one_weights_squared_gradients_by_squared_weights() -> None:
    model, x, y = network()
    squares = explicit_jacobian(model, x, y).square().mean(0)
    expected = HALF_SQUARED_RADIUS * (weights_of(model).square() * squares).sum().item()
    assert value_of("adaptive_average_sharpness", model, (x, y)) == pytest.approx(expected, rel=1e-9)
    free = value_of("adaptive_average_sharpness", model, (x, y), scale_invariant=True)
    assert free == pytest.approx(expected, rel=1e-9)
    assert value_of("average_sharpness", model, (x, y)) == pytest.approx(
        HALF_SQUARED_RADIUS * squares.sum().item(), rel=1e-9
    )
    with pytest.raises(UndefinedMeasureError, match="it is the adaptive one"):
        value_of("average_sharpness", model, (x, y), scale_invariant=True)


def test_the_top_eigenvalue_is_that_of_the_exact_gauss_newton_matrix() -> None:
    model, x, y = network()
    expected = torch.linalg.eigvalsh(fm.exact_fisher(model, x, "model"))[-1].item()
    assert value_of("ggn_eigenvalue", model, (x, y), fisher="model") == pytest.approx(expected, rel=1e-9)
    with pytest.raises(UndefinedMeasureError, match="use fisher='model'"):
        value_of("ggn_eigenvalue", model, (x, y))
