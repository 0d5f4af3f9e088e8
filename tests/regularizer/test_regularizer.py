from __future__ import annotations

import copy
import io
import itertools
import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

from flatminima.errors import FlatminimaError, NonFiniteError
from flatminima.regularizer.regularizer import FisherTraceRegularizer
from support.regularizer_cases import (
    BACKENDS,
    CASES,
    SEED,
    Case,
    CountingBackend,
    CountingNoise,
    Float32Island,
    assert_same_bits,
    assert_same_gradients,
    by_case,
    gradients_of,
    make,
    mlp,
    select,
    snapshot,
    with_norm,
)


def literal_algorithm_1(
    model: nn.Module, loss_fn: Any, inputs: Any, targets: Any, *, alpha: float, beta: float, num_sub_batches: int
) -> tuple[dict[str, Tensor | None], Tensor, Tensor]:
    """Gradient of L + βR by one backward pass through R itself, R, and mean ‖g_i‖²; on a copy of the model."""
    model = copy.deepcopy(model)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def loss_at(weights: dict[str, Tensor], x: Any, y: Any) -> Tensor:
        args, kwargs = ((), x) if isinstance(x, dict) else (x if isinstance(x, tuple) else (x,), {})
        return loss_fn(functional_call(model, weights, args, kwargs), y)

    samples = len(
        next(t for t in (inputs, *(inputs.values() if isinstance(inputs, dict) else inputs)) if isinstance(t, Tensor))
    )
    splits = torch.randperm(samples).tensor_split(min(num_sub_batches, samples))
    penalty, trace = torch.zeros(()).double(), torch.zeros(()).double()
    for indices in splits:
        x, y = select(inputs, indices), select(targets, indices)
        generator_state = torch.get_rng_state()
        here = loss_at(parameters, x, y)
        gradients = torch.autograd.grad(here, parameters.values(), retain_graph=True, allow_unused=True)
        g = {
            name: torch.zeros_like(p) if gradient is None else gradient.detach().to_dense()
            for (name, p), gradient in zip(parameters.items(), gradients, strict=True)
        }
        torch.set_rng_state(generator_state)
        there = loss_at({name: p - alpha * g[name] for name, p in parameters.items()}, x, y)
        penalty = penalty + (here - there) / len(splits)
        trace = trace + sum(v.square().sum() for v in g.values()) / len(splits)
    objective = loss_at(parameters, inputs, targets) + beta * penalty
    gradients = torch.autograd.grad(objective, parameters.values(), allow_unused=True)
    return dict(zip(parameters, gradients, strict=True)), penalty.detach(), trace


