from __future__ import annotations

import datetime
import os
import time
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import flatminima as fm
from flatminima.gramian.rules import RULES, rule, temporary_rules
from flatminima.parallel.processes import Processes
from support.collectives import free_port, run_in_processes

pytestmark = [
    pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo backend"),
    pytest.mark.xdist_group("processes"),
]

OPTIONS: dict[str, Any] = {"subset_size": 6, "trials": 3, "progress": False}
ENDS_WITHIN = 90
"""Seconds; far below the process group's timeout of half an hour."""


class Failing(nn.Module):
    """Fails in the pass of that number, forward or backward; deeper layers' weights are then still to be gathered."""

    forward_passes = backward_passes = -1

    def forward(self, x: Tensor) -> Tensor:
        self.forward_passes -= 1
        if self.forward_passes == 0:
            raise torch.OutOfMemoryError("not enough memory")
        x = x.clone()
        if x.requires_grad:
            x.register_hook(self._backward)
        return x

    def _backward(self, grad: Tensor) -> None:
        self.backward_passes -= 1
        if self.backward_passes == 0:
            raise torch.OutOfMemoryError("not enough memory")


class Unreadable(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __init__(self, data: tuple[Tensor, Tensor], index: int) -> None:
        self.data, self.index = data, index

    def __len__(self) -> int:
        return len(self.data[1])

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if index == self.index:
            raise OSError("disk error")
        return self.data[0][index], self.data[1][index]


def network_and_data() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    y = torch.arange(30) % 3
    x = torch.randn(30, 6, dtype=torch.float64) + 5 * F.one_hot(y, 6)
    layers = [nn.Linear(6, 7), nn.Tanh(), Failing(), nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3)]
    return nn.Sequential(*layers).double(), (x, y)


def sharded() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, data = network_and_data()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh), data


@contextmanager
def failing_rule(fails: bool, at: str) -> Any:
    """The rule for linear layers, or the forming of its rows, fails here."""
    original = RULES[F.linear]

    def failing(*args: Any, **kwargs: Any) -> Any:
        if at == "rule":
            raise ValueError("no rule for this")
        uses = original(*args, **kwargs)
        for use in uses:
            use.rows, use.product = no_memory, None
        return uses

    def no_memory(*args: Any) -> Tensor:
        raise torch.OutOfMemoryError("not enough memory")

    with temporary_rules():
        if fails:
            rule(F.linear)(failing)
        yield


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits, targets, reduction="none")


def failing_loss(fails: bool, at: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Fails here in the call of that number."""
    calls = 0

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if fails and calls == at:
            error = RuntimeError("the loss fails")
            error.unpicklable = lambda: None  # type: ignore[attr-defined]
            raise error
        return cross_entropy(logits, targets)

    return loss


def error_of(action: Callable[[], Any]) -> tuple[str, str]:
    try:
        action()
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


def in_each_process(rank: int, world: int, port: int, folder: str) -> None:
    """The last process alone fails, in every way; what all make of it is saved for the tests to judge."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    fails = rank == world - 1
    found: dict[str, Any] = {}

    def note(name: str, action: Callable[[nn.Module, tuple[Tensor, Tensor]], Any], **passes: int) -> None:
        model, data = sharded()
        if fails:
            vars(model[2]).update(passes)
        error = error_of(lambda: action(model, data))
        vars(model[2]).update(dict.fromkeys(passes, -1))
        found[name] = error, fm.gram(model, data[0][:6], data[1][:6])

    def gram(model: nn.Module, data: tuple[Tensor, Tensor]) -> None:
        fm.gram(model, data[0][:6], data[1][:6])

    def measure(model: nn.Module, data: Any) -> None:
        fm.measure(model, data, **OPTIONS)

    note("plan", gram, forward_passes=1)
    note("forward", gram, forward_passes=2)
    note("backward", gram, backward_passes=1)
    note("spot check", gram, backward_passes=2)
    with failing_rule(fails, at="rule"):
        rule, rows = error_of(lambda: gram(*sharded())), None
    with failing_rule(fails, at="rows"):
        rows = error_of(lambda: gram(*sharded()))
    found["rule"], found["rows"] = (rule, None), (rows, None)
    note("training loss", measure, forward_passes=1)
    note("trial", measure, forward_passes=6)
    note("loss", lambda model, data: fm.measure(model, data, loss=failing_loss(fails, at=4), **OPTIONS))
    note("data", lambda model, data: measure(model, Unreadable(data, 3 if fails else -1)))

    model, data = network_and_data()
    split = {**OPTIONS, "trials": 5, "distributed": True}
    other = nn.Sequential(*network_and_data()[0])
    models = {"a": model, "b": other}
    for at in (1, 2):
        loss = failing_loss(fails, at)
        found[f"split trials, loss {at}"] = (
            error_of(lambda loss=loss: fm.measure(model, data, loss=loss, **split)),
            None,
        )
        loss = failing_loss(fails, at)
        found[f"split comparison, loss {at}"] = (
            error_of(lambda loss=loss: fm.compare(models, data, loss=loss, **split)),
            None,
        )
    found["split trials, data"] = (
        error_of(lambda: fm.measure(model, Unreadable(data, 3 if fails else -1), **split)),
        None,
    )

    with torch.no_grad():
        model[5].bias[1] = torch.nan if fails else 0
    found["ours"] = error_of(lambda: fm.measure(model, data, **split)), None
    found["afterwards"] = Processes.all().gather(lambda: rank)

    model, data = sharded()
    store = dist.distributed_c10d._get_process_group_store(dist.group.WORLD)
    store.set_timeout(datetime.timedelta(seconds=2))
    if not fails:
        found["killed"] = error_of(lambda: gram(model, data)), None
    torch.save(found, f"{folder}/{rank}.pt")
    os._exit(0)


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)])
def processes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("processes")
    run_in_processes(in_each_process, request.param, request.param, free_port(), str(folder), within=ENDS_WITHIN)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(request.param)]


