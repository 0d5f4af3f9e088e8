from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import jacrev

import flatminima as fm
from flatminima.errors import FlatminimaError, FlatminimaWarning, UndefinedMeasureError
from flatminima.measures import Characterization, input_jacobian, input_jacobian_norms


def network(classes: int = 4) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(48, classes)
    ).double()


def explicitly(model: nn.Module, x: Tensor) -> Tensor:
    jacobians = [jacrev(lambda z: model(z[None])[0].softmax(0))(sample).flatten(1) for sample in x]
    return torch.stack([torch.linalg.matrix_norm(jacobian, 2) ** 2 for jacobian in jacobians])


@pytest.mark.parametrize("classes", [2, 4, 40, 41, 60])
@pytest.mark.parametrize("sharpness", [0.0, 1.0, 10.0])
def test_equals_spectral_norm_of_the_explicit_jacobian(sharpness: float, classes: int) -> None:
    model, x = network(classes).eval(), torch.randn(5, 2, 6, 6, dtype=torch.float64)
    model[-1].weight.data *= sharpness
    torch.testing.assert_close(input_jacobian_norms(model, x), explicitly(model, x), rtol=1e-8, atol=1e-30)


@pytest.mark.parametrize(("classes", "sharpness"), [(4, 60), (60, 300)])
def test_float32_agrees_with_float64_where_p_is_one_hot(classes: int, sharpness: float) -> None:
    """p_y = 1 in float32 here: S formed by 1 − p_y would be exactly zero."""
    model, x = network(classes), torch.randn(5, 2, 6, 6, dtype=torch.float64)
    model[-1].weight.data *= sharpness
    expected = input_jacobian_norms(model, x)
    assert 0 < expected.min() < 1e-20
    torch.testing.assert_close(input_jacobian_norms(model.float(), x.float()), expected, rtol=2e-3, atol=0)


@pytest.mark.parametrize("classes", [4, 60])
def test_is_zero_where_all_other_probabilities_vanish(classes: int) -> None:
    model, x = nn.Linear(7, classes).double(), torch.randn(3, 7, dtype=torch.float64)
    with torch.no_grad():
        model.bias[1] = 1e4
    assert input_jacobian_norms(model, x).tolist() == [0] * 3


def passes_back(model: nn.Module, x: Tensor) -> tuple[Tensor, int]:
    """The norms, and how many backward passes from the logits they took."""
    passes = []
    hook = model.register_forward_hook(lambda module, args, logits: logits.register_hook(passes.append) and None)
    norms = input_jacobian_norms(model, x)
    hook.remove()
    return norms, len(passes)


@settings(max_examples=40, deadline=None)
@given(
    classes=st.integers(41, 80),
    size=st.integers(1, 90),
    decay=st.floats(0, 3),
    sharpness=st.floats(0, 30),
    seed=st.integers(0, 10**6),
)
def test_many_classes_equal_the_largest_singular_value(
    classes: int, size: int, decay: float, sharpness: float, seed: int
) -> None:
    """Of a linear network, whose Jacobian is S W, with singular values of W from equal to steeply falling."""
    generator = torch.Generator().manual_seed(seed)
    model, x = nn.Linear(size, classes).double(), torch.randn(2, size, dtype=torch.float64, generator=generator)
    weight = torch.randn(classes, size, dtype=torch.float64, generator=generator)
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    falling = torch.arange(1, len(values) + 1) ** -decay
    with torch.no_grad():
        model.weight.copy_(sharpness * left @ torch.diag(falling.double()) @ right)
    found, expected = input_jacobian_norms(model, x).sqrt(), explicitly(model, x).sqrt()
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-13)  # where p is one-hot the expected one is rounded


@pytest.mark.parametrize("sharpness", [1.0, 10.0])
def test_many_classes_take_few_passes(sharpness: float) -> None:
    model, x = network(1000).eval(), torch.randn(3, 2, 6, 6, dtype=torch.float64)
    model[-1].weight.data *= sharpness
    norms, passes = passes_back(model, x)
    assert passes < 100
    torch.testing.assert_close(norms, explicitly(model, x), rtol=1e-8, atol=1e-30)


