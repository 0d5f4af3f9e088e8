"""On an accelerator: the same numbers as on the CPU, measured and trained with, and no float64 where it has none."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flatminima as fm
from flatminima.gramian.engine import factored_gram
from support import no_float64

PRESENT = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
ACCELERATORS = [
    pytest.param(device, marks=pytest.mark.skipif(not present, reason=f"no {device} here"))
    for device, present in PRESENT.items()
]
TOLERANCE = 2e-3
"""In nats of γ̂: float32 rows on either device are within half of it of those in float64."""


def minimum() -> tuple[nn.Module, Tensor, Tensor]:
    """A network of every common layer in float32, whose head fits its data."""
    torch.manual_seed(0)
    y = torch.arange(40) % 4
    x = 3 * torch.randn(4, 3, 8, 8)[y] + 0.5 * torch.randn(40, 3, 8, 8)
    body = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2), nn.Tanh()
    )
    model = nn.Sequential(body, nn.Flatten(), nn.Linear(72, 16), nn.LayerNorm(16), nn.Linear(16, 4))
    with torch.no_grad():
        body.train()(x)
        features = model.eval()[:-1](x)
        means = torch.stack([features[y == c].mean(0) for c in range(4)])
        means -= means.mean(0)
        model[-1].weight.copy_(8 * means / means.norm(dim=1, keepdim=True))
        model[-1].bias.zero_()
    return model, x, y


WAYS = [
    {},
    {"fisher": "model"},
    {"fisher": "labels", "loss": fm.CrossEntropy(label_smoothing=0.1)},
    {"logit_normalization": 0.04},
    {"batchnorm": 4},
    {"memory_budget": 3_000_000},
]


@pytest.mark.parametrize("options", WAYS)
@pytest.mark.parametrize("device", ACCELERATORS)
def test_every_measure_is_that_on_the_cpu(device: str, options: dict) -> None:
    model, x, y = minimum()
    options = {"subset_size": 8, "trials": 3, "per_parameter": True, "measures": "cheap", **options}
    expected = fm.measure(model, (x, y), **options)
    found = fm.measure(copy.deepcopy(model).to(device), (x, y), **options)
    assert found.log_det_fisher.per_trial == pytest.approx(expected.log_det_fisher.per_trial, abs=TOLERANCE)
    for name, estimate in expected.estimates().items():
        assert found.estimates()[name].mean == pytest.approx(estimate.mean, rel=1e-3, abs=TOLERANCE, nan_ok=True)
    assert found.train_loss == pytest.approx(expected.train_loss, rel=1e-4)
    assert found.settings.device.startswith(device)


@pytest.mark.parametrize("device", ACCELERATORS)
def test_the_gram_matrix_is_float64(device: str) -> None:
    model, x, y = minimum()
    expected = factored_gram(model, x, y)
    found = factored_gram(copy.deepcopy(model).to(device), x.to(device), y.to(device))
    assert found.unit.dtype == found.log_scale.dtype == torch.float64
    torch.testing.assert_close(
        found.matrix().cpu(), expected.matrix(), rtol=1e-3, atol=1e-6 * expected.matrix().max().item()
    )


@pytest.mark.parametrize("batch", ["equal", "unequal"])
@pytest.mark.parametrize(
    ("passes", "estimator"),
    [
        ("one-by-one", "finite-difference"),
        ("one-by-one", "hvp"),
        ("together", "finite-difference"),
        ("together", "hvp"),
        ("compiled", "finite-difference"),
    ],
)
@pytest.mark.parametrize("device", ACCELERATORS)
def test_the_regularizer_gives_the_gradient_of_the_cpu(device: str, passes: str, estimator: str, batch: str) -> None:
    model, x, y = minimum()
    model.train()
    size = {"equal": 40, "unequal": 38}[batch]
    exact = copy.deepcopy(model).double()
    on_device = copy.deepcopy(model).to(device)
    options = {"alpha": 1e-2, "num_sub_batches": 4, "main_gradient": "sub-batches", "estimator": estimator}
    torch.manual_seed(0)
    fm.FisherTraceRegularizer(exact, **options).backward(F.cross_entropy, x[:size].double(), y[:size])
    torch.manual_seed(0)
    regularizer = fm.FisherTraceRegularizer(on_device, passes=passes, **options)
    regularizer.backward(F.cross_entropy, x[:size].to(device), y[:size].to(device))
    for (name, found), expected in zip(on_device.named_parameters(), exact.parameters(), strict=True):
        error = (found.grad.cpu().double() - expected.grad).norm() / expected.grad.norm().clamp(min=1e-6)
        assert error < 1e-2, name  # float32: at α = 1e-2 a difference of gradients keeps some four digits
    for (name, found), expected in zip(on_device.named_buffers(), exact.buffers(), strict=True):
        torch.testing.assert_close(found.cpu().double(), expected.double(), rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("device", ACCELERATORS)
def test_an_interrupted_landscape_goes_on_where_the_model_is(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x, y = minimum()
    goes_on_along_the_hessian(model.to(device), (x, y), tmp_path / "landscape.json", monkeypatch)


def goes_on_along_the_hessian(
    model: nn.Module, data: tuple[Tensor, Tensor], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("scipy")
    options = {"directions": "hessian", "extent": 0.1, "steps": 3, "path": path, "progress": False}
    whole = fm.landscape(model, data, **options)
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {name: values[name][:1] for name in ("losses", "accuracies")}))
    monkeypatch.setattr("flatminima.loss_landscape.evaluation.eigenvectors", lambda *_: pytest.fail("they are known"))
    assert fm.landscape(model, data, **options).losses == pytest.approx(whole.losses, rel=1e-4)


@pytest.fixture
def device_without_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flatminima.network.precision.WITHOUT_FLOAT64", {no_float64.DEVICE})


@pytest.mark.usefixtures("device_without_float64")
@pytest.mark.parametrize("options", WAYS)
def test_a_device_without_float64_is_never_asked_for_it(options: dict) -> None:
    model, x, y = minimum()
    measures = "cheap" if options else "all"  # the costly ones, once: every call on this device takes long
    options = {"subset_size": 8, "trials": 1, "per_parameter": True, "measures": measures, **options}
    expected = fm.measure(model, (x, y), **options)
    with no_float64.Device():
        found = fm.measure(no_float64.moved(model), (x, y), **options)
    assert found.settings.device == no_float64.DEVICE
    assert found.log_det_fisher.per_trial == pytest.approx(expected.log_det_fisher.per_trial, abs=TOLERANCE)
    for name, estimate in expected.estimates().items():
        assert found.estimates()[name].mean == pytest.approx(estimate.mean, rel=1e-3, abs=1e-12, nan_ok=True), name


@pytest.mark.usefixtures("device_without_float64")
def test_parameters_without_a_rule_on_a_device_without_float64() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 8)), nn.Tanh(), nn.Linear(8, 3))
    x, y = torch.randn(5, 6), torch.tensor([0, 1, 2, 0, 1])
    expected = factored_gram(model, x, y)
    with no_float64.Device():
        found = factored_gram(no_float64.moved(model), x.to(no_float64.DEVICE), y.to(no_float64.DEVICE))
    assert len(found.generic_parameters) == 2
    torch.testing.assert_close(found.matrix(), expected.matrix(), rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("device_without_float64")
def test_an_interrupted_landscape_goes_on_on_a_device_without_float64(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x, y = minimum()
    with no_float64.Device():
        goes_on_along_the_hessian(no_float64.moved(model), (x, y), tmp_path / "landscape.json", monkeypatch)


def test_the_device_without_float64_refuses_it() -> None:
    with no_float64.Device():
        x = torch.ones(3).to(no_float64.DEVICE)
        assert torch.equal((x + x).to("cpu"), 2 * torch.ones(3))
        for wrong in (x.double, lambda: torch.zeros(3, dtype=torch.float64, device=no_float64.DEVICE)):
            with pytest.raises(TypeError, match="float64"):
                wrong()
        with pytest.raises(RuntimeError, match="two devices"):
            x + torch.ones(3)