OUT_OF_MEMORY = "OutOfMemoryError: not enough memory"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("plan", OUT_OF_MEMORY),
        ("forward", OUT_OF_MEMORY),
        ("backward", OUT_OF_MEMORY),
        ("spot check", OUT_OF_MEMORY),
        ("rule", "ValueError: no rule for this"),
        ("rows", OUT_OF_MEMORY),
        ("training loss", OUT_OF_MEMORY),
        ("trial", OUT_OF_MEMORY),
        ("loss", "RuntimeError: the loss fails"),
        ("data", "OSError: disk error"),
        ("split trials, loss 1", "RuntimeError: the loss fails"),
        ("split trials, loss 2", "RuntimeError: the loss fails"),
        ("split comparison, loss 1", "RuntimeError: the loss fails"),
        ("split comparison, loss 2", "RuntimeError: the loss fails"),
        ("split trials, data", "OSError: disk error"),
    ],
)
def test_all_processes_end_where_one_fails(processes: list[dict[str, Any]], name: str, message: str) -> None:
    *others, failed = (found[name][0] for found in processes)
    kind, reason = message.split(": ")
    assert failed == (kind, reason)
    for other in others:
        assert other == ("FlatminimaError", f"process {len(others)} of {len(processes)} failed: {message}")


@pytest.mark.parametrize(
    "name", ["plan", "forward", "backward", "spot check", "training loss", "trial", "loss", "data"]
)
def test_a_model_that_failed_on_one_process_can_be_measured_again(processes: list[dict[str, Any]], name: str) -> None:
    model, (x, y) = network_and_data()
    for found in processes:
        torch.testing.assert_close(found[name][1], fm.gram(model, x[:6], y[:6]), rtol=1e-10, atol=0)


def test_errors_of_ours_keep_their_type(processes: list[dict[str, Any]]) -> None:
    *others, failed = (found["ours"][0] for found in processes)
    assert failed == ("NonFiniteError", "NaN or infinity in parameter '5.bias': " + failed[1].split(": ", 1)[1])
    for other in others:
        assert other == ("NonFiniteError", f"process {len(others)}: {failed[1]}")


def test_the_process_group_stays_usable(processes: list[dict[str, Any]]) -> None:
    for found in processes:
        assert found["afterwards"] == list(range(len(processes)))


def test_waiting_for_a_killed_process_ends_with_the_timeout(processes: list[dict[str, Any]]) -> None:
    for found in processes[:-1]:
        kind, message = found["killed"][0]
        assert kind == "FlatminimaError"
        assert "within the process group's timeout" in message


def test_without_torchrun_a_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setenv("RANK", "3")  # of some other launcher
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert Processes.launched() == Processes(0, 1)


def test_torchrun_says_which_process_this_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"TORCHELASTIC_RUN_ID": "none", "RANK": "3", "WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    assert Processes.launched() == Processes(3, 8)


def test_alone_an_action_is_done_and_its_error_raised() -> None:
    assert Processes().first(lambda: 5) == 5
    with pytest.raises(ZeroDivisionError):
        Processes().first(lambda: 1 // 0)


def measured_on_the_first_alone(rank: int, world: int, port: int, folder: str) -> None:
    """What the first process measures of DDP's models while the others do not."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    models = [nn.parallel.DistributedDataParallel(with_running_statistics()[0]) for _ in range(2)]
    if rank == 0:
        for model in (models[0], torch.compile(models[1], backend="eager")):
            torch.save(measured(model), f"{folder}/{type(model).__name__}.pt")
        Path(folder, "done").touch()
    while not Path(folder, "done").exists():
        time.sleep(0.1)
    dist.destroy_process_group()


def with_running_statistics() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    _, data = network_and_data()
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).double(), data


def measured(model: nn.Module) -> dict[str, Any]:
    """Without what took how long."""
    _, data = network_and_data()
    line = fm.landscape(model, data, dimensions=1, steps=3, progress=False)
    return {
        "measure": fm.measure(model, data, **OPTIONS).log_det_fisher.per_trial,
        "compare": fm.compare({"a": model, "b": model}, data, **OPTIONS)["a"].log_det_fisher.per_trial,
        "landscape": line.losses,
    }


@pytest.mark.filterwarnings("ignore::flatminima.errors.NotAMinimumWarning")
def test_one_process_alone_may_measure_a_model_in_ddp(tmp_path: Path) -> None:
    """DDP's forward hands on the buffers: the first process would wait for the others in vain."""
    run_in_processes(measured_on_the_first_alone, 2, 2, free_port(), str(tmp_path), within=ENDS_WITHIN)
    expected = measured(with_running_statistics()[0])
    for name in ("DistributedDataParallel", "OptimizedModule"):
        found = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        for function, values in expected.items():
            assert found[function] == pytest.approx(values), (name, function)