@by_case
@pytest.mark.parametrize("num_sub_batches", [1, 4, 5])
def test_gradient_is_that_of_algorithm_1(case: Case, num_sub_batches: int) -> None:
    model, inputs, targets = make(case)
    options: dict[str, Any] = {"alpha": 0.05, "beta": 3.0, "num_sub_batches": num_sub_batches}
    torch.manual_seed(SEED)
    expected, penalty, trace = literal_algorithm_1(model, case.loss_fn, inputs, targets, **options)

    torch.manual_seed(SEED)
    regularizer = FisherTraceRegularizer(model, **options)
    regularizer.backward(case.loss_fn, inputs, targets)

    assert_same_gradients(gradients_of(model), expected)
    assert regularizer.last_step is not None
    torch.testing.assert_close(regularizer.last_step.penalty, penalty, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(regularizer.last_step.trace, trace, rtol=1e-9, atol=1e-12)


@by_case
def test_only_the_main_pass_changes_buffers_and_nothing_changes_weights(case: Case) -> None:
    model, inputs, targets = make(case)
    plain = copy.deepcopy(model)
    args, kwargs = (
        ((), inputs) if isinstance(inputs, dict) else (inputs if isinstance(inputs, tuple) else (inputs,), {})
    )
    plain(*args, **kwargs)

    own_buffers = [id(buffer) for buffer in model.buffers()]
    FisherTraceRegularizer(model, num_sub_batches=4).backward(case.loss_fn, inputs, targets)

    assert_same_bits(snapshot(model), snapshot(plain))
    assert [id(buffer) for buffer in model.buffers()] == own_buffers


@by_case
def test_without_beta_the_step_is_the_plain_step_to_the_bit(case: Case) -> None:
    model, inputs, targets = make(case)
    plain = copy.deepcopy(model)
    args, kwargs = (
        ((), inputs) if isinstance(inputs, dict) else (inputs if isinstance(inputs, tuple) else (inputs,), {})
    )
    plain_loss = case.loss_fn(plain(*args, **kwargs), targets)
    plain_loss.backward()

    loss = FisherTraceRegularizer(model, beta=0.0).backward(case.loss_fn, inputs, targets)

    assert torch.equal(loss, plain_loss.detach())
    assert not loss.requires_grad
    for name, gradient in gradients_of(plain).items():
        ours = gradients_of(model)[name]
        assert (ours is None) == (gradient is None)
        assert gradient is None or torch.equal(ours.to_dense(), gradient.to_dense())


@settings(deadline=None, max_examples=60)
@given(
    samples=st.integers(1, 20),
    num_sub_batches=st.integers(1, 24),
    alpha=st.floats(1e-6, 1.0),
    beta=st.floats(0.0, 100.0),
    seed=st.integers(0, 2**31),
)
def test_any_batch_and_split(samples: int, num_sub_batches: int, alpha: float, beta: float, seed: int) -> None:
    """Sub-batches of unequal size weigh the same (Eq. 6 averages over i); short batches fall into single samples."""
    model, inputs, targets = make(CASES["mlp"], samples=samples)
    weights = snapshot(model)
    options: dict[str, Any] = {"alpha": alpha, "beta": beta, "num_sub_batches": num_sub_batches}
    torch.manual_seed(seed)
    expected, _, _ = literal_algorithm_1(model, F.cross_entropy, inputs, targets, **options)
    torch.manual_seed(seed)
    FisherTraceRegularizer(model, **options).backward(F.cross_entropy, inputs, targets)
    assert_same_gradients(gradients_of(model), expected)
    assert_same_bits(snapshot(model), weights)


@pytest.mark.parametrize(
    ("samples", "num_sub_batches", "sizes"), [(10, 4, [3, 3, 2, 2]), (3, 8, [1, 1, 1]), (1, 1, [1])]
)
@pytest.mark.filterwarnings("ignore::flatminima.errors.AccumulationWarning")
def test_split_is_a_random_partition_into_near_equal_parts(
    samples: int, num_sub_batches: int, sizes: list[int]
) -> None:
    model, inputs, _ = make(CASES["mlp"], samples=samples)
    seen: list[list[int]] = []

    def loss_fn(output: Tensor, targets: Tensor) -> Tensor:
        seen.append(targets.tolist())
        return output.square().mean()

    regularizer = FisherTraceRegularizer(model, num_sub_batches=num_sub_batches)
    regularizer.backward(loss_fn, inputs, torch.arange(samples))
    *penalty_batches, looked_at, main_batch = seen
    assert looked_at == penalty_batches[0]  # once more after the first penalty
    assert penalty_batches[::2] == penalty_batches[1::2]
    assert [len(batch) for batch in penalty_batches[::2]] == sizes
    assert sorted(itertools.chain(*penalty_batches[::2])) == main_batch == list(range(samples))
    if samples == 10:
        regularizer.backward(loss_fn, inputs, torch.arange(samples))
        assert seen[len(sizes) * 2 + 2 :: 2][: len(sizes)] != penalty_batches[::2]


def test_small_alpha_gives_the_hessian_vector_product() -> None:
    """∇R_α / α → mean_i H_i g_i, and R_α / α → mean_i ‖g_i‖² (exact double backward)."""
    model, inputs, targets = make(CASES["mlp"])
    parameters = list(model.parameters())
    alpha = 1e-6
    torch.manual_seed(SEED)
    limit = [torch.zeros_like(p) for p in parameters]
    for indices in torch.randperm(len(inputs)).tensor_split(4):
        loss = F.cross_entropy(model(inputs[indices]), targets[indices])
        g = torch.autograd.grad(loss, parameters, create_graph=True)
        half_norm = sum(v.square().sum() for v in g) / 2  # its gradient is H g
        for total, product in zip(limit, torch.autograd.grad(half_norm, parameters), strict=True):
            total += product / 4
    main = torch.autograd.grad(F.cross_entropy(model(inputs), targets), parameters)

    torch.manual_seed(SEED)
    regularizer = FisherTraceRegularizer(model, alpha=alpha, beta=1 / alpha, num_sub_batches=4)
    regularizer.backward(F.cross_entropy, inputs, targets)

    for parameter, gradient, product in zip(parameters, main, limit, strict=True):
        torch.testing.assert_close(parameter.grad - gradient, product, rtol=1e-4, atol=1e-8)
    assert regularizer.last_step is not None
    torch.testing.assert_close(regularizer.last_step.penalty / alpha, regularizer.last_step.trace, rtol=1e-4, atol=0)


def test_dropout_uses_one_mask_for_both_passes_of_a_sub_batch() -> None:
    dropout = Case(
        lambda: nn.Sequential(nn.Linear(6, 50), nn.Tanh(), nn.Dropout(0.5), nn.Linear(50, 3), nn.Dropout(0.2))
    )
    model, inputs, targets = make(dropout)
    options: dict[str, Any] = {"alpha": 1e-3, "beta": 100.0, "num_sub_batches": 4}
    torch.manual_seed(SEED)
    expected, penalty, _ = literal_algorithm_1(model, F.cross_entropy, inputs, targets, **options)
    torch.manual_seed(SEED)
    regularizer = FisherTraceRegularizer(model, **options)
    regularizer.backward(F.cross_entropy, inputs, targets)
    assert_same_gradients(gradients_of(model), expected)
    assert regularizer.last_step is not None
    torch.testing.assert_close(regularizer.last_step.penalty, penalty)
    torch.testing.assert_close(penalty, 1e-3 * regularizer.last_step.trace, rtol=0.02, atol=0)


@pytest.mark.filterwarnings("ignore::flatminima.errors.AccumulationWarning")
def test_dropout_masks_differ_from_step_to_step() -> None:
    model = nn.Dropout(0.5)
    model.register_parameter("scale", nn.Parameter(torch.ones(())))
    masks: list[Tensor] = []

    def loss_fn(output: Tensor, targets: Tensor) -> Tensor:
        masks.append(output.detach() != 0)
        return (model.scale * output).mean()

    regularizer = FisherTraceRegularizer(model, num_sub_batches=1)
    for _ in range(2):
        regularizer.backward(loss_fn, torch.ones(64, 4), torch.zeros(64))
    first, first_moved, _, _, second, second_moved, _ = masks  # the first penalty looks at one pass more
    assert torch.equal(first, first_moved)
    assert torch.equal(second, second_moved)
    assert not torch.equal(first, second)


def test_a_buffer_that_the_forward_reads_and_writes_is_the_same_for_every_penalty_pass() -> None:
    model, inputs, targets = make(Case(lambda: nn.Sequential(CountingNoise(), nn.Linear(6, 3))))
    torch.manual_seed(SEED)
    scaled, _, _ = literal_algorithm_1(
        nn.Sequential(nn.Identity(), copy.deepcopy(model[1])), F.cross_entropy, 2 * inputs, targets,
        alpha=0.1, beta=2.0, num_sub_batches=4,
    )  # fmt: skip
    torch.manual_seed(SEED)
    FisherTraceRegularizer(model, alpha=0.1, beta=2.0, num_sub_batches=4).backward(F.cross_entropy, inputs, targets)
    assert_same_gradients(gradients_of(model), scaled)
    assert model[0].count == 2


def test_recurrent_network_moves_all_its_weights() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.head = nn.LSTM(2, 5, batch_first=True), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.lstm(x.view(-1, 3, 2))[0][:, -1])

    model, inputs, targets = make(Case(Recurrent))
    regularizer = FisherTraceRegularizer(model, alpha=1e-6, beta=1.0, num_sub_batches=1)
    regularizer.backward(F.cross_entropy, inputs, targets)
    assert regularizer.last_step is not None
    torch.testing.assert_close(regularizer.last_step.penalty / 1e-6, regularizer.last_step.trace, rtol=1e-4, atol=0)


