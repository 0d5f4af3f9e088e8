"""``passes="together"``: the same numbers as one by one, in two passes; and a clear word where it cannot be."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from flatminima.errors import FlatminimaError
from flatminima.regularizer.regularizer import FisherTraceRegularizer
from flatminima.torch_compat import has_reshard_switches
from support.regularizer_cases import (
    CASES,
    SEED,
    Case,
    CountingNoise,
    assert_same,
    assert_same_bits,
    assert_same_gradients,
    gradients_of,
    make,
    mlp,
    snapshot,
    with_norm,
)


class Reassigned(nn.Module):
    """Running statistics that are new tensors after every forward, with a gradient's history."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(5))

    def forward(self, x: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
        return x - self.mean


class TiedHead(nn.Module):
    """One matrix under two names in one module, and in another module of another class."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(10, 6), nn.Linear(6, 10)
        self.head.weight = self.tokens.weight
        self.alias = self.tokens.weight
        self.same = self.alias

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.tokens(x).mean(1)) + (self.same * self.alias).sum(0))


class MixedPrecision(nn.Module):
    """A body in float32 under a head in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 5), nn.Linear(5, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x)).double())


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention, self.head = (
            nn.LayerNorm(6), nn.MultiheadAttention(6, 2, batch_first=True), nn.Linear(6, 3)
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x.view(-1, 2, 3).repeat(1, 1, 2))
        return self.head(self.attention(x, x, x)[0].mean(1))


TOGETHER = {name: case for name, case in CASES.items() if name != "sparse-embedding"} | {
    "reassigned-buffer": Case(lambda: with_norm(Reassigned())),
    "counting-noise": Case(lambda: with_norm(CountingNoise())),
    "tied-head": Case(TiedHead, shape_inputs=lambda x: (x.abs() * 4).long().clamp(max=9)),
    "attention": Case(Attention),
}


by_way_of_passes = pytest.mark.parametrize(
    "way",
    [
        {},
        {"estimator": "hvp"},
        {"passes": "together"},
        {"passes": "together", "estimator": "hvp"},
    ],
    ids=["one-by-one", "hvp", "together", "together-hvp"],
)


def step(case: Case, passes: str, *, samples: int = 24, **options: Any) -> tuple[dict[str, Tensor | None], ...]:
    """One step's gradients, numbers, buffers and generator."""
    model, inputs, targets = make(case, samples=samples)
    torch.manual_seed(SEED)
    regularizer = FisherTraceRegularizer(model, alpha=0.05, beta=3.0, passes=passes, **options)  # type: ignore[arg-type]
    loss = regularizer.backward(case.loss_fn, inputs, targets)
    seen = regularizer.last_step
    assert seen is not None
    numbers: dict[str, Tensor | None] = {**vars(seen), "loss": loss, "generator": torch.get_rng_state()}
    return gradients_of(model), numbers, dict(model.named_buffers())


@pytest.mark.parametrize("case", TOGETHER.values(), ids=TOGETHER)
@pytest.mark.parametrize("estimator", ["finite-difference", "hvp"])
@pytest.mark.parametrize(
    "options",
    [
        {"num_sub_batches": 4},
        {"num_sub_batches": 5},
        {"num_sub_batches": 5, "main_gradient": "sub-batches"},
        {"num_sub_batches": 5, "batch_statistics": "whole-batch"},
        {"num_sub_batches": 5, "batch_statistics": "running"},
    ],
    ids=["equal", "unequal", "main", "whole-batch", "running"],
)
def test_together_gives_the_same_numbers(case: Case, estimator: str, options: dict[str, Any]) -> None:
    assert_same(*(step(case, passes, estimator=estimator, **options) for passes in ("together", "one-by-one")))


@pytest.mark.parametrize(("samples", "num_sub_batches"), [(1, 1), (3, 8), (24, 1), (24, 24), (23, 2)])
def test_together_gives_the_same_numbers_whatever_the_sizes(samples: int, num_sub_batches: int) -> None:
    options: dict[str, Any] = {"samples": samples, "num_sub_batches": num_sub_batches}
    assert_same(*(step(CASES["relu"], passes, **options) for passes in ("together", "one-by-one")))


@pytest.mark.parametrize("passes", ["one-by-one", "together"])
def test_every_gradient_has_the_type_of_its_parameter(passes: Any) -> None:
    model = MixedPrecision()
    penalty = FisherTraceRegularizer(model, num_sub_batches=4, passes=passes).penalize(
        lambda batch: F.cross_entropy(model(batch[0]), batch[1]), (torch.randn(24, 6), torch.randint(3, (24,)))
    )
    assert penalty is not None
    for gradients in (penalty.gradient, penalty.main_gradient):
        assert [gradient.dtype for gradient in gradients] == [parameter.dtype for parameter in model.parameters()]


