from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import flatminima as fm
from flatminima.errors import FlatminimaError
from flatminima.sampling import draw_subsets


@given(n=st.integers(1, 50), size=st.integers(1, 50), trials=st.integers(1, 5), seed=st.integers(0, 1000))
def test_subsets_are_distinct_indices_and_do_not_depend_on_the_number_of_trials(n, size, trials, seed) -> None:
    if size > n:
        with pytest.raises(FlatminimaError, match="fewer than subset_size"):
            draw_subsets(n, size, trials, seed)
        return
    subsets = draw_subsets(n, size, trials, seed)
    assert len(subsets) == trials
    assert all(len(set(subset)) == size and set(subset) <= set(range(n)) for subset in subsets)
    assert draw_subsets(n, size, trials + 1, seed)[:trials] == subsets


@pytest.mark.filterwarnings("ignore::flatminima.errors.FlatminimaWarning")
def test_a_measures_trials_are_on_these_subsets() -> None:
    torch.manual_seed(0)
    model, x, y = nn.Linear(8, 3).double(), torch.randn(20, 8, dtype=torch.float64), torch.randint(3, (20,))
    measured = fm.measure(model, (x, y), subset_size=5, trials=3, seed=4, progress=False)
    expected = [torch.linalg.slogdet(fm.gram(model, x[s], y[s])).logabsdet.item() for s in draw_subsets(20, 5, 3, 4)]
    assert measured.log_det_fisher.per_trial == pytest.approx(expected, rel=1e-9)
