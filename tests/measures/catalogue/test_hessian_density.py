from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import Tensor, nn

import flatminima as fm
from flatminima.errors import FlatminimaError
from flatminima.measures import CATALOGUE, SpectralDensity, Trial, spectral_density
from support.small_networks import pinned_linear
from support.trials import trial_of

pytestmark = pytest.mark.filterwarnings("ignore::flatminima.errors.FlatminimaWarning")

NEGATIVE = CATALOGUE["hessian_negative_energy"]


def exact(trial: Trial) -> Tensor:
    return torch.linalg.eigvalsh(fm.exact_hessian(trial.model, trial.inputs, trial.targets))


def small() -> Trial:
    """No more parameters than steps."""
    model, x = pinned_linear(12)
    return trial_of(model, x, torch.arange(12) % 3, subset_size=5)


def curved() -> Trial:
    """63 parameters, far from a minimum: eigenvalues of both signs."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    model.append(nn.Linear(3, 3, dtype=torch.float64))
    return trial_of(model, torch.randn(9, 5, dtype=torch.float64), torch.arange(9) % 3)


def of_low_rank() -> Trial:
    """42 parameters and a Hessian of rank 6."""
    torch.manual_seed(0)
    model = nn.Linear(20, 2).double()
    return trial_of(model, torch.randn(6, 20, dtype=torch.float64), torch.arange(6) % 2)


def negative_share(eigenvalues: Tensor) -> float:
    return float(-eigenvalues[eigenvalues < 0].sum() / eigenvalues.abs().sum())


def test_of_few_parameters_it_has_every_eigenvalue() -> None:
    trial = small()
    found, expected = spectral_density(trial), exact(trial)
    torch.testing.assert_close(found.eigenvalues, expected, rtol=1e-9, atol=1e-12)
    assert torch.equal(found.weights, torch.full_like(expected, 1 / len(expected)))
    assert NEGATIVE.of(trial) == pytest.approx(negative_share(expected), abs=1e-12)


def test_the_steps_find_all_eigenvalues_where_there_are_few() -> None:
    """Of rank 6 there are six beside zero; the recurrence ends long before its 20 steps."""
    trial = of_low_rank()
    found, expected = spectral_density(trial, steps=20), exact(trial)
    torch.testing.assert_close(found.eigenvalues[-6:], expected[-6:], rtol=1e-9, atol=0)
    assert 7 <= len(found.eigenvalues) <= 9
    assert float(found.eigenvalues[:-6].abs().max()) < 1e-12
    assert float(found.weights.sum()) == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("function", [lambda x: x, torch.square, torch.abs, lambda x: x.clamp_max(0)])
def test_means_over_eigenvalues_are_right_on_average(function: object) -> None:
    """Within four standard errors over probes, of the exact Hessian's."""
    assert callable(function)
    trial = curved()
    expected = float(function(exact(trial)).mean())
    assert abs(expected) > 1e-4
    rules = [spectral_density(dataclasses.replace(trial, number=i), steps=20) for i in range(30)]
    values = torch.tensor([rule.mean(function) for rule in rules])
    standard_error = float(values.std()) / len(values) ** 0.5
    assert standard_error < 0.5 * abs(expected)
    assert abs(float(values.mean()) - expected) < 4 * standard_error


def test_probes_are_averaged_and_the_density_is_that_of_the_exact_spectrum() -> None:
    trial = curved()
    eigenvalues = exact(trial)
    width = 0.1 * float(eigenvalues[-1] - eigenvalues[0])
    points = torch.linspace(float(eigenvalues[0]) - 5 * width, float(eigenvalues[-1]) + 5 * width, 400)
    step = float(points[1] - points[0])
    alike = SpectralDensity(eigenvalues, torch.full_like(eigenvalues, 1 / len(eigenvalues)))
    expected = alike.at(points, width)
    normal = torch.distributions.Normal(eigenvalues, width)
    torch.testing.assert_close(expected, normal.log_prob(points.double()[:, None]).exp().mean(1))
    found = spectral_density(trial, probes=40, steps=20)
    assert len(found.eigenvalues) == 40 * 20
    assert float(found.at(points, width).sum()) * step == pytest.approx(1, rel=1e-3)
    assert float((found.at(points, width) - expected).abs().sum()) * step < 0.1


def test_the_outermost_nodes_are_eigenvalues() -> None:
    trial = curved()
    found, expected = spectral_density(trial).eigenvalues, exact(trial)
    assert float(found[-1]) == pytest.approx(float(expected[-1]), rel=1e-6)
    assert float(found[0]) == pytest.approx(float(expected[0]), rel=1e-6)


def test_draws_are_the_trials_own_and_the_callers_generator_stays() -> None:
    trial = curved()
    state = torch.get_rng_state()
    value = NEGATIVE.of(trial)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert NEGATIVE.of(trial) == value != NEGATIVE.of(dataclasses.replace(trial, number=1))


def test_float32_agrees_with_float64() -> None:
    trial = curved()
    single = trial_of(copy.deepcopy(trial.model).float(), trial.inputs.float(), trial.targets)
    assert NEGATIVE.of(single) == pytest.approx(NEGATIVE.of(trial), rel=1e-3)


def test_a_hessian_of_zeros_has_no_share() -> None:
    trial = trial_of(nn.Linear(20, 3).double(), torch.randn(6, 20, dtype=torch.float64), torch.arange(6) % 3)
    flat = dataclasses.replace(trial, options=dataclasses.replace(trial.options, loss=lambda z, y: z.sum(1)))
    assert spectral_density(flat).eigenvalues.tolist() == [0.0]
    assert NEGATIVE.of(flat) != NEGATIVE.of(flat)


def test_none_of_it_is_refused() -> None:
    with pytest.raises(FlatminimaError, match="a probe and two steps, got 0 and 30"):
        spectral_density(small(), probes=0)
