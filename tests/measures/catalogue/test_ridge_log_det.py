from __future__ import annotations

import pytest
import torch

import flatminima as fm
from support.minima import network, value_of

pytestmark = pytest.mark.filterwarnings("ignore::flatminima.errors.NotAMinimumWarning")


@pytest.mark.parametrize("fisher", ["empirical", "model"])
def test_equals_the_determinant_of_the_posterior_precision_over_all_weights(fisher: str) -> None:
    """Laplace's W × W form with a unit prior: ln det(1 + N F) by Sylvester's identity."""
    model, x, y = network()
    information = fm.exact_fisher(model, x, y if fisher == "empirical" else "model")
    expected = torch.linalg.slogdet(torch.eye(len(information)) + 12 * information)[1].item()
    assert value_of("ridge_log_det", model, (x, y), fisher=fisher) == pytest.approx(expected, rel=1e-9)


def test_a_subset_stands_for_all_samples() -> None:
    """Copies of every sample: subsets that hold each once stand for all of them, exactly."""
    model, x, y = network()
    subset = fm.exact_fisher(model, x[:1], y[:1])
    expected = torch.linalg.slogdet(torch.eye(len(subset)) + 12 * subset)[1].item()
    data = x[:1].expand(12, -1).clone(), y[:1].expand(12).clone()
    assert value_of("ridge_log_det", model, data, subset_size=1) == pytest.approx(expected, rel=1e-9)


@pytest.mark.filterwarnings("ignore::flatminima.errors.SingularTrialWarning")
def test_a_singular_gram_matrix_has_one_too() -> None:
    model, x, y = network()
    x, y = torch.cat([x, x[:1]]), torch.cat([y, y[:1]])
    c = fm.measure(model, (x, y), subset_size=6, trials=6, measures="free", on_singular="skip", progress=False)
    assert 0 < len(c.singular_trials) < 6
    for trial in c.singular_trials:
        assert c.estimates()["ridge_log_det"].per_trial[trial] > 0
