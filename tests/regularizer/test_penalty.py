from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from flatminima.errors import FlatminimaError
from flatminima.regularizer.regularizer import FisherTraceRegularizer
from support.regularizer_cases import (
    CASES,
    SEED,
    Case,
    HandWrittenBatchNorm,
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


def literal_hvp(
    model: nn.Module, loss_fn: Any, inputs: Any, targets: Any, *, alpha: float, num_sub_batches: int
) -> tuple[dict[str, Tensor], Tensor]:
    """α · mean_i H_i g_i by autograd through ½‖g_i‖², and mean ‖g_i‖²; on a copy of the model."""
    model = copy.deepcopy(model)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    samples = len(next(t for t in [inputs, *(inputs.values() if isinstance(inputs, dict) else inputs)]
                       if isinstance(t, Tensor)))  # fmt: skip
    splits = torch.randperm(samples).tensor_split(min(num_sub_batches, samples))
    products, trace = {name: torch.zeros_like(p) for name, p in parameters.items()}, torch.zeros(()).double()
    for indices in splits:
        x, y = select(inputs, indices), select(targets, indices)
        args, kwargs = ((), x) if isinstance(x, dict) else (x if isinstance(x, tuple) else (x,), {})
        loss = loss_fn(functional_call(copy.deepcopy(model), parameters, args, kwargs), y)
        gradients = torch.autograd.grad(loss, parameters.values(), create_graph=True, allow_unused=True)
        squares = sum(g.to_dense().square().sum() for g in gradients if g is not None)
        rows = torch.autograd.grad(squares / 2, parameters.values(), allow_unused=True)
        for name, row in zip(parameters, rows, strict=True):
            products[name] += 0 if row is None else alpha / len(splits) * row.to_dense()
        trace += squares.detach() / len(splits)
    return products, trace


def penalty_gradient(model: nn.Module, inputs: Any, targets: Any, loss_fn: Any = F.cross_entropy, **options: Any):
    """∇R_α alone, as the regularizer computes it."""
    torch.manual_seed(SEED)
    regularizer = FisherTraceRegularizer(model, **options)
    penalty = regularizer.penalize(lambda batch: loss_fn(model(batch[0]), batch[1]), (inputs, targets))
    assert penalty is not None
    return penalty


def relative_error(actual: list[Tensor], expected: list[Tensor]) -> float:
    difference = sum((a.double() - e.double()).square().sum() for a, e in zip(actual, expected, strict=True))
    return float((difference / sum(e.double().square().sum() for e in expected)).sqrt())


@by_case
@pytest.mark.parametrize("num_sub_batches", [1, 5])
def test_hvp_is_the_exact_hessian_vector_product(case: Case, num_sub_batches: int) -> None:
    model, inputs, targets = make(case)
    torch.manual_seed(SEED)
    products, trace = literal_hvp(
        model, case.loss_fn, inputs, targets, alpha=0.05, num_sub_batches=num_sub_batches
    )  # fmt: skip
    before, own_buffers = snapshot(model), [id(buffer) for buffer in model.buffers()]
    plain = copy.deepcopy(model)
    FisherTraceRegularizer(plain, beta=0.0).backward(case.loss_fn, inputs, targets)
    expected = {name: None if main is None else main.to_dense() + 3.0 * products[name]
                for name, main in gradients_of(plain).items()}  # fmt: skip

    torch.manual_seed(SEED)
    regularizer = FisherTraceRegularizer(
        model, alpha=0.05, beta=3.0, num_sub_batches=num_sub_batches, estimator="hvp"
    )  # fmt: skip
    regularizer.backward(case.loss_fn, inputs, targets)

    assert_same_gradients(gradients_of(model), expected)
    assert regularizer.last_step is not None
    torch.testing.assert_close(regularizer.last_step.trace, trace, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(regularizer.last_step.penalty, 0.05 * trace, rtol=1e-9, atol=1e-12)
    assert_same_bits(snapshot(model), snapshot(plain))
    assert [id(buffer) for buffer in model.buffers()] == own_buffers
    assert before.keys() == snapshot(model).keys()


@pytest.mark.parametrize(
    ("estimator", "alpha", "dtype", "tolerance"),
    [
        ("hvp", 1e-4, torch.float64, 1e-12),
        ("hvp", 1e-4, torch.float32, 1e-5),
        ("finite-difference", 1e-4, torch.float64, 1e-3),
        ("finite-difference", 1e-6, torch.float64, 1e-5),
        ("finite-difference", 1e-2, torch.float32, 0.1),
        ("finite-difference", 1e-4, torch.float32, 0.1),
    ],
)
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "batchnorm"])
def test_both_estimators_agree_with_double_backward_on_smooth_networks(
    estimator: Any, alpha: float, dtype: torch.dtype, tolerance: float, norm: bool
) -> None:
    """In units of α H g. The finite difference errs by O(α) from truncation and O(ε/α) from rounding."""
    model, inputs, targets = make(Case(lambda: nn.Sequential(
        nn.Linear(6, 20), *([nn.BatchNorm1d(20)] if norm else []), nn.Tanh(),
        nn.Linear(20, 20), nn.GELU(), nn.Linear(20, 3),
    )), samples=64)  # fmt: skip
    torch.manual_seed(SEED)
    products, _ = literal_hvp(model, F.cross_entropy, inputs, targets, alpha=alpha, num_sub_batches=4)
    penalty = penalty_gradient(
        model.to(dtype), inputs.to(dtype), targets, alpha=alpha, num_sub_batches=4, estimator=estimator
    )
    assert relative_error(penalty.gradient, list(products.values())) < tolerance


