"""Penalties that do nothing, or are noise, are warned of."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatminima.errors import FlatminimaWarning, IdlePenaltyWarning, NoisyPenaltyWarning
from flatminima.regularizer import FisherTraceRegularizer
from support.regularizer_cases import SEED, mlp

LOOK = 20
"""After how many penalties the warnings look."""


def samples(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    torch.manual_seed(SEED)
    return torch.randn(32, 6, dtype=dtype), torch.randint(3, (32,))


def warned_of(steps: int, *, dtype: torch.dtype = torch.float32, start: int = 0, **options: Any) -> list[Any]:
    """The steps that warned, with the warnings' types; every step is on the same weights and batch."""
    inputs, targets = samples(dtype)
    model = mlp().to(dtype)
    regularizer = FisherTraceRegularizer(model, num_sub_batches=4, **options)
    regularizer.load_state_dict({"step": start, "clipped": 0})
    found = []
    for step in range(start, start + steps):
        model.zero_grad()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            regularizer.backward(F.cross_entropy, inputs, targets)
        found += [(step, warning.category) for warning in caught]
    return found


def test_a_penalty_that_does_something_is_no_reason_to_warn() -> None:
    assert warned_of(3 * LOOK, alpha=1e-4, beta=100.0) == []


def test_a_penalty_that_does_nothing_is_told_once() -> None:
    assert warned_of(3 * LOOK, alpha=1e-4, beta=1e-3) == [(LOOK - 1, IdlePenaltyWarning)]


def test_a_penalty_of_rounding_errors_is_told_once() -> None:
    assert warned_of(3 * LOOK, alpha=1e-7, beta=1e5) == [(LOOK - 1, NoisyPenaltyWarning)]


def test_one_that_is_small_and_noise_is_called_noise_as_a_larger_weight_would_not_help() -> None:
    assert warned_of(LOOK, alpha=1e-7, beta=1.0) == [(LOOK - 1, NoisyPenaltyWarning)]


@pytest.mark.parametrize("options", [{"dtype": torch.float64}, {"estimator": "hvp"}], ids=["float64", "hvp"])
def test_the_same_settings_are_no_noise(options: dict[str, Any]) -> None:
    assert warned_of(LOOK, alpha=1e-7, beta=1e5, **options) == []


def test_no_penalty_is_none_that_does_nothing() -> None:
    assert warned_of(LOOK, beta=0.0) == []


def test_looks_count_penalties_at_their_full_weight() -> None:
    last = 10 + 4 + 2 * (LOOK - 1)  # steps 10 and 12 are of the warm-up
    assert warned_of(last + 10, beta=1e-3, every=2, start_step=10, warmup_steps=4) == [(last, IdlePenaltyWarning)]


def test_the_weight_counts_every() -> None:
    """A penalty on every 1000th step has 1000 times the weight."""
    inputs, targets = samples()
    regularizer = FisherTraceRegularizer(mlp(), beta=0.1, num_sub_batches=4, every=1000)
    for k in range(LOOK):
        regularizer.step = 1000 * k
        regularizer.penalize(lambda batch: F.cross_entropy(regularizer.model(batch[0]), batch[1]), (inputs, targets))
    assert regularizer.diagnostics()["penalty_to_gradient"] > 1e-3


def test_a_resumed_run_is_not_told_that_its_penalty_has_faded() -> None:
    assert warned_of(3 * LOOK, start=500, beta=1e-3) == []


def test_a_run_is_told_of_noise_whenever_the_noise_has_an_effect() -> None:
    assert warned_of(LOOK, start=500, alpha=1e-7, beta=1e5) == [(500 + LOOK - 1, NoisyPenaltyWarning)]
    assert warned_of(LOOK, start=500, alpha=1e-7, beta=1.0) == []


def test_single_odd_steps_are_no_reason() -> None:
    """Nine of twenty batches have no gradient to speak of: the median does not see them."""
    inputs, targets = samples()
    regularizer = FisherTraceRegularizer(mlp(), alpha=1e-4, beta=100.0, num_sub_batches=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FlatminimaWarning)
        for k in range(LOOK):
            scale = 1e-6 if k % 2 and k < LOOK - 1 else 1.0
            regularizer.penalize(lambda batch, s=scale: s * loss(regularizer.model, batch), (inputs, targets))
            assert (regularizer.diagnostics()["penalty_to_gradient"] < 1e-3) == (scale < 1)


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def test_messages_say_what_and_what_to_do() -> None:
    inputs, targets = samples()
    for options, category, message in [
        ({"beta": 1e-3}, IdlePenaltyWarning, r"is [\d.e-]+ of the main one .*beta=0.001, .*Raise beta"),
        ({"alpha": 1e-7}, NoisyPenaltyWarning, r"^\d+ % of .*rounding error.*alpha=1e-07.*'hvp'.*raise alpha"),
    ]:
        regularizer = FisherTraceRegularizer(mlp(), num_sub_batches=4, **options)
        for _ in range(LOOK - 1):
            regularizer.penalize(lambda batch, r=regularizer: loss(r.model, batch), (inputs, targets))
        with pytest.warns(category, match=message) as caught:
            regularizer.penalize(lambda batch, r=regularizer: loss(r.model, batch), (inputs, targets))
        assert [warning.filename for warning in caught] == [__file__]
