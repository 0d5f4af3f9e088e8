"""Interrupted at any line, measuring leaves nothing behind, and the interruption arrives."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import flatminima as fm
from flatminima.errors import FlatminimaError
from support.interruptions import what_interruptions_leave

SEED = 5


@pytest.mark.parametrize("moments", [30, pytest.param(400, marks=pytest.mark.slow)])
@pytest.mark.parametrize("call", ["gram", "measure", "compare"])
@pytest.mark.filterwarnings("ignore::flatminima.errors.FlatminimaWarning")
def test_an_interruption_at_any_line_leaves_nothing_behind_and_arrives(call: str, moments: int) -> None:
    torch.manual_seed(SEED)
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Dropout(0.2), nn.ReLU(), nn.Linear(5, 3))
    model[2].eval()
    other = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 3))
    x, y = torch.randn(12, 6), torch.randint(3, (12,))
    calls = {
        "gram": lambda: fm.gram(model, x, y),
        "measure": lambda: fm.measure(model, (x, y), subset_size=4, trials=2, progress=False),
        "compare": lambda: fm.compare({"a": model, "b.c": other}, (x, y), subset_size=2, trials=1, progress=False),
    }
    left = what_interruptions_leave(calls[call], nn.ModuleList([model, other]), moments, SEED)
    assert not left, "\n".join(left)


class Interrupting(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise KeyboardInterrupt("again")


def test_an_error_while_the_caller_handles_an_interruption_is_that_error() -> None:
    """Stopped, then measured: what the caller handles is none of the call's."""
    model = nn.Linear(6, 3)
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        with pytest.raises(FlatminimaError, match="a single number"):
            fm.gram(model, torch.randn(4, 6), torch.tensor(1))
        with pytest.raises(KeyboardInterrupt, match="again"):
            fm.gram(nn.Sequential(model, Interrupting()), torch.randn(4, 6), torch.arange(4) % 3)
