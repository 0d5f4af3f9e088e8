from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from flatminima.errors import FlatminimaError, NonFiniteError
from flatminima.lab.errors import TrainingInterrupted
from flatminima.lab.runs.folder import RunFolder
from flatminima.lab.runs.schedules import MultiStep, Plateau
from flatminima.lab.runs.session import Session
from flatminima.lab.runs.sets import load_sets
from flatminima.lab.runs.spec import FisherPenaltySpec, RegularizerSpec, RunSpec, SharpnessAwareSpec, derived_seed
from flatminima.lab.runs.training import launch, train
from flatminima.regularizer.regularizer import FisherTraceRegularizer
from support.collectives import free_port, run_in_processes

PROCESSES = 2
# 4 updates in each of 3 epochs; the learning rate follows from the losses of both processes.
PLAIN = RunSpec(
    model="mlp",
    data="digits",
    train_size=140,
    augmentation="1-crop-f",
    batch_size=32,
    epochs=3,
    lr=0.05,
    schedule=Plateau(patience=0, threshold=0.5),
    validation=50,
)
# Sub-batches of one sample, so that no random split stands between one process and two; smooth, so nor does rounding.
PENALTY = RegularizerSpec(num_sub_batches=32, estimator="hvp", beta=100.0, max_grad_norm=1.0, start_epoch=1)
AGREEING = {
    "plain": PLAIN,
    "whole-batch": replace(PLAIN, regularizer=PENALTY),
    "sub-batches": replace(PLAIN, regularizer=replace(PENALTY, main_gradient="sub-batches", every=2)),
}
BATCHNORM = replace(PLAIN, model="resnet20", train_size=24, batch_size=8, epochs=2)
DIVERGING = replace(PLAIN, lr=1e15, schedule=MultiStep(()))

pytestmark = [
    pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo backend"),
    pytest.mark.xdist_group("processes"),
]


