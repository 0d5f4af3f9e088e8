"""The global random generators, led back to where they stood."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from flatminima.network import Generators

NUMPYS: Any = np.random  # the generator that models draw from, legacy or not

DRAWS: dict[str, Callable[[], Any]] = {
    "torch": lambda: float(torch.rand(())),
    "torch, normal": lambda: float(torch.randn(())),  # keeps half a pair, as the others do
    "Python": random.random,
    "Python, normal": lambda: random.gauss(0, 1),
    "numpy": lambda: float(NUMPYS.rand()),
    "numpy, normal": lambda: float(NUMPYS.randn()),
    "numpy, integer": lambda: int(NUMPYS.randint(2**31)),
}


@pytest.fixture(autouse=True)
def numpys_own() -> Iterator[None]:
    before = NUMPYS.get_state()
    yield
    NUMPYS.set_state(before)


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
@pytest.mark.parametrize("drawn_before", [0, 1, 2])
def test_what_is_drawn_inside_is_drawn_again_every_time(draw: Callable[[], Any], drawn_before: int) -> None:
    generators = Generators([])
    for _ in range(drawn_before):
        draw()
    seen = []
    for _ in range(4):
        with generators.restored():
            inside = draw()
        assert draw() == inside
        with generators.restored():
            pass
        seen.append(inside)
    assert len(set(seen)) == len(seen)


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_they_go_back_over_many_draws(draw: Callable[[], Any]) -> None:
    generators = Generators([])
    draw()
    states = generators.states()
    first = [draw() for _ in range(1000)]
    with generators.restored():
        draw()
    generators.go_back(states)
    assert [draw() for _ in range(1000)] == first
    generators.go_back(states)
    generators.go_back(states)
    assert draw() == first[0]


def test_half_a_pair_that_numpy_keeps_is_seen() -> None:
    """Drawing it leaves the generator's memory as it is."""
    NUMPYS.seed(0)
    NUMPYS.randn()
    generators = Generators([])
    with generators.restored():
        second = NUMPYS.randn()
    assert NUMPYS.randn() == second
    states = generators.states()
    NUMPYS.randn()
    third = NUMPYS.randn()
    generators.go_back(states)
    NUMPYS.randn()
    assert NUMPYS.randn() == third


def test_another_generator_of_numpys_is_led_back_too() -> None:
    own = NUMPYS.get_bit_generator()
    NUMPYS.set_bit_generator(NUMPYS.PCG64(0))
    try:
        generators = Generators([])
        with generators.restored():
            inside = NUMPYS.rand()
        assert NUMPYS.rand() == inside
    finally:
        NUMPYS.set_bit_generator(own)
