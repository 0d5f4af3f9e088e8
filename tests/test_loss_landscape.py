"""The loss around a minimum, against evaluations of copies whose weights are moved by hand."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatminima import Landscape, exact_hessian, landscape
from flatminima.errors import CoarseRoundingWarning, FlatminimaError, NonFiniteError, UndefinedMeasureError
from flatminima.loss_landscape.directions import eigenvectors
from flatminima.measures import evaluate
from flatminima.measures.hessian_products import SMALL
from flatminima.network import samples_of

STEPS = 5


@pytest.fixture
def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(24, 2, 4, 4, generator=generator, dtype=torch.float64), torch.arange(24) % 3


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)).double()
    model(torch.randn(50, 2, 4, 4, dtype=torch.float64))  # running statistics of its own
    return model.eval()


def moved_by_hand(model: nn.Module, direction: dict[str, Tensor], step: float) -> nn.Module:
    other = copy.deepcopy(model)
    other.load_state_dict({name: t + step * direction.get(name, 0) for name, t in model.state_dict().items()})
    return other


def mean_loss(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    with torch.no_grad():
        return F.cross_entropy(model(data[0]), data[1]).item()


def direction_of(model: nn.Module, data: tuple[Tensor, Tensor], **options: Any) -> dict[str, Tensor]:
    """What a landscape moves the weights by at 1, seen from inside the network."""
    seen: list[dict[str, Tensor]] = []
    handle = model.register_forward_pre_hook(
        lambda module, _: seen.append({name: t.clone() for name, t in module.state_dict().items()})
    )
    landscape(model, data, steps=3, progress=False, **options)
    handle.remove()
    return {name: seen[-1][name] - seen[0][name] for name in seen[0]}  # the minimum is seen first, 1 last


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


def test_losses_along_a_line_are_those_of_moved_copies(data: tuple[Tensor, Tensor]) -> None:
    model = network()
    direction = direction_of(model, data, seed=3)
    found = landscape(model, data, steps=STEPS, extent=2.0, seed=3, progress=False)
    assert found.coordinates == ((-2.0, -1.0, 0.0, 1.0, 2.0),)
    expected = [mean_loss(moved_by_hand(model, direction, step), data) for step in found.coordinates[0]]
    assert found.losses == pytest.approx(expected, rel=1e-12)
    assert found.losses[2] == mean_loss(model, data)


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


def test_accuracies_stand_beside_the_losses(data: tuple[Tensor, Tensor]) -> None:
    model = network()
    found = landscape(model, data, steps=3, progress=False)
    assert found.accuracies[1] == evaluate(model, samples_of(data)).accuracy
    assert (
        landscape(model, (data[0], data[1].double()), loss=lambda z, y: (z.sum(1) - y) ** 2, steps=3).accuracies == ()
    )


def test_the_model_is_left_to_the_bit(data: tuple[Tensor, Tensor]) -> None:
    model = network().train()
    before = copy.deepcopy(model.state_dict())
    landscape(model, data, steps=3, progress=False)
    landscape(model, data, directions="between", to=network(1), steps=5, progress=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.training


def test_where_the_loss_is_not_finite_it_is_nan(data: tuple[Tensor, Tensor]) -> None:
    model = network()
    found = landscape(model, data, steps=3, extent=1e200, progress=False)
    assert [math.isnan(loss) for loss in found.losses] == [True, False, True]
    again = Landscape.from_json(found.to_json())
    assert again.losses[1] == found.losses[1]
    assert math.isnan(again.losses[0])


def test_an_interrupted_landscape_goes_on(
    data: tuple[Tensor, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, path = network(), tmp_path / "landscape.json"
    whole = landscape(model, data, steps=STEPS, progress=False)
    calls = 0

    def counted(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return evaluate(*args, **options)

    monkeypatch.setattr("flatminima.loss_landscape.evaluation.evaluate", counted)
    with pytest.raises(KeyboardInterrupt):
        landscape(model, data, steps=STEPS, path=path, progress=False)
    assert landscape(model, data, steps=STEPS, path=path, progress=False) == whole
    assert calls == 4 + 1 + 2  # the minimum again, which is a point too, and two of five


@pytest.mark.parametrize("change", ["weights", "grid", "seed", "data"])
def test_a_file_of_another_landscape_is_refused(data: tuple[Tensor, Tensor], tmp_path: Path, change: str) -> None:
    path = tmp_path / "landscape.json"
    landscape(network(), data, steps=3, path=path, progress=False)
    changed: dict[str, Any] = {"grid": {"extent": 2.0}, "seed": {"seed": 1}}.get(change, {})
    model = network(1 if change == "weights" else 0)
    data = (data[0] + 1, data[1]) if change == "data" else data
    with pytest.raises(FlatminimaError, match="holds another landscape"):
        landscape(model, data, path=path, progress=False, **({"steps": 3} | changed))


def test_a_landscape_along_the_hessian_goes_on_with_its_own_eigenvectors(
    data: tuple[Tensor, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, path = network(), tmp_path / "landscape.json"
    options: dict[str, Any] = {"directions": "hessian", "steps": 3, "extent": 0.5, "progress": False}
    whole = landscape(model, data, path=path, **options)
    values = json.loads(path.read_text())
    values["losses"], values["accuracies"] = values["losses"][:1], values["accuracies"][:1]
    path.write_text(json.dumps(values))  # as an interrupted call leaves it
    of_this_call = eigenvectors

    def turned(*args: Any) -> Any:  # an eigenvector has no sign
        found, ways = of_this_call(*args)
        return found, [{name: -along for name, along in way.items()} for way in ways]

    monkeypatch.setattr("flatminima.loss_landscape.evaluation.eigenvectors", turned)
    assert landscape(model, data, **options).losses == pytest.approx(whole.losses[::-1], rel=1e-6)
    assert landscape(model, data, path=path, **options) == whole
    path.write_text(json.dumps(values))
    beside = tmp_path / "landscape.json.directions"
    beside.write_bytes(beside.read_bytes()[:-9])
    with pytest.raises(FlatminimaError, match=r"json.directions, the eigenvectors of .*remove .*json to begin anew"):
        landscape(model, data, path=path, **options)


def test_a_file_that_is_whole_is_a_landscape_and_costs_no_second_one(
    data: tuple[Tensor, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "landscape.json"
    whole = landscape(network(), data, steps=3, path=path, progress=False)
    assert Landscape.from_json(path.read_text()) == whole
    monkeypatch.setattr("flatminima.loss_landscape.record.write_file", lambda *_: pytest.fail("nothing is new"))
    monkeypatch.setattr("flatminima.loss_landscape.record.require_writable", lambda *_: pytest.fail("nor need be"))
    assert landscape(network(), data, steps=3, path=path, progress=False) == whole


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is no landscape that was begun: .*choose another path, or remove it"),
        (b'{"question": "a", "los', "is no landscape that was begun"),
        (b"[]", "is no landscape that was begun"),
        (b"\xff\xfe\x00", "is no landscape that was begun"),
        (b'{"digest": "a", "losses": [1, 2], "accuracies": []}', "no landscape that was begun: it lacks 'directions'"),
    ],
)
def test_a_file_of_something_else_is_refused_and_left(
    data: tuple[Tensor, Tensor], tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "landscape.json"
    path.write_bytes(content)
    with pytest.raises(FlatminimaError, match=message):
        landscape(network(), data, path=path, progress=False)
    assert path.read_bytes() == content


def test_places_that_hold_no_file_are_refused_before_the_points(data: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path, message in (
        (tmp_path, "cannot keep a landscape in .*: Is a directory; name another file"),
        (tmp_path / "file" / "landscape.json", "Not a directory; name another file"),
        (tmp_path / ("a" * 300), "File name too long; name another file"),
    ):
        with pytest.raises(FlatminimaError, match=message):
            landscape(network(), data, path=path, progress=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"directions": "hills"}, "directions"),
        ({"directions": "between"}, "needs to="),
        ({"to": nn.Linear(2, 3)}, "'between' alone"),
        ({"directions": "between", "to": nn.Linear(2, 3)}, r"do not fit the model: 0.weight"),
        ({"dimensions": 3}, "dimensions must be 1 or 2"),
        ({"steps": 4}, "steps must be odd"),
        ({"steps": 1}, "steps must be odd"),
        ({"directions": "between", "to": nn.Linear(2, 3), "steps": 7}, r"steps must be 5, 9, 13"),
        ({"extent": 0.0}, "extent must be a positive number"),
        ({"extent": 10**400}, "extent must be a positive number"),
        ({"extent": math.nan}, "extent must be a positive number, got nan"),
        ({"directions": "between", "to": nn.Linear(2, 3), "extent": 2.0}, r"extent has no meaning for .*leave it out"),
        ({"directions": "between", "to": nn.Linear(2, 3), "dimensions": 2}, r"through two other models: to=\[a, b\]"),
        ({"directions": None}, "unknown directions None; use one of random, hessian, between"),
        ({"directions": "randm"}, r"unknown directions 'randm' \(did you mean 'random'\?\)"),
        ({"dimensions": 1.0}, "dimensions must be an integer, got 1.0"),
        ({"steps": "5"}, "steps must be an integer, got '5'"),
        ({"steps": 10**9 + 1}, r"a grid of 1,000,000,001 points .*lower steps"),
        ({"steps": 1001, "dimensions": 2}, r"a grid of 1,002,001 points"),
        ({"seed": 2**64}, "seed must fit 64 bits"),
        ({"seed": "a"}, "seed must be an integer, got 'a'"),
        ({"progress": "no"}, "progress must be True or False"),
        ({"path": 3}, "path must name a file, got 3"),
        ({"path": ""}, "path must name a file, got ''"),
        ({"directions": "between", "to": None}, "to must be models or their state_dicts, got NoneType"),
        ({"directions": "between", "to": "other.pt"}, "got str: load the weights first"),
        ({"directions": "between", "to": ["other.pt"]}, "got str: load the weights first"),
    ],
)
def test_wrong_arguments_are_refused(data: tuple[Tensor, Tensor], options: dict[str, Any], message: str) -> None:
    with pytest.raises(FlatminimaError, match=message):
        landscape(network(), data, **({"progress": False} | options))


class _Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("model.pt", "a model is a torch.nn.Module, got str"),
        (nn.Linear, "a model is a torch.nn.Module, got type"),
        (nn.Sequential(nn.Flatten(), nn.LazyLinear(3)), "'1.weight' has no shape yet .*run the model on one batch"),
        (nn.Linear(32, 3, device="meta"), "'weight' is on the meta device, without values: load"),
        (nn.Linear(32, 3, dtype=torch.complex64), "weight is torch.complex64: complex weights are not moved"),
        (nn.Flatten(), "no trainable weights of two or more dimensions to move: set requires_grad"),
        (
            nn.Sequential(nn.Flatten(), nn.Linear(32, 3).double()).requires_grad_(False),
            r"set requires_grad .*or use directions='between'",
        ),
        (nn.Sequential(nn.Flatten(), nn.Linear(32, 3).double(), _Noise()), "random in eval mode"),
        (nn.Sequential(nn.Flatten(), nn.Linear(32, 3)), "float64.*convert the inputs to the parameters' type"),
        (nn.Sequential(nn.Flatten(), nn.Linear(9, 3).double()), "pass the data as the model takes them"),
    ],
)
def test_models_without_a_landscape_are_refused(data: tuple[Tensor, Tensor], model: Any, message: str) -> None:
    with pytest.raises(FlatminimaError, match=message) as raised:
        landscape(model, data, progress=False)
    assert "\n" not in str(raised.value)


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


def test_a_frozen_network_has_a_way_to_another(data: tuple[Tensor, Tensor]) -> None:
    model = network().requires_grad_(False)
    found = landscape(model, data, directions="between", to=network(1), steps=5, progress=False)
    assert found.losses[3] == pytest.approx(mean_loss(network(1), data), rel=1e-10)


@pytest.mark.parametrize("steps", [3, 7, 99])
def test_the_minimum_is_a_grid_point_to_the_bit(data: tuple[Tensor, Tensor], steps: int) -> None:
    (axis,) = landscape(network(), data, extent=0.3, steps=steps, progress=False).coordinates
    assert (axis[0], axis[steps // 2], axis[-1]) == (-0.3, 0.0, 0.3)


def test_half_precision_has_no_eigenvectors(data: tuple[Tensor, Tensor]) -> None:
    halves = data[0].bfloat16(), data[1]
    with (
        pytest.warns(CoarseRoundingWarning, match=r"0.weight is torch.bfloat16, in which moves .* are lost"),
        pytest.raises(UndefinedMeasureError, match=r"0.weight is torch.bfloat16, too coarse for second derivatives"),
    ):
        landscape(network().to(torch.bfloat16), halves, directions="hessian", steps=3, progress=False)


def test_a_network_with_nan_is_refused(data: tuple[Tensor, Tensor]) -> None:
    model = network()
    with torch.no_grad():
        model[4].bias.fill_(math.nan)  # type: ignore[index]
    with pytest.raises(NonFiniteError):
        landscape(model, data, progress=False)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"directions": "random", "coordinates": 1}',
        '{"directions": "up", "coordinates": [[0]], "losses": [1], "accuracies": []}',
        '{"directions": "random", "coordinates": [[0]], "losses": [1], "accuracies": [1, 2]}',
    ],
)
def test_a_text_of_something_else_is_refused(text: str) -> None:
    with pytest.raises(FlatminimaError, match="not a landscape"):
        Landscape.from_json(text)


def test_a_text_of_a_part_is_refused() -> None:
    text = '{"directions": "random", "coordinates": [[-1, 0, 1]], "losses": [1], "accuracies": []}'
    with pytest.raises(FlatminimaError, match=r"1 losses for 3 grid points; .*same call with the same path goes on"):
        Landscape.from_json(text)


def test_flat_planes_and_negative_losses_have_pictures() -> None:
    axis = (-1.0, 0.0, 1.0)
    Landscape("random", (axis, axis), (2.0,) * 9).plot()
    assert list(Landscape("random", (axis,), (-1.0, -2.0, -1.0)).plot().lines[0].get_ydata()) == [-1, -2, -1]
    with pytest.raises(FlatminimaError, match="a plane is drawn on a logarithmic scale"):
        Landscape("random", (axis, axis), (-1.0,) * 9).plot()


def test_pictures_of_lines_and_planes(data: tuple[Tensor, Tensor]) -> None:
    model = network()
    line = landscape(model, data, steps=3, progress=False)
    assert list(line.plot().lines[0].get_ydata()) == list(line.losses)
    plane = landscape(model, data, directions="between", to=[network(1), network(2)], steps=5, progress=False).plot()
    assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in plane.lines] == [(0, 0), (1, 0), (0, 1)]
    with pytest.raises(FlatminimaError, match="no loss of this landscape is finite"):
        Landscape("random", ((0.0,),), (math.nan,)).plot()


def test_buffers_that_are_not_saved_stay(data: tuple[Tensor, Tensor]) -> None:
    models = [network(seed) for seed in (0, 1)]
    for model in models:
        model.register_buffer("frequencies", torch.ones(3), persistent=False)
    found = landscape(models[0], data, directions="between", to=models[1], steps=5, progress=False)
    assert found.losses[3] == pytest.approx(mean_loss(models[1], data), rel=1e-10)
