from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from flatminima.gramian import factored_gram
from flatminima.network import batch_statistics, chunk_statistics, sound_batchnorm

torch.manual_seed(0)
WHOLE, PART = torch.randn(12, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)


def network(*, training: bool) -> nn.BatchNorm1d:
    layer = nn.BatchNorm1d(3).double()
    layer.running_mean.copy_(torch.tensor([1.0, 2.0, 3.0]))
    layer.running_var.copy_(torch.tensor([0.5, 1.5, 2.5]))
    return layer.train(training)


def normalized_by(samples: Tensor | None) -> Tensor:
    """``PART``, by the mean and variance of these samples; of none: by the running ones."""
    if samples is None:
        layer = network(training=False)
        mean, variance = layer.running_mean, layer.running_var
    else:
        mean, variance = samples.mean(0), samples.var(0, correction=0)
    return (PART - mean) / (variance + nn.BatchNorm1d(3).eps).sqrt()


STATES: dict[str, tuple[Callable[[nn.Module], AbstractContextManager[None]], bool, Tensor | None]] = {
    "chunk": (chunk_statistics, False, PART),
    "sub-batch": (lambda m: batch_statistics(m, lambda: m(WHOLE), "sub-batch"), True, PART),
    "whole-batch": (lambda m: batch_statistics(m, lambda: m(WHOLE), "whole-batch"), True, WHOLE),
    "running": (lambda m: batch_statistics(m, lambda: m(WHOLE), "running"), True, None),
    "running, in evaluation mode": (lambda m: batch_statistics(m, lambda: m(WHOLE), "whole-batch"), False, None),
}


@pytest.mark.parametrize("state", STATES)
def test_batchnorm_normalizes_by_the_statistics_named(state: str) -> None:
    enter, training, samples = STATES[state]
    model = network(training=training)
    with enter(model):
        torch.testing.assert_close(model(PART), normalized_by(samples))


@pytest.mark.parametrize("state", STATES)
def test_batchnorm_is_put_back_even_after_an_error(state: str) -> None:
    enter, training, _ = STATES[state]
    model = network(training=training)
    buffers = dict(model.named_buffers())
    with pytest.raises(InterruptedError), enter(model):
        raise InterruptedError
    assert (model.training, model.track_running_stats) == (training, True)
    assert all(buffer is buffers[name] for name, buffer in model.named_buffers())


def test_chunks_leave_the_running_statistics_alone() -> None:
    model = network(training=False)
    with chunk_statistics(model):
        model(PART)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), network(training=False).buffers(), strict=True))


NORMALIZATIONS = {
    "batch": nn.BatchNorm2d(4),
    "instance": nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
}


def off_by_one_sample(layer: nn.Module) -> float:
    """How far gradients of one sample are from those of two of which one counts, where the mean over positions follows.

    ``x.flatten(2).transpose(1, 2).mean(1)`` has a gradient that is an expanded view.
    """
    torch.manual_seed(0)
    layer = layer.double().eval()
    layer.running_mean.normal_()
    layer.running_var.uniform_(0.5, 2)
    x, weights = torch.randn(1, 4, 3, 3, dtype=torch.float64), torch.randn(4, dtype=torch.float64)

    def gradients(inputs: Tensor) -> list[Tensor]:
        leaf = inputs.clone().requires_grad_()
        pooled = layer(leaf).flatten(2).transpose(1, 2).mean(1)
        found = torch.autograd.grad((pooled[:1] @ weights).tanh().sum(), [leaf, *layer.parameters()])
        return [found[0][:1], *found[1:]]

    pairs = zip(gradients(x), gradients(torch.cat([x, x])), strict=True)
    return max((one - two).abs().max().item() for one, two in pairs)


@pytest.mark.parametrize("name", NORMALIZATIONS)
def test_gradients_of_one_sample_are_right_inside(name: str) -> None:
    with sound_batchnorm():
        assert off_by_one_sample(NORMALIZATIONS[name]) < 1e-12


@pytest.mark.parametrize("name", NORMALIZATIONS)
@pytest.mark.xfail(strict=True, reason="PyTorch's own fault (2.13): once mended, sound_batchnorm can go")
def test_pytorchs_own_gradients_of_one_sample_are_right(name: str) -> None:
    assert off_by_one_sample(NORMALIZATIONS[name]) < 1e-12


@pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo backend")
def test_synchronized_batchnorm_takes_a_chunks_statistics_from_this_process_alone() -> None:
    """It would join them with those of other processes' trials; on a CPU it raises where it tries to."""
    torch.manual_seed(0)
    x, y = torch.randn(12, 4).double(), torch.arange(12) % 3
    plain = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).double()
    synchronized = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(plain))
    assert isinstance(synchronized[1], nn.SyncBatchNorm)
    expected = factored_gram(plain, x, y, batchnorm=4).matrix()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert torch.equal(factored_gram(synchronized, x, y, batchnorm=4).matrix(), expected)
        with pytest.raises(ValueError, match="SyncBatchNorm expected input tensor to be on"):
            synchronized(x)  # as before
    finally:
        dist.destroy_process_group()
