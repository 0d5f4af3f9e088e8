from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from flatminima.errors import FlatminimaError
from flatminima.regularizer.regularizer import FisherTraceRegularizer
from flatminima.torch_compat import has_reshard_switches
from support.collectives import counted_collectives, run_in_processes
from support.regularizer_cases import (
    CASES,
    SEED,
    assert_same,
    assert_same_bits,
    assert_same_gradients,
    gradients_of,
    make,
    snapshot,
)

PROCESSES = 2
OPTIONS: dict[str, Any] = {"alpha": 0.05, "beta": 3.0, "max_grad_norm": 0.5}

STEPS: dict[str, tuple[str, dict[str, Any]]] = {
    "whole-batch": ("mlp", {}),
    "sub-batches": ("mlp", {"main_gradient": "sub-batches"}),
    "hvp": ("mlp", {"estimator": "hvp"}),
    "frozen": ("frozen", {}),
    "tied": ("tied", {}),
}

pytestmark = [
    pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo backend"),
    pytest.mark.xdist_group("processes"),
]


def count_exchanges(model: DistributedDataParallel) -> Callable[[], int]:
    """How often the processes average a bucket of gradients (these models fit into one)."""
    buckets = []

    def hook(state, bucket):  # DDP rejects annotations that are strings
        buckets.append(bucket.index())
        return allreduce_hook(None, bucket)

    model.register_comm_hook(None, hook)
    return lambda: len(buckets)


def in_each_process(rank: int, folder: str) -> None:
    """One step in each way; what each process ends up with is saved for the test to judge."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=PROCESSES)
    results: dict[str, Any] = {}
    for name, case, options in [
        ("whole-batch", "mlp", {}),
        ("sub-batches", "mlp", {"main_gradient": "sub-batches"}),
        ("hvp", "mlp", {"estimator": "hvp"}),
        ("tied", "tied", {}),
    ]:
        model, inputs, targets = make(CASES[case], samples=12)
        mine = slice(rank * 6, rank * 6 + 6)
        wrapped = DistributedDataParallel(model)
        exchanges = count_exchanges(wrapped)
        regularizer = FisherTraceRegularizer(wrapped, num_sub_batches=6, **OPTIONS, **options)
        regularizer.backward(F.cross_entropy, inputs[mine], targets[mine])
        results[name] = (gradients_of(model), exchanges(), float(regularizer.diagnostics()["grad_norm"]))

    model, inputs, targets = make(CASES["mlp"], samples=12)  # DDP owns .grad; the second step is what counts
    wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True)
    regularizer = FisherTraceRegularizer(wrapped, num_sub_batches=6, **OPTIONS)
    exchanges = count_exchanges(wrapped)
    for _ in range(2):
        wrapped.zero_grad()
        regularizer.backward(F.cross_entropy, inputs[mine], targets[mine])
    results["bucket-view"] = (gradients_of(model), exchanges() / 2, float(regularizer.diagnostics()["grad_norm"]))

    model, inputs, targets = make(CASES["mlp"], samples=12)  # accumulation: three micro-batches of two samples
    wrapped = DistributedDataParallel(model)
    exchanges = count_exchanges(wrapped)
    regularizer = FisherTraceRegularizer(wrapped, num_sub_batches=2, **OPTIONS)
    for k in range(3):
        part = slice(rank * 6 + 2 * k, rank * 6 + 2 * k + 2)
        regularizer.backward(F.cross_entropy, inputs[part], targets[part], weight=1 / 3, last=k == 2)
    results["accumulated"] = (gradients_of(model), exchanges(), regularizer.diagnostics()["grad_norm"])

    for main_gradient in ("whole-batch", "sub-batches"):
        model, inputs, targets = make(CASES["mlp"], samples=12)
        wrapped = torch.compile(DistributedDataParallel(model), backend="aot_eager")
        regularizer = FisherTraceRegularizer(wrapped, num_sub_batches=3, main_gradient=main_gradient, **OPTIONS)
        for k in range(2):
            part = slice(rank * 6 + 3 * k, rank * 6 + 3 * k + 3)
            regularizer.backward(F.cross_entropy, inputs[part], targets[part], weight=1 / 2, last=k == 1)
        results[f"compiled {main_gradient}"] = (gradients_of(model), 0, regularizer.diagnostics()["grad_norm"])
    calls = count_collectives()
    regularizer.penalize(lambda batch, m=wrapped: F.cross_entropy(m(batch[0]), batch[1]), (inputs, targets))
    results["collectives of the compiled penalty"] = calls()

    results["ways of DDP"] = [as_ddp_trains(rank, ours=ours) for ours in (False, True)]

    model, inputs, targets = make(CASES["batchnorm"], samples=13)  # 7 and 6 sub-batches of one
    model.eval()
    wrapped = DistributedDataParallel(model)
    mine = slice(0, 7) if rank == 0 else slice(7, 13)
    regularizer = FisherTraceRegularizer(wrapped, num_sub_batches=7, **OPTIONS)
    regularizer.backward(F.cross_entropy, inputs[mine], targets[mine])
    results["uneven"] = gradients_of(model)

    model, inputs, targets = make(CASES["batchnorm"], samples=12)
    wrapped = DistributedDataParallel(model)
    calls = count_collectives()
    penalty = FisherTraceRegularizer(wrapped, num_sub_batches=2).penalize(
        lambda batch: F.cross_entropy(wrapped(batch[0]), batch[1]), (inputs, targets)
    )
    assert penalty is not None
    results["collectives of the penalty"] = calls()
    wrapped(inputs)
    results["and of a plain forward"] = calls()
    if can_train_sharded():
        results["sharded"] = under_fsdp(rank)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


class UsedByTheFirst(nn.Module):
    """Has a layer that only the first process's loss uses, one that none uses, one that DDP ignores, and BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm, self.head = nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)
        self.ours, self.unused, self.ignored = nn.Linear(6, 3), nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x: Any) -> Any:
        output = self.head(torch.tanh(self.norm(self.layer(x)))) + self.ignored(x)
        return output + self.ours(x) if dist.get_rank() == 0 else output