def test_relu_leaves_a_gap_between_the_estimators_that_smooth_networks_do_not_have() -> None:
    """A step across kinks changes gradients by what no Hessian knows of."""
    gaps = {}
    for activation in (nn.ReLU, nn.Softplus):
        model, inputs, targets = make(
            Case(lambda a=activation: nn.Sequential(
                nn.Linear(6, 100), a(), nn.Linear(100, 100), a(), nn.Linear(100, 100), a(), nn.Linear(100, 3)
            )), samples=64,
        )  # fmt: skip
        options: dict[str, Any] = {"alpha": 1e-2, "num_sub_batches": 4}
        exact = penalty_gradient(model, inputs, targets, estimator="hvp", **options)
        difference = penalty_gradient(model, inputs, targets, estimator="finite-difference", **options)
        gaps[activation] = relative_error(difference.gradient, exact.gradient)
    assert gaps[nn.Softplus] < 0.05
    assert gaps[nn.ReLU] > 1


def test_hvp_differentiates_attention_twice() -> None:
    """The fused attention kernels have no second derivative; the plain one does."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.head = nn.Linear(2, 12), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x.view(-1, 1, 3, 2)).chunk(3, dim=-1)
            return self.head(F.scaled_dot_product_attention(q, k, v).mean((1, 2)))

    model, inputs, targets = make(Case(Attention))
    options: dict[str, Any] = {"alpha": 1e-6, "num_sub_batches": 4}
    exact = penalty_gradient(model, inputs, targets, estimator="hvp", **options)
    difference = penalty_gradient(model, inputs, targets, **options)
    assert relative_error(difference.gradient, exact.gradient) < 1e-4


def test_hvp_draws_the_same_dropout_masks() -> None:
    model, inputs, targets = make(
        Case(lambda: nn.Sequential(nn.Linear(6, 50), nn.Tanh(), nn.Dropout(0.5), nn.Linear(50, 3)))
    )
    options: dict[str, Any] = {"alpha": 1e-6, "num_sub_batches": 4}
    exact = penalty_gradient(model, inputs, targets, estimator="hvp", **options)
    state = torch.get_rng_state()
    difference = penalty_gradient(model, inputs, targets, **options)
    assert relative_error(difference.gradient, exact.gradient) < 1e-4
    assert torch.equal(torch.get_rng_state(), state)


def test_hvp_of_a_loss_linear_in_the_weights_is_zero() -> None:
    model = nn.Linear(6, 1)
    penalty = penalty_gradient(model, torch.randn(8, 6), torch.zeros(8), lambda o, _: o.mean(), estimator="hvp")
    assert all(not gradient.any() for gradient in penalty.gradient)
    assert penalty.trace > 0


@pytest.mark.parametrize("last", [False, True])
def test_hvp_says_when_a_second_derivative_is_missing(last: bool) -> None:
    """Also where the loss ends with it: no gradient with a history comes to it by itself then."""

    class OnceDifferentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x.square().mean() if last else x.square()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            (x,) = ctx.saved_tensors
            return 2 * x * gradient / (x.numel() if last else 1)

    with pytest.raises(FlatminimaError, match=r"second derivatives.*choose estimator='finite-difference'"):
        penalty_gradient(
            mlp(),
            torch.randn(8, 6),
            torch.zeros(8),
            lambda o, _: OnceDifferentiable.apply(o) if last else OnceDifferentiable.apply(o).square().mean(),
            estimator="hvp",
        )


def test_hvp_refuses_the_second_derivatives_that_pytorch_gets_wrong() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 5)), nn.Tanh(), nn.Linear(5, 3))
    with pytest.raises(FlatminimaError, match=r"weight normalization is wrong.*choose estimator='finite-difference'"):
        penalty_gradient(model, torch.randn(8, 6), torch.arange(8) % 3, F.cross_entropy, estimator="hvp")


@pytest.mark.parametrize("estimator", ["finite-difference", "hvp"])
def test_only_the_chosen_parameters_move_and_count(estimator: Any) -> None:
    """R of the chosen block P: L(w) − L(w − α P g); its gradient reaches every trainable parameter."""
    model, inputs, targets = make(CASES["batchnorm"])
    alpha = 1e-5 if estimator == "finite-difference" else 0.1
    penalty = penalty_gradient(
        model, inputs, targets, alpha=alpha, num_sub_batches=1, estimator=estimator,
        parameters=[p for p in model.parameters() if p.dim() > 1],
    )  # fmt: skip

    copied = copy.deepcopy(model)
    parameters = list(copied.parameters())
    loss = F.cross_entropy(copied(inputs), targets)
    gradients = torch.autograd.grad(loss, parameters, create_graph=True)
    squares = sum(g.square().sum() for g in gradients if g.dim() > 1)
    expected = torch.autograd.grad(squares / 2, parameters)
    torch.testing.assert_close(penalty.trace, squares.detach(), rtol=1e-9, atol=0)
    assert relative_error([g / alpha for g in penalty.gradient], list(expected)) < 1e-3
    assert all(gradient.any() for name, gradient in zip(dict(model.named_parameters()), penalty.gradient, strict=True)
               if name != "0.bias")  # fmt: skip


def test_refuses_parameters_of_another_model_and_frozen_ones() -> None:
    model = mlp()
    with pytest.raises(FlatminimaError, match="parameters must be those of the model"):
        FisherTraceRegularizer(model, parameters=mlp().parameters())
    with pytest.raises(FlatminimaError, match="none of the penalized parameters is trainable"):
        FisherTraceRegularizer(model, parameters=[])
    model[0].requires_grad_(False)
    with pytest.raises(FlatminimaError, match="none of the penalized parameters is trainable"):
        FisherTraceRegularizer(model, parameters=model[0].parameters())


WITHOUT_STATISTICS = {
    name: case
    for name, case in CASES.items()
    if name in ("batchnorm-eval", "instancenorm") or ("norm" not in name and name != "not-a-mean-over-samples")
}


@pytest.mark.parametrize("case", WITHOUT_STATISTICS.values(), ids=WITHOUT_STATISTICS)
@pytest.mark.parametrize("num_sub_batches", [1, 5])
def test_mean_of_sub_batches_is_the_whole_batch_gradient_without_batch_statistics(
    case: Case, num_sub_batches: int
) -> None:
    """24 samples in 5 sub-batches: they weigh by their sizes in the main gradient, equally in the penalty."""
    results = []
    for main_gradient in ("whole-batch", "sub-batches"):
        model, inputs, targets = make(case)
        torch.manual_seed(SEED)
        regularizer = FisherTraceRegularizer(
            model, alpha=0.05, beta=3.0, num_sub_batches=num_sub_batches, main_gradient=main_gradient
        )
        loss = regularizer.backward(case.loss_fn, inputs, targets)
        results.append((gradients_of(model), loss, snapshot(model)))
    (expected, loss, buffers), (actual, actual_loss, actual_buffers) = results
    torch.testing.assert_close(actual_loss, loss, rtol=1e-12, atol=1e-12)
    assert_same_gradients(actual, expected)
    for name, tensor in buffers.items():
        torch.testing.assert_close(actual_buffers[name], tensor, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("estimator", ["finite-difference", "hvp"])
def test_ghost_statistics_update_the_running_ones_once_with_their_mean(momentum: float | None, estimator: Any) -> None:
    model, inputs, targets = make(Case(lambda: with_norm(nn.BatchNorm1d(5, momentum=momentum))))
    norm = model[1]
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    norm.num_batches_tracked.fill_(3)
    torch.manual_seed(SEED)
    hidden = [model[0](inputs[indices]).detach() for indices in torch.randperm(24).tensor_split(4)]
    m = 1 / 4 if momentum is None else momentum
    mean = (1 - m) * norm.running_mean + m * torch.stack([h.mean(0) for h in hidden]).mean(0)
    variance = (1 - m) * norm.running_var + m * torch.stack([h.var(0) for h in hidden]).mean(0)

    torch.manual_seed(SEED)
    regularizer = FisherTraceRegularizer(model, num_sub_batches=4, main_gradient="sub-batches", estimator=estimator)
    own = [id(buffer) for buffer in model.buffers()]
    regularizer.backward(F.cross_entropy, inputs, targets)

    torch.testing.assert_close(norm.running_mean, mean)
    torch.testing.assert_close(norm.running_var, variance)
    assert norm.num_batches_tracked == 4
    assert [id(buffer) for buffer in model.buffers()] == own


def literal_penalty(
    model: nn.Module, normalize: Callable[[nn.Module], nn.Module], inputs: Tensor, targets: Tensor
) -> dict[str, Tensor]:
    """∇R by one backward pass through R, with the model's BatchNorm layers replaced by ``normalize(layer)``."""
    model = copy.deepcopy(model)
    model[1] = normalize(model[1])
    parameters = dict(model.named_parameters())
    penalty = torch.zeros(()).double()
    for indices in torch.randperm(len(inputs)).tensor_split(4):
        x, y = inputs[indices], targets[indices]
        here = F.cross_entropy(functional_call(model, parameters, (x,)), y)
        gradients = torch.autograd.grad(here, list(parameters.values()), retain_graph=True)
        there = {name: p - 0.05 * g for (name, p), g in zip(parameters.items(), gradients, strict=True)}
        penalty = penalty + (here - F.cross_entropy(functional_call(model, there, (x,)), y)) / 4
    return dict(zip(parameters, torch.autograd.grad(penalty, list(parameters.values())), strict=True))


