"""What programs really put into batches, forwards and losses: a step must be that of the same program without it."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flatminima.errors import (
    AccumulationWarning,
    CoarseRoundingWarning,
    FlatminimaError,
    UnrepeatableForwardWarning,
)
from flatminima.regularizer import FisherTraceRegularizer
from support.regularizer_cases import SEED, assert_same, gradients_of, mlp, snapshot, with_norm

WAYS = [
    {},
    {"estimator": "hvp"},
    {"passes": "together"},
    {"main_gradient": "sub-batches"},
    {"batch_statistics": "whole-batch"},
]
by_way = pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(map(str, way.values())) or "default")


class Batch(NamedTuple):
    x: Tensor
    labels: Tensor


def data(samples: int = 24) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(SEED)
    x = torch.randn(samples, 6, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (samples,), generator=generator)


def network(norm: bool = True) -> nn.Module:
    torch.manual_seed(SEED)
    return (with_norm(nn.BatchNorm1d(5)) if norm else mlp()).double()


def step(
    closure: Callable[[nn.Module, Any], Tensor], batch: Any, *, model: nn.Module | None = None, **options: Any
) -> list[dict[str, Any]]:
    """All that a step leaves: gradients, buffers, and what it saw."""
    model = network() if model is None else model
    regularizer = FisherTraceRegularizer(model, **{"alpha": 1e-2, "num_sub_batches": 4, **options})
    torch.manual_seed(SEED)
    loss = regularizer.backward_closure(lambda part: closure(model, part), batch)
    seen = regularizer.last_step
    assert seen is not None
    return [
        gradients_of(model),
        snapshot(model),
        {"loss": loss, "trace": seen.trace, "penalty": seen.penalty, "norm": seen.penalty_gradient_norm},
    ]


def clean(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch["x"] - 3), batch["labels"])


def writes(model: nn.Module, batch: Any) -> Tensor:
    batch["x"] -= 3
    return F.cross_entropy(model(batch["x"]), batch["labels"])


def writes_unseen(model: nn.Module, batch: Any) -> Tensor:
    batch["x"].data.sub_(3)  # autograd's counter does not see it
    return F.cross_entropy(model(batch["x"]), batch["labels"])


def takes_out(model: nn.Module, batch: Any) -> Tensor:
    labels = batch.pop("labels")
    return F.cross_entropy(model(batch.pop("x") - 3), labels)


@by_way
@pytest.mark.parametrize("closure", [writes, writes_unseen, takes_out])
def test_a_batch_that_its_model_changes_is_fresh_for_every_pass(closure: Any, way: dict[str, Any]) -> None:
    if closure is writes_unseen and way.get("passes") == "together":
        pytest.skip("vmap has no .data")
    x, y = data()
    assert_same(step(closure, {"x": x.clone(), "labels": y}, **way), step(clean, {"x": x, "labels": y}, **way))


@by_way
def test_named_tuples_arrive_as_what_they_are(way: dict[str, Any]) -> None:
    x, y = data()
    found = step(lambda model, b: F.cross_entropy(model(b.x - 3), b.labels), Batch(x, y), **way)
    assert_same(found, step(clean, {"x": x, "labels": y}, **way))


@pytest.mark.parametrize("kind", [list, tuple, np.asarray], ids=["list", "tuple", "array"])
def test_what_is_no_tensor_goes_to_the_sub_batch_of_its_sample(kind: Any) -> None:
    x, y = data()
    weight = 1.0 + torch.arange(24).double()

    def weighted(model: nn.Module, batch: Any) -> Tensor:
        losses = F.cross_entropy(model(batch["x"]), batch["labels"], reduction="none")
        return (losses * torch.as_tensor(batch["weight"], dtype=torch.float64)).mean()

    batch = {"x": x, "labels": y, "rate": 0.5, "names": [str(i) for i in range(24)], "none": None}
    assert_same(step(weighted, {**batch, "weight": kind(weight.tolist())}), step(weighted, {**batch, "weight": weight}))
    with pytest.raises(FlatminimaError, match=r"the batch's \['weight'\] .* neither 24 things"):
        step(weighted, {**batch, "weight": kind([1.0, 2.0])})


def masked(draw: Callable[[int], Tensor]) -> Callable[[nn.Module, Any], Tensor]:
    def closure(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0] * draw(len(batch[0]))), batch[1])

    return closure


DRAWS = {
    "torch": lambda n: (torch.rand(n, 6) > 0.3).double(),
    "numpy": lambda n: torch.from_numpy((np.random.rand(n, 6) > 0.3).astype(float)),  # noqa: NPY002 - the kind in use
    "python": lambda n: torch.tensor([[float(random.random() > 0.3) for _ in range(6)] for _ in range(n)]).double(),
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_both_passes_of_a_sub_batch_see_one_mask_whoever_draws_it(draw: Any) -> None:
    random.seed(SEED)
    np.random.seed(SEED)  # noqa: NPY002
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnrepeatableForwardWarning)
        *_, seen = step(masked(draw), data(), model=network(norm=False), alpha=1e-5)
    torch.testing.assert_close(seen["penalty"], 1e-5 * seen["trace"], rtol=1e-3, atol=0)


def test_a_generator_out_of_reach_is_noticed_once() -> None:
    own = np.random.default_rng(SEED)
    closure = masked(lambda n: torch.from_numpy((own.random((n, 6)) > 0.3).astype(float)))
    model = network(norm=False)
    regularizer = FisherTraceRegularizer(model, num_sub_batches=4)
    with pytest.warns(UnrepeatableForwardWarning, match="two passes over the same sub-batch"):
        regularizer.backward_closure(lambda batch: closure(model, batch), data())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnrepeatableForwardWarning)
        model.zero_grad()
        regularizer.backward_closure(lambda batch: closure(model, batch), data())


class OnFrozenBase(nn.Module):
    """A trained layer in float32 before a frozen one of another type."""

    def __init__(self, kind: torch.dtype) -> None:
        super().__init__()
        self.trained, self.base, self.head = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 3)
        self.base.requires_grad_(False).to(kind)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.base(torch.tanh(self.trained(x)).to(self.base.weight.dtype)).float())


def test_a_frozen_base_in_half_precision_is_told_and_its_rounding_counted() -> None:
    torch.manual_seed(SEED)
    mixed = OnFrozenBase(torch.bfloat16)
    regularizer = FisherTraceRegularizer(mixed, num_sub_batches=4)
    x, y = data(samples=64)
    with pytest.warns(CoarseRoundingWarning, match=r"65536 times as coarsely.*Choose estimator='hvp'"):
        regularizer.backward(F.cross_entropy, x.float(), y)
    assert regularizer.diagnostics()["rounding_share"] > 0.3
    seen = regularizer.last_step
    assert seen is not None
    torch.testing.assert_close(seen.rounding_norm, 5 * 2.0**-7 * (2 * seen.trace / 4).sqrt())


@pytest.mark.parametrize("compiles", [False, True])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forward_that_rounds_to_half_precision_itself_is_told_too(compiles: bool) -> None:
    class Rounding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(6, 16), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.body(x)).bfloat16().float())

    torch.manual_seed(SEED)
    model = Rounding()
    if compiles:
        model.compile(backend="aot_eager")
    regularizer = FisherTraceRegularizer(model, num_sub_batches=4)
    x, y = data(samples=64)
    with pytest.warns(CoarseRoundingWarning, match=r"65536 times as coarsely.*Choose estimator='hvp'"):
        regularizer.backward(F.cross_entropy, x.float(), y)
    seen = regularizer.last_step
    assert seen is not None
    torch.testing.assert_close(seen.rounding_norm, 5 * 2.0**-7 * (2 * seen.trace / 4).sqrt())


@pytest.mark.parametrize("estimator", ["finite-difference", "hvp"])
def test_what_is_not_on_the_way_to_the_loss_does_not_round(estimator: Any) -> None:
    torch.manual_seed(SEED)
    model = OnFrozenBase(torch.float32)
    model.teacher = nn.Linear(6, 3).bfloat16().requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", CoarseRoundingWarning)
        regularizer = FisherTraceRegularizer(model, num_sub_batches=4, estimator=estimator)
        x, y = data(samples=64)
        regularizer.backward(lambda o, t: F.cross_entropy(o, t), x.float(), y)
    seen = regularizer.last_step
    assert seen is not None
    expected = 5 * 2.0**-23 * (2 * seen.trace / 4).sqrt() if estimator == "finite-difference" else torch.zeros(())
    torch.testing.assert_close(seen.rounding_norm, expected)


def test_quantized_weights_are_told() -> None:
    class Quantized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.trained = nn.Linear(6, 16)
            self.register_buffer("weight", torch.randint(-127, 127, (3, 16), dtype=torch.int8))

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.trained(x)) @ (self.weight.float() / 127).T

    x, y = data()
    with pytest.warns(CoarseRoundingWarning, match="quantized"):
        FisherTraceRegularizer(Quantized(), num_sub_batches=4).backward(F.cross_entropy, x.float(), y)


@by_way
def test_a_sub_batch_none_of_whose_labels_counts_weighs_nothing(way: dict[str, Any]) -> None:
    """The same as those with labels alone, at M of all: R_α is a mean over M, the main loss one over labels."""
    x, y = data(samples=8)
    y[torch.tensor([2, 5])] = -100

    def closure(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    def by_hand(model: nn.Module, batch: Any) -> Tensor:
        loss = F.cross_entropy(model(batch[0]), batch[1], reduction="sum")
        return loss / (batch[1] >= 0).sum().clamp_min(1)

    way = {**way, "num_sub_batches": 8}
    found, expected = (step(c, (x, y), model=network(norm=False), **way) for c in (closure, by_hand))
    if way.get("main_gradient") == "sub-batches":  # by hand, an empty sub-batch's zero is part of the mean
        assert float(found[2]["loss"]) == pytest.approx(float(expected[2]["loss"]) * 8 / 6, rel=1e-12)
        found, expected = ([{k: f[2][k] for k in ("trace", "penalty", "norm")}] for f in (found, expected))
    assert_same(found, expected)


@pytest.mark.parametrize("way", [{}, {"estimator": "hvp"}, {"main_gradient": "sub-batches"}], ids=str)
def test_a_constant_sub_batch_loss_has_the_gradient_zero(way: dict[str, Any]) -> None:
    x, y = data(samples=8)

    def constant(model: nn.Module, batch: Any) -> Tensor:
        if not (batch[1] == 0).any():
            return torch.zeros((), dtype=torch.float64)
        return (model(batch[0])[batch[1] == 0] - 1).square().mean()

    def zero(model: nn.Module, batch: Any) -> Tensor:
        return constant(model, batch) + 0 * model(batch[0]).sum()

    way = {**way, "num_sub_batches": 8}
    assert_same(*(step(c, (x, y), model=network(norm=False), **way) for c in (constant, zero)))


@pytest.mark.parametrize("way", [{}, {"main_gradient": "sub-batches"}], ids=str)
def test_gradient_recording_that_is_off_is_told(way: dict[str, Any]) -> None:
    def detached(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]).detach(), batch[1])

    with pytest.raises(FlatminimaError, match="is gradient recording switched off"):
        step(detached, data(), **way)
    with torch.no_grad(), pytest.raises(FlatminimaError, match="is gradient recording switched off"):
        step(lambda model, b: F.cross_entropy(model(b[0]), b[1]), data(), **way)


@pytest.mark.parametrize("passes", ["one-by-one", "together"])
def test_a_short_batch_with_batchnorm_has_fewer_sub_batches(passes: Any) -> None:
    x, y = data(samples=16)
    model = network()
    regularizer = FisherTraceRegularizer(model, num_sub_batches=8, passes=passes)
    regularizer.backward(F.cross_entropy, x, y)
    model.zero_grad()
    torch.manual_seed(SEED)
    regularizer.backward(F.cross_entropy, x[:9], y[:9])
    found = [gradients_of(model)]

    twin = network()
    four = FisherTraceRegularizer(twin, num_sub_batches=4, passes=passes)
    torch.manual_seed(SEED)
    four.backward(F.cross_entropy, x[:9], y[:9])
    assert_same(found, [gradients_of(twin)], rtol=1e-9, atol=1e-11)

    resumed, state = network(), regularizer.state_dict()
    regularizer = FisherTraceRegularizer(resumed, num_sub_batches=8, passes=passes)
    regularizer.load_state_dict(state)  # at the last batch of an epoch, the first that this process sees
    torch.manual_seed(SEED)
    regularizer.backward(F.cross_entropy, x[:9], y[:9])
    assert_same(found, [gradients_of(resumed)], rtol=1e-9, atol=1e-11)
    resumed.zero_grad()
    with pytest.raises(FlatminimaError, match="lower num_sub_batches, or drop the last, short batch"):
        regularizer.backward(F.cross_entropy, x[:1], y[:1])


def test_a_nan_batch_leaves_running_statistics_alone() -> None:
    x, y = data()
    x[3, 2] = torch.nan
    model = network()
    before = snapshot(model)
    with pytest.raises(FlatminimaError, match="the loss is nan"):
        FisherTraceRegularizer(model, main_gradient="sub-batches").backward(F.cross_entropy, x, y)
    assert all(torch.equal(value, before[name]) for name, value in snapshot(model).items())
    assert all(parameter.grad is None for parameter in model.parameters())


class Embedded(nn.Module):
    """A table of which a batch uses some rows."""

    def __init__(self, *, sparse: bool) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(20, 6, sparse=sparse), nn.Linear(6, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.table(tokens).mean(1))


def tables(**options: Any) -> list[tuple[nn.Module, FisherTraceRegularizer]]:
    found = []
    for sparse in (True, False):
        torch.manual_seed(SEED)
        model = Embedded(sparse=sparse).double()
        found.append((model, FisherTraceRegularizer(model, alpha=1e-2, num_sub_batches=4, **options)))
    return found


@pytest.mark.parametrize("max_grad_norm", [None, 0.1])
@pytest.mark.parametrize("main_gradient", ["whole-batch", "sub-batches"])
@pytest.mark.parametrize("every", [1, 2])
def test_sparse_gradients_are_those_of_a_dense_table(max_grad_norm: Any, main_gradient: Any, every: int) -> None:
    tokens, y = torch.randint(14, (16, 4)), torch.randint(3, (16,))
    weights, norms = [], []
    for model, regularizer in tables(max_grad_norm=max_grad_norm, main_gradient=main_gradient, every=every):
        optimizer = torch.optim.SGD(model.parameters(), 0.5)
        for step_number in range(3):
            torch.manual_seed(step_number)
            optimizer.zero_grad()
            for last in (False, True):  # two micro-batches
                regularizer.backward(F.cross_entropy, tokens, y, weight=0.5, last=last)
            assert model.table.weight.grad.is_sparse == model.table.sparse
            optimizer.step()
        weights.append(snapshot(model))
        norms.append({"norm": regularizer.last_step.grad_norm})
    assert_same([weights[0], norms[0]], [weights[1], norms[1]])


def test_sparse_adam_trains_a_table() -> None:
    tokens, y = torch.randint(14, (16, 4)), torch.randint(3, (16,))
    (model, regularizer), _ = tables()
    before = model.table.weight.detach().clone()
    regularizer.backward(F.cross_entropy, tokens, y)
    torch.optim.SparseAdam([model.table.weight], 0.1).step()
    used = torch.zeros(20, dtype=torch.bool)
    used[tokens.flatten()] = True
    assert torch.equal((model.table.weight != before).any(1), used)


def test_a_sparse_gradient_joins_what_is_there() -> None:
    tokens, y = torch.randint(14, (16, 4)), torch.randint(3, (16,))
    found = []
    for model, regularizer in tables():
        F.cross_entropy(model(tokens), y).backward()
        torch.manual_seed(SEED)
        regularizer.backward(F.cross_entropy, tokens, y)
        found.append({name: g.to_dense() for name, g in gradients_of(model).items() if g is not None})
    assert_same(found[:1], found[1:])


class Checkpointed(nn.Module):
    def __init__(self, variant: bool | None) -> None:
        super().__init__()
        self.first, self.inner, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.drop, self.variant = nn.Dropout(0.3), variant

    def block(self, x: Tensor) -> Tensor:
        return self.drop(torch.tanh(self.inner(x)))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        x = self.block(x) if self.variant is None else checkpoint(self.block, x, use_reentrant=self.variant)
        return self.head(x)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("estimator", ["finite-difference", "hvp"])
def test_checkpointed_activations_change_nothing(reentrant: bool, estimator: Any) -> None:
    found = []
    for variant in (reentrant, None):
        torch.manual_seed(SEED)
        model = Checkpointed(variant).double()
        found.append(step(lambda m, b: F.cross_entropy(m(b[0]), b[1]), data(), model=model, estimator=estimator))
    assert_same(*found, rtol=1e-9, atol=1e-12)


@by_way
def test_inputs_that_are_made_to_require_gradients_change_nothing(way: dict[str, Any]) -> None:
    def closure(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    def saliency(model: nn.Module, batch: Any) -> Tensor:
        return closure(model, (batch[0].requires_grad_(), batch[1]))

    if way.get("passes") == "together":
        with pytest.raises(FlatminimaError, match="choose passes='one-by-one'"):
            step(saliency, data(), **way)
        return
    x, y = data()
    assert_same(step(saliency, (x, y), **way), step(closure, (x.detach(), y), **way))


def test_accumulation_the_usual_way_is_told_once() -> None:
    model = network()
    regularizer = FisherTraceRegularizer(model, num_sub_batches=4)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    x, y = data()

    def backward(**options: Any) -> None:
        regularizer.backward(F.cross_entropy, x, y, **options)

    with warnings.catch_warnings():
        warnings.simplefilter("error", AccumulationWarning)
        for clear in (optimizer.zero_grad, lambda: optimizer.zero_grad(set_to_none=False), lambda: None):
            clear()
            for last in (False, True):
                backward(weight=0.5, last=last)
            optimizer.step()
        optimizer.zero_grad()
        backward()
    with pytest.warns(AccumulationWarning, match=r"pass weight=1/K, and last=False for all but the last"):
        backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error", AccumulationWarning)
        backward()