def as_ddp_trains(rank: int, *, ours: bool) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Gradients after two plain steps of two micro-batches, and the buffers after each micro-batch; by DDP or by us."""
    torch.manual_seed(SEED)
    model = UsedByTheFirst().double()
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ["ignored.weight", "ignored.bias"])
    inputs, targets = torch.randn(2, 4, 6, 6).double()[rank], torch.randint(3, (2, 4, 6))[rank]
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    regularizer = FisherTraceRegularizer(wrapped, num_sub_batches=1, beta=0.0, main_gradient="sub-batches")
    buffers = []
    for i, last in enumerate((False, True, False, True)):
        if ours:
            regularizer.backward(F.cross_entropy, inputs[i], targets[i], weight=0.5, last=last)
        else:
            with contextlib.nullcontext() if last else wrapped.no_sync():
                (F.cross_entropy(wrapped(inputs[i]), targets[i]) * 0.5).backward()
        buffers.append({name: buffer.clone() for name, buffer in model.named_buffers()})
        gradients = gradients_of(model)
        if last:
            model.zero_grad()
    return gradients, buffers


def can_train_sharded() -> bool:
    """Whether this torch can; the others are refused by name."""
    from torch.distributed.fsdp import FSDPModule

    return has_reshard_switches(FSDPModule)


def under_fsdp(rank: int) -> dict[str, Any]:
    """The same steps, and some more, with a model that FSDP2 has split."""
    mine = slice(rank * 6, rank * 6 + 6)
    results: dict[str, Any] = {}
    for name, (case, options) in STEPS.items():
        model, inputs, targets = sharded(case)
        before = snapshot_of_shards(model)
        regularizer = FisherTraceRegularizer(model, num_sub_batches=6, **OPTIONS, **options)
        with counted_collectives() as exchanges:
            regularizer.backward(F.cross_entropy, inputs[mine], targets[mine])
        assert_same_bits(snapshot_of_shards(model), before)
        results[name] = (whole_gradients_of(model), exchanges, float(regularizer.diagnostics()["grad_norm"]))

    model, inputs, targets = sharded("mlp")
    regularizer = FisherTraceRegularizer(model, num_sub_batches=3)
    with counted_collectives() as exchanges:
        regularizer.penalize(lambda batch, m=model: F.cross_entropy(m(batch[0]), batch[1]), (inputs, targets))
    results["exchanges of the penalty"] = exchanges

    for main_gradient in ("whole-batch", "sub-batches"):  # three micro-batches of two samples
        model, inputs, targets = sharded("mlp")
        regularizer = FisherTraceRegularizer(model, num_sub_batches=2, main_gradient=main_gradient, **OPTIONS)
        for k in range(3):
            part = slice(rank * 6 + 2 * k, rank * 6 + 2 * k + 2)
            regularizer.backward(F.cross_entropy, inputs[part], targets[part], weight=1 / 3, last=k == 2)
        grad_norm = float(regularizer.diagnostics()["grad_norm"])
        results[f"accumulated {main_gradient}"] = (whole_gradients_of(model), None, grad_norm)

    model, inputs, targets = sharded("mlp", outermost=False)
    regularizer = FisherTraceRegularizer(model, num_sub_batches=6, **OPTIONS)
    regularizer.backward(F.cross_entropy, inputs[mine], targets[mine])
    grad_norm = float(regularizer.diagnostics()["grad_norm"])
    results["layers on their own"] = (whole_gradients_of(model), None, grad_norm)

    model, inputs, targets = sharded("mlp", samples=13)  # 7 and 6 sub-batches of one
    uneven = slice(0, 7) if rank == 0 else slice(7, 13)
    regularizer = FisherTraceRegularizer(model, num_sub_batches=7, **OPTIONS)
    regularizer.backward(F.cross_entropy, inputs[uneven], targets[uneven])
    results["uneven"] = whole_gradients_of(model)

    model, inputs, targets = sharded("mlp")
    results["trained"] = {
        name: weights.full_tensor() for name, weights in trained(model, inputs[mine], targets[mine], 6).items()
    }
    results["errors"] = fsdp_errors()
    return results


def sharded(case: str, samples: int = 12, outermost: bool = True) -> tuple[nn.Module, Any, Any]:
    """The case's model split over all processes, every layer on its own where it runs by itself."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, inputs, targets = make(CASES[case], samples=samples)
    mesh = init_device_mesh("cpu", (PROCESSES,))
    if isinstance(model, nn.Sequential):
        for layer in model:
            if next(layer.parameters(), None) is not None:
                fully_shard(layer, mesh=mesh)
    if outermost:
        fully_shard(model, mesh=mesh)
    return model, inputs, targets


