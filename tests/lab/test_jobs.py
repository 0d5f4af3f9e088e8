from __future__ import annotations

import contextlib
import errno
import multiprocessing.forkserver
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from flatminima.errors import FlatminimaError
from flatminima.lab.jobs import PRELOADED, Executor, Failure, Local, Ray, WorkerPool, available_cores, run_all
from flatminima.lab.runs.folder import RunFolder
from flatminima.lab.runs.records import RunResult
from flatminima.lab.runs.spec import RunSpec
from flatminima.lab.runs.training import train
from support.commands import Command, environment

SPEC = RunSpec(model="mlp", data="digits", train_size=100, augmentation="no-aug", batch_size=10, epochs=4)
SPECS = [replace(SPEC, seed=seed) for seed in range(4)]
BOTH = pytest.mark.parametrize("executor", [Local(), WorkerPool(2)], ids=["local", "processes"])


def square(number: int) -> tuple[int, int, int]:
    time.sleep(0.02 * (3 - number))  # later tasks end first
    return number**2, os.getpid(), torch.get_num_threads()


def are_imported(names: tuple[str, ...]) -> bool:
    return all(name in sys.modules for name in names)


def fail(number: int) -> int:
    if number == 1:
        raise ValueError("task 1\nis broken")
    if number == 2:
        raise FlatminimaError("task 2: choose another")
    return number


def die_once(folder: Path) -> int:
    """Killed while the first of two attempts runs."""
    attempts = len(list(folder.iterdir()))
    (folder / str(attempts)).touch()
    if attempts == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return os.getpid()


def die(status: int) -> int:
    if status:
        os._exit(status)
    return status


def gpu(task: float) -> str:
    time.sleep(task)
    return os.environ["CUDA_VISIBLE_DEVICES"]


def train_one(task: tuple[RunSpec, Path]) -> RunResult:
    """As experiments do, in small: training alone, saved after every update."""
    torch.set_num_threads(1)
    task[1].mkdir(parents=True, exist_ok=True)
    (task[1] / f"worker.{os.getpid()}").touch()
    return train(task[0], task[1], progress=False, checkpoint_seconds=0.0, wait=True)


def numbers(results: list[Any]) -> list[Any]:
    return [replace(result, folder=Path(), seconds=0.0) for result in results]


def trained_once(results: list[Any]) -> list[Any]:
    """A result's file as it was first written: work that was done twice has another."""
    return [(result.folder / "result.json").stat().st_mtime_ns for result in results]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    root = tmp_path_factory.mktemp("expected")
    threads = torch.get_num_threads()
    found = numbers([train_one((spec, root)) for spec in SPECS])
    torch.set_num_threads(threads)
    return found


@BOTH
def test_results_keep_the_tasks_order(executor: Executor) -> None:
    assert [value for value, _, _ in run_all(square, [0, 1, 2, 3], executor, progress=False)] == [0, 1, 4, 9]


def test_workers_are_processes_with_the_threads_asked_for() -> None:
    results = run_all(square, [0, 1, 2, 3], WorkerPool(2, threads=3), progress=False)
    assert {threads for _, _, threads in results} == {3}
    assert 1 <= len({pid for _, pid, _ in results} - {os.getpid()}) <= 2


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere every worker imports for itself")
def test_workers_begin_with_the_slow_imports_done() -> None:
    pool = WorkerPool(1)
    pool.prepare()
    pool.prepare()
    assert run_all(are_imported, [tuple(PRELOADED)], pool, progress=False) == [True]


def test_no_tasks_no_results() -> None:
    assert run_all(square, [], WorkerPool(2), progress=False) == []


@BOTH
def test_a_failed_task_is_listed_and_the_others_go_on(executor: Executor) -> None:
    assert run_all(fail, [0, 1, 2, 3], executor, progress=False) == [
        0,
        Failure(1, "ValueError: task 1 is broken"),
        Failure(2, "task 2: choose another"),
        3,
    ]