@pytest.mark.parametrize("failing_call", [1, 2, 3, 6, 9, 10])
@pytest.mark.parametrize("exception", [RuntimeError, KeyboardInterrupt])
def test_everything_is_put_back_after_an_exception(failing_call: int, exception: type[BaseException]) -> None:
    model, inputs, targets = make(CASES["batchnorm"])
    before, own_buffers = snapshot(model), [id(buffer) for buffer in model.buffers()]
    calls = 0

    def loss_fn(output: Tensor, targets: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == failing_call:
            raise exception("stop")
        return F.cross_entropy(output, targets)

    with pytest.raises(exception, match="stop"):
        FisherTraceRegularizer(model, alpha=0.3, num_sub_batches=4).backward(loss_fn, inputs, targets)

    after = snapshot(model)
    if failing_call == 10:  # the main pass: a plain step would have updated the statistics as well
        before, after = ({k: v for k, v in s.items() if "running" not in k and "num" not in k} for s in (before, after))
    assert_same_bits(after, before)
    assert [id(buffer) for buffer in model.buffers()] == own_buffers
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(not module._forward_pre_hooks for module in model.modules())


@pytest.mark.filterwarnings("ignore::flatminima.errors.AccumulationWarning")
def test_gradients_accumulate() -> None:
    model, inputs, targets = make(CASES["mlp"])
    regularizer = FisherTraceRegularizer(model, alpha=0.05)
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for seed in (1, 2):
        torch.manual_seed(seed)
        model.zero_grad()
        regularizer.backward(F.cross_entropy, inputs, targets)
        total = {name: total[name] + gradient for name, gradient in gradients_of(model).items()}
    model.zero_grad()
    for seed in (1, 2):
        torch.manual_seed(seed)
        regularizer.backward(F.cross_entropy, inputs, targets)
    assert_same_gradients(gradients_of(model), total)


def test_clips_the_global_norm_and_reports_the_norm_before() -> None:
    model, inputs, targets = make(CASES["mlp"])
    torch.manual_seed(SEED)
    free = FisherTraceRegularizer(model)
    free.backward(F.cross_entropy, inputs, targets)
    unclipped = {name: gradient.clone() for name, gradient in gradients_of(model).items() if gradient is not None}
    norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in unclipped.values()))

    for limit in (norm / 7, norm * 2):
        model.zero_grad()
        torch.manual_seed(SEED)
        clipping = FisherTraceRegularizer(model, max_grad_norm=limit)
        clipping.backward(F.cross_entropy, inputs, targets)
        factor = min(1.0, limit / norm)
        for name, gradient in gradients_of(model).items():
            torch.testing.assert_close(gradient, factor * unclipped[name], rtol=1e-5, atol=1e-12)
        assert free.last_step is not None
        assert clipping.last_step is not None
        assert (
            float(clipping.last_step.grad_norm) == pytest.approx(norm) == pytest.approx(float(free.last_step.grad_norm))
        )


@pytest.mark.filterwarnings("ignore::flatminima.errors.AccumulationWarning")
def test_penalty_is_float32_whatever_the_main_pass_uses() -> None:
    torch.manual_seed(SEED)
    model, inputs, targets = mlp(), torch.randn(24, 6), torch.randint(3, (24,))
    regularizer = FisherTraceRegularizer(model, num_sub_batches=4)

    def step(images: Tensor, autocast: bool) -> tuple[Any, Tensor]:
        torch.manual_seed(SEED)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = regularizer.backward(F.cross_entropy, images, targets)
            assert torch.is_autocast_enabled("cpu") == autocast
        assert regularizer.last_step is not None
        return regularizer.last_step, loss

    full, full_loss = step(inputs, autocast=False)
    mixed, mixed_loss = step(inputs, autocast=True)
    assert torch.equal(full.penalty, mixed.penalty)
    assert torch.equal(full.trace, mixed.trace)
    assert full_loss != mixed_loss, "the main pass keeps the caller's autocast"

    rounded, _ = step(inputs.bfloat16().float(), autocast=True)
    half_inputs, _ = step(inputs.bfloat16(), autocast=True)
    assert torch.equal(rounded.penalty, half_inputs.penalty)