def torchrun_environment(rank: int, port: int = 0) -> dict[str, str]:
    """What torchrun tells a process."""
    return {
        "TORCHELASTIC_RUN_ID": "none",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": str(PROCESSES),
        "LOCAL_WORLD_SIZE": str(PROCESSES),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


class Crash(BaseException):
    """The process is gone: nothing may catch this."""


def patched_update(before: Any) -> pytest.MonkeyPatch:
    """Do something before every update."""
    patch, update = pytest.MonkeyPatch(), Session.update

    def patched(run: Session) -> None:
        before(run)
        update(run)

    patch.setattr(Session, "update", patched)
    return patch


def failure(spec: RunSpec, root: Path) -> tuple[str, str]:
    """The class and the message of the error that training ends in."""
    with pytest.raises(FlatminimaError) as caught:
        train(spec, root, accelerator="cpu")
    return type(caught.value).__name__, str(caught.value)


def in_each_process(rank: int, folder: Path, port: int) -> None:
    """What each of the processes sees is saved for the tests to judge."""
    os.environ.update(torchrun_environment(rank, port))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])  # blocked where the lab's worker pool began the server
    torch.set_num_threads(1)
    seen: dict[str, Any] = {}

    seeds: list[int] = []
    patch = patched_update(lambda run: seeds.append(torch.initial_seed()))
    for spec in (*AGREEING.values(), BATCHNORM):
        train(spec, folder / "shared", accelerator="cpu", progress=False)
    patch.undo()
    seen["seeds"] = seeds
    seen["again"] = train(PLAIN, folder / "shared", accelerator="cpu").test_error

    run = Session(PLAIN, load_sets(PLAIN), launch(PLAIN, "cpu"))
    seen["batch"] = run.next_batch()

    patch, compile_, graphs = pytest.MonkeyPatch(), torch.compile, []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    patch.setattr(torch, "compile", lambda model, *, dynamic, mode: compile_(model, backend=backend, dynamic=dynamic))
    train(AGREEING["whole-batch"], folder / "compiled", accelerator="cpu", compile=True)
    patch.undo()
    seen["graphs"] = len(graphs)

    for name, spec in {"stopped": AGREEING["whole-batch"], "stopped with BatchNorm": BATCHNORM}.items():
        patch = patched_update(
            lambda run: signal.raise_signal(signal.SIGINT) if (rank, run.iteration) == (1, 4) else None
        )
        try:
            train(spec, folder / "stopped", accelerator="cpu", checkpoint_seconds=0.0)
        except TrainingInterrupted as interrupted:
            seen[name] = str(interrupted)
        patch.undo()
        train(spec, folder / "stopped", accelerator="cpu")

    def die(run: Session) -> None:
        if run.iteration == 6:
            raise Crash

    patch = patched_update(die)
    try:
        train(PLAIN, folder / "crashed", accelerator="cpu", checkpoint_seconds=0.0)
    except Crash:
        seen["crashed"] = True
    patch.undo()
    dist.barrier()
    train(PLAIN, folder / "crashed", accelerator="cpu")

    seen["diverging"] = failure(DIVERGING, folder / "failed")
    seen["no data"] = failure(replace(PLAIN, data="nowhere"), folder / "failed")

    backward = FisherTraceRegularizer.backward

    def failing(regularizer: FisherTraceRegularizer, *args: Any) -> Any:
        if (rank, regularizer.step) == (1, 1):
            raise NonFiniteError("the loss is nan")
        return backward(regularizer, *args)

    patch = pytest.MonkeyPatch()
    patch.setattr(FisherTraceRegularizer, "backward", failing)
    spec = replace(AGREEING["whole-batch"], seed=1)
    torch.save(seen, folder / f"{rank}.pt")
    try:
        train(spec, folder / "failed alone", accelerator="cpu")
    except NonFiniteError as error:
        assert rank == 1
        (folder / "failed alone" / "message").write_text(str(error))
    except RuntimeError:  # the other process has gone
        assert rank == 0
    os._exit(0)  # without a word of gloo's about it


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs of the two processes, and those of one process in ``alone``."""
    folder = tmp_path_factory.mktemp("processes")
    run_in_processes(in_each_process, PROCESSES, folder, free_port())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for spec in AGREEING.values():
        train(spec, folder / "alone", accelerator="cpu")
    failure(DIVERGING, folder / "alone")
    torch.set_num_threads(threads)
    return folder


@pytest.fixture(scope="module")
def seen(folder: Path) -> list[dict[str, Any]]:
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(PROCESSES)]


@pytest.mark.parametrize(
    ("root", "spec"),
    [*(("shared", spec) for spec in AGREEING.values()), ("compiled", AGREEING["whole-batch"])],
    ids=[*AGREEING, "compiled"],
)
def test_two_processes_train_the_run_of_one(root: str, spec: RunSpec, folder: Path, seen: list[dict[str, Any]]) -> None:
    assert all(found["graphs"] > 0 for found in seen)
    alone, shared = (RunFolder.of(folder / name, spec) for name in ("alone", root))
    assert alone.read_spec() == shared.read_spec()
    expected, found = alone.read_checkpoint(), shared.read_checkpoint()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-5)
    for ours, theirs in zip(shared.read_history(), alone.read_history(), strict=True):
        assert ours.train_loss == pytest.approx(theirs.train_loss, rel=1e-4)
        assert (ours.fisher_trace is None) == (theirs.fisher_trace is None)
        assert (ours.fisher_trace or 0.0) == pytest.approx(theirs.fisher_trace or 0.0, rel=1e-3)
        same = {"train_loss": 0.0, "fisher_trace": None, "seconds": 0.0}
        assert replace(ours, **same) == replace(theirs, **same)


def test_the_result_says_how_many_processes_there_were(folder: Path) -> None:
    for name, processes in (("shared", PROCESSES), ("alone", None)):
        result = RunFolder.of(folder / name, PLAIN).read_result()
        assert result is not None
        assert result.environment.get("processes") == processes


def test_each_process_takes_its_part_of_the_batch(seen: list[dict[str, Any]]) -> None:
    run = Session(PLAIN, load_sets(PLAIN), launch(PLAIN, "cpu"))
    for whole, *parts in zip(run.next_batch(), *(found["batch"] for found in seen), strict=True):
        assert {len(part) for part in parts} == {16}
        torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=0)


def test_processes_draw_other_masks_and_splits(seen: list[dict[str, Any]]) -> None:
    first, second = (set(found["seeds"]) for found in seen)  # those that each update finds: of the one before it
    assert len(first) == 12
    assert first & second == {derived_seed(0, "weights", 0)}


def test_a_finished_run_is_returned_to_all(folder: Path, seen: list[dict[str, Any]]) -> None:
    result = RunFolder.of(folder / "shared", PLAIN).read_result()
    assert result is not None
    assert [found["again"] for found in seen] == [result.test_error] * PROCESSES


@pytest.mark.parametrize(
    ("root", "spec"),
    [("stopped", AGREEING["whole-batch"]), ("stopped", BATCHNORM), ("crashed", PLAIN)],
    ids=["interrupted", "interrupted with BatchNorm", "crashed"],
)
def test_a_broken_off_run_ends_in_the_same_bits(
    root: str, spec: RunSpec, folder: Path, seen: list[dict[str, Any]]
) -> None:
    """Interrupted by a signal to the second process alone, or dead in the middle of an epoch."""
    for found in seen:
        assert found["crashed"]
        assert found["stopped"].startswith("stopped after 5 of 12 updates; the same command goes on from there")
        assert found["stopped with BatchNorm"].startswith("stopped after 5 of 6 updates")
    files = [RunFolder.of(folder / name, spec).path / "checkpoint.safetensors" for name in (root, "shared")]
    assert files[0].read_bytes() == files[1].read_bytes()
    histories = [RunFolder.of(folder / name, spec).read_history() for name in (root, "shared")]
    assert [replace(record, seconds=0.0) for record in histories[0]] == [
        replace(record, seconds=0.0) for record in histories[1]
    ]


def test_a_loss_that_is_not_finite_fails_the_run_for_all(folder: Path, seen: list[dict[str, Any]]) -> None:
    alone = json.loads((RunFolder.of(folder / "alone", DIVERGING).path / "failure.json").read_text())["error"]
    assert [found["diverging"] for found in seen] == [("NonFiniteError", alone)] * PROCESSES
    assert RunFolder.of(folder / "failed", DIVERGING).status == "failed"


def test_one_process_that_fails_alone_marks_the_folder(folder: Path) -> None:
    run = RunFolder.of(folder / "failed alone", replace(AGREEING["whole-batch"], seed=1))
    assert run.status == "failed"
    message = (folder / "failed alone" / "message").read_text()
    assert message.startswith("training failed in epoch 2, iteration 6: the loss is nan")
    with pytest.raises(FlatminimaError, match="training failed in epoch 2"):
        run.read_result()


def test_an_error_of_the_first_process_is_raised_on_all(seen: list[dict[str, Any]]) -> None:
    for found in seen:
        name, message = found["no data"]
        assert name == "FlatminimaError"
        assert message.removeprefix("process 0: ").startswith("no data set 'nowhere'")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 33}, "batch_size 33 cannot be shared equally by 2 processes: choose a multiple of 2"),
        ({"regularizer": RegularizerSpec(num_sub_batches=3)}, "regularizer.num_sub_batches 3 cannot be shared"),
        ({"regularizer": SharpnessAwareSpec()}, "sharpness-aware minimization runs in one process"),
        ({"regularizer": FisherPenaltySpec()}, "the Fisher penalty runs in one process: start it without torchrun"),
    ],
)
def test_what_cannot_be_shared_is_refused_before_anything_else(
    changes: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in torchrun_environment(1).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(FlatminimaError, match=message) as caught:
        train(replace(PLAIN, **changes), tmp_path)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------------------------------
# torchrun itself
# ---------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def torchrun(root: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(PROCESSES)]
    command = [*launcher, "-m", "flatminima", "train", "digits", "--model", "mlp", "--device", "cpu", *options]
    process = subprocess.Popen(
        [*command, "--root", str(root)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
    )
    try:
        yield process
    finally:
        process.terminate()  # and it ends those that it started
        process.communicate()


def wait_for_update(process: subprocess.Popen[str], root: Path, update: int) -> RunFolder:
    """Wait until the one run under ``root`` is saved at ``update`` or later."""
    deadline = time.monotonic() + 240
    while process.poll() is None and time.monotonic() < deadline:
        for folder in map(RunFolder, root.iterdir()):
            point = folder.read_resume_point()
            if point is not None and point.iteration >= update:
                return folder
        time.sleep(0.1)
    raise AssertionError(f"it does not get so far; exit status {process.poll()}")


def ours(stderr: str) -> list[str]:
    """What we said, without torchrun's own words."""
    return [line for line in stderr.splitlines() if line.startswith("flatminima: ")]