def test_a_task_whose_worker_is_killed_is_performed_again(tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    first, second = run_all(die_once, folders, WorkerPool(1), progress=False)
    assert [len(list(folder.iterdir())) for folder in folders] == [2, 2]
    assert first != second  # each came from the worker that took the place of a killed one


def test_a_task_that_kills_every_worker_is_listed_and_costs_nobody_else() -> None:
    results = run_all(die, [0, 3, 0, 0], WorkerPool(2, retries=1), progress=False)
    assert results == [0, Failure(3, "its worker died 2 times, with exit status 3"), 0, 0]


def test_gpus_are_dealt_out_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    assert sorted(run_all(gpu, [1.0, 1.0, 1.0], WorkerPool(3), progress=False)) == ["4", "4", "7"]


def test_available_cores() -> None:
    assert 1 <= available_cores() <= (os.cpu_count() or 1)


# ---------------------------------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------------------------------


def test_runs_give_the_same_numbers_wherever_they_go(tmp_path: Path, expected: list[Any]) -> None:
    results = run_all(train_one, [(spec, tmp_path) for spec in SPECS], WorkerPool(2), progress=False)
    assert numbers(results) == expected


def test_a_full_disk_and_a_corrupt_folder_cost_no_other_run(
    tmp_path: Path, expected: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    full = RunFolder.of(tmp_path, SPECS[1]).path
    other = RunFolder.of(tmp_path, SPECS[2])
    other.path.mkdir()
    other.write_spec(SPECS[3])
    sync = os.fsync

    def no_space(descriptor: int) -> None:
        if Path(f"/proc/self/fd/{descriptor}").readlink().parent == full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", no_space)
    results = run_all(train_one, [(spec, tmp_path) for spec in SPECS], Local(), progress=False)
    assert numbers([results[0], results[3]]) == [expected[0], expected[3]]
    assert isinstance(results[1], Failure)
    assert "No space left on device; free some space" in results[1].error
    assert isinstance(results[2], Failure)
    assert "holds another run than its name says" in results[2].error


def train_all(root: Path) -> None:
    run_all(train_one, [(spec, root) for spec in SPECS], WorkerPool(2), progress=False)


@contextlib.contextmanager
def command(root: Path) -> Iterator[Command]:
    """The whole experiment as a command of its own."""
    process = Command(root.parent, train_all, root)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def workers_of(root: Path) -> list[int]:
    """The workers that live."""
    return [pid for path in root.glob("worker.*") if lives(pid := int(path.suffix[1:]))]


def lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def wait_until(condition: Callable[[], Any], seconds: float = 200.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)  # the condition reads files: asked all the time, it takes a core from the workers


def updates(root: Path) -> int:
    """How far all runs are."""
    total = 0
    for spec in SPECS:
        folder = RunFolder.of(root, spec)
        if folder.status == "finished":
            total += 40
        elif (point := folder.read_resume_point()) is not None:
            total += point.iteration
    return total


@pytest.mark.timeout(900)
def test_killed_workers_and_killed_commands_end_in_the_same_numbers(tmp_path: Path, expected: list[Any]) -> None:
    """SIGKILL at random moments: a worker, then the whole command, whose workers must not live on; then it ends."""
    root, moments = tmp_path / "runs", random.Random(0)
    with command(root) as process:
        wait_until(lambda: updates(root) > 3)
        time.sleep(moments.uniform(0, 0.1))
        os.kill(moments.choice(workers_of(root)), signal.SIGKILL)
        wait_until(lambda: updates(root) > 50)
        time.sleep(moments.uniform(0, 0.1))
        assert workers_of(root)
        process.kill()
        wait_until(lambda: not workers_of(root), 10)
    finished = [RunFolder.of(root, spec).read_result() for spec in SPECS]
    before = trained_once([result for result in finished if result is not None])
    assert len(before) < len(SPECS)
    with command(root) as process:
        assert process.communicate()[1] == ""
        assert process.returncode == 0
    results = run_all(train_one, [(spec, root) for spec in SPECS], Local(), progress=False)
    assert numbers(results) == expected
    assert trained_once([result for result, early in zip(results, finished, strict=True) if early]) == before


def test_two_commands_on_one_folder_share_the_work(tmp_path: Path, expected: list[Any]) -> None:
    root = tmp_path / "runs"
    with command(root) as first, command(root) as second:
        for process in (first, second):
            assert process.communicate()[1] == ""
            assert process.returncode == 0
    results = [RunFolder.of(root, spec).read_result() for spec in SPECS]
    assert numbers(results) == expected


def test_interruption_saves_every_run_and_leaves_no_worker_behind(tmp_path: Path) -> None:
    script = tmp_path / "slow.py"
    script.write_text(
        "import os, signal, sys\n"
        "from dataclasses import replace\n"
        "from pathlib import Path\n"
        "from flatminima.lab.jobs import WorkerPool, run_all\n"
        "from flatminima.lab.runs.spec import RunSpec\n"
        "from flatminima.lab.runs import training\n"
        "def slow(spec):\n"
        "    update = training.Session.update\n"
        "    def noted(run):\n"
        "        update(run)\n"
        "        Path(sys.argv[1], str(os.getpid())).touch()\n"
        "    training.Session.update = noted\n"
        "    training.train(spec, Path(sys.argv[1], 'runs'), checkpoint_seconds=1e9, progress=False)\n"
        "if __name__ == '__main__':\n"
        "    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it\n"
        f"    spec = RunSpec.from_json({replace(SPEC, epochs=100_000).to_json()!r})\n"
        "    run_all(slow, [spec, replace(spec, seed=1)], WorkerPool(2), progress=False)\n"
    )
    process = subprocess.Popen([sys.executable, script, tmp_path], env=environment(), stderr=subprocess.PIPE, text=True)
    folders = [RunFolder.of(tmp_path / "runs", replace(SPEC, epochs=100_000, seed=seed)) for seed in (0, 1)]
    try:
        wait_until(lambda: len([path for path in tmp_path.iterdir() if path.name.isdigit()]) == 2)  # both train
        process.send_signal(signal.SIGINT)
        error = process.communicate(timeout=60)[1]
    finally:
        process.kill()  # its workers end with it
    assert process.returncode != 0
    assert error.strip().splitlines()[-1] == "KeyboardInterrupt"
    assert error.count("Traceback") == 1  # the workers say nothing
    for folder in folders:
        point = folder.read_resume_point()
        assert point is not None
        assert point.iteration > 0
    workers = [int(path.name) for path in tmp_path.iterdir() if path.name.isdigit()]
    assert len(workers) == 2
    assert not any(map(lives, workers))


class Starting:
    """A worker that Ctrl-C meets as it starts, and one before it that runs."""

    made: ClassVar[list[Starting]] = []

    def __init__(self, **_: Any) -> None:
        self.stopped = self.is_started = False
        self.made.append(self)

    def start(self) -> None:
        if len(self.made) == 2:
            raise KeyboardInterrupt
        self.is_started = True

    def terminate(self) -> None:
        assert self.is_started
        self.stopped = True

    def join(self, timeout: float | None = None) -> None:
        assert self.is_started

    kill = join


def test_ctrl_c_while_workers_start_stops_those_that_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multiprocessing.get_context("forkserver"), "Process", Starting, raising=False)
    Starting.made.clear()
    with pytest.raises(KeyboardInterrupt):
        run_all(square, [0, 1, 2], WorkerPool(3), progress=False)
    assert [worker.stopped for worker in Starting.made] == [True, False]


def test_the_server_of_workers_is_deaf_to_ctrl_c(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal sends it to all processes of the program: the server, while it imports, would print a traceback."""

    def inherited() -> None:
        masks.append(signal.pthread_sigmask(signal.SIG_BLOCK, []))

    masks: list[Any] = []
    monkeypatch.setattr(multiprocessing.forkserver, "ensure_running", inherited)
    monkeypatch.setattr(multiprocessing.get_context("forkserver"), "Process", Starting, raising=False)
    Starting.made.clear()
    with pytest.raises(KeyboardInterrupt):
        run_all(square, [0, 1, 2], WorkerPool(3), progress=False)
    assert all(signal.SIGINT in mask for mask in masks)
    assert len(masks) == 2
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


# ---------------------------------------------------------------------------------------------------------------------
# Ray
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A head node that performs nothing, to which tests add nodes of one core."""
    ray = pytest.importorskip("ray", reason="Ray is not installed (extra 'cluster')")
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)]))
    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    yield found
    ray.shutdown()
    found.shutdown()