def test_a_step_within_autocast_goes_back_through_what_is_float32_in_float32() -> None:
    """PyTorch recommends the backward pass outside autocast, and here the whole step may be within."""
    torch.manual_seed(SEED)
    model, inputs, targets = Float32Island(), torch.randn(24, 6), torch.randint(3, (24,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = F.cross_entropy(model(inputs), targets)
    expected = dict(zip(dict(model.named_parameters()), torch.autograd.grad(loss, [*model.parameters()]), strict=True))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        FisherTraceRegularizer(model, beta=0.0).backward(F.cross_entropy, inputs, targets)
        assert torch.is_autocast_enabled("cpu")
    found = gradients_of(model)
    assert [name for name, gradient in expected.items() if not torch.equal(found[name], gradient)] == []


def test_autocast_inside_the_forward_is_refused() -> None:
    class Autocasting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = mlp()

        @torch.autocast("cpu", dtype=torch.bfloat16)
        def forward(self, x: Tensor) -> Tensor:
            return self.body(x)

    with pytest.raises(FlatminimaError, match="switches autocast on inside its forward"):
        FisherTraceRegularizer(Autocasting()).backward(F.cross_entropy, torch.randn(8, 6), torch.randint(3, (8,)))


@pytest.mark.parametrize("by_layer", [True, False])
@pytest.mark.parametrize("options", [{}, {"estimator": "hvp"}, {"passes": "together"}])
def test_autocast_inside_the_forward_is_refused_wherever_it_begins(by_layer: bool, options: dict[str, Any]) -> None:
    class Autocasting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(6, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            hidden = torch.tanh(self.body(x))
            with torch.autocast("cpu", dtype=torch.bfloat16):
                output = self.head(hidden) if by_layer else F.linear(hidden, self.head.weight)
            return output.float()

    model = Autocasting()
    before = snapshot(model)
    with pytest.raises(FlatminimaError, match="switches autocast on inside its forward, but penalty passes"):
        FisherTraceRegularizer(model, **options).backward(
            F.cross_entropy, torch.randn(8, 6), torch.randint(3, (8,))
        )  # fmt: skip
    assert_same_bits(snapshot(model), before)
    assert all(parameter.grad is None for parameter in model.parameters())
    FisherTraceRegularizer(model.double(), **options).backward(  # which autocast leaves alone
        lambda output, y: F.cross_entropy(output.double(), y), torch.randn(8, 6).double(), torch.randint(3, (8,))
    )


def test_training_with_the_penalty_ends_at_a_lower_trace_and_a_similar_loss() -> None:
    """The same start, data and number of steps; the trace is that of the last 20 steps."""
    traces, losses = {}, {}
    for beta in (0.0, 50.0):
        model, inputs, _ = make(CASES["mlp"], samples=64)
        targets = inputs[:, :3].argmax(1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
        regularizer = FisherTraceRegularizer(model, alpha=1e-2, beta=beta, max_grad_norm=5.0)
        steps = []
        for _ in range(100):
            optimizer.zero_grad()
            losses[beta] = float(regularizer.backward(F.cross_entropy, inputs, targets))
            optimizer.step()
            steps.append(regularizer.last_step)
        traces[beta] = sum(float(step.trace) for step in steps[-20:] if step is not None) / 20
    assert losses[50.0] == pytest.approx(losses[0.0], rel=0.05)
    assert traces[50.0] < 0.9 * traces[0.0]


def test_freezing_between_steps_is_seen() -> None:
    model, inputs, targets = make(CASES["mlp"])
    regularizer = FisherTraceRegularizer(model)
    model[0].requires_grad_(False)
    regularizer.backward(F.cross_entropy, inputs, targets)
    assert [parameter.grad is None for parameter in model.parameters()] == [True, True, False, False]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 0.0}, "alpha must be"),
        ({"alpha": math.inf}, "alpha must be"),
        ({"alpha": math.nan}, "alpha must be"),
        ({"beta": -1.0}, "beta must be"),
        ({"beta": math.nan}, "beta must be"),
        ({"num_sub_batches": 0}, "num_sub_batches must be"),
        ({"num_sub_batches": 2.5}, "num_sub_batches must be an integer, got 2.5"),
        ({"num_sub_batches": True}, "num_sub_batches must be an integer, got True"),
        ({"every": np.int64(0)}, "every must be at least 1, got 0"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be"),
        ({"max_grad_norm": math.nan}, "max_grad_norm must be"),
        ({"passes": "at once"}, "passes must be one of 'one-by-one', 'together', 'compiled'; got 'at once'"),
    ],
)
def test_refuses_arguments_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(FlatminimaError, match=message):
        FisherTraceRegularizer(mlp(), **options)


def test_numpys_numbers_are_numbers() -> None:
    options = {"num_sub_batches": np.int64(4), "every": np.int64(2), "alpha": np.float32(1e-4), "beta": np.int64(10)}
    regularizer = FisherTraceRegularizer(mlp(), **options)
    assert json.loads(json.dumps([regularizer.num_sub_batches, regularizer.every])) == [4, 2]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (mlp().requires_grad_(False), "no trainable parameters"),
        (nn.Flatten(), "no trainable parameters"),
        (mlp().bfloat16(), "parameter 0.weight is torch.bfloat16: keep trainable parameters in float32"),
        (nn.DataParallel(mlp()), "DataParallel is not supported"),
        (nn.Sequential(nn.DataParallel(mlp())), "DataParallel is not supported"),
    ],
)
def test_refuses_models(model: nn.Module, message: str) -> None:
    with pytest.raises(FlatminimaError, match=message):
        FisherTraceRegularizer(model)


