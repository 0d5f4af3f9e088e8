"""Models in which the first dimension is not always the samples: rows of J must not be given to the wrong ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from flatminima.gramian import Checks, factored_gram
from support.oracles import explicit_gram

N, T, D = 4, 8, 6


def random(*size: int) -> Tensor:
    return torch.randn(*size, dtype=torch.float64)


class Network(nn.Module):
    """A layer, something that moves samples about, a layer and a head."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor], **more: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, 3)
        self.norm, self.conv = nn.LayerNorm(D), nn.Conv1d(D, D, 3, padding=1)
        for name, value in more.items():
            setattr(self, name, value)
        self.middle = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.middle(self, x)


def time_major_encoder(net: Any, x: Tensor) -> Tensor:
    h = net.encoder(net.first(x).transpose(0, 1))
    return net.head(net.norm(h).mean(0))


def routed_experts(net: Any, x: Tensor) -> Tensor:
    h = torch.tanh(net.first(x)).reshape(len(x) * x.shape[1], D)
    weight, chosen = net.gate(h).softmax(-1).max(-1)
    out = torch.zeros_like(h)
    for number, expert in enumerate(net.experts):
        rows = (chosen == number).nonzero()[:, 0]
        out = out.index_add(0, rows, expert(h[rows]) * weight[rows, None])
    return net.head((h + out).reshape(*x.shape[:2], D).mean(1))