def test_ray_without_a_cluster_there_is_one_line() -> None:
    pytest.importorskip("ray", reason="Ray is not installed (extra 'cluster')")
    with pytest.raises(FlatminimaError, match=r"there is no Ray cluster at 127\.0\.0\.1:1") as caught:
        run_all(square, [1], Ray("127.0.0.1:1"), progress=False)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_tasks_on_a_cluster(cluster: Any) -> None:
    cluster.add_node(num_cpus=2)
    executor = Ray(cluster.address, threads=2)
    results = run_all(fail, [0, 1, 2, 3], executor, progress=False)
    assert results == run_all(fail, [0, 1, 2, 3], Local(), progress=False)
    ((_, pid, threads),) = run_all(square, [1], executor, progress=False)
    assert pid != os.getpid()
    assert threads == 2


@pytest.mark.slow
def test_runs_on_a_cluster_survive_the_death_of_a_node(cluster: Any, tmp_path: Path, expected: list[Any]) -> None:
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    executor, ended = Ray(cluster.address), {}
    for number, outcome in executor.run(train_one, [(spec, tmp_path) for spec in [*SPECS, replace(SPEC, lr=1e30)]]):
        ended[number] = outcome
        if len(ended) == 1:
            cluster.remove_node(nodes[0], allow_graceful=False)
    assert numbers([ended[number] for number in range(4)]) == expected
    assert isinstance(ended[4], Failure)
    assert "training failed in epoch 1" in ended[4].error