@pytest.mark.parametrize(
    ("loss_fn", "inputs", "targets", "message"),
    [
        (F.cross_entropy, torch.zeros(0, 6), torch.zeros(0).long(), "the batch is empty"),
        (F.cross_entropy, torch.zeros(4, 6), torch.zeros(5).long(), "share their first dimension"),
        (
            lambda o, y: F.cross_entropy(o, y, reduction="none"),
            torch.zeros(8, 6),
            torch.zeros(8).long(),
            r"scalar.*\(1,\)",
        ),
        (lambda o, y: 1.0, torch.zeros(4, 6), torch.zeros(4).long(), "scalar tensor.*float"),
        (lambda o, y: o.detach().mean(), torch.zeros(4, 6), torch.zeros(4).long(), "does not depend on a trainable"),
    ],
)
def test_refuses_batches_and_losses(loss_fn: Any, inputs: Tensor, targets: Tensor, message: str) -> None:
    with pytest.raises(FlatminimaError, match=message):
        FisherTraceRegularizer(mlp()).backward(loss_fn, inputs, targets)


def test_batchnorm_on_single_samples_says_what_to_do() -> None:
    model = with_norm(nn.BatchNorm1d(5))
    with pytest.raises(FlatminimaError, match=r"sub-batch of 1 sample\(s\): lower num_sub_batches"):
        FisherTraceRegularizer(model, num_sub_batches=8).backward(
            F.cross_entropy, torch.randn(8, 6), torch.zeros(8).long()
        )


def test_non_finite_loss_is_an_error_and_leaves_gradients_alone() -> None:
    model, inputs, targets = make(CASES["mlp"])
    inputs[3, 2] = math.nan
    with pytest.raises(NonFiniteError, match="the loss is nan"):
        FisherTraceRegularizer(model).backward(F.cross_entropy, inputs, targets)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_micro_batches_of_an_abandoned_step_are_no_part_of_the_next() -> None:
    model, inputs, targets = make(CASES["mlp"])
    traces = []
    for abandoned in (False, True):
        regularizer = FisherTraceRegularizer(model)
        if abandoned:
            regularizer.backward(F.cross_entropy, 100 * inputs, targets, last=False)
            with pytest.raises(NonFiniteError):
                regularizer.backward(F.cross_entropy, math.nan * inputs, targets)
        model.zero_grad()
        torch.manual_seed(0)
        regularizer.backward(F.cross_entropy, inputs, targets)
        assert regularizer.last_step is not None
        traces.append(float(regularizer.last_step.trace))
    assert traces[0] == traces[1]


def test_non_finite_loss_of_the_moved_weights_alone_is_an_error() -> None:
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(model.weight, 1e-3)
    with pytest.raises(NonFiniteError, match=r"the penalty is nan though the loss is -6.9.*lower alpha"):
        FisherTraceRegularizer(model, alpha=1e-3).backward(
            lambda output, _: output.log().mean(), torch.ones(8, 1).double(), torch.zeros(8)
        )
    assert model.weight.grad is None
    assert model.weight.item() == 1e-3


def run_steps(regularizer: FisherTraceRegularizer, model: nn.Module, inputs: Any, targets: Any, steps: range) -> None:
    """Plain gradient descent; step t draws from seed t."""
    for t in steps:
        torch.manual_seed(t)
        model.zero_grad()
        regularizer.backward(F.cross_entropy, inputs, targets)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad


def test_every_evaluation_of_a_closure_counts_unless_the_loop_says_which_step_it_is() -> None:
    model, inputs, targets = make(CASES["mlp"])
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=4)
    regularizer = FisherTraceRegularizer(model, every=2, start_step=3)
    evaluations = 0

    def closure(step: int | None = None) -> Tensor:
        nonlocal evaluations
        optimizer.zero_grad()
        if step is not None:
            regularizer.step = step
        evaluations += 1
        return regularizer.backward(F.cross_entropy, inputs, targets)

    optimizer.step(closure)
    assert 1 < evaluations == regularizer.step
    optimizer.step(lambda: closure(step=7))
    assert regularizer.step == 8


def test_schedule_is_that_of_plain_and_penalized_steps() -> None:
    """From step 3 on, every second step, β doubled, rising over 4 steps: β · 2 · (1/4, 3/4, 1, ...) at 3, 5, 7, ..."""
    model, inputs, targets = make(CASES["mlp"])
    scheduled = FisherTraceRegularizer(
        model, alpha=0.05, beta=3.0, num_sub_batches=4, every=2, start_step=3, warmup_steps=4
    )
    betas = {3: 3 * 2 / 4, 5: 3 * 2 * 3 / 4, 7: 3 * 2, 9: 3 * 2}
    for t in range(11):
        reference = copy.deepcopy(model)
        assert scheduled.is_due == (t in betas)
        torch.manual_seed(t)
        model.zero_grad()
        scheduled.backward(F.cross_entropy, inputs, targets)
        if t in betas:
            torch.manual_seed(t)
            expected, _, _ = literal_algorithm_1(
                reference, F.cross_entropy, inputs, targets, alpha=0.05, beta=betas[t], num_sub_batches=4
            )
            assert scheduled.diagnostics()["beta"] == betas[t]
        else:
            F.cross_entropy(reference(inputs), targets).backward()
            expected = gradients_of(reference)
        assert_same_gradients(gradients_of(model), expected)
        assert scheduled.step == t + 1
        assert bool(scheduled.diagnostics()) == (t >= 3)


