"""Models that people really build: ξ, and a penalty's gradient, against plain autograd."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import flatminima as fm
from flatminima.gramian import factored_gram
from flatminima.network import call_model, take

N, T, D, H = 6, 5, 6, 4
"""Samples, positions, features (as many as samples: the wrong dimension may fit too) and hidden features."""


class Network(nn.Module):
    """A function as forward, and what it needs as attributes, beside an input layer and a head."""

    def __init__(self, forward: Callable[..., Tensor], **parts: Any) -> None:
        super().__init__()
        self.function = forward
        self.first, self.head = nn.Linear(D, H), nn.Linear(H, 3)
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(self, *inputs)


def random(*size: int) -> Tensor:
    return torch.randn(size, dtype=torch.float64)


def parameter(*size: int) -> nn.Parameter:
    return nn.Parameter(random(*size) / 2)


def routed_to_two_experts(net: Any, x: Tensor) -> Tensor:
    h = torch.tanh(net.first(x)).view(-1, H)
    weights, chosen = net.gate(h).softmax(-1).topk(2)
    out = torch.zeros_like(h)
    for number, expert in enumerate(net.experts):
        token, place = torch.where(chosen == number)
        out.index_add_(0, token, expert(h[token]) * weights[token, place, None])
    return net.head(out.view(*x.shape[:2], H).mean(1))


def hypernetwork(net: Any, x: Tensor) -> Tensor:
    weight = net.hyper(x[:, 0]).view(-1, H, D)
    return net.head(torch.tanh(x @ weight.transpose(1, 2)).mean(1))


def layers_of_one_hypernetwork(net: Any, x: Tensor) -> Tensor:
    """With an embedding for each of as many layers as there are samples."""
    for weight in net.hyper(net.codes).view(N, D, D)[:2]:
        x = torch.tanh(x @ weight)
    return net.head(net.first(x).mean(1))


def tied_decoder(net: Any, x: Tensor) -> Tensor:
    return F.linear(torch.tanh(net.first(x.mean(1))), net.first.weight.T)[:, :3]


def modulated(net: Any, x: Tensor, condition: Tensor) -> Tensor:
    scale, shift = net.film(condition).chunk(2, -1)
    return net.head(torch.relu(net.first(x) * (1 + scale[:, None]) + shift[:, None]).mean(1))


def grouped_queries(net: Any, x: Tensor) -> Tensor:
    q = net.query(x).unflatten(-1, (4, 2)).transpose(1, 2)
    k, v = (layer(x).unflatten(-1, (2, 2)).transpose(1, 2) for layer in (net.key, net.value))
    k, v = k.repeat_interleave(2, 1), v[:, :, None].expand(-1, 2, 2, -1, -1).transpose(1, 2).flatten(1, 2)
    attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
    return net.head(net.out(attended)[:, -1])


def written_cache(net: Any, x: Tensor) -> Tensor:
    keys = torch.zeros(len(x), T, H, dtype=x.dtype)
    out = []
    for t in range(T):
        keys[:, t] = net.first(x[:, t])
        seen = keys[:, : t + 1].clone()
        out.append(torch.einsum("nt,ntd->nd", torch.einsum("nd,ntd->nt", net.query(x[:, t]), seen).softmax(-1), seen))
    return net.head(torch.stack(out).mean(0))


def selective_scan(net: Any, x: Tensor) -> Tensor:
    u, step = net.first(x), F.softplus(net.step(x))
    state, out = x.new_zeros(len(x), H, 3), []
    for t in range(T):
        state = state * torch.exp(step[:, t, :, None] * -net.decay.exp()) + u[:, t, :, None]
        out.append(state.sum(-1) + net.skip * u[:, t])
    return net.head(torch.stack(out, 1).mean(1))


def messages_of_all_graphs_together(net: Any, x: Tensor, edges: Tensor) -> Tensor:
    """Nodes of all samples in one tensor, edges numbered through, as graph libraries batch."""
    h = net.first(x).reshape(-1, H)
    sources, targets = (edges + T * torch.arange(len(x))[:, None, None]).transpose(0, 1).reshape(2, -1)
    messages = torch.relu(net.message(torch.cat([h[sources], h[targets]], -1)))
    h = torch.tanh(h + torch.zeros_like(h).index_add_(0, targets, messages))
    return net.head(h.view(len(x), T, H).mean(1))


def messages_by_scatter(net: Any, x: Tensor, edges: Tensor) -> Tensor:
    h = net.first(x)
    sources, targets = (edges[:, i, :, None].expand(-1, -1, H) for i in (0, 1))
    received = torch.zeros_like(h).scatter_reduce(1, targets, net.message(h.gather(1, sources).repeat(1, 1, 2)), "sum")
    return net.head(torch.tanh(h + received).mean(1))


def real_parameters_of_complex_activations(net: Any, x: Tensor) -> Tensor:
    h = torch.fft.rfft(net.first(x), dim=1) * net.scale + net.shift
    return net.head(h.abs().mean(1))


def filter_of_real_pairs(net: Any, x: Tensor) -> Tensor:
    h = torch.fft.rfft(net.first(x), dim=1) * torch.view_as_complex(net.filter)
    return net.head(torch.fft.irfft(h, n=T, dim=1).square().mean(1))


def low_rank_with_magnitudes(net: Any, x: Tensor) -> Tensor:
    weight = net.first.weight + net.up @ net.down
    weight = net.magnitude[:, None] * weight / weight.norm(dim=1, keepdim=True)
    return net.head(torch.relu(F.linear(x, weight)).mean(1))


def odd_einsums(net: Any, x: Tensor) -> Tensor:
    h = torch.einsum("bte, eh -> bh", x, net.left) + torch.einsum("...e,eh", x, net.left).mean(1)
    return net.head(
        torch.tanh(h + torch.einsum("ii->i", net.square) + torch.einsum(x, [0, 1, 2], net.left, [2, 3], [0, 3]))
    )


def members_by_vmap(net: Any, x: Tensor) -> Tensor:
    """As many members of an ensemble as samples."""
    return net.head(torch.vmap(lambda weight: torch.tanh(x.mean(1) @ weight))(net.members).mean(0))


def each_sample_by_vmap(net: Any, x: Tensor) -> Tensor:
    return torch.vmap(lambda one: net.head(torch.tanh(net.first(one)).mean(0)))(x)


def checkpointed(net: Any, x: Tensor) -> Tensor:
    h = checkpoint(lambda z: torch.tanh(net.first(z)), x, use_reentrant=False)
    return net.head(checkpoint(net.block, h, use_reentrant=True).mean(1))


def packed(net: Any, x: Tensor, lengths: Tensor) -> Tensor:
    sequence = nn.utils.rnn.pack_padded_sequence(net.first(x), lengths, batch_first=True, enforce_sorted=False)
    return net.head(net.recurrent(sequence)[1][0][-1])


def unfolded_and_folded(net: Any, x: Tensor) -> Tensor:
    patches = F.unfold(x[:, None], 3, padding=1)
    h = F.fold(torch.tanh(net.patch(patches.transpose(1, 2))).transpose(1, 2), (T, D), 3, padding=1)
    return net.head(h.mean((2, 3)))


def sparse_look_ups(net: Any, tokens: Tensor) -> Tensor:
    return net.head(net.table(tokens).mean(1))


def straight_through(net: Any, x: Tensor) -> Tensor:
    h = net.first(x)
    nearest = net.codes[(h[:, :, None] - net.codes).square().sum(-1).argmin(-1)]
    return net.head((h + nearest - h.detach()).mean(1))


def written_in_place(net: Any, x: Tensor) -> Tensor:
    h = x.new_zeros(len(x), T + 1, D)
    h[:, 0], h[:, 1:] = net.token, x
    h = net.first(h)
    h.add_(net.shift).mul_(2).relu_()
    return net.head(h.mean(1))


class Subclass(Tensor):
    pass


def of_a_subclass(net: Any, x: Tensor) -> Tensor:
    h = F.relu(net.first(x.as_subclass(Subclass)), inplace=True)
    return net.head(h.mean(1)).as_subclass(Tensor)


def as_deep_as_the_sample_asks(net: Any, x: Tensor) -> Tensor:
    out = []
    for one in x:
        h = one
        for _ in range(1 + int(one[0, 0] > 0)):
            h = torch.tanh(net.square_layer(h))
        out.append(net.first(h).mean(0))
    return net.head(torch.stack(out))


def early_exits(net: Any, x: Tensor) -> Tensor:
    h = torch.tanh(net.first(x.mean(1)))
    z = net.head(h).clone()
    going_on = z[:, 0] > z[:, 1]
    z[going_on] = net.head(torch.tanh(net.block(h[going_on])))
    return z


def tree(net: Any, x: Tensor) -> Tensor:
    if x.shape[1] == 1:
        return net.first(x[:, 0])
    half = x.shape[1] // 2
    return torch.tanh(net.join(torch.cat([tree(net, x[:, :half]), tree(net, x[:, half:])], -1)))


def recursive(net: Any, x: Tensor) -> Tensor:
    return net.head(tree(net, x))


def latents_as_many_as_samples(net: Any, x: Tensor) -> Tensor:
    latents = net.latents.expand(len(x), -1, -1)
    h = net.first(x)
    latents = latents + (net.block(latents) @ h.transpose(1, 2)).softmax(-1) @ h
    return net.head((latents + net.block(net.latents)).mean(1))


def table_of_as_many_rows_as_samples(net: Any, x: Tensor) -> Tensor:
    """Which is summed over, so that its rows are not the samples'."""
    return net.head(torch.tanh(net.first(x).mean(1) @ net.table(torch.arange(H * N).view(N, H) % 9).mean(2)[:H]))


