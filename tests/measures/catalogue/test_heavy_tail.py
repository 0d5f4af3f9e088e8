from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from flatminima.errors import UndefinedMeasureError
from flatminima.measures import CATALOGUE
from flatminima.measures.catalogue.heavy_tail import tail_exponent
from support.trials import trial_of

pytestmark = pytest.mark.filterwarnings("ignore::flatminima.errors.FlatminimaWarning")


def by_the_book(values: np.ndarray) -> float:
    """Clauset, Shalizi & Newman (2009), Eq. 3.1 and 3.9, for every x_min one after the other."""
    fits = []
    for x_min in np.sort(values)[:-1]:
        tail = np.sort(values[values >= x_min])
        alpha = 1 + len(tail) / np.log(tail / x_min).sum()
        cumulative = np.array([np.mean(tail < x) for x in tail])
        fits.append((np.abs(cumulative - (1 - (tail / x_min) ** (1 - alpha))).max(), alpha))
    return min(fits)[1]


def with_eigenvalues(values: Tensor) -> Tensor:
    """A weight whose WᵀW has them."""
    n, dtype = len(values), values.dtype
    left, right = (torch.linalg.qr(torch.randn(m, n, dtype=dtype)).Q for m in (n + 5, n))
    return left @ values.sqrt().diag() @ right.T


def alpha(*layers: nn.Module, inputs: tuple[int, ...]) -> float:
    model = nn.Sequential(*layers)
    x = torch.randn(4, *inputs, dtype=model[-1].weight.dtype)
    return CATALOGUE["heavy_tail_alpha"].of(trial_of(model, x, torch.arange(4) % 2, subset_size=2))


@pytest.fixture(autouse=True)
def _same_draws() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("exponent", [1.8, 2.5, 4.0])
def test_a_power_law_has_its_exponent(exponent: float) -> None:
    """At equally likely quantiles of the law, where maximum likelihood is right up to their number."""
    quantiles = (torch.arange(400, dtype=torch.float64) + 0.5) / 400
    layer = nn.Linear(400, 405).double()
    layer.weight.data = with_eigenvalues((1 - quantiles) ** (-1 / (exponent - 1)))
    assert alpha(layer, nn.Flatten(), nn.Linear(405, 2).double(), inputs=(400,)) == pytest.approx(exponent, rel=0.02)


def test_the_default_type_changes_nothing() -> None:
    """Not even one so coarse that another x_min would fit best."""
    torch.manual_seed(2)
    values = torch.rand(100, dtype=torch.float64).pow(-1.3).sort().values
    expected = tail_exponent(values)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert tail_exponent(values) == expected
    finally:
        torch.set_default_dtype(torch.float32)


def test_it_is_the_mean_over_layers_of_the_best_fit_to_all_positions_of_a_kernel() -> None:
    conv, linear = nn.Conv2d(8, 6, 3).double(), nn.Linear(54, 40).double()
    conv.weight.data *= torch.randn(6, 1, 1, 1, dtype=torch.float64).exp()
    spectra = [np.linalg.svd(conv.weight.detach().numpy()[:, :, i, j])[1] ** 2 for i in range(3) for j in range(3)]
    expected = by_the_book(np.concatenate(spectra)), by_the_book(np.linalg.svd(linear.weight.detach().numpy())[1] ** 2)
    layers = conv, nn.Flatten(), linear, nn.Linear(40, 2).double()  # whose last has two eigenvalues: left out
    assert alpha(*layers, inputs=(8, 5, 5)) == pytest.approx(np.mean(expected), rel=1e-9)


def test_directions_that_a_weight_has_not_are_no_tail() -> None:
    """A float32 weight of rank 30 has further singular values, of rounding."""
    values = torch.randn(30).abs() + 0.1
    whole, layer = with_eigenvalues(values), nn.Linear(50, 35)
    layer.weight.data = whole @ torch.linalg.qr(torch.randn(50, 30)).Q.T
    found = alpha(layer, nn.Linear(35, 2), inputs=(50,))
    assert found == pytest.approx(by_the_book(values.double().numpy()), rel=1e-3)


def test_layers_too_small_for_a_fit_have_none() -> None:
    with pytest.raises(UndefinedMeasureError, match="no layer's weight has 20 eigenvalues"):
        alpha(nn.Linear(19, 30), nn.Linear(30, 2), inputs=(19,))