def test_steps_without_the_penalty_draw_no_random_numbers() -> None:
    model, inputs, targets = make(CASES["mlp"])
    regularizer = FisherTraceRegularizer(model, start_step=1)
    state = torch.get_rng_state()
    regularizer.backward(F.cross_entropy, inputs, targets)
    assert torch.equal(torch.get_rng_state(), state)


def test_resumed_run_goes_on_to_the_same_bits() -> None:
    def start() -> tuple[nn.Module, Any, Any, FisherTraceRegularizer]:
        model, inputs, targets = make(CASES["batchnorm"])
        return model, inputs, targets, FisherTraceRegularizer(
            model, alpha=0.05, beta=5.0, num_sub_batches=3, max_grad_norm=0.35, every=2, start_step=1, warmup_steps=6
        )  # fmt: skip

    model, inputs, targets, regularizer = start()
    run_steps(regularizer, model, inputs, targets, range(4))
    buffer = io.BytesIO()
    torch.save({"model": model.state_dict(), "regularizer": regularizer.state_dict()}, buffer)
    run_steps(regularizer, model, inputs, targets, range(4, 9))

    resumed, inputs, targets, resumed_regularizer = start()
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    resumed.load_state_dict(saved["model"])
    resumed_regularizer.load_state_dict(saved["regularizer"])
    run_steps(resumed_regularizer, resumed, inputs, targets, range(4, 9))

    assert_same_bits(snapshot(resumed), snapshot(model))
    assert resumed_regularizer.diagnostics() == regularizer.diagnostics()
    assert 0 < regularizer.diagnostics()["clip_rate"] < 1
    regularizer.load_state_dict({"step": 0, "clipped": 0})
    assert regularizer.diagnostics() == {}
    with pytest.raises(FlatminimaError, match=r"not a FisherTraceRegularizer's state_dict.*\['lr'\]"):
        regularizer.load_state_dict({"lr": 1})


def test_diagnostics_are_what_they_say() -> None:
    model, inputs, targets = make(CASES["mlp"])
    main = copy.deepcopy(model)
    F.cross_entropy(main(inputs), targets).backward()
    main_norm = math.sqrt(sum(float(p.grad.square().sum()) for p in main.parameters()))

    torch.manual_seed(SEED)
    regularizer = FisherTraceRegularizer(model, alpha=0.01, beta=7.0, num_sub_batches=4, every=3)
    assert regularizer.diagnostics() == {}
    regularizer.backward(F.cross_entropy, inputs, targets)
    penalty_norm = math.sqrt(sum(
        float((p.grad - q.grad).square().sum()) for p, q in zip(model.parameters(), main.parameters(), strict=True)
    ))  # fmt: skip

    found = regularizer.diagnostics()
    assert regularizer.last_step is not None
    assert found["fisher_trace"] == float(regularizer.last_step.trace)
    assert found["penalty"] == pytest.approx(0.01 * found["fisher_trace"], rel=0.02)
    assert found["beta"] == 21.0
    assert found["penalty_to_gradient"] == pytest.approx(penalty_norm / main_norm, rel=1e-9)
    assert found["grad_norm"] == pytest.approx(math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters())))
    assert found["clip_rate"] == 0.0
    assert json.loads(json.dumps(found)) == found
    loss = float(F.cross_entropy(main(inputs), targets).detach())
    rounding = (5 + 0.5 / loss) * torch.finfo(torch.float64).eps * math.sqrt(2 * found["fisher_trace"] / 4)
    assert found["rounding_share"] == pytest.approx(rounding * 21 / penalty_norm)


def smooth_mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 50), nn.Tanh(), nn.Linear(50, 50), nn.Tanh(), nn.Linear(50, 3))


def smooth_convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 256), nn.Unflatten(1, (1, 16, 16)), nn.Conv2d(1, 16, 3), nn.BatchNorm2d(16), nn.GELU(),
        nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3),
    )  # fmt: skip


@pytest.mark.parametrize("alpha", [1e-5, 1e-4, 1e-3])
@pytest.mark.parametrize("build", [smooth_mlp, smooth_convolutional])
def test_rounding_share_foretells_the_error_of_float32(build: Callable[[], nn.Module], alpha: float) -> None:
    """To an order of magnitude, on networks at both ends of what was measured."""
    model, inputs, targets = make(Case(build), samples=64)
    penalties = {}
    for dtype in (torch.float64, torch.float32):
        model.to(dtype)
        torch.manual_seed(SEED)
        regularizer = FisherTraceRegularizer(model, alpha=alpha, num_sub_batches=4, max_grad_norm=1.0)
        penalty = regularizer.penalize(lambda b: F.cross_entropy(model(b[0]), b[1]), (inputs.to(dtype), targets))
        assert penalty is not None
        penalties[dtype] = [g.double() for g in penalty.gradient]
        regularizer.backward(F.cross_entropy, inputs.to(dtype), targets)
    norm = math.sqrt(sum(float(g.square().sum()) for g in penalties[torch.float64]))
    error = math.sqrt(
        sum(
            float((a - b).square().sum())
            for a, b in zip(penalties[torch.float32], penalties[torch.float64], strict=True)
        )
    )
    assert error / norm / 10 < regularizer.diagnostics()["rounding_share"] < error / norm * 10


