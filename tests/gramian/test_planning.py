from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

import flatminima as fm
from flatminima.errors import FlatminimaError
from flatminima.gramian.engine import factored_gram, plan_for
from flatminima.gramian.planning import PIECEWISE, Plan, make_plan, pass_bytes


def covered(plan: Plan) -> dict[str, list[int]]:
    """Every index of every parameter's first dimension, as often as it is planned."""
    indices: dict[str, list[int]] = {}
    for pieces in plan.passes:
        for piece in pieces:
            indices.setdefault(piece.name, []).extend(range(piece.start, piece.stop))
    return indices


@given(
    samples=st.integers(1, 40),
    shapes=st.lists(st.lists(st.integers(1, 9), max_size=3), min_size=1, max_size=5),
    sample_bytes=st.integers(1, 3000),
    budget=st.integers(100, 200_000),
)
def test_every_entry_is_planned_once_and_the_budget_holds(samples, shapes, sample_bytes, budget) -> None:
    parameters = {f"p{i}": nn.Parameter(torch.zeros(shape)) for i, shape in enumerate(shapes)}
    try:
        plan = make_plan(samples, parameters, sample_bytes, 100, budget)
    except FlatminimaError:  # too small a budget; test_a_small_budget_... looks at the message
        assume(False)
    lengths = {name: list(range(p.shape[0] if p.dim() else 1)) for name, p in parameters.items()}
    assert covered(plan) == lengths
    assert 1 <= plan.chunk <= samples
    assert plan.activation_bytes + plan.rows_bytes <= (budget if plan.at_once else PIECEWISE * budget)


def test_the_least_budget_that_an_error_names_is_enough() -> None:
    parameters = {"p": nn.Parameter(torch.zeros(40, 1000))}
    least = int((80 + 20 * 4000) / PIECEWISE) + 1
    with pytest.raises(FlatminimaError, match="allow at least"):
        make_plan(20, parameters, sample_bytes=80, rows_at_once=10**6, budget=least - 2)
    assert make_plan(20, parameters, sample_bytes=80, rows_at_once=10**6, budget=least).chunk == 1


def test_pass_bytes_of_a_known_network() -> None:
    """Two linear layers around a tanh: its output is saved, the input was there before; and eight times the logits."""
    model = nn.Sequential(nn.Linear(10, 20), nn.Tanh(), nn.Linear(20, 3))
    images = torch.randn(50, 10)
    assert pass_bytes(model, images[:1]) == 1.25 * 4 * 20 + 8 * 4 * 3


def test_rows_get_the_memory_that_activations_do_not_need() -> None:
    """40 units of rows where 30 can be filled: two passes with up to 10 samples at once, but three with more."""
    plan = make_plan(20, {"p": nn.Parameter(torch.zeros(40))}, sample_bytes=80, rows_at_once=1000, budget=2500)
    assert (len(plan.passes), plan.chunk) == (2, 10)


def test_a_small_budget_gives_more_passes_and_the_same_numbers() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(576, 5)
    ).double()
    x, y = torch.randn(20, 3, 8, 8, dtype=torch.float64), torch.arange(20) % 5
    roomy = plan_for(model, x, memory_budget=2**30)
    tight = plan_for(model, x, memory_budget=2**18)
    assert (len(roomy.passes), roomy.chunk) == (1, 20)
    assert len(tight.passes) > 3
    assert tight.chunk < 20
    assert "passes over" in str(tight)
    expected = factored_gram(model, x, y, plan=roomy)
    torch.testing.assert_close(factored_gram(model, x, y, plan=tight).unit, expected.unit, rtol=1e-9, atol=1e-9)
    with pytest.raises(FlatminimaError, match="is too small: one sample takes"):
        plan_for(model, x, memory_budget=1000)


def test_several_passes_over_all_samples_at_once() -> None:
    """What a budget gives that holds all activations, but few rows beside them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    x, y = torch.randn(7, 6, dtype=torch.float64), torch.arange(7) % 3
    parameters = dict(model.named_parameters())
    plan = make_plan(7, parameters, sample_bytes=100, rows_at_once=3000, budget=3021)
    assert (len(plan.passes), plan.chunk) == (3, 7)
    torch.testing.assert_close(factored_gram(model, x, y, plan=plan).unit, factored_gram(model, x, y).unit)


def test_measure_keeps_to_the_budget_given() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, 3)).double()
    x, y = torch.randn(40, 20, dtype=torch.float64), torch.arange(40) % 3
    options = {"subset_size": 15, "trials": 2, "loss": nn.MSELoss(), "measures": ()}
    targets = nn.functional.one_hot(y, 3).double()
    whole = fm.measure(model, (x, targets), **options)
    parts = fm.measure(model, (x, targets), memory_budget=60_000, **options)
    assert parts.log_det_fisher.mean == pytest.approx(whole.log_det_fisher.mean, rel=1e-10)
