from __future__ import annotations

import contextlib

import torch

from flatminima.network.precision import float32_products, float32_switches, outside_autocast, true_precision


def test_autocast_is_off_inside_and_back_on_after() -> None:
    x = torch.randn(4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with true_precision():
            assert (x @ x).dtype == torch.float32
        assert (x @ x).dtype == torch.bfloat16


def test_a_backward_pass_outside_autocast_is_the_one_that_pytorch_recommends() -> None:
    weight, x = torch.randn(4, 4, requires_grad=True), torch.randn(4, 4)

    def loss() -> torch.Tensor:
        with torch.autocast("cpu", enabled=False):
            return ((x @ weight) @ weight).square().sum()

    with torch.autocast("cpu", dtype=torch.bfloat16):
        kept = loss()
    (expected,) = torch.autograd.grad(kept, weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with outside_autocast():
            (found,) = torch.autograd.grad(loss(), weight)
        (rounded,) = torch.autograd.grad(loss(), weight)
        assert (x @ x).dtype == torch.bfloat16
    assert torch.equal(found, expected)
    assert not torch.equal(rounded, expected)  # so it makes a difference


def test_every_switch_is_exact_inside_and_restored_after_an_error() -> None:
    holder, name, _, fast = float32_switches()[0]
    original = getattr(holder, name)
    try:
        setattr(holder, name, fast)
        with contextlib.suppress(KeyboardInterrupt), true_precision():
            assert all(getattr(h, n) == e for h, n, e, _ in float32_switches())
            raise KeyboardInterrupt
        assert getattr(holder, name) == fast
    finally:
        setattr(holder, name, original)


def test_works_whichever_way_the_user_chose_a_precision() -> None:
    before = torch.get_float32_matmul_precision()
    switches = [(holder, name, getattr(holder, name)) for holder, name, _, _ in float32_switches()]
    try:
        torch.set_float32_matmul_precision("high")
        with true_precision():
            pass
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
        for holder, name, value in switches:  # which that has set to what it takes for the same
            setattr(holder, name, value)


def test_tf32_is_for_gpus_alone_and_undone_after() -> None:
    before = [getattr(holder, name) for holder, name, _, _ in float32_switches()]
    with float32_products(tf32=True):
        assert all(getattr(holder, name) == fast for holder, name, _, fast in float32_switches())
        with true_precision():
            assert all(getattr(holder, name) == exact for holder, name, exact, _ in float32_switches())
        if hasattr(torch.backends.cuda.matmul, "fp32_precision"):
            assert torch.backends.cudnn.conv.fp32_precision == "tf32"
            assert torch.backends.mkldnn.conv.fp32_precision == "ieee"
    assert [getattr(holder, name) for holder, name, _, _ in float32_switches()] == before