@pytest.mark.slow
def test_torchrun_is_stopped_by_ctrl_c_and_goes_on(tmp_path: Path) -> None:
    with torchrun(tmp_path, "--epochs", "100000") as process:
        folder = wait_for_update(process, tmp_path, 1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert out == ""
    (said,) = ours(err)
    stopped = folder.read_resume_point()
    assert stopped is not None
    assert said.startswith(f"flatminima: interrupted: stopped after {stopped.iteration} of")

    with torchrun(tmp_path, "--epochs", "100000") as process:
        wait_for_update(process, tmp_path, stopped.iteration + 1)
        process.terminate()
        out, err = process.communicate(timeout=60)
    assert out == ""
    assert ours(err) == [f"flatminima: going on with the unfinished run in {folder.path}"]
    assert folder.status == "unfinished"
    assert folder.read_resume_point() is not None


@pytest.mark.slow
def test_torchrun_prints_one_result(tmp_path: Path) -> None:
    with torchrun(tmp_path, "--epochs", "2", "--json") as process:
        out, err = process.communicate(timeout=240)
    assert json.loads(out)["environment"]["processes"] == PROCESSES
    assert ours(err) == []
    with torchrun(tmp_path, "--batch-size", "63") as process:
        out, err = process.communicate(timeout=240)
    assert out == ""
    (said,) = ours(err)
    assert said.startswith("flatminima: error: batch_size 63 cannot be shared equally by 2 processes")
