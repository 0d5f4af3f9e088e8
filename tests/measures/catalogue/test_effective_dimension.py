from __future__ import annotations

import pytest
import torch

from support.minima import network, value_of
from support.oracles import explicit_jacobian

pytestmark = pytest.mark.filterwarnings("ignore::flatminima.errors.NotAMinimumWarning")


def test_dimension_and_rank_by_the_singular_values_of_the_jacobian() -> None:
    model, x, y = network()
    eigenvalues = torch.linalg.svdvals(explicit_jacobian(model, x, y)) ** 2
    dimension = (eigenvalues / (eigenvalues + eigenvalues.mean())).sum().item()
    assert value_of("effective_dimension", model, (x, y)) == pytest.approx(dimension, rel=1e-9)
    rank = (eigenvalues.sum() / eigenvalues.max()).item()
    assert value_of("stable_rank", model, (x, y)) == pytest.approx(rank, rel=1e-9)


def test_rescaling_the_loss_changes_neither() -> None:
    model, x, y = network()

    def a_hundredth(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(logits, labels, reduction="none") / 100

    for measure in ("effective_dimension", "stable_rank"):
        expected = value_of(measure, model, (x, y))
        assert value_of(measure, model, (x, y), loss=a_hundredth) == pytest.approx(expected, rel=1e-9)


def test_orthogonal_gradients_of_one_length_count_half_and_whole() -> None:
    model = torch.nn.Linear(12, 4, bias=False).double()
    model.weight.data.zero_()
    data = torch.eye(12, dtype=torch.float64), torch.arange(12) % 4
    assert value_of("effective_dimension", model, data) == pytest.approx(6)
    assert value_of("stable_rank", model, data) == pytest.approx(12)