@pytest.mark.parametrize("passes", ["one-by-one", "together"])
@pytest.mark.parametrize("estimator", ["finite-difference", "hvp"])
@pytest.mark.parametrize("main_gradient", ["whole-batch", "sub-batches"])
def test_every_gradient_has_the_layout_of_its_parameter(passes: Any, estimator: Any, main_gradient: Any) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Tanh(), nn.Conv2d(8, 4, 3), nn.Flatten(1))
    model.to(memory_format=torch.channels_last)
    inputs, targets = torch.randn(16, 3, 6, 6).to(memory_format=torch.channels_last), torch.randint(16, (16,))
    regularizer = FisherTraceRegularizer(
        model, num_sub_batches=4, passes=passes, estimator=estimator, main_gradient=main_gradient
    )
    regularizer.backward(F.cross_entropy, inputs, targets)
    gradients = [parameter.grad for parameter in model.parameters()]
    assert [gradient.stride() for gradient in gradients] == [parameter.stride() for parameter in model.parameters()]


def test_only_the_chosen_parameters_move() -> None:
    penalties = []
    for passes in ("together", "one-by-one"):
        model, inputs, targets = make(CASES["batchnorm"])
        torch.manual_seed(SEED)
        regularizer = FisherTraceRegularizer(
            model, alpha=0.3, passes=passes, parameters=[p for p in model.parameters() if p.dim() > 1]
        )  # fmt: skip
        penalties.append(
            regularizer.penalize(lambda b, model=model: F.cross_entropy(model(b[0]), b[1]), (inputs, targets))
        )
    together, one_by_one = penalties
    torch.testing.assert_close(together.trace, one_by_one.trace, rtol=1e-12, atol=0)
    torch.testing.assert_close(together.gradient, one_by_one.gradient, rtol=1e-10, atol=1e-13)
    assert together.num_sub_batches == one_by_one.num_sub_batches