def packed(net: Any, x: Tensor) -> Tensor:
    lengths = (x[:, 0, 0] > 0).long() * (T // 2) + T // 2
    sequence = pack_padded_sequence(net.first(x), lengths, batch_first=True, enforce_sorted=False)
    data = torch.tanh(net.second(sequence.data))
    again = sequence._replace(data=data)
    return net.head(pad_packed_sequence(again, batch_first=True, total_length=T)[0].mean(1))


def two_views(net: Any, x: Tensor) -> Tensor:
    h = torch.cat([x, x.flip(1) + 1], 0)
    h = torch.tanh(net.second(net.norm(net.first(h))))
    one, other = h.chunk(2)
    return net.head((one * other).mean(1))


def views_sliced_apart(net: Any, x: Tensor) -> Tensor:
    h = net.conv(torch.cat([x, 2 * x, x.square()], 0).transpose(1, 2)).mean(2)
    return net.head(h[: len(x)] * h[len(x) : 2 * len(x)] + h[-len(x) :])


def frames_folded_time_first(net: Any, x: Tensor) -> Tensor:
    n, t, _ = x.shape
    h = x.transpose(0, 1).reshape(t * n, D)
    h = torch.tanh(net.second(net.norm(net.first(h))))
    return net.head(h.view(t, n, D).mean(0))


def frames_folded_samples_first(net: Any, x: Tensor) -> Tensor:
    h = torch.tanh(net.norm(net.first(x.reshape(-1, D))))
    return net.head(h.view(len(x), -1, D).mean(1))


def relative_positions(net: Any, x: Tensor) -> Tensor:
    """With as many positions as samples, the table of shape (T, T) could be one of (N, T)."""
    h = torch.tanh(net.first(x))
    t = x.shape[1]
    distance = (torch.arange(t)[:, None] - torch.arange(t)).abs()
    bias = net.distances(distance).permute(2, 0, 1)
    scores = h @ net.second(h).transpose(1, 2) + bias
    return net.head((scores.softmax(-1) @ h).mean(1))


def learned_queries(net: Any, x: Tensor) -> Tensor:
    """A query expanded to as many positions as there are samples."""
    h = torch.tanh(net.first(x))
    queries = net.query.expand(x.shape[1], D)
    return net.head((torch.tanh(net.second(queries)) * h).mean(1))


def permuted_but_for_the_ends(net: Any, x: Tensor) -> Tensor:
    order = torch.arange(len(x))
    order[1:-1] = order[1:-1].flip(0)
    h = torch.tanh(net.first(x))[order]
    h = torch.tanh(net.second(h))
    return net.head(h[order].mean(1))


def rolled_and_back(net: Any, x: Tensor) -> Tensor:
    h = torch.tanh(net.first(x)).roll(1, 0)
    return net.head(torch.tanh(net.second(h)).roll(-1, 0).mean(1))


def sorted_by_length(net: Any, x: Tensor) -> Tensor:
    order = x[:, 0, 0].argsort()
    h = torch.tanh(net.second(torch.tanh(net.first(x)).index_select(0, order)))
    return net.head(h.index_select(0, order.argsort()).mean(1))


def padding_removed(net: Any, x: Tensor) -> Tensor:
    kept = x[..., 0] > -0.7
    out = torch.zeros_like(x)
    out[kept] = torch.tanh(net.first(x[kept]))
    return net.head(net.second(out).sum(1))


def written_by_mask(net: Any, x: Tensor) -> Tensor:
    h = torch.tanh(net.first(x)).clone()
    h[x[..., 0] > 0] = net.table.weight[2]
    return net.head(torch.tanh(net.second(h)).mean(1))


def written_by_number(net: Any, x: Tensor) -> Tensor:
    h = torch.tanh(net.first(x)).clone()
    h[:, 1] = net.query
    h[:, 2, 2:4] = h[:, 2, 2:4] * 2 + net.query[2:4]
    return net.head(torch.tanh(net.second(h)).mean(1))


def written_into_zeros(net: Any, x: Tensor) -> Tensor:
    h = torch.zeros(len(x), T + 1, D, dtype=x.dtype)
    h[:, 0] = net.query
    h[:, 1:] = net.first(x)
    return net.head(torch.tanh(net.second(h)).mean(1))


def last_token(net: Any, x: Tensor) -> Tensor:
    lengths = (x[:, 0, 0] > 0).long() + 2
    return net.head(torch.tanh(net.first(x))[torch.arange(len(x)), lengths])


def attention_as_einsum(net: Any, x: Tensor) -> Tensor:
    h = torch.tanh(net.first(x))
    q, k = (p.unflatten(-1, (2, 3)) for p in (net.second(h), h))
    scores = torch.einsum("nqhd,nkhd->nhqk", q, k).softmax(-1)
    return net.head(torch.einsum("nhqk,nkhd->nqhd", scores, k).flatten(2).mean(1))


def unknown_to_pytorch(net: Any, x: Tensor) -> Tensor:
    return net.head(torch.tanh(net.second(torch.vmap(lambda one: one.flip(0))(torch.tanh(net.first(x)))).mean(1)))


def positions_for_each_sample(net: Any, x: Tensor) -> Tensor:
    positions = torch.arange(x.shape[1]).expand(len(x), -1)
    return net.head(torch.tanh(net.second(net.norm(net.table(positions)) + net.first(x))).mean(1))


def one_row_of_positions_repeated(net: Any, x: Tensor) -> Tensor:
    row = net.table(torch.arange(x.shape[1])[None])
    return net.head(torch.tanh(net.second(net.first(x) + row.repeat(len(x), 1, 1) + row[0] + row.view(-1, D))).mean(1))


def class_token(net: Any, x: Tensor) -> Tensor:
    h = torch.cat([net.query.expand(len(x), 1, D), net.first(x)], 1)
    return net.head(torch.tanh(net.second(h))[:, 0])


def recurrent_time_major(net: Any, x: Tensor) -> Tensor:
    h, _ = net.gru(net.first(x).transpose(0, 1))
    return net.head(h[-1])


@dataclass(frozen=True)
class Kind:
    forward: Callable[[Any, Tensor], Tensor]
    more: Callable[[], dict[str, Any]] = dict
    fast: tuple[str, ...] = ()
    """Parameters that must not take the generic path."""
    samples: int = N

    def build(self, seed: int = 0) -> tuple[nn.Module, Tensor, Tensor]:
        torch.manual_seed(seed)
        model = Network(self.forward, **self.more()).double()
        return model, random(self.samples, T, D), torch.randint(0, 3, (self.samples,))


FIRST, SECOND, HEAD, NORM = (
    tuple(f"{name}.{part}" for part in ("weight", "bias")) for name in ("first", "second", "head", "norm")
)
ALL = (*FIRST, *SECOND, *HEAD)
ENCODER = {"nhead": 2, "dim_feedforward": 7}
ENCODED = (
    *(*FIRST, *HEAD, *NORM),
    *(f"encoder.{name}" for name, _ in nn.TransformerEncoderLayer(D, **ENCODER).named_parameters()),
)

KINDS = [
    Kind(time_major_encoder, lambda: {"encoder": nn.TransformerEncoderLayer(D, **ENCODER)}, ENCODED),
    Kind(time_major_encoder, lambda: {"encoder": nn.TransformerEncoderLayer(D, **ENCODER)}, ENCODED, samples=T),
    Kind(
        routed_experts,
        lambda: {"gate": nn.Linear(D, 2), "experts": nn.ModuleList(nn.Linear(D, D) for _ in range(2))},
        (*FIRST, *HEAD),
    ),
    Kind(packed, fast=FIRST),
    Kind(two_views, fast=(*ALL, *NORM)),
    Kind(views_sliced_apart, fast=("conv.weight", "conv.bias", *HEAD)),
    Kind(frames_folded_time_first, fast=(*ALL, *NORM)),
    Kind(frames_folded_samples_first, fast=(*FIRST, *HEAD)),
    Kind(relative_positions, lambda: {"distances": nn.Embedding(T, 1)}, ALL),
    Kind(relative_positions, lambda: {"distances": nn.Embedding(T, 1)}, ALL, samples=T),
    Kind(learned_queries, lambda: {"query": nn.Parameter(torch.randn(1, D))}, (*FIRST, *HEAD)),
    Kind(learned_queries, lambda: {"query": nn.Parameter(torch.randn(1, D))}, (*FIRST, *HEAD), samples=T),
    Kind(permuted_but_for_the_ends, fast=FIRST, samples=6),
    Kind(rolled_and_back, fast=FIRST),
    Kind(sorted_by_length, fast=FIRST, samples=6),
    Kind(padding_removed, fast=HEAD),
    Kind(written_by_mask, lambda: {"table": nn.Embedding(3, D)}, ALL),
    Kind(written_by_number, lambda: {"query": nn.Parameter(torch.randn(D))}, ALL),
    Kind(written_into_zeros, lambda: {"query": nn.Parameter(torch.randn(D))}, ALL),
    Kind(last_token, fast=(*FIRST, *HEAD)),
    Kind(attention_as_einsum, fast=ALL),
    Kind(unknown_to_pytorch, fast=FIRST),
    Kind(positions_for_each_sample, lambda: {"table": nn.Embedding(T, D)}, (*ALL, "table.weight", "norm.weight")),
    Kind(one_row_of_positions_repeated, lambda: {"table": nn.Embedding(T, D)}, ALL),
    Kind(class_token, lambda: {"query": nn.Parameter(torch.randn(1, 1, D))}, (*ALL, "query")),
    Kind(recurrent_time_major, lambda: {"gru": nn.GRU(D, D)}, (*FIRST, *HEAD)),
]


def name_of(kind: Kind) -> str:
    return f"{kind.forward.__name__} of {kind.samples}"


@pytest.mark.parametrize("checked", [True, False], ids=["checked", "not checked"])
@pytest.mark.parametrize("kind", KINDS, ids=name_of)
def test_rows_belong_to_their_samples(kind: Kind, checked: bool) -> None:
    """Also without a check, which would find what was wrong and put it right; and so without its warning."""
    model, x, y = kind.build()
    result = factored_gram(model, x, y, spot_check=checked)
    expected = explicit_gram(model, x, y)
    torch.testing.assert_close(result.matrix(), expected, rtol=1e-9, atol=1e-9 * expected.abs().max().item())
    assert set(kind.fast).isdisjoint(result.generic_parameters)


@pytest.mark.parametrize("kind", [k for k in KINDS if k.forward in (routed_experts, padding_removed)], ids=name_of)
def test_rows_that_data_gather_are_right_in_every_one_of_many_batches(kind: Kind) -> None:
    """With a memory of what was checked, as in a measure's trials."""
    model, _, y = kind.build()
    checks = Checks()
    for seed in range(25):
        torch.manual_seed(seed)
        x = random(N, T, D)
        expected = explicit_gram(model, x, y)
        result = factored_gram(model, x, y, checks=checks).matrix()
        torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-9 * expected.abs().max().item())