def cosines(net: Any, x: Tensor) -> Tensor:
    return net.temperature.exp() * F.normalize(net.first(x.mean(1)), dim=-1) @ F.normalize(net.head.weight, dim=-1).T


def distances(net: Any, x: Tensor) -> Tensor:
    return -torch.cdist(net.first(x.mean(1)), net.codes[:3]) - net.codes.square().sum() / 9


def weights_of_conditions(net: Any, x: Tensor, condition: Tensor) -> Tensor:
    """A grouped convolution with the samples among the channels, as style networks have it."""
    style = net.film(condition)[:, :T]
    weight = (net.kernels[None] * style[:, None, :, None]).flatten(0, 1)
    h = F.conv1d(x.reshape(1, -1, D), weight, groups=len(x))
    return net.head(h.view(len(x), H, -1).mean(2))


def samples_last(net: Any, x: Tensor) -> Tensor:
    h = torch.tanh(net.square @ x.mean(1).T[:H] + net.shift[:, None])
    return net.head(h.T)


def solved(net: Any, x: Tensor) -> Tensor:
    h = net.first(x)
    return net.head(torch.linalg.solve(h.transpose(1, 2) @ h + 5 * torch.eye(H), net.query(x).mean(1)))


@dataclass(frozen=True)
class Kind:
    forward: Callable[..., Tensor]
    parts: Callable[[], dict[str, Any]] = dict
    more: Callable[[], Tensor] | None = None
    """A second input."""
    tokens: bool = False

    def build(self) -> tuple[nn.Module, Any, Tensor]:
        torch.manual_seed(0)
        model = Network(self.forward, **self.parts()).double()
        x = torch.randint(0, 9, (N, T)) if self.tokens else random(N, T, D)
        return model, x if self.more is None else (x, self.more()), torch.randint(0, 3, (N,))


