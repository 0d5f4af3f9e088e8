from __future__ import annotations

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
from flatminima.regularizer import FisherTraceRegularizer
from regularizer_cases import CASES, SEED, assert_same_bits, assert_same_gradients, gradients_of, make, snapshot

PROCESSES = 2
OPTIONS: dict[str, Any] = {"alpha": 0.05, "beta": 3.0, "max_grad_norm": 0.5}

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo backend")


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
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def count_collectives() -> Any:
    """Starts counting; the function returned stops it and gives the count."""
    before = dist.distributed_c10d._get_default_group()._get_sequence_number_for_group()
    return lambda: dist.distributed_c10d._get_default_group()._get_sequence_number_for_group() - before


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(in_each_process, (str(folder),), nprocs=PROCESSES)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(PROCESSES)]


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
def test_refuses_sharded_and_inner_wrapped_models() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    inner = nn.Sequential(DistributedDataParallel(make(CASES["mlp"])[0]))
    with pytest.raises(FlatminimaError, match="DistributedDataParallel must be the outermost module"):
        FisherTraceRegularizer(inner)
    sharded = fully_shard(make(CASES["mlp"])[0], mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(FlatminimaError, match=r"parameter 0.weight is sharded \(FSDP\)"):
        FisherTraceRegularizer(sharded)