@pytest.mark.parametrize("logits", [torch.float32, torch.float64])
@pytest.mark.parametrize("loss", ["cross entropy", "binary"])
@pytest.mark.parametrize("steps", [100, 400])
def test_the_error_of_float32_is_foretold_where_a_network_fits(loss: str, steps: int, logits: torch.dtype) -> None:
    """Rounding of p − y, of nearly 1 and 1, is that of a cross entropy in float32 alone; to an order of magnitude."""
    torch.manual_seed(SEED)
    model = nn.Sequential(nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 5))
    inputs, labels = torch.randn(64, 20), torch.randint(5, (64,))
    targets = labels if loss == "cross entropy" else F.one_hot(labels, 5).float()
    function = {
        "cross entropy": F.cross_entropy,
        "binary": lambda o, t: F.binary_cross_entropy_with_logits(o, t.to(o)),
    }[loss]
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        function(model(inputs), targets).backward()
        optimizer.step()

    def gradient(kind: torch.dtype, cast: torch.dtype) -> tuple[Tensor, float]:
        copied = copy.deepcopy(model).to(kind)
        torch.manual_seed(SEED)
        regularizer = FisherTraceRegularizer(copied, alpha=1e-3, num_sub_batches=4)
        penalty = regularizer.penalize(lambda b: function(copied(b[0]).to(cast), b[1]), (inputs.to(kind), targets))
        assert penalty is not None
        return torch.cat([g.double().flatten() for g in penalty.gradient]), regularizer.diagnostics()["rounding_share"]

    right, _ = gradient(torch.float64, torch.float64)
    found, share = gradient(torch.float32, logits)
    error = float((found - right).norm() / right.norm())
    assert min(error, 1.0) / 10 < share < error * 10


def test_the_limit_has_no_rounding_share() -> None:
    model, inputs, targets = make(CASES["mlp"])
    regularizer = FisherTraceRegularizer(model, estimator="hvp")
    regularizer.backward(F.cross_entropy, inputs, targets)
    assert regularizer.diagnostics()["rounding_share"] == 0.0


def test_clip_rate_counts_all_steps() -> None:
    model, inputs, targets = make(CASES["mlp"])
    probe = copy.deepcopy(model)
    regularizer = FisherTraceRegularizer(probe)
    regularizer.backward(F.cross_entropy, inputs, targets)
    norm = regularizer.diagnostics()["grad_norm"]

    regularizer = FisherTraceRegularizer(model, max_grad_norm=norm * 1.5)
    for factor in (1, 2, 1, 3):
        model.zero_grad()
        torch.manual_seed(SEED)
        regularizer.backward(lambda o, y, f=factor: f * F.cross_entropy(o, y), inputs, targets)
    assert regularizer.diagnostics()["clip_rate"] == 0.5


def test_closure_over_the_model() -> None:
    """The form for losses that call the model themselves; batches arrive as plain dicts."""
    expected = gradients_after(CASES["mlp"], lambda r, x, y: r.backward(F.cross_entropy, x, y))

    def by_closure(regularizer: FisherTraceRegularizer, x: Tensor, y: Tensor) -> Tensor:
        return regularizer.backward_closure(
            lambda batch: F.cross_entropy(regularizer.model(batch["x"]), batch["labels"]), {"x": x, "labels": y}
        )

    assert_same_gradients(gradients_after(CASES["mlp"], by_closure), expected)


def gradients_after(case: Case, act: Callable[[FisherTraceRegularizer, Any, Any], Any], **options: Any) -> Any:
    model, inputs, targets = make(case)
    torch.manual_seed(SEED)
    regularizer = FisherTraceRegularizer(model, **{"alpha": 0.05, "beta": 3.0, "num_sub_batches": 4, **options})
    act(regularizer, inputs, targets)
    return gradients_of(model)


@pytest.mark.parametrize("main_gradient", ["whole-batch", "sub-batches"])
@pytest.mark.parametrize("max_grad_norm", [None, 0.1])
def test_micro_batches_are_the_sub_batches(main_gradient: Any, max_grad_norm: float | None) -> None:
    """With M = 1, K micro-batches in order are Algorithm 1 with those K sub-batches, clipped once."""
    model, inputs, targets = make(CASES["mlp"], samples=24)
    expected, penalty, trace = literal_in_order(model, inputs, targets, parts=3, alpha=0.05, beta=3.0)
    norm = math.sqrt(sum(float(g.square().sum()) for g in expected.values()))
    factor = 1.0 if max_grad_norm is None else max_grad_norm / norm

    regularizer = FisherTraceRegularizer(
        model, alpha=0.05, beta=3.0, num_sub_batches=1, main_gradient=main_gradient, max_grad_norm=max_grad_norm
    )
    losses = []
    for k, (x, y) in enumerate(zip(inputs.split(8), targets.split(8), strict=True)):
        losses.append(regularizer.backward(F.cross_entropy, x, y, weight=1 / 3, last=k == 2))
        assert regularizer.step == (k == 2)

    for name, gradient in gradients_of(model).items():
        torch.testing.assert_close(gradient, factor * expected[name], rtol=1e-5, atol=1e-12)
    torch.testing.assert_close(sum(losses) / 3, F.cross_entropy(model(inputs), targets).detach())
    assert regularizer.last_step is not None
    torch.testing.assert_close(regularizer.last_step.trace, trace)
    torch.testing.assert_close(regularizer.last_step.penalty, penalty)
    assert float(regularizer.last_step.grad_norm) == pytest.approx(norm)