def linears(**sizes: tuple[int, int]) -> Callable[[], dict[str, Any]]:
    return lambda: {name: nn.Linear(*size) for name, size in sizes.items()}


def edges() -> Tensor:
    return torch.randint(0, T, (N, 2, 7))


KINDS = [
    Kind(
        routed_to_two_experts,
        lambda: {"gate": nn.Linear(H, 3), "experts": nn.ModuleList(nn.Linear(H, H) for _ in range(3))},
    ),
    Kind(hypernetwork, linears(hyper=(D, H * D))),
    Kind(layers_of_one_hypernetwork, lambda: {"hyper": nn.Linear(3, D * D), "codes": parameter(N, 3)}),
    Kind(tied_decoder),
    Kind(modulated, linears(film=(3, 2 * H)), lambda: random(N, 3)),
    Kind(grouped_queries, linears(query=(D, 8), key=(D, 4), value=(D, 4), out=(8, H))),
    Kind(written_cache, linears(query=(D, H))),
    Kind(selective_scan, lambda: {"step": nn.Linear(D, H), "decay": parameter(H, 3), "skip": parameter(H)}),
    Kind(messages_of_all_graphs_together, linears(message=(2 * H, H)), edges),
    Kind(messages_by_scatter, linears(message=(2 * H, H)), edges),
    Kind(real_parameters_of_complex_activations, lambda: {"scale": parameter(H), "shift": parameter(H)}),
    Kind(filter_of_real_pairs, lambda: {"filter": parameter(T // 2 + 1, H, 2)}),
    Kind(
        low_rank_with_magnitudes,
        lambda: {"up": parameter(H, 2), "down": parameter(2, D), "magnitude": parameter(H)},
    ),
    Kind(odd_einsums, lambda: {"left": parameter(D, H), "square": parameter(H, H)}),
    Kind(members_by_vmap, lambda: {"members": parameter(N, D, H)}),
    Kind(each_sample_by_vmap),
    Kind(checkpointed, linears(block=(H, H))),
    Kind(packed, lambda: {"recurrent": nn.LSTM(H, H, batch_first=True)}, lambda: torch.randint(1, T + 1, (N,))),
    Kind(unfolded_and_folded, linears(patch=(9, 9 * H))),
    Kind(sparse_look_ups, lambda: {"table": nn.Embedding(9, H, sparse=True)}, tokens=True),
    Kind(straight_through, lambda: {"codes": parameter(N, H)}),
    Kind(written_in_place, lambda: {"token": parameter(D), "shift": parameter(H)}),
    Kind(of_a_subclass),
    Kind(as_deep_as_the_sample_asks, linears(square_layer=(D, D))),
    Kind(early_exits, linears(block=(H, H))),
    Kind(recursive, linears(join=(2 * H, H))),
    Kind(latents_as_many_as_samples, lambda: {"latents": parameter(N, H), "block": nn.Linear(H, H)}),
    Kind(table_of_as_many_rows_as_samples, lambda: {"table": nn.Embedding(9, 3)}),
    Kind(cosines, lambda: {"temperature": parameter()}),
    Kind(distances, lambda: {"codes": parameter(N, H)}),
    Kind(
        weights_of_conditions,
        lambda: {"film": nn.Linear(3, 2 * H), "kernels": parameter(H, T, 3)},
        lambda: random(N, 3),
    ),
    Kind(samples_last, lambda: {"square": parameter(H, H), "shift": parameter(H)}),
    Kind(solved, linears(query=(D, H))),
    Kind(each_sample_by_vmap, lambda: {"first": parametrizations.spectral_norm(nn.Linear(D, H))}),
]


def plain_gradients(model: nn.Module, x: Any, y: Tensor) -> Tensor:
    """J by ``backward()`` on each sample alone, which reentrant checkpoints need."""
    model = copy.deepcopy(model).eval()
    rows = []
    for i in range(N):
        model.zero_grad()
        F.cross_entropy(call_model(model, take(x, slice(i, i + 1))), y[i : i + 1]).backward()
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
        rows.append(torch.cat([(g.to_dense() if g.is_sparse else g).flatten() for g in grads]))
    return torch.stack(rows)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.forward.__name__)
def test_gram_is_that_of_plain_autograd(kind: Kind) -> None:
    """Also without the check, which would put right what is wrong."""
    model, x, y = kind.build()
    jacobian = plain_gradients(model, x, y)
    expected = jacobian @ jacobian.T
    for checked in (True, False):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            xi = factored_gram(model, x, y, spot_check=checked).matrix()
        torch.testing.assert_close(xi, expected, rtol=1e-9, atol=1e-10 * expected.abs().max().item())


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.forward.__name__)
def test_a_penaltys_gradient_is_that_of_plain_autograd(kind: Kind) -> None:
    """∇R_α of one sub-batch: the difference of two gradients."""
    model, x, y = kind.build()
    model.eval()
    plain, alpha = copy.deepcopy(model), 1e-3

    def gradient(network: nn.Module) -> list[Tensor]:
        network.zero_grad()
        F.cross_entropy(call_model(network, take(x, slice(None))), y).backward()
        grads = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in network.parameters()]
        return [g.to_dense() if g.is_sparse else g for g in grads]

    here = gradient(plain)
    with torch.no_grad():
        for p, g in zip(plain.parameters(), here, strict=True):
            p -= alpha * g
    expected = [a - b for a, b in zip(here, gradient(plain), strict=True)]
    regularizer = fm.FisherTraceRegularizer(model, alpha=alpha, num_sub_batches=1)
    penalty = regularizer.penalize(lambda batch: F.cross_entropy(call_model(model, batch[0]), batch[1]), (x, y))
    assert penalty is not None
    model.zero_grad()
    penalty.add_gradient_to_grad(1.0)
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    scale = max(float(g.abs().max()) for g in expected)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.to_dense() if a.is_sparse else a, b, rtol=1e-7, atol=1e-8 * scale)