class FixedNorm(nn.Module):
    """BatchNorm with given constants."""

    def __init__(self, layer: nn.BatchNorm1d, mean: Tensor, variance: Tensor) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = layer.weight, layer.bias, layer.eps
        self.mean, self.variance = mean, variance

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / (self.variance + self.eps).sqrt() * self.weight + self.bias


@pytest.mark.parametrize(
    ("policy", "track"),
    [("sub-batch", True), ("sub-batch", False), ("whole-batch", True), ("whole-batch", False), ("running", True)],
)
@pytest.mark.parametrize("estimator", ["finite-difference", "hvp"])
def test_batch_statistics_of_penalty_passes(policy: Any, estimator: Any, track: bool) -> None:
    model, inputs, targets = make(Case(lambda: with_norm(nn.BatchNorm1d(5, track_running_stats=track))))
    if track:
        model[1].running_mean.normal_()
        model[1].running_var.uniform_(0.5, 2)
    hidden = model[0](inputs).detach()
    constants = {
        "whole-batch": (hidden.mean(0), hidden.var(0, correction=0)),
        "running": (copy.deepcopy(model[1].running_mean), copy.deepcopy(model[1].running_var)),
    }
    torch.manual_seed(SEED)
    expected = literal_penalty(
        model, lambda layer: layer if policy == "sub-batch" else FixedNorm(layer, *constants[policy]), inputs, targets
    )
    before = snapshot(model)
    alpha = 0.05 if estimator == "finite-difference" else 1e-7
    penalty = penalty_gradient(
        model, inputs, targets, alpha=alpha, num_sub_batches=4, batch_statistics=policy, estimator=estimator
    )
    if estimator == "finite-difference":
        assert relative_error(penalty.gradient, list(expected.values())) < 1e-9
    else:
        small = penalty_gradient(model, inputs, targets, alpha=1e-7, num_sub_batches=4, batch_statistics=policy)
        assert relative_error(small.gradient, penalty.gradient) < 1e-5
    assert_same_bits(snapshot(model), before)
    assert model[1].training


