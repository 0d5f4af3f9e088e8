from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import flatminima as fm
from flatminima.errors import FlatminimaError
from flatminima.gramian.engine import factored_gram
from flatminima.gramian.planning import Piece, Plan
from support.cases import CASES
from support.collectives import counted_collectives, free_port, run_in_processes

pytestmark = [
    pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo backend"),
    pytest.mark.xdist_group("processes"),
]

OPTIONS: dict[str, Any] = {"subset_size": 6, "trials": 3, "progress": False}
AWKWARD = {case.name: case for case in CASES}
QUICK = (
    "conv2d grouped",  # batch normalization; first dimensions of 6 and 5
    "tied embedding",
    "branched, dead and unused",
    "in place",
    "frozen",
    "functional",  # a scalar that stays whole, parameters without a rule
    "vision transformer",
    "language by keyword",
    "recurrent",  # seen by no call
)


def shard_whole(model: nn.Module, mesh: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    fully_shard(model, mesh=mesh, ignored_params={p for p in model.parameters() if p.dim() == 0})


def shard_nested(model: nn.Module, mesh: Any) -> None:
    """Every child on its own, and the rest with the root."""
    from torch.distributed.fsdp import fully_shard

    for child in model.children():
        if next(child.parameters(), None) is not None:
            fully_shard(child, mesh=mesh)
    shard_whole(model, mesh)


def shard_first(model: nn.Module, mesh: Any) -> None:
    """The first child alone, where there is one: what is left keeps plain parameters."""
    shard_whole(next(model.children(), model), mesh)


def schemes(name: str) -> dict[str, Callable[[nn.Module, Any], None]]:
    if name == "functional":
        return {"whole": shard_whole}
    if name == "tied embedding":  # its embedding's weight is used outside the embedding's forward
        return {"whole": shard_whole, "first": lambda model, mesh: shard_whole(model.hidden, mesh)}
    return {"whole": shard_whole, "nested": shard_nested, "first": shard_first}


def network_and_data() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """Lengths of 7, 5 and 3, that no number of processes divides; the last leaves one of four empty-handed."""
    torch.manual_seed(0)
    y = torch.arange(30) % 3
    x = torch.randn(30, 6, dtype=torch.float64) + 5 * nn.functional.one_hot(y, 6)
    model = nn.Sequential(
        nn.Linear(6, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Sequential(nn.Linear(7, 5), nn.Tanh()), nn.Linear(5, 3)
    ).double()
    model(x)
    return model, (x, y)


def in_several_passes(model: nn.Module, size: int) -> Plan:
    """Two samples at a time, each half of every part in a pass of its own; as the first process counts."""
    lengths = {name: -(-len(p) // size) for name, p in model.named_parameters()}
    first = tuple(Piece(name, 0, (length + 1) // 2) for name, length in lengths.items())
    second = tuple(Piece(name, (length + 1) // 2, length) for name, length in lengths.items())
    return Plan(samples=6, chunk=2, passes=(first, second), activation_bytes=0, rows_bytes=0, budget=0)


def measured(model: nn.Module, data: tuple[Tensor, Tensor]) -> dict[str, str]:
    return {
        "default": fm.measure(model, data, per_parameter=True, **OPTIONS).to_json(),
        "scale-invariant": fm.measure(model, data, scale_invariant=True, **OPTIONS).to_json(),
        "batchnorm": fm.measure(model, data, batchnorm=3, **OPTIONS).to_json(),
        "classes": fm.measure(model, data, fisher="model", **OPTIONS).to_json(),
        "rivals": fm.measure(model, data, measures=("cheap", "adaptive_average_sharpness"), **OPTIONS).to_json(),
    }


def error_of(action: Callable[[], Any]) -> str:
    with pytest.raises(FlatminimaError) as caught:
        action()
    return str(caught.value)


class FailsOn(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Data that one process cannot read."""

    def __init__(self, data: tuple[Tensor, Tensor], fails: bool) -> None:
        self.data, self.fails = data, fails

    def __len__(self) -> int:
        return len(self.data[1])

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if self.fails and index == 17:
            raise FlatminimaError("sample 17 cannot be read")
        return self.data[0][index], self.data[1][index]


def in_each_process(rank: int, world: int, port: int, folder: str, names: tuple[str, ...]) -> None:
    """What every process finds is saved for the tests to judge."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (world,))
    results: dict[str, Any] = {}
    for name in names:
        for scheme, shard in schemes(name).items():
            model, inputs, targets = AWKWARD[name].build()
            shard(model, mesh)
            found = factored_gram(model, inputs, targets, shares=True)
            results[f"{name}, {scheme}"] = (found.matrix(), found.generic_parameters)

    results["on all"] = on_mesh(mesh)
    results["errors"] = errors(mesh, rank) if world == 2 else {}
    if world == 2:
        results["on its own"] = on_mesh(init_device_mesh("cpu", (2, 1), mesh_dim_names=("others", "own"))["own"])
    if world == 4:
        model, (x, y) = network_and_data()
        shard_nested(model, init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))
        results["on all"]["replicated"] = fm.gram(model, x[:6], y[:6])
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def on_mesh(mesh: Any) -> dict[str, Any]:
    model, data = network_and_data()
    x, y = data[0][:6], data[1][:6]
    shard_nested(model, mesh)
    before = state_of(model)
    found: dict[str, Any] = {"measured": measured(model, data)}
    found["several passes"] = factored_gram(model, x, y, plan=in_several_passes(model, mesh.size())).matrix()
    found["sums"], found["reductions"] = count_sums(lambda: fm.gram(model, x, y))
    found["states"] = before, state_of(model)
    return found


def state_of(model: nn.Module) -> dict[str, Any]:
    return {name: (type(p.data).__name__, p.requires_grad, p.grad) for name, p in model.named_parameters()}


def count_sums(action: Callable[[], Any]) -> tuple[list[int], int]:
    """The sizes of what processes sum up meanwhile, and how often FSDP2 reduces gradients."""
    sums: list[int] = []
    all_reduce = dist.all_reduce

    def noted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        sums.append(tensor.numel())
        return all_reduce(tensor, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, counted_collectives() as counts:
        patch.setattr(dist, "all_reduce", noted)
        action()
    return sums, sum(count for call, count in counts.items() if "reduce_scatter" in call)


def errors(mesh: Any, rank: int) -> dict[str, str]:
    from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    model, data = network_and_data()
    x, y = data[0][:6], data[1][:6]
    shard_nested(model, mesh)
    found = {
        "distributed": error_of(lambda: fm.measure(model, data, distributed=True, **OPTIONS)),
        "fetch": error_of(lambda: fm.measure(model, FailsOn(data, fails=rank == 1), **OPTIONS)),
        "other samples": error_of(lambda: fm.gram(model, x + rank, y)),
        "other sizes": error_of(lambda: fm.measure(model, (data[0][rank:], data[1][rank:]), **OPTIONS)),
        "exact": error_of(lambda: fm.exact_fisher(model, x, y)),
    }
    broken, _ = network_and_data()
    broken[4].bias.data[2] = torch.nan  # in the last process's part, or the one before
    fully_shard(broken, mesh=mesh)
    found["NaN"] = error_of(lambda: fm.gram(broken, x, y))
    low, _ = network_and_data()
    fully_shard(low, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    found["mixed precision"] = error_of(lambda: fm.gram(low, x, y))
    second = nn.Linear(8, 4).double()
    fully_shard(second, mesh=mesh, shard_placement_fn=lambda parameter: Shard(parameter.dim() - 1))
    found["second dimension"] = error_of(lambda: fm.gram(second, torch.randn(3, 8).double(), y[:3]))
    tensor_parallel = parallelize_module(nn.Linear(8, 4).double(), mesh, ColwiseParallel())
    found["tensor parallel"] = error_of(lambda: fm.gram(tensor_parallel, torch.randn(3, 8).double(), y[:3]))
    flat = FullyShardedDataParallel(nn.Linear(8, 4).double(), use_orig_params=True, device_id=torch.device("cpu"))
    found["FSDP1"] = error_of(lambda: fm.gram(flat, torch.randn(3, 8).double(), y[:3]))
    return found


def run_processes(world: int, folder: Path, names: tuple[str, ...]) -> list[dict[str, Any]]:
    run_in_processes(in_each_process, world, world, free_port(), str(folder), names)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world)]


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_processes(2, tmp_path_factory.mktemp("two"), QUICK)


@pytest.fixture(scope="module", params=[1, 2, pytest.param(4, marks=pytest.mark.slow)])
def processes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, two_processes: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """What each of 1, 2 or 4 processes found that share one model."""
    if request.param == 1:
        return [two_processes[1]["on its own"]]
    found = two_processes if request.param == 2 else run_processes(4, tmp_path_factory.mktemp("four"), ())
    return [one["on all"] for one in found]


def assert_grams(processes: list[dict[str, Any]], names: tuple[str, ...]) -> None:
    for name in names:
        model, inputs, targets = AWKWARD[name].build()
        expected = factored_gram(model, inputs, targets)
        for found in processes:
            for scheme in schemes(name):
                matrix, generic = found[f"{name}, {scheme}"]
                assert_close(matrix, expected.matrix())
                assert torch.equal(matrix, processes[0][f"{name}, {scheme}"][0])
                assert generic == expected.generic_parameters


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12 * expected.abs().max().item())


def test_gram_is_that_of_the_whole_model(two_processes: list[dict[str, Any]]) -> None:
    assert_grams(two_processes, QUICK)


@pytest.mark.slow
def test_gram_of_every_case_is_that_of_the_whole_model(tmp_path: Path) -> None:
    names = tuple(AWKWARD)
    assert_grams(run_processes(2, tmp_path, names), names)


@pytest.mark.parametrize("name", ["default", "scale-invariant", "batchnorm", "classes", "rivals"])
@pytest.mark.filterwarnings("ignore::flatminima.errors.NotAMinimumWarning")
def test_measures_are_those_of_the_whole_model(processes: list[dict[str, Any]], name: str) -> None:
    alone = fm.Characterization.from_json(measured(*network_and_data())[name])
    for found in processes:
        assert found["measured"][name] == processes[0]["measured"][name]
        together = fm.Characterization.from_json(found["measured"][name])
        assert together.num_parameters == alone.num_parameters
        assert together.train_loss == pytest.approx(alone.train_loss, rel=1e-10)
        for measure, estimate in alone.estimates().items():
            if "the weights whole" in together.settings.left_out.get(measure, ""):
                assert measure not in together.estimates()
                continue
            assert together.estimates()[measure].per_trial == pytest.approx(estimate.per_trial, rel=1e-10, nan_ok=True)
        assert name != "rivals" or {"margin", "adaptive_average_sharpness"} <= set(together.estimates())
        for parameter, share in (alone.shares or {}).items():
            assert together.shares[parameter].fisher_trace.mean == pytest.approx(share.fisher_trace.mean, rel=1e-10)


def test_rows_formed_in_several_passes_give_the_same(processes: list[dict[str, Any]]) -> None:
    model, (x, y) = network_and_data()
    for found in processes:
        assert_close(found["several passes"], fm.gram(model, x[:6], y[:6]))
        if "replicated" in found:
            assert_close(found["replicated"], fm.gram(model, x[:6], y[:6]))


def test_processes_exchange_the_sum_and_what_the_spot_check_needs_of_it(processes: list[dict[str, Any]]) -> None:
    three_numbers_each = 3 * len(list(network_and_data()[0].parameters()))
    for found in processes:
        assert found["sums"] == ([36, three_numbers_each, 4] if len(processes) > 1 else [])
        assert found["reductions"] == 0


def test_the_model_is_left_as_it_was(processes: list[dict[str, Any]]) -> None:
    for found in processes:
        before, after = found["states"]
        assert after == before
        assert {kind for kind, _, _ in after.values()} == {"DTensor"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("distributed", "leave distributed=True out"),
        ("fetch", "sample 17 cannot be read"),
        ("other samples", "samples differ between the processes"),
        ("other sizes", "numbers of samples differ between the processes"),
        ("exact", "is sharded over processes"),
        ("NaN", "NaN or infinity in parameter '4.bias'"),
        ("mixed precision", "without mp_policy and offload_policy"),
        ("second dimension", "only fully_shard along first dimensions"),
        ("tensor parallel", "another scheme than fully_shard"),
        ("FSDP1", "FSDP1"),
    ],
)
def test_every_process_says_what_is_wrong(two_processes: list[dict[str, Any]], name: str, message: str) -> None:
    for found in two_processes:
        assert message in found["errors"][name]