@pytest.mark.filterwarnings("ignore::flatminima.errors.FlatminimaWarning")
def test_a_checkpointed_model_is_measured_as_it_would_be_without() -> None:
    kind = next(kind for kind in KINDS if kind.forward is checkpointed)
    model, x, y = kind.build()
    jacobian = plain_gradients(model, x, y)
    measured = fm.measure(model, (x, y), subset_size=N, trials=1, progress=False)
    expected = torch.linalg.slogdet(jacobian @ jacobian.T).logabsdet.item()
    assert measured.log_det_fisher.mean == pytest.approx(expected, rel=1e-9)
    assert measured.robustness is not None


@pytest.mark.filterwarnings("ignore::flatminima.errors.FlatminimaWarning")
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.forward.__name__)
def test_the_rivals_of_gamma_are_those_of_plain_autograd(kind: Kind) -> None:
    model, x, y = kind.build()
    jacobian = plain_gradients(model, x, y)
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    samples = [(take(x, slice(i, i + 1)), y[i]) for i in range(N)]
    data = [(tuple(one[0] for one in z) if isinstance(z, tuple) else z[0], label) for z, label in samples]
    rivals = ("cheap", "adaptive_average_sharpness")
    measured = fm.measure(model, data, measures=rivals, subset_size=N, trials=1, on_singular="skip", progress=False)
    found = measured.estimates()
    assert found["fisher_rao_norm"].mean == pytest.approx((jacobian @ weights).square().mean().item(), rel=1e-9)
    adaptive = 0.1**2 / 2 * (jacobian * weights).square().sum(1).mean().item()
    assert found["adaptive_average_sharpness"].mean == pytest.approx(adaptive, rel=1e-9)