@by_case
@pytest.mark.parametrize("policy", ["sub-batch", "whole-batch", "running"])
def test_penalty_alone_leaves_no_trace(case: Case, policy: Any) -> None:
    model, inputs, targets = make(case)
    before, own = snapshot(model), [id(buffer) for buffer in model.buffers()]
    modes = [module.training for module in model.modules()]
    regularizer = FisherTraceRegularizer(model, num_sub_batches=4, batch_statistics=policy)
    forward = {dict: lambda x: model(**x), tuple: lambda x: model(*x)}.get(type(inputs), model)
    penalty = regularizer.penalize(lambda batch: case.loss_fn(forward(batch[0]), batch[1]), (inputs, targets))
    assert penalty is not None
    assert penalty.trace > 0
    assert_same_bits(snapshot(model), before)
    assert [id(buffer) for buffer in model.buffers()] == own
    assert [module.training for module in model.modules()] == modes
    assert all(not module._forward_pre_hooks and "forward" not in module.__dict__ for module in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert regularizer.step == 0


def test_batch_statistics_that_do_not_exist_are_refused() -> None:
    x, y = torch.randn(8, 6), torch.zeros(8).long()
    untracked = with_norm(nn.BatchNorm1d(5, track_running_stats=False))
    with pytest.raises(FlatminimaError, match="BatchNorm layer 1 keeps no running statistics"):
        penalty_gradient(untracked, x, y, batch_statistics="running", num_sub_batches=2)

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.head = nn.BatchNorm1d(6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm(self.norm(x)))

    model = Twice()
    with pytest.raises(FlatminimaError, match="BatchNorm layer norm runs twice"):
        penalty_gradient(model, x, y, batch_statistics="whole-batch", num_sub_batches=2)
    assert model.norm.training
    assert not model.norm._forward_pre_hooks
    with pytest.raises(FlatminimaError, match="running statistics would never be updated"):
        FisherTraceRegularizer(model, main_gradient="sub-batches", batch_statistics="running")


def test_single_samples_are_fine_with_statistics_from_elsewhere() -> None:
    """The remedy for sub-batches of one sample, where BatchNorm has no statistics of its own."""
    for policy in ("whole-batch", "running"):
        penalty = penalty_gradient(
            with_norm(nn.BatchNorm1d(5)), torch.randn(8, 6), torch.zeros(8).long(), batch_statistics=policy
        )
        assert penalty.num_sub_batches == 8
        assert penalty.trace > 0


def test_normalization_layers_of_unknown_classes_keep_sub_batch_statistics() -> None:
    model, inputs, targets = make(Case(lambda: with_norm(HandWrittenBatchNorm())))
    by_policy = [
        penalty_gradient(model, inputs, targets, num_sub_batches=4, batch_statistics=policy).trace
        for policy in ("sub-batch", "running")
    ]
    assert torch.equal(*by_policy)


class MeanOverPositions(nn.Module):
    """BatchNorm before a mean over positions, whose gradient is an expanded view."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.out = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.Linear(16, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(self.conv(x)).flatten(2).transpose(1, 2).mean(1))


@pytest.mark.parametrize("estimator", ["finite-difference", "hvp"])
def test_sub_batches_of_one_sample_have_right_gradients_through_running_statistics(estimator: Any) -> None:
    """PyTorch's own backward pass of BatchNorm is wrong for one sample and such a gradient (2.13, on a CPU)."""
    torch.manual_seed(0)
    model = MeanOverPositions().double()
    model.norm.running_mean.normal_()
    model.norm.running_var.uniform_(0.5, 2)
    model.train()
    x, y = torch.randn(4, 3, 6, 6, dtype=torch.float64), torch.arange(4)
    squares = []
    model.eval()
    for i in range(4):
        twice = model(x[[i, i]])  # two samples are right
        loss = torch.nn.functional.cross_entropy(twice[:1], y[i : i + 1])
        squares.append(sum(g.square().sum().item() for g in torch.autograd.grad(loss, list(model.parameters()))))
    model.train()
    regularizer = FisherTraceRegularizer(model, num_sub_batches=4, batch_statistics="running", estimator=estimator)
    regularizer.backward(nn.CrossEntropyLoss(), x, y)
    assert regularizer.last_step is not None
    assert regularizer.last_step.trace.item() == pytest.approx(sum(squares) / 4, rel=1e-9)