def trained(model: nn.Module, inputs: Any, targets: Any, num_sub_batches: int) -> dict[str, Any]:
    """The weights after four steps with clipping, momentum and a schedule; the second half in evaluation mode."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    moved = [model[0].weight]
    regularizer = FisherTraceRegularizer(
        model, num_sub_batches=num_sub_batches, every=2, warmup_steps=3, parameters=moved, **OPTIONS
    )
    for step in range(4):
        if step == 2:
            model.eval()
        optimizer.zero_grad()
        regularizer.backward(F.cross_entropy, inputs, targets)
        optimizer.step()
        with torch.no_grad():
            model(inputs)  # must see the weights of after the step
    return {name: weights.detach() for name, weights in model.named_parameters()}


def fsdp_errors() -> dict[str, str]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    found = {}
    mesh = init_device_mesh("cpu", (PROCESSES,))
    model, inputs, targets = make(CASES["mlp"])
    fully_shard(model[0], mesh=mesh)
    with pytest.raises(FlatminimaError) as error:
        FisherTraceRegularizer(model)
    found["a part only"] = str(error.value)
    model, inputs, targets = make(CASES["mlp"])
    regularizer = FisherTraceRegularizer(model)
    fully_shard(model[0], mesh=mesh)
    with pytest.raises(FlatminimaError) as error:
        regularizer.backward(F.cross_entropy, inputs, targets)
    found["a part only, later"] = str(error.value)
    model, inputs, targets = make(CASES["mlp"])
    fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    with pytest.raises(FlatminimaError) as error:
        FisherTraceRegularizer(model).backward(F.cross_entropy, inputs, targets)
    found["mixed precision"] = str(error.value)
    model, inputs, targets = sharded("mlp")
    before = snapshot_of_shards(model)
    with pytest.raises(FlatminimaError) as error:
        FisherTraceRegularizer(model).backward(F.cross_entropy, inputs * torch.nan, targets)
    found["NaN"] = str(error.value)
    assert_same_bits(snapshot_of_shards(model), before)
    assert all(p.grad is None for p in model.parameters())
    return found


def snapshot_of_shards(model: nn.Module) -> dict[str, Any]:
    return {name: p.to_local().detach().clone() for name, p in model.named_parameters()}


def whole_gradients_of(model: nn.Module) -> dict[str, Any]:
    return {name: None if g is None else g.full_tensor() for name, g in gradients_of(model).items()}


def count_collectives() -> Any:
    """Starts counting; the function returned stops it and gives the count."""
    before = dist.distributed_c10d._get_default_group()._get_sequence_number_for_group()
    return lambda: dist.distributed_c10d._get_default_group()._get_sequence_number_for_group() - before


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("processes")
    run_in_processes(in_each_process, PROCESSES, str(folder))
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(PROCESSES)]


@pytest.fixture
def sharded_processes(processes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the processes have found with weights that they share."""
    if not can_train_sharded():
        pytest.skip("this torch cannot train under fully_shard")
    return [found["sharded"] for found in processes]


