"""Which weights are moved, and which way, seen from inside the network."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flatminima import Landscape, exact_hessian, landscape
from flatminima.errors import CoarseRoundingWarning, FlatminimaError, UndefinedMeasureError
from flatminima.measures.hessian_products import SMALL
from support.landscapes import direction_of, mean_loss, moved_by_hand, network

STEPS = 5


def test_random_directions_have_the_filters_norms_and_leave_biases_and_normalization(
    data: tuple[Tensor, Tensor],
) -> None:
    model = network()
    direction = direction_of(model, data)
    for name in ("0.weight", "4.weight"):
        own, drawn = model.state_dict()[name].flatten(1), direction[name].flatten(1)
        torch.testing.assert_close(drawn.norm(dim=1), own.norm(dim=1))
        assert not torch.allclose(drawn, own)
    assert all(not direction[name].any() for name in direction if name not in ("0.weight", "4.weight"))


def test_a_plane_holds_both_lines(data: tuple[Tensor, Tensor]) -> None:
    model = network()
    plane = landscape(model, data, dimensions=2, steps=3, progress=False).to_tensor()
    first, second = (landscape(model, data, steps=3, seed=seed, progress=False).to_tensor() for seed in (0, 1))
    torch.testing.assert_close(plane[:, 1], first)
    torch.testing.assert_close(plane[1, :], second)


def test_between_ends_at_the_others(data: tuple[Tensor, Tensor]) -> None:
    model, first, second = network(0), network(1), network(2)
    line = landscape(model, data, directions="between", to=first, steps=STEPS, progress=False)
    assert line.coordinates == ((-0.5, 0.0, 0.5, 1.0, 1.5),)
    halfway = {name: (t + first.state_dict()[name]) / 2 for name, t in model.state_dict().items()}
    middle = network()
    middle.load_state_dict(halfway)
    expected = [mean_loss(m, data) for m in (model, middle, first)]
    assert line.losses[1:4] == pytest.approx(expected, rel=1e-10)
    plane = landscape(
        model, data, directions="between", to=[first.state_dict(), second], steps=STEPS, progress=False
    ).to_tensor()
    corners = [plane[1, 1], plane[3, 1], plane[1, 3]]
    assert [corner.item() for corner in corners] == pytest.approx(
        [mean_loss(m, data) for m in (model, first, second)], rel=1e-10
    )


def test_hessian_directions_are_its_top_eigenvectors(data: tuple[Tensor, Tensor]) -> None:
    model = network()
    values, vectors = torch.linalg.eigh(exact_hessian(model, *data))
    assert len(values) > SMALL  # so that they are iterated
    extent = 1e-3
    line = landscape(model, data, directions="hessian", extent=extent, steps=3, progress=False)
    plane = landscape(model, data, directions="hessian", dimensions=2, extent=extent, steps=3, progress=False)
    assert plane.eigenvalues == pytest.approx(values.flip(0)[:2].tolist(), rel=1e-6)
    assert line.eigenvalues == pytest.approx(plane.eigenvalues[:1], rel=1e-6)
    below, middle, above = line.losses
    assert (below - 2 * middle + above) / extent**2 == pytest.approx(line.eigenvalues[0], rel=1e-3)
    parts = torch.split(vectors[:, -1], [p.numel() for p in model.parameters()])
    top = {name: part.view_as(p) for (name, p), part in zip(model.named_parameters(), parts, strict=True)}
    by_hand = [mean_loss(moved_by_hand(model, top, step * extent), data) for step in (-1, 0, 1)]
    assert sorted(line.losses) == pytest.approx(sorted(by_hand), abs=1e-11)  # an eigenvector has no sign
    torch.testing.assert_close(plane.to_tensor()[:, 1], line.to_tensor(), rtol=0, atol=1e-11)


def test_of_a_small_network_the_whole_hessian_is_formed(data: tuple[Tensor, Tensor]) -> None:
    torch.manual_seed(0)
    model, inputs = nn.Linear(4, 3).double(), data[0].flatten(1)[:, :4]
    found = landscape(model, (inputs, data[1]), directions="hessian", dimensions=2, steps=3, progress=False)
    values = torch.linalg.eigvalsh(exact_hessian(model, inputs, data[1]))
    assert found.eigenvalues == pytest.approx(values.flip(0)[:2].tolist(), rel=1e-10)
    assert Landscape.from_json(found.to_json()) == found
    assert all(parameter.grad is None for parameter in model.parameters())


class _Checkpointed(nn.Module):
    """A reentrant checkpoint, which leaves out what comes before the first input that requires a gradient."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.out = nn.Linear(4, 5).double(), nn.Linear(5, 3).double()

    def forward(self, images: Tensor) -> Tensor:
        inputs = images.flatten(1)[:, :4]
        return self.out(checkpoint(lambda x: self.first(x).tanh(), inputs, use_reentrant=True))