@pytest.mark.parametrize(("num_sub_batches", "expected"), [(1, 2), (4, 2), (5, 4)])
def test_there_are_two_passes_for_each_size(num_sub_batches: int, expected: int) -> None:
    model, inputs, targets = make(CASES["mlp"])
    sizes = []

    def closure(batch: Any) -> Tensor:
        sizes.append(len(batch[0]))
        return F.cross_entropy(model(batch[0]), batch[1])

    regularizer = FisherTraceRegularizer(model, num_sub_batches=num_sub_batches, passes="together")
    regularizer.penalize(closure, (inputs, targets))  # the first looks at one sub-batch once more
    sizes.clear()
    regularizer.penalize(closure, (inputs, targets))
    assert len(sizes) == expected
    assert set(sizes) == {24 // num_sub_batches, -(-24 // num_sub_batches)}


def test_closure_takes_the_model_and_anything_else_from_where_it_likes() -> None:
    penalties = []
    for passes in ("together", "one-by-one"):
        model, inputs, targets = make(CASES["mlp"])
        torch.manual_seed(SEED)
        other = nn.Linear(3, 3).double()  # trainable, but not the regularizer's

        def closure(batch: Any, model: nn.Module = model, other: nn.Module = other) -> Tensor:
            assert batch["scale"] == 0.5
            output = other(model(batch["x"][0])) * batch["scale"]
            return F.cross_entropy(output, batch["y"]) + 0.01 * sum(p.square().sum() for p in model.parameters())

        torch.manual_seed(SEED)
        regularizer = FisherTraceRegularizer(model, alpha=0.05, passes=passes)
        regularizer.backward_closure(closure, {"x": [inputs], "y": targets, "scale": 0.5})
        penalties.append(gradients_of(model))
    assert_same_gradients(*penalties)


def relative_error(actual: list[Tensor], expected: list[Tensor]) -> float:
    difference = sum((a - e).square().sum() for a, e in zip(actual, expected, strict=True))
    return float((difference / sum(e.square().sum() for e in expected)).sqrt())


def test_dropout_uses_one_mask_for_both_passes_of_a_sub_batch() -> None:
    """With other masks in the second pass, the finite difference would be noise of the size of 1/α."""
    model, inputs, targets = make(
        Case(lambda: nn.Sequential(nn.Linear(6, 50), nn.Tanh(), nn.Dropout(0.5), nn.Linear(50, 3)))
    )
    found = []
    for estimator in ("finite-difference", "hvp"):
        torch.manual_seed(SEED)
        regularizer = FisherTraceRegularizer(
            model, alpha=1e-6, num_sub_batches=4, passes="together", estimator=estimator
        )
        penalty = regularizer.penalize(lambda batch: F.cross_entropy(model(batch[0]), batch[1]), (inputs, targets))
        assert penalty is not None
        found.append((penalty.gradient, torch.get_rng_state()))
    (difference, state), (exact, state_after_one_pass) = found
    assert relative_error(difference, exact) < 1e-4
    assert torch.equal(state, state_after_one_pass)


def test_dropout_uses_another_mask_for_every_sub_batch() -> None:
    """Of equal samples all g_i would be equal otherwise, and the mean of their squares the square of their mean."""
    model = nn.Sequential(nn.Linear(6, 50), nn.Tanh(), nn.Dropout(0.5), nn.Linear(50, 3)).double()
    seen = FisherTraceRegularizer(model, num_sub_batches=4, passes="together")
    seen.backward(F.cross_entropy, torch.ones(8, 6).double(), torch.zeros(8).long())
    assert seen.last_step is not None
    assert seen.last_step.trace > 1.01 * seen.last_step.main_gradient_norm.square()


@pytest.mark.parametrize("failing_call", [1, 2])
@pytest.mark.parametrize("exception", [RuntimeError, KeyboardInterrupt])
def test_everything_is_put_back_after_an_exception(failing_call: int, exception: type[BaseException]) -> None:
    model, inputs, targets = make(CASES["tied"])
    model.norm = nn.BatchNorm1d(3).double()
    before = snapshot(model)
    own = [id(tensor) for tensor in (*model.parameters(), *model.buffers())]
    calls = 0

    def loss_fn(output: Tensor, targets: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == failing_call:
            raise exception("stop")
        return F.cross_entropy(model.norm(output), targets)

    with pytest.raises(exception, match="stop"):
        FisherTraceRegularizer(model, alpha=0.3, num_sub_batches=4, passes="together").backward(
            loss_fn, inputs, targets
        )
    assert_same_bits(snapshot(model), before)
    assert [id(tensor) for tensor in (*model.parameters(), *model.buffers())] == own
    assert all(parameter.grad is None for parameter in model.parameters())


class Lambda(nn.Module):
    """A layer, and a function of its output."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.function = nn.Linear(6, 3), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.layer(x))


class Square(torch.autograd.Function):
    """As functions were written before ``torch.func``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * gradient


class OnceDifferentiable(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.square()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * gradient


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(2, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x.view(-1, 3, 2))[0][:, -1])


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(lambda x: torch.tanh(self.first(x)), x, use_reentrant=False))


REFUSED = {
    "item": Case(lambda: Lambda(lambda x: x * x.sum().item())),
    "control-flow": Case(lambda: Lambda(lambda x: x if x.sum() > 0 else 2 * x)),
    "old-function": Case(lambda: Lambda(Square.apply)),
    "recurrent": Case(Recurrent),
    "checkpoint": Case(Checkpointed),
    "sparse-embedding": CASES["sparse-embedding"],
}


def assert_refused(case: Case, passes: Any, message: str) -> None:
    """With ``message``, nothing of the model changed; one by one it runs."""
    model, inputs, targets = make(case)
    before, own = snapshot(model), [id(parameter) for parameter in model.parameters()]
    with pytest.raises(FlatminimaError, match=message):
        FisherTraceRegularizer(model, passes=passes).backward(case.loss_fn, inputs, targets)
    assert_same_bits(snapshot(model), before)
    assert [id(parameter) for parameter in model.parameters()] == own
    assert all(parameter.grad is None for parameter in model.parameters())
    FisherTraceRegularizer(model).backward(case.loss_fn, inputs, targets)


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_what_vmap_cannot_run_is_refused_and_leaves_no_trace(case: Case) -> None:
    assert_refused(case, "together", r"cannot go through .* together \(.*choose passes='one-by-one'")


@pytest.mark.parametrize("only_there", [True, False])
def test_weights_that_cannot_be_swapped_are_refused(only_there: bool) -> None:
    """Else the gradient would silently lack what the loss owes to the captured parameter."""
    model, inputs, targets = make(CASES["mlp"])
    captured = list(model.parameters())[:1]

    def closure(batch: Any) -> Tensor:
        output = batch[0] @ captured[0].T if only_there else model(batch[0])
        return F.cross_entropy(output, batch[1]) + captured[0].square().sum()

    regularizer = FisherTraceRegularizer(model, passes="together")
    with pytest.raises(FlatminimaError, match=r"uses parameter 0.weight itself.*choose passes='one-by-one'"):
        regularizer.penalize(closure, (inputs, targets))
    assert FisherTraceRegularizer(model).penalize(closure, (inputs, targets)) is not None


def test_hooks_on_gradients_run_or_are_refused_whenever_they_come() -> None:
    """The copies of a parameter do not have its hooks, and the penalty's gradient would silently lack their effect."""
    model, inputs, targets = make(CASES["mlp"])
    together = FisherTraceRegularizer(model, passes="together")
    together.backward(F.cross_entropy, inputs, targets)
    model.zero_grad()
    handle = model[2].weight.register_hook(torch.zeros_like)
    with pytest.raises(FlatminimaError, match=r"parameter 2.weight has a hook.*choose passes='one-by-one'"):
        together.backward(F.cross_entropy, inputs, targets)
    assert all(parameter.grad is None for parameter in model.parameters())
    FisherTraceRegularizer(model).backward(F.cross_entropy, inputs, targets)
    assert not model[2].weight.grad.any()
    handle.remove()
    together.backward(F.cross_entropy, inputs, targets)
    assert model[2].weight.grad.any()


def test_second_derivatives_of_custom_functions_are_refused() -> None:
    """``vmap`` hides that one is marked once_differentiable, and its second derivative would silently be zero."""
    model, inputs, targets = make(Case(lambda: Lambda(OnceDifferentiable.apply)))
    with pytest.raises(FlatminimaError, match=r"custom autograd.Function.*choose passes='one-by-one'"):
        FisherTraceRegularizer(model, estimator="hvp", passes="together").backward(F.cross_entropy, inputs, targets)
    assert_same(*(step(Case(lambda: Lambda(OnceDifferentiable.apply)), p) for p in ("together", "one-by-one")))


@pytest.mark.parametrize("estimator", ["finite-difference", "hvp"])
def test_leaves_of_a_pass_that_live_on_are_not_trained(estimator: Any) -> None:
    """A frozen embedding's output that is to be differentiated by, say, and is kept."""
    model, inputs, targets = make(CASES["mlp"])
    kept = []

    def closure(batch: Any) -> Tensor:
        kept.append(batch[0].clone().requires_grad_())
        return F.cross_entropy(model(kept[-1]), batch[1])

    regularizer = FisherTraceRegularizer(model, main_gradient="sub-batches", estimator=estimator)
    regularizer.backward_closure(closure, (inputs, targets))
    assert len(kept) > 2
    assert all(parameter.grad is not None for parameter in model.parameters())


@by_way_of_passes
@pytest.mark.parametrize("trained", ["in-the-loss", "before-the-model"])
def test_what_is_trained_outside_the_model_has_a_main_gradient_or_is_refused(trained: str, way: dict[str, Any]) -> None:
    model, inputs, targets = make(CASES["mlp"])
    shift, encoder = torch.zeros(3, dtype=torch.float64, requires_grad=True), nn.Linear(6, 6).double()
    outside = shift if trained == "in-the-loss" else encoder.weight

    def closure(batch: Any) -> Tensor:
        if trained == "in-the-loss":
            return F.cross_entropy(model(batch[0]) + shift, batch[1])
        return F.cross_entropy(model(encoder(batch[0])), batch[1])

    (expected,) = torch.autograd.grad(closure((inputs, targets)), [outside])
    FisherTraceRegularizer(model, **way).backward_closure(closure, (inputs, targets))
    torch.testing.assert_close(outside.grad, expected)
    model.zero_grad()
    before, message = snapshot(model), rf"no parameter of the model \(.*\({outside.shape[0]},.*whole-batch"
    with pytest.raises(FlatminimaError, match=message):
        FisherTraceRegularizer(model, main_gradient="sub-batches", **way).backward_closure(closure, (inputs, targets))
    assert_same_bits(snapshot(model), before)
    assert all(parameter.grad is None for parameter in model.parameters())


@by_way_of_passes
def test_an_encoder_whose_output_is_the_batch_is_outside_too(way: dict[str, Any]) -> None:
    model, inputs, targets = make(CASES["mlp"])
    encoder = nn.Linear(6, 6).double()
    regularizer = FisherTraceRegularizer(model, main_gradient="sub-batches", **way)
    with pytest.raises(FlatminimaError, match=r"Parameter of shape \(6, 6\).*choose main_gradient='whole-batch'"):
        regularizer.backward(F.cross_entropy, encoder(inputs), targets)


@pytest.mark.parametrize("estimator", ["finite-difference", "hvp"])
def test_leaves_that_a_loss_makes_for_itself_are_nobodys(estimator: Any) -> None:
    """As losses with derivatives by the inputs do, of physics-informed networks for example."""
    model, inputs, targets = make(CASES["mlp"])

    def closure(batch: Any) -> Tensor:
        points, scale = batch[0].requires_grad_(), torch.ones((), dtype=torch.float64, requires_grad=True)
        outputs = scale * model(points)
        (slope,) = torch.autograd.grad(outputs.sum(), [points], create_graph=True)
        return F.cross_entropy(outputs, batch[1]) + slope.square().mean()

    regularizer = FisherTraceRegularizer(model, beta=0.0, main_gradient="sub-batches", estimator=estimator)
    regularizer.backward_closure(closure, (inputs, targets))
    found = gradients_of(model)
    expected = torch.autograd.grad(closure((inputs.clone(), targets)), list(model.parameters()), allow_unused=True)
    assert_same_gradients(found, dict(zip(found, expected, strict=True)))


@by_way_of_passes
def test_hooks_after_accumulation_run_or_are_refused(way: dict[str, Any]) -> None:
    model, inputs, targets = make(CASES["mlp"])
    fired: list[Tensor] = []
    handle = model[0].weight.register_post_accumulate_grad_hook(fired.append)
    FisherTraceRegularizer(model, **way).backward(F.cross_entropy, inputs, targets)
    assert len(fired) == 1
    model.zero_grad()
    regularizer = FisherTraceRegularizer(model, main_gradient="sub-batches", **way)
    with pytest.raises(FlatminimaError, match=r"parameter 0.weight has a hook .*choose main_gradient='whole-batch'"):
        regularizer.backward(F.cross_entropy, inputs, targets)
    handle.remove()
    regularizer.backward(F.cross_entropy, inputs, targets)
    assert model[0].weight.grad is not None


@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [
        (lambda o, y: F.cross_entropy(o, y, reduction="none"), r"must return a scalar tensor.*shape \(3,\)"),
        (lambda o, y: F.cross_entropy(o.detach(), y), "does not depend on a trainable parameter"),
    ],
)
def test_refuses_losses(loss_fn: Any, message: str) -> None:
    with pytest.raises(FlatminimaError, match=message):
        FisherTraceRegularizer(mlp(), passes="together").backward(
            loss_fn, torch.randn(24, 6), torch.zeros(24).long()
        )  # fmt: skip