def literal_in_order(model: nn.Module, x: Tensor, y: Tensor, *, parts: int, alpha: float, beta: float) -> Any:
    """As literal_algorithm_1, with sub-batches cut in order."""
    order = torch.arange(len(x))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randperm", lambda n: order[:n])
        return literal_algorithm_1(model, F.cross_entropy, x, y, alpha=alpha, beta=beta, num_sub_batches=parts)


@pytest.mark.parametrize("main_gradient", ["whole-batch", "sub-batches"])
def test_gradient_scaler_scales_everything_and_clips_as_if_it_did_not(main_gradient: Any) -> None:
    options: dict[str, Any] = {"main_gradient": main_gradient, "max_grad_norm": 0.1}
    plain = gradients_after(CASES["mlp"], lambda r, x, y: r.backward(F.cross_entropy, x, y), **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def scaled_step(regularizer: FisherTraceRegularizer, x: Tensor, y: Tensor) -> None:
        loss = regularizer.backward(F.cross_entropy, x, y, scaler=scaler)
        torch.testing.assert_close(loss, F.cross_entropy(regularizer.model(x), y).detach())
        assert regularizer.last_step is not None
        assert float(regularizer.last_step.grad_norm) > 0.1
        assert regularizer.diagnostics()["clip_rate"] == 1.0

    scaled = gradients_after(CASES["mlp"], scaled_step, **options)
    assert_same_gradients({name: g / 1024 for name, g in scaled.items()}, plain)


def test_fp16_loop_with_a_gradient_scaler_steps_and_skips_overflows() -> None:
    torch.manual_seed(SEED)
    model, inputs, targets = mlp(), torch.randn(32, 6), torch.randint(3, (32,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**15, growth_interval=1000)
    regularizer = FisherTraceRegularizer(model, num_sub_batches=4, max_grad_norm=1.0)

    def step(overflow: bool) -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            regularizer.backward(F.cross_entropy, inputs, targets, scaler=scaler)
        if overflow:
            next(model.parameters()).grad[0, 0] = math.inf
        scaler.step(optimizer)
        scaler.update()

    before = snapshot(model)
    step(overflow=False)
    after = snapshot(model)
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert all(torch.isfinite(tensor).all() for tensor in after.values())
    step(overflow=True)
    assert_same_bits(snapshot(model), after)
    assert scaler.get_scale() == 2.0**14


def test_disabled_scaler_changes_nothing() -> None:
    plain = gradients_after(CASES["mlp"], lambda r, x, y: r.backward(F.cross_entropy, x, y))
    disabled = torch.amp.GradScaler("cpu", enabled=False)
    scaled = gradients_after(CASES["mlp"], lambda r, x, y: r.backward(F.cross_entropy, x, y, scaler=disabled))
    assert_same_gradients(scaled, plain)


def test_refuses_a_weight_that_is_none() -> None:
    model, inputs, targets = make(CASES["mlp"])
    with pytest.raises(FlatminimaError, match="weight must be a positive number, got 0"):
        FisherTraceRegularizer(model).backward(F.cross_entropy, inputs, targets, weight=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("main_gradient", ["whole-batch", "sub-batches"])
@pytest.mark.parametrize("estimator", ["finite-difference", "hvp"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::flatminima.errors.AccumulationWarning")
def test_compiled_model_gives_the_same_gradient(estimator: Any, main_gradient: Any, backend: str) -> None:
    """Weights and buffers that move between passes are inputs of the compiled graph, not constants in it."""
    options: dict[str, Any] = {"num_sub_batches": 4, "estimator": estimator, "main_gradient": main_gradient}
    model, inputs, targets = make(CASES["batchnorm"])
    eager = copy.deepcopy(model)
    for network in (eager, torch.compile(model, backend=backend)):
        torch.manual_seed(SEED)
        regularizer = FisherTraceRegularizer(network, alpha=0.05, beta=3.0, **options)
        for _ in range(2):
            regularizer.backward(F.cross_entropy, inputs, targets)
    assert_same_gradients(gradients_of(model), gradients_of(eager))
    for name, buffer in eager.named_buffers():
        torch.testing.assert_close(model.get_buffer(name), buffer)


@pytest.mark.parametrize("main_gradient", ["whole-batch", "sub-batches"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::flatminima.errors.AccumulationWarning")
def test_only_the_first_step_compiles(main_gradient: Any) -> None:
    backend = CountingBackend()
    model, inputs, targets = make(CASES["batchnorm"])
    compiled = torch.compile(model, backend=backend)
    regularizer = FisherTraceRegularizer(compiled, num_sub_batches=4, main_gradient=main_gradient)
    compiled_by_step = []
    for _ in range(4):
        regularizer.backward(F.cross_entropy, inputs, targets)
        compiled_by_step.append(backend.graphs)
    assert compiled_by_step[0] > 0
    assert compiled_by_step == compiled_by_step[:1] * 4
