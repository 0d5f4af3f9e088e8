from __future__ import annotations

import contextlib

import torch

from flatminima.precision import _float32_switches, true_precision


def test_autocast_is_off_inside_and_back_on_after() -> None:
    x = torch.randn(4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with true_precision():
            assert (x @ x).dtype == torch.float32
        assert (x @ x).dtype == torch.bfloat16


def test_every_switch_is_exact_inside_and_restored_after_an_error() -> None:
    holder, name, exact = _float32_switches()[0]
    original = getattr(holder, name)
    fast = "tf32" if isinstance(exact, str) else True
    try:
        setattr(holder, name, fast)
        with contextlib.suppress(KeyboardInterrupt), true_precision():
            assert all(getattr(h, n) == e for h, n, e in _float32_switches())
            raise KeyboardInterrupt
        assert getattr(holder, name) == fast
    finally:
        setattr(holder, name, original)


def test_works_whichever_way_the_user_chose_a_precision() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        with true_precision():
            pass
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