def test_batchnorm_on_single_samples_says_what_to_do() -> None:
    with pytest.raises(FlatminimaError, match=r"on a sub-batch of 1 sample\(s\): lower num_sub_batches"):
        FisherTraceRegularizer(with_norm(nn.BatchNorm1d(5)), passes="together").backward(
            F.cross_entropy, torch.randn(8, 6), torch.zeros(8).long()
        )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("estimator", ["finite-difference", "hvp"])
@pytest.mark.filterwarnings("ignore::flatminima.errors.AccumulationWarning")
def test_compiled_model_gives_the_same_gradient(estimator: Any) -> None:
    model, inputs, targets = make(CASES["batchnorm"])
    eager = copy.deepcopy(model)
    for network, passes in ((eager, "one-by-one"), (torch.compile(model, backend="aot_eager"), "together")):
        torch.manual_seed(SEED)
        regularizer = FisherTraceRegularizer(
            network, alpha=0.05, beta=3.0, num_sub_batches=4, estimator=estimator, passes=passes
        )
        for _ in range(2):
            regularizer.backward(F.cross_entropy, inputs, targets)
    assert_same_gradients(gradients_of(model), gradients_of(eager))


@pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo backend")
def test_distributed_data_parallel_runs_together_and_fully_shard_is_refused(tmp_path: Path) -> None:
    from torch.distributed.fsdp import fully_shard

    results = []
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        for passes in ("together", "one-by-one"):
            model, inputs, targets = make(CASES["batchnorm"])
            torch.manual_seed(SEED)
            FisherTraceRegularizer(
                DistributedDataParallel(model), passes=passes, num_sub_batches=5, main_gradient="sub-batches"
            ).backward(F.cross_entropy, inputs, targets)
            results.append((gradients_of(model), dict(model.named_buffers())))
        sharded = mlp()
        fully_shard(sharded, mesh=dist.device_mesh.init_device_mesh("cpu", (1,)))
        refusal = "fully_shard does not: choose passes='one-by-one'"
        if not has_reshard_switches(sharded):
            refusal = "fully_shard needs a newer torch"
        with pytest.raises(FlatminimaError, match=refusal):
            FisherTraceRegularizer(sharded, passes="together")
    finally:
        dist.destroy_process_group()
    assert_same(*results)