@pytest.mark.parametrize(
    ("name", "case", "options"),
    [
        ("whole-batch", "mlp", {}),
        ("sub-batches", "mlp", {"main_gradient": "sub-batches"}),
        ("hvp", "mlp", {"estimator": "hvp"}),
        ("tied", "tied", {}),
        ("bucket-view", "mlp", {}),
        ("accumulated", "mlp", {}),
    ],
)
def test_two_processes_are_one_with_the_joined_batch(
    processes: list[dict[str, Any]], name: str, case: str, options: dict[str, Any]
) -> None:
    """Sub-batches of one sample, so that no random split stands between them; clipped, after one exchange."""
    model, inputs, targets = make(CASES[case], samples=12)
    regularizer = FisherTraceRegularizer(model, num_sub_batches=12, **OPTIONS, **options)
    regularizer.backward(F.cross_entropy, inputs, targets)
    expected = gradients_of(model)
    for gradients, exchanges, grad_norm in (found[name] for found in processes):
        assert_same_gradients(gradients, expected)
        assert grad_norm == pytest.approx(regularizer.diagnostics()["grad_norm"])
        assert exchanges == (0 if name == "sub-batches" else 1)


@pytest.mark.parametrize("main_gradient", ["whole-batch", "sub-batches"])
def test_a_model_compiled_around_ddp_is_trained_as_ddp_is(processes: list[dict[str, Any]], main_gradient: str) -> None:
    """Two micro-batches of three sub-batches of one sample each; the penalty's passes exchange nothing."""
    assert_joined(processes, f"compiled {main_gradient}", "mlp", {})
    assert [found["collectives of the compiled penalty"] for found in processes] == [0] * PROCESSES


@pytest.mark.parametrize("name", STEPS)
def test_two_processes_that_share_the_weights_are_one_with_the_joined_batch(
    sharded_processes: list[dict[str, Any]], name: str
) -> None:
    case, options = STEPS[name]
    assert_joined(sharded_processes, name, case, options)
    for _, exchanges, _ in (found[name] for found in sharded_processes):
        # FSDP2 reduces once per layer; without a main pass, there is a reduction per parameter
        layers, parameters = (1, 3) if case == "tied" else (2, 4)
        reductions = sum(count for call, count in exchanges.items() if "reduce_scatter" in call)
        assert reductions == (parameters if "main_gradient" in options else layers)


def test_penalty_passes_of_shared_weights_gather_them_once(sharded_processes: list[dict[str, Any]]) -> None:
    for found in sharded_processes:
        assert found["exchanges of the penalty"] == {"c10d::_allgather_base_": 2}  # one per layer


@pytest.mark.parametrize("main_gradient", ["whole-batch", "sub-batches"])
def test_micro_batches_of_shared_weights_add_up(sharded_processes: list[dict[str, Any]], main_gradient: str) -> None:
    assert_joined(sharded_processes, f"accumulated {main_gradient}", "mlp", {})


def test_layers_may_share_their_weights_without_an_outermost_module(sharded_processes: list[dict[str, Any]]) -> None:
    assert_joined(sharded_processes, "layers on their own", "mlp", {})


