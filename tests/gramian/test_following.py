"""What is said of where the samples lie must be true of every call: nothing there may depend on another sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatminima.gramian.layouts import Layout
from flatminima.gramian.recording import Recorder

N = 3
Op = Callable[[Tensor], Any]

BEGINNINGS: dict[str, Op] = {
    "samples first": lambda x: x + 0,
    "samples second": lambda x: x.transpose(0, 1),
    "samples third": lambda x: x.permute(1, 2, 0, 3),
    "samples last": lambda x: x.movedim(0, -1),
    "folded before time": lambda x: x.flatten(0, 1)[:, None],
    "folded behind time": lambda x: x.transpose(0, 1).flatten(0, 1)[:, None],
    "two views": lambda x: torch.cat([x, x + 1]),
    "as long as time": lambda x: x[:, :N],
    "as long as time, second": lambda x: x[:, :N].transpose(0, 1),
}
"""From (N, 4, 6, 6) to four dimensions, the samples somewhere."""


def written_into(make: Callable[[Tensor], Tensor], write: Callable[[Tensor, Tensor], None]) -> Op:
    def op(x: Tensor) -> Tensor:
        target = make(x)
        write(target, x)
        return target

    return op


def sized_like(x: Tensor) -> Tensor:
    return torch.zeros(x.shape, dtype=x.dtype)


OPS: dict[str, Op] = {
    "tanh": torch.tanh,
    "add a row": lambda x: x + torch.arange(x.shape[-1]),
    "add a column": lambda x: torch.arange(x.shape[0])[:, None, None, None] + x,
    "add more dimensions": lambda x: x + torch.ones(2, 1, 1, 1, 1),
    "add to its transpose": lambda x: x + x.transpose(0, 1) if x.shape[0] == x.shape[1] else x,
    "pairs": lambda x: x[:, None, :, 0, 0] - x[None, :, :, 0, 0],
    "where": lambda x: torch.where(x > 0, x, -x),
    "masked_fill": lambda x: x.masked_fill(x > 0, 2.0),
    "clamp": lambda x: x.clamp(-0.5, 0.5),
    "softmax 0": lambda x: x.softmax(0),
    "softmax by keyword": lambda x: torch.softmax(dim=0, input=x),
    "softmax 1": lambda x: F.softmax(x, dim=1),
    "softmax -1": lambda x: torch.softmax(x, -1),
    "cumsum 0": lambda x: x.cumsum(0),
    "cumsum 2": lambda x: x.cumsum(dim=2),
    "cumsum by axis": lambda x: x.cumsum(axis=0),
    "sort": lambda x: x.sort(),
    "sort 0": lambda x: x.sort(0),
    "sort by axis": lambda x: x.sort(axis=0),
    "argsort 1": lambda x: x.argsort(1).double(),
    "topk": lambda x: x.topk(2),
    "topk 1": lambda x: x.topk(2, 1),
    "topk by axis": lambda x: x.topk(2, axis=0),
    "flip 0": lambda x: x.flip(0),
    "flip 1 3": lambda x: x.flip(1, 3),
    "roll 0": lambda x: x.roll(1, 0),
    "roll 1": lambda x: torch.roll(x, 1, dims=1),
    "roll all": lambda x: x.roll(1),
    "normalize": F.normalize,
    "normalize 0": lambda x: F.normalize(x, dim=0),
    "glu": F.glu,
    "fft": lambda x: torch.fft.fft(x).real,
    "fft 0": lambda x: torch.fft.fft(x, dim=0).abs(),
    "fft by axis": lambda x: torch.fft.fft(x, axis=0).abs(),
    "sum": lambda x: x.sum(),
    "sum 0": lambda x: x.sum(0),
    "mean 1": lambda x: x.mean(1),
    "mean by axis": lambda x: torch.mean(a=x, axis=1),
    "mean 1 kept": lambda x: x.mean(1, keepdim=True),
    "mean 2 3": lambda x: x.mean((2, 3)),
    "mean all but first": lambda x: x.mean(dim=(1, 2, 3)),
    "max": lambda x: x.max(),
    "max 0": lambda x: x.max(0),
    "max -1": lambda x: x.max(-1),
    "max of two": lambda x: torch.max(x, x.flip(3)),
    "amax": lambda x: x.amax((0, 1)),
    "std": lambda x: x.std(),
    "var 3": lambda x: torch.var(x, 3),
    "var_mean 1": lambda x: torch.var_mean(x, dim=1, correction=0),
    "norm": lambda x: x.norm(),
    "norm 1": lambda x: x.norm(dim=1),
    "vector_norm": lambda x: torch.linalg.vector_norm(x, dim=(2, 3)),
    "logsumexp": lambda x: x.logsumexp(2),
    "argmax": lambda x: x.argmax(-1),
    "any": lambda x: (x > 1).any(1),
    "flatten": lambda x: x.flatten(),
    "flatten 1": lambda x: x.flatten(1),
    "flatten 0 2": lambda x: x.flatten(0, 2),
    "reshape": lambda x: x.reshape(-1, 12),
    "reshape across": lambda x: x.reshape(4, -1),
    "reshape across samples": lambda x: x.reshape(9, -1) if x.numel() % 9 == 0 else x,
    "unflatten": lambda x: x.unflatten(-1, (3, -1)),
    "unsqueeze": lambda x: x.unsqueeze(0).unsqueeze(-1),
    "squeeze": lambda x: x[:, :1].squeeze(),
    "transpose": lambda x: x.transpose(1, 3),
    "permute": lambda x: x.permute(3, 0, 2, 1),
    "T": lambda x: x[0].mT,
    "mT": lambda x: x.mT,
    "expand": lambda x: x[None].expand(2, -1, -1, -1, -1),
    "expand as": lambda x: x[:, :1].expand_as(x),
    "select 0": lambda x: x[0],
    "select 1": lambda x: x.select(1, 0),
    "slice 0": lambda x: x[1:],
    "slice 0 by steps": lambda x: x[::2],
    "first samples": lambda x: x[:N],
    "last samples": lambda x: x[-N:],
    "slice 1": lambda x: x[:, 1:3],
    "ellipsis": lambda x: x[..., None, 2],
    "narrow": lambda x: x.narrow(0, 0, 2),
    "chunk 0": lambda x: x.chunk(2),
    "chunk -1": lambda x: x.chunk(3, -1),
    "split": lambda x: x.split([1, x.shape[1] - 1], 1),
    "unbind": lambda x: x.unbind(2),
    "unbind 0": lambda x: x.unbind(),
    "diagonal": lambda x: x.diagonal(dim1=2, dim2=3),
    "diagonal of samples": lambda x: x.diagonal(),
    "unfold": lambda x: x.unfold(3, 2, 1),
    "index by numbers": lambda x: x[torch.tensor([1, 0, 2])],
    "index by numbers behind": lambda x: x[:, torch.tensor([1, 0])],
    "index by a table behind": lambda x: x[:, :, torch.tensor([[1, 0], [2, 3]])],
    "index apart": lambda x: x[:, torch.tensor([0, 1]), :, torch.tensor([0, 1])],
    "index with a number": lambda x: x[torch.tensor([0, 1]), :, 0],
    "index by mask": lambda x: x[x > 0],
    "index by mask of rows": lambda x: x[x[:, 0, 0, 0] > 0],
    "each its own": lambda x: x[torch.arange(len(x)), (x[:, 0, 0, 0] > 0).long()],
    "each its own, all": lambda x: x[torch.arange(len(x))[:, None], (x[:, :2, 0, 0] > 0).long()],
    "index by list": lambda x: x[[0, 1]],
    "table looked up": lambda x: torch.arange(6.0)[(x > 0).long()],
    "table looked up by two": lambda x: torch.eye(2)[(x > 0).long(), (x > 1).long()],
    "index_select 0": lambda x: x.index_select(0, torch.tensor([1, 0])),
    "index_select 3": lambda x: torch.index_select(x, 3, torch.tensor([1, 0])),
    "gather 0": lambda x: x.gather(0, (x > 0).long()),
    "gather by keyword": lambda x: torch.gather(index=(x > 0).long(), input=x, dim=0),
    "gather fewer by axis": lambda x: x.gather(axis=3, index=torch.zeros(2, 2, 2, 2, dtype=torch.long)),
    "gather 3": lambda x: x.gather(3, (x > 0).long()),
    "gather fewer": lambda x: x.gather(3, torch.zeros(2, 2, 2, 2, dtype=torch.long)),
    "take_along_dim": lambda x: torch.take_along_dim(x, x.argsort(1), 1),
    "scatter": lambda x: torch.zeros_like(x).scatter(3, x.argsort(3), x),
    "masked_select": lambda x: x.masked_select(x > 0),
    "nonzero": lambda x: (x > 0).nonzero(),
    "cat 0": lambda x: torch.cat([x, x]),
    "cat 1": lambda x: torch.cat((x, x), dim=1),
    "cat by axis": lambda x: torch.cat(tensors=(x, x), axis=1),
    "cat with others": lambda x: torch.cat([x, torch.zeros_like(x)], 0),
    "cat with constants": lambda x: torch.cat([torch.ones(1, *x.shape[1:]), x]),
    "cat with constants behind": lambda x: torch.cat([torch.ones(*x.shape[:3], 1), x], -1),
    "stack": lambda x: torch.stack([x, x]),
    "stack -1": lambda x: torch.stack([x, x], -1),
    "stack by axis": lambda x: torch.stack(tensors=[x, x], axis=1),
    "repeat": lambda x: x.repeat(2, 1, 1, 1),
    "repeat more": lambda x: x.repeat(2, 1, 2, 1, 3),
    "repeat_interleave 0": lambda x: x.repeat_interleave(2, 0),
    "repeat_interleave 1": lambda x: x.repeat_interleave(2, dim=1),
    "repeat_interleave by axis": lambda x: x.repeat_interleave(repeats=2, axis=0),
    "repeat_interleave flat": lambda x: x.repeat_interleave(2),
    "matmul": lambda x: x @ torch.ones(x.shape[-1], 5, dtype=x.dtype),
    "matmul with itself": lambda x: x @ x.mT,
    "matmul by keyword": lambda x: torch.matmul(other=x, input=x.mT),
    "flatten by keyword": lambda x: torch.flatten(input=x, end_dim=1),
    "transpose by keyword": lambda x: torch.transpose(input=x, dim0=0, dim1=1),
    "matmul with its transpose": lambda x: x[..., 0] @ x[..., 0].mT,
    "matmul from the left": lambda x: torch.ones(5, x.shape[-2], dtype=x.dtype) @ x,
    "matmul of a vector": lambda x: x @ torch.ones(x.shape[-1], dtype=x.dtype),
    "matmul with a vector": lambda x: torch.ones(x.shape[-2], dtype=x.dtype) @ x,
    "matmul of rows": lambda x: x[:, 0, 0] @ x[:, 0, 0].T,
    "bmm": lambda x: torch.bmm(x[:, 0], x[:, 0].mT),
    "einsum": lambda x: torch.einsum("abcd,abed->abce", x, x),
    "einsum over the first": lambda x: torch.einsum("abcd,ebcd->ae", x, x),
    "einsum with dots": lambda x: torch.einsum("...cd,ed->...ce", x, torch.ones(2, x.shape[-1], dtype=x.dtype)),
    "linear": lambda x: F.linear(x, torch.ones(3, x.shape[-1], dtype=x.dtype)),
    "linear with computed weights": lambda x: F.linear(torch.ones(3, x.shape[-1], dtype=x.dtype), x[0, 0]),
    "conv": lambda x: F.conv2d(x, torch.ones(2, x.shape[1], 2, 2, dtype=x.dtype)),
    "conv with computed weights": lambda x: F.conv2d(torch.ones(1, x.shape[1], 7, 7, dtype=x.dtype), x),
    "conv of one": lambda x: F.conv1d(x[:, 0], torch.ones(2, x.shape[2], 2, dtype=x.dtype)),
    "conv without batch": lambda x: F.conv2d(x[:, 0], torch.ones(2, x.shape[0], 2, 2, dtype=x.dtype)),
    "max_pool": lambda x: F.max_pool2d(x, 2, 1),
    "adaptive pool": lambda x: F.adaptive_avg_pool2d(x, 1),
    "interpolate": lambda x: F.interpolate(x, scale_factor=2),
    "pad": lambda x: F.pad(x, (1, 1)),
    "pad all": lambda x: F.pad(x, (0, 0, 0, 0, 0, 0, 1, 1)),
    "batch_norm": lambda x: F.batch_norm(x, torch.zeros(x.shape[1]).double(), torch.ones(x.shape[1]).double()),
    "batch_norm of the batch": lambda x: F.batch_norm(x, None, None, training=True),
    "layer_norm": lambda x: F.layer_norm(x, x.shape[-1:]),
    "layer_norm of all": lambda x: F.layer_norm(x, x.shape),
    "group_norm": lambda x: F.group_norm(x, 1),
    "instance_norm": F.instance_norm,
    "attention": lambda x: F.scaled_dot_product_attention(x, x, x),
    "attention with a mask": lambda x: F.scaled_dot_product_attention(x, x, x, x[:, :1, :, :1] > 0),
    "embedding": lambda x: F.embedding((x > 0).long(), torch.arange(8.0).view(2, 4)),
    "one_hot": lambda x: F.one_hot((x > 0).long(), 2),
    "pixel_shuffle": lambda x: F.pixel_shuffle(x[:, :1].expand(-1, 4, -1, -1), 2),
    "cdist": lambda x: torch.cdist(x, x),
    "tril": torch.tril,
    "add into": lambda x: torch.zeros(x.shape).double().add_(x),
    "index_add 0": lambda x: torch.zeros_like(x).index_add(0, torch.arange(len(x)), x),
    "index_add 3": lambda x: torch.zeros_like(x).index_add(3, torch.arange(x.shape[3]).flip(0), x),
    "index_copy backwards": lambda x: torch.zeros_like(x).index_copy(0, torch.arange(len(x)).flip(0), x),
    "write": written_into(sized_like, lambda to, x: to.__setitem__((slice(None), 0), x[:, 1])),
    "write all": written_into(sized_like, lambda to, x: to.__setitem__(Ellipsis, x)),
    "write by transposing": written_into(
        lambda x: torch.zeros(max(x.shape[:2]), max(x.shape[:2]), *x.shape[2:]).double(),
        lambda to, x: to.__setitem__((slice(0, x.shape[1]), slice(0, x.shape[0])), x.transpose(0, 1)),
    ),
    "write backwards": written_into(torch.zeros_like, lambda to, x: to.__setitem__(slice(None), x.flip(0))),
    "write one for all": written_into(torch.zeros_like, lambda to, x: to.__setitem__(slice(None), x[0])),
    "write by mask": written_into(torch.zeros_like, lambda to, x: to.__setitem__(x > 0, 1.0)),
    "copy_": written_into(sized_like, lambda to, x: to.copy_(x)),
    "copy backwards": written_into(torch.zeros_like, lambda to, x: to.copy_(x.flip(0))),
    "write into a view": written_into(sized_like, lambda to, x: to[:, 0].add_(x[:, 1])),
}


class Recorded(nn.Module):
    """Remembers what it computed."""

    def __init__(self, op: Op) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.op = op
        self.outputs: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        outputs = self.op(x)
        self.outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        return x.flatten(1).sum(1)


def sample_at_every_place(layout: Layout, output: Tensor) -> Tensor:
    along = torch.arange(output.shape[layout.dim]) // layout.inner % N
    shape = [1] * output.dim()
    shape[layout.dim] = -1
    return along.view(shape).expand_as(output)


def same(was: Tensor, now: Tensor) -> bool:
    return torch.allclose(was, now, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", OPS)
def test_nothing_depends_on_another_sample_than_the_one_it_is_said_to_be_of(name: str) -> None:
    taken = [beginning for beginning in BEGINNINGS if follows(name, beginning)]
    assert len(taken) > len(BEGINNINGS) // 2  # few take no tensor of such a shape


def follows(name: str, beginning: str) -> bool:
    """Whether the operation takes such a tensor; fail if its result depends on other samples than it is said to."""
    torch.manual_seed(0)
    x = torch.randn(N, 4, 6, 6, dtype=torch.float64)

    def op(x: Tensor) -> Any:
        return OPS[name](BEGINNINGS[beginning](x))

    try:
        op(x)
    except (RuntimeError, ValueError, IndexError):
        return False
    model = Recorded(op)
    recorder = Recorder(N, dict(model.named_parameters()))
    recorder.run(model, x)
    before, layouts = model.outputs, [recorder.layout_of(output) for output in model.outputs]
    for sample in range(N):
        changed = x.clone()
        changed[sample] += torch.randn(4, 6, 6, dtype=torch.float64)
        after = op(changed)
        for was, now, layout in zip(before, [after] if isinstance(after, Tensor) else after, layouts, strict=True):
            if layout is None:
                assert same(was, now), f"{beginning}: said not to be computed from the inputs"
            elif layout.dim >= 0 and not recorder.guessed:
                others = sample_at_every_place(layout, was) != sample
                assert same(was[others], now[others]), beginning
    return True


MODULES = [
    *(nn.ReLU(), nn.ReLU(inplace=True), nn.GELU(), nn.SiLU(inplace=True), nn.LeakyReLU(), nn.ELU(), nn.SELU()),
    *(nn.CELU(), nn.Hardswish(), nn.Hardtanh(), nn.Softplus(), nn.Mish(), nn.PReLU(), nn.LogSigmoid(), nn.GLU()),
    *(nn.Softmax(1), nn.LogSoftmax(-1), nn.Dropout(), nn.Dropout2d(), nn.Sigmoid(), nn.ReLU6(), nn.Threshold(0, 0)),
    *(nn.MaxPool2d(2), nn.MaxPool2d(2, return_indices=True), nn.AvgPool2d(2), nn.LPPool2d(2, 2)),
    *(nn.AdaptiveAvgPool2d(1), nn.AdaptiveMaxPool2d(2), nn.ZeroPad2d(1), nn.ReflectionPad2d(1), nn.CircularPad2d(1)),
    *(nn.Upsample(scale_factor=2), nn.PixelShuffle(2), nn.ChannelShuffle(2), nn.Flatten(), nn.Identity(), nn.Unfold(2)),
    *(nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.InstanceNorm2d(4, affine=True), nn.LayerNorm(6), nn.RMSNorm(6)),
    *(nn.LocalResponseNorm(2), nn.Linear(6, 2), nn.Conv2d(4, 2, 3), nn.ConvTranspose2d(4, 2, 3)),
    nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
]
"""Of images, each known for certain to keep the samples where they are."""


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_samples_are_not_lost_by_ordinary_layers(module: nn.Module) -> None:
    model = Recorded(module).eval()
    recorder = Recorder(N, dict(model.named_parameters()))
    recorder.run(model, torch.randn(N, 4, 6, 6))
    assert {recorder.layout_of(output) for output in model.outputs} == {Layout(0)}
    assert not recorder.guessed