class Tanh(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.tanh()


class Once(Tanh):
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient * (1 - x.tanh() ** 2)


class Wrong(Tanh):
    """A backward pass that hides a part of what it does from a second one."""

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        slope = 1 - x.tanh() ** 2
        return gradient * slope / 2 + (gradient * slope / 2).detach()


class Detached(Wrong):
    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return super(Detached, Detached).backward(ctx, gradient).detach()


class Applied(nn.Module):
    def __init__(self, function: type[torch.autograd.Function]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.function, self.into, self.out = function, nn.Linear(5, 16).double(), nn.Linear(16, 50).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.function.apply(self.into(x)))


@pytest.mark.parametrize("function", [Once, Wrong, Detached])
def test_without_right_second_derivatives_every_direction_is_taken(function: type[torch.autograd.Function]) -> None:
    model, x = Applied(function), torch.randn(3, 5, dtype=torch.float64)
    plain = nn.Sequential(model.into, nn.Tanh(), model.out)
    norms, passes = passes_back(model, x)
    assert passes >= 49
    torch.testing.assert_close(norms, explicitly(plain, x), rtol=1e-8, atol=0)


def close_singular_values() -> tuple[nn.Module, Tensor]:
    model, x = nn.Linear(300, 300).double(), torch.zeros(2, 300, dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(torch.diag(1 - torch.arange(300) / 1e5))
        model.bias.zero_()
    return model, x


def test_close_singular_values_are_told_apart() -> None:
    model, x = close_singular_values()
    torch.testing.assert_close(input_jacobian_norms(model, x), explicitly(model, x), rtol=1e-10, atol=0)


def test_every_direction_is_taken_where_the_iterations_do_not_converge(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(input_jacobian, "_ITERATIONS", 10)
    model, x = close_singular_values()
    norms, passes = passes_back(model, x)
    assert passes >= 299
    torch.testing.assert_close(norms, explicitly(model, x), rtol=1e-10, atol=0)


def test_a_transformer_with_many_classes() -> None:
    """Its fused attention has no second derivative."""

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.head = nn.Linear(8, 50)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.layer(x).mean(1))

    model, x = Encoder().double().eval(), torch.randn(2, 6, 8, dtype=torch.float64)
    norms, passes = passes_back(model, x)
    assert passes < 40
    torch.testing.assert_close(norms, explicitly(model, x), rtol=1e-8, atol=0)


def test_a_sharded_model_takes_every_direction(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its processes must all make the same passes."""
    monkeypatch.setattr(input_jacobian, "is_sharded", lambda parameter: True)
    model, x = mlp(50).double(), X.double()
    norms, passes = passes_back(model, x)
    assert passes == 49
    torch.testing.assert_close(norms, explicitly(model, x), rtol=1e-8, atol=0)


def test_half_precision_takes_every_direction() -> None:
    torch.manual_seed(0)
    model, x = mlp(50).bfloat16(), torch.randn(3, 5).bfloat16()
    norms, passes = passes_back(model, x)
    assert passes == 49
    torch.testing.assert_close(norms, input_jacobian_norms(model.double(), x.double()), rtol=0.1, atol=0)


def test_leaves_the_model_as_it_was() -> None:
    model, x = network().train(), torch.randn(3, 2, 6, 6, dtype=torch.float64)
    model[0].requires_grad_(False)
    input_jacobian_norms(model, x)
    assert model.training
    assert [p.requires_grad for p in model.parameters()] == [False, False, True, True, True, True]
    assert all(p.grad is None for p in model.parameters())


def measured(model: nn.Module, x: Tensor, y: Tensor, loss) -> Characterization:
    return fm.measure(model, (x, y), loss=loss, subset_size=5, trials=2, progress=False)


def mlp(outputs: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, outputs))


X = torch.randn(20, 5)
OTHER_OUTPUTS = {
    "one value": (mlp(1), X, torch.randn(20, 1), nn.MSELoss()),
    "several values": (mlp(3), X, torch.randn(20, 3), nn.MSELoss()),
    "one logit": (mlp(1), X, torch.randint(0, 2, (20, 1)).float(), nn.BCEWithLogitsLoss()),
    "one logit, flat": (nn.Sequential(mlp(1), nn.Flatten(0)), X, torch.rand(20), nn.BCEWithLogitsLoss()),
    "several labels": (mlp(4), X, torch.randint(0, 2, (20, 4)).float(), nn.BCEWithLogitsLoss()),
    "pixels": (nn.Conv2d(3, 4, 3), torch.randn(20, 3, 5, 5), torch.randint(0, 4, (20, 3, 3)), nn.CrossEntropyLoss()),
    "tokens": (nn.Linear(5, 4), torch.randn(20, 7, 5), torch.randint(0, 4, (20, 7)), fm.CrossEntropy()),
    "as many tokens as classes": (nn.Linear(5, 4), torch.randn(20, 4, 5), torch.ones(20, 4).long(), fm.CrossEntropy()),
}


@pytest.mark.filterwarnings("ignore::flatminima.errors.NotAMinimumWarning")
@pytest.mark.parametrize("kind", OTHER_OUTPUTS)
def test_outputs_that_are_no_class_logits_have_no_robustness_and_the_result_says_why(kind: str) -> None:
    model, x, y, loss = OTHER_OUTPUTS[kind]
    c = measured(model, x, y, loss)
    assert c.robustness is None
    assert "one class per sample" in c.settings.left_out["robustness"]
    assert "no robustness: " in " ".join(str(c).split())
    assert Characterization.from_json(c.to_json()) == c


def test_class_logits_of_any_loss_have_one() -> None:
    def focal(logits: Tensor, labels: Tensor) -> Tensor:
        p = logits.softmax(1).gather(1, labels[:, None])[:, 0]
        return -((1 - p) ** 2) * p.log()

    model, x, y = mlp(3).double(), X.double(), torch.arange(20) % 3
    c = fm.measure(model, (x, y), loss=focal, subset_size=20, trials=1, robustness_samples=20, progress=False)
    assert "robustness" not in c.settings.left_out
    assert c.robustness is not None
    assert c.robustness.mean == pytest.approx(input_jacobian_norms(model, x).mean().item())


def test_one_output_is_refused_in_a_line() -> None:
    with pytest.raises(FlatminimaError, match=r"logits of shape \(N, K ≥ 2\), the model returned \(20, 1\)"):
        input_jacobian_norms(mlp(1), X)


@pytest.mark.parametrize("classes", [4, 60])
def test_derivatives_that_are_not_finite_leave_the_robustness_out_and_the_rest_in(classes: int) -> None:
    """Those of the length of a vector at zero, with respect to the input; with respect to the weights they are."""

    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Linear(5, classes).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x.square().sqrt())

    x = torch.randn(20, 5, dtype=torch.float64)
    x[:, 0] = 0
    with pytest.raises(UndefinedMeasureError, match="with respect to the input is NaN"):
        input_jacobian_norms(Root(), x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FlatminimaWarning)
        c = measured(Root(), x, torch.arange(20) % classes, fm.CrossEntropy())
    assert c.robustness is None
    assert "with respect to the input is NaN" in c.settings.left_out["robustness"]
    assert len(c.log_det_fisher.per_trial) == 2


def test_a_network_that_is_flat_in_its_input_has_norm_zero() -> None:
    class Signs(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.sign().detach()

    assert input_jacobian_norms(Signs(), X).tolist() == [0] * 20


@pytest.mark.filterwarnings("ignore::flatminima.errors.NotAMinimumWarning")
def test_a_network_that_writes_to_its_input_leaves_the_callers_alone() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp(3).double()

        def forward(self, x: Tensor) -> Tensor:
            x -= 3
            return self.net(x)

    model, x, y = InPlace(), X.double(), torch.arange(20) % 3
    given = x.clone()
    c = fm.measure(model, (given, y), subset_size=20, trials=1, robustness_samples=20, progress=False)
    expected = fm.measure(model.net, (x - 3, y), subset_size=20, trials=1, robustness_samples=20, progress=False)
    assert c.log_det_fisher.mean == pytest.approx(expected.log_det_fisher.mean, rel=1e-9)
    assert c.robustness.mean == pytest.approx(expected.robustness.mean, rel=1e-9)
    assert c.train_loss == pytest.approx(expected.train_loss, rel=1e-9)
    fm.gram(model, given, y)
    fm.exact_fisher(model, given, y)
    assert torch.equal(given, x)


@pytest.mark.filterwarnings("ignore::flatminima.errors.FlatminimaWarning")
def test_no_samples_leave_it_out_and_the_rest_in() -> None:
    torch.manual_seed(0)
    model, x, y = nn.Linear(6, 3).double(), torch.randn(20, 6, dtype=torch.float64), torch.arange(20) % 3
    c = fm.measure(model, (x, y), subset_size=6, trials=2, robustness_samples=0, progress=False)
    assert c.robustness is None
    assert len(c.log_det_fisher.per_trial) == 2