def assert_joined(processes: list[dict[str, Any]], name: str, case: str, options: dict[str, Any]) -> None:
    model, inputs, targets = make(CASES[case], samples=12)
    regularizer = FisherTraceRegularizer(model, num_sub_batches=12, **OPTIONS, **options)
    regularizer.backward(F.cross_entropy, inputs, targets)
    for gradients, _, grad_norm in (found[name] for found in processes):
        assert_same_gradients(gradients, gradients_of(model))
        assert grad_norm == pytest.approx(regularizer.diagnostics()["grad_norm"])


def test_training_shared_weights_is_training(sharded_processes: list[dict[str, Any]]) -> None:
    model, inputs, targets = make(CASES["mlp"], samples=12)
    expected = trained(model, inputs, targets, 12)
    for found in sharded_processes:
        assert found["trained"].keys() == expected.keys()
        for name, weights in expected.items():
            torch.testing.assert_close(found["trained"][name], weights, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a part only", "fully_shard must hold all that is trained, also 2.weight"),
        ("a part only, later", "fully_shard must hold all that is trained, also 2.weight"),
        ("mixed precision", "is torch.bfloat16: keep trainable parameters in float32"),
        ("NaN", "the loss is nan"),
    ],
)
def test_errors_with_shared_weights(sharded_processes: list[dict[str, Any]], name: str, message: str) -> None:
    for found in sharded_processes:
        assert message in found["errors"][name]


def test_uneven_batches_of_shared_weights_end(sharded_processes: list[dict[str, Any]]) -> None:
    first, second = (found["uneven"] for found in sharded_processes)
    assert_same_gradients(first, second)


def test_a_gradient_of_sub_batches_leaves_what_ddp_leaves(processes: list[dict[str, Any]]) -> None:
    """No gradient where no process has one, this process's own where DDP ignores it; buffers of the first process."""
    for found in processes:
        (gradients, buffers), (ours, our_buffers) = found["ways of DDP"]
        assert gradients["unused.weight"] is None
        assert gradients["ours.weight"] is not None
        assert_same_gradients(ours, gradients)
        assert_same(our_buffers, buffers)
    (_, first), (_, second) = (found["ways of DDP"][0] for found in processes)
    assert not torch.equal(first[-1]["norm.running_mean"], second[-1]["norm.running_mean"])
    assert not torch.equal(*(found["ways of DDP"][0][0]["ignored.weight"] for found in processes))


def test_uneven_batches_end(processes: list[dict[str, Any]]) -> None:
    """One process runs 7 sub-batches, the other 6; neither waits for the other until the exchange."""
    first, second = (found["uneven"] for found in processes)
    assert_same_gradients(first, second)


def test_penalty_passes_do_not_communicate(processes: list[dict[str, Any]]) -> None:
    assert [found["collectives of the penalty"] for found in processes] == [0] * PROCESSES
    assert all(found["and of a plain forward"] > 0 for found in processes), "a plain forward hands buffers on"


@pytest.fixture
def one_process(tmp_path: Path) -> Any:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_synchronized_batchnorm_uses_this_process_alone_in_penalty_passes() -> None:
    """On the CPU a SyncBatchNorm that tried to communicate would raise."""
    model, inputs, targets = make(CASES["sync-batchnorm"])
    penalties = []
    for network in (copy.deepcopy(model), model):
        if network is not model:
            network[1] = nn.BatchNorm1d(5).double()
        else:
            with pytest.raises(ValueError, match="SyncBatchNorm expected input tensor to be on"):
                network(inputs)
        torch.manual_seed(SEED)
        before = snapshot(network)
        penalties.append(
            FisherTraceRegularizer(network, num_sub_batches=4).penalize(
                lambda batch, n=network: F.cross_entropy(n(batch[0]), batch[1]), (inputs, targets)
            )
        )
        assert_same_bits(snapshot(network), before)
    for ours, plain in zip(penalties[1].gradient, penalties[0].gradient, strict=True):
        torch.testing.assert_close(ours, plain)


@pytest.mark.usefixtures("one_process")
def test_refuses_inner_wrapped_models() -> None:
    inner = nn.Sequential(DistributedDataParallel(make(CASES["mlp"])[0]))
    with pytest.raises(FlatminimaError, match="DistributedDataParallel must be the outermost module"):
        FisherTraceRegularizer(inner)
