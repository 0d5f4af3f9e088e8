from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.func import jacrev

import flatminima as fm
from flatminima.errors import FlatminimaError
from flatminima.measures import Characterization, input_jacobian_norms


def network(classes: int = 4) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(48, classes)
    ).double()


@pytest.mark.parametrize("sharpness", [0.0, 1.0, 10.0])
def test_equals_spectral_norm_of_the_explicit_jacobian(sharpness: float) -> None:
    model, x = network().eval(), torch.randn(5, 2, 6, 6, dtype=torch.float64)
    model[-1].weight.data *= sharpness
    expected = [
        torch.linalg.matrix_norm(jacrev(lambda z: model(z[None])[0].softmax(0))(sample).flatten(1), 2) ** 2
        for sample in x
    ]
    torch.testing.assert_close(input_jacobian_norms(model, x), torch.stack(expected), rtol=1e-8, atol=1e-30)


def test_float32_agrees_with_float64_where_p_is_one_hot() -> None:
    """p_y = 1 in float32 here: S formed by 1 − p_y would be exactly zero."""
    model, x = network(), torch.randn(5, 2, 6, 6, dtype=torch.float64)
    model[-1].weight.data *= 60
    expected = input_jacobian_norms(model, x)
    assert 0 < expected.min() < 1e-20
    torch.testing.assert_close(input_jacobian_norms(model.float(), x.float()), expected, rtol=2e-3, atol=0)


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