class _MeanOverPositions(nn.Module):
    """Through which PyTorch's gradient of a batch normalization of one sample is wrong."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.out = nn.BatchNorm2d(2).double(), nn.Linear(2, 3).double()

    def forward(self, images: Tensor) -> Tensor:
        return self.out(self.norm(images).flatten(2).transpose(1, 2).mean(1))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
@pytest.mark.parametrize("model", [_Checkpointed, _MeanOverPositions])
def test_eigenvalues_are_right_where_plain_autograd_is_not(model: type[nn.Module], data: tuple[Tensor, Tensor]) -> None:
    images, labels = (tensor.repeat(5, *[1] * (tensor.dim() - 1))[:101] for tensor in data)  # 100 at once, then one
    images = images + torch.arange(101).view(-1, 1, 1, 1) / 50
    found = landscape(model(), (images, labels), directions="hessian", dimensions=2, steps=3, progress=False)
    values = torch.linalg.eigvalsh(exact_hessian(model().eval(), images, labels))
    assert found.eigenvalues == pytest.approx(values.flip(0)[:2].tolist(), rel=1e-6)


def test_iterations_that_do_not_converge_and_wrong_derivatives_are_refused(
    data: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    linalg = pytest.importorskip("scipy.sparse.linalg")

    def fails(*arguments: Any, **options: Any) -> None:
        raise linalg.ArpackNoConvergence("No convergence (10 iterations, 0/1 eigenvectors converged)", [], [])

    monkeypatch.setattr(linalg, "eigsh", fails)
    with pytest.raises(UndefinedMeasureError, match=r"the Lanczos iterations failed: .*No convergence"):
        landscape(network(), data, directions="hessian", steps=3, progress=False)
    with pytest.raises(FlatminimaError, match="fewer trainable parameters than directions"):
        landscape(_Scaled(), data, directions="hessian", dimensions=2, steps=3, progress=False)


class _Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)[:, :3] * self.factor


def test_a_network_of_zeros_has_no_directions_of_its_norms(data: tuple[Tensor, Tensor]) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(32, 3)).double()
    nn.init.zeros_(model[1].weight)  # type: ignore[arg-type]
    with pytest.raises(FlatminimaError, match="all weights of two or more dimensions are zero"):
        landscape(model, data, progress=False)


def changed(name: str, value: Any) -> dict[str, Any]:
    return {**network(1).state_dict(), name: value}


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: network(0), r"the model's own, with nothing between: was the same checkpoint loaded twice"),
        (lambda: [network(1), network(1)], r"have the same weights, and span no plane"),
        (lambda: nn.Linear(2, 3), r"0.weight is missing \(it has 'bias', which the model lacks\); pass a network"),
        (lambda: {f"module.{name}": t for name, t in network(1).state_dict().items()}, r"it has 'module\.0\.bias'"),
        (lambda: changed("9.weight", torch.ones(2)), "the model lacks '9.weight'"),
        (lambda: changed("4.bias", torch.ones(4)), r"4.bias is \(4,\), not \(3,\)"),
        (lambda: changed("4.bias", [1.0, 2.0, 3.0]), "must be floating-point tensors, but 4.bias is list"),
        (lambda: changed("4.bias", torch.ones(3).int()), "must be floating-point tensors, but 4.bias is torch.int32"),
        (lambda: changed("4.bias", torch.full((3,), math.nan)), "hold NaN or infinity: 4.bias"),
        (lambda: changed("4.bias", torch.ones(3, device="meta")), "without values: 4.bias was never loaded"),
        (lambda: network(1).to("meta"), "'0.weight' is on the meta device"),
        (
            lambda: [network(1), changed("4.bias", torch.ones(4))],
            r"the weights of to\[1\] do not fit the model: 4.bias",
        ),
    ],
)
def test_others_that_do_not_fit_are_refused(data: tuple[Tensor, Tensor], other: Any, message: str) -> None:
    with pytest.raises(FlatminimaError, match=message):
        landscape(network(), data, directions="between", to=other(), steps=5, progress=False)


def test_compiled_models_call_their_weights_as_they_did_before(data: tuple[Tensor, Tensor]) -> None:
    options: dict[str, Any] = {"directions": "between", "steps": 5, "progress": False}
    expected = landscape(network(), data, to=network(1), **options)
    compiled, other = (torch.compile(network(seed), backend="eager") for seed in (0, 1))
    assert landscape(compiled, data, to=network(1).state_dict(), **options) == expected
    assert landscape(network(), data, to=other, **options) == expected


def test_a_frozen_network_has_a_way_to_another(data: tuple[Tensor, Tensor]) -> None:
    model = network().requires_grad_(False)
    found = landscape(model, data, directions="between", to=network(1), steps=5, progress=False)
    assert found.losses[3] == pytest.approx(mean_loss(network(1), data), rel=1e-10)


def test_half_precision_has_no_eigenvectors(data: tuple[Tensor, Tensor]) -> None:
    halves = data[0].bfloat16(), data[1]
    with (
        pytest.warns(CoarseRoundingWarning, match=r"0.weight is torch.bfloat16, in which moves .* are lost"),
        pytest.raises(UndefinedMeasureError, match=r"0.weight is torch.bfloat16, too coarse for second derivatives"),
    ):
        landscape(network().to(torch.bfloat16), halves, directions="hessian", steps=3, progress=False)


def test_buffers_that_are_not_saved_stay(data: tuple[Tensor, Tensor]) -> None:
    models = [network(seed) for seed in (0, 1)]
    for model in models:
        model.register_buffer("frequencies", torch.ones(3), persistent=False)
    found = landscape(models[0], data, directions="between", to=models[1], steps=5, progress=False)
    assert found.losses[3] == pytest.approx(mean_loss(models[1], data), rel=1e-10)
