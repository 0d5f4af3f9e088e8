from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from flatminima import cli
from flatminima.cli.commands import COMMANDS, Report
from flatminima.errors import FlatminimaWarning
from flatminima.lab import runs
from flatminima.lab.networks.paper import build_model
from support.command_line import TRAIN, error_of
from support.commands import Command


@pytest.mark.parametrize("command", [[], ["--help"], ["help"]])
def test_without_a_command_it_lists_them(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(command) == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in COMMANDS)
    assert "flatminima COMMAND --help" in out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.split()[0] == "flatminima"


@pytest.mark.parametrize("command", list(COMMANDS))
def test_help_of_a_command_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([command, "--help"]) == 0
    captured = capsys.readouterr()
    assert f"Example: flatminima {command}" in captured.out
    assert "--json" in captured.out
    assert captured.err == ""


class Trap:
    """Unpickling it would leave a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def test_bad_input_is_one_line(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(sorted(trained.iterdir())[0])
    assert "unknown command 'tran'" in error_of(capsys, ["tran"])
    assert "unknown recipe 'resnet200'" in error_of(capsys, ["train", "resnet200"])
    assert "not a run folder" in error_of(capsys, ["measure", str(tmp_path / "none")])
    assert "give either" in error_of(capsys, ["measure"])
    assert "unknown model 'resnet99'" in error_of(capsys, ["measure", "--model", "resnet99", "--data", "digits"])
    assert "at least two minima" in error_of(capsys, ["compare", run])
    assert "same name" in error_of(capsys, ["compare", run, run])
    assert "fewer than subset_size" in error_of(capsys, ["measure", run, "--subset-size", "5000"])
    mlp, digits = ["measure", "--model", "mlp", "--checkpoint"], ["--data", "digits"]
    mark, pickled = tmp_path / "mark", tmp_path / "evil.pt"
    pickled.write_bytes(pickle.dumps({"weight": Trap(mark)}))
    error_of(capsys, [*mlp, str(pickled), *digits])
    assert not mark.exists()
    (tmp_path / "torn.safetensors").write_bytes(b"\x00" * 7)
    assert "torn.safetensors" in error_of(capsys, [*mlp, str(tmp_path / "torn.safetensors"), *digits])
    save_file(build_model("mlp", num_classes=7, in_channels=1).state_dict(), tmp_path / "seven.safetensors")
    assert "seven.safetensors" in error_of(capsys, [*mlp, str(tmp_path / "seven.safetensors"), *digits])
    weights = build_model("mlp", num_classes=10, in_channels=1).state_dict()
    next(iter(weights.values()))[0] = float("nan")
    save_file(weights, tmp_path / "nan.safetensors")
    assert "NaN" in error_of(capsys, [*mlp, str(tmp_path / "nan.safetensors"), *digits])


def test_a_device_that_is_not_there(
    runs: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    if torch.cuda.device_count():
        pytest.skip("it is there")
    assert "device 'cuda' cannot be used here" in error_of(capsys, ["measure", runs[0], "--device", "cuda"])
    assert "device 'cuda' cannot be used here" in error_of(capsys, [*TRAIN, "--device", "cuda"])


@pytest.mark.parametrize("how", ["--debug", "FLATMINIMA_DEBUG"])
def test_debugging_shows_where_an_error_comes_from(
    how: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["measure", str(tmp_path / "none")]
    if how == "--debug":
        arguments.append(how)
    else:
        monkeypatch.setenv(how, "1")
    assert cli.main(arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("Traceback")
    assert "flatminima: error: " in err.splitlines()[-1]


def test_the_caller_keeps_its_own_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    before = warnings.showwarning, list(warnings.filters)
    assert cli.main(["--version"]) == 0
    assert (warnings.showwarning, list(warnings.filters)) == before


def test_a_warning_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def warning(given: list[str]) -> Any:
        warnings.warn("first\nsecond", FlatminimaWarning, stacklevel=1)
        return False, Report({}, "")

    monkeypatch.setitem(COMMANDS, "demo", warning)
    assert cli.main(["demo"]) == 0
    assert capsys.readouterr().err == "flatminima: warning: first second\n"


def test_a_network_that_leaves_the_program_is_an_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def leaving(given: list[str]) -> Any:
        sys.exit(0)

    monkeypatch.setitem(COMMANDS, "demo", leaving)
    assert "error: SystemExit: 0" in error_of(capsys, ["demo"], status=1)


@pytest.mark.parametrize("command", ["demo", "reproduce"])
def test_ctrl_c_says_that_finished_runs_are_kept(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(given: list[str]) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setitem(COMMANDS, command, interrupted)
    assert cli.main([command]) == 130
    assert "interrupted: finished runs are kept; the same command goes on" in capsys.readouterr().err


def test_ctrl_c_while_the_program_is_imported_leaves_no_traceback() -> None:
    code = (
        "import sys\n"
        "class Pressed:\n"
        "    def find_spec(self, name, *rest):\n"
        "        if name == 'tyro':\n"
        "            raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Pressed())\n"
        "import flatminima.cli\n"
    )
    completed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert completed.returncode == 130
    assert completed.stderr == "flatminima: interrupted: the same command starts again\n"


def test_a_missing_package_is_named_with_its_remedy(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "flatminima.lab.demo", None)
    monkeypatch.delattr("flatminima.lab.demo", raising=False)
    assert "pip install 'flatminima[lab]'" in error_of(capsys, ["demo"], status=1)


@pytest.mark.xdist_group("processes")
@pytest.mark.parametrize("given", ["", "--help", "measure"])
def test_without_the_lab_the_program_says_what_to_install(given: str, tmp_path: Path) -> None:
    code = f"import sys; sys.modules['tyro'] = None; sys.argv[1:] = {given.split()}; from flatminima.cli import main"
    process = Command(tmp_path, exec, code, {})
    said, error = process.communicate()
    if given == "measure":
        assert error == "flatminima: error: the command line needs tyro: pip install 'flatminima[lab]'\n"
    else:
        assert "Its commands need tyro:\n  pip install 'flatminima[lab]'\n" in said
        assert error == ""
    assert process.returncode == (1 if given == "measure" else 0)


def test_help_and_refusals_leave_the_slow_packages_alone() -> None:
    code = (
        "import sys; from flatminima.cli import main; main(['--help'])\n"
        f"assert not any(main([command, '--help']) for command in {list(COMMANDS)})\n"
        "assert main(['measure', '--trails', '3']) == main(['train', 'resnet99']) == main(['elsewhere']) == 2\n"
        "slow = {'torch', 'numpy', 'lightning_fabric', 'datasets', 'sklearn', 'scipy', 'matplotlib'}\n"
        "slow &= set(sys.modules)\n"
        "assert not slow, slow"
    )
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)


@pytest.mark.xdist_group("processes")
def test_ctrl_c_says_how_to_go_on_and_the_same_command_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "runs"
    arguments = ["train", "digits", "--model", "mlp", "--epochs", "100000", "--root", str(root)]
    code = (
        "import sys; from flatminima.cli import main; from flatminima.lab.runs import interrupts\n"
        "interrupts.EPOCH_END_SECONDS = 0.0  # a resume point after the first epoch\n"
        f"sys.exit(main({arguments!r}))"
    )
    process = Command(tmp_path, exec, code, {})
    deadline = time.monotonic() + 120
    while not list(root.glob("*/state.safetensors")) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert len(err.splitlines()) == 1
    assert err.startswith("flatminima: interrupted: stopped after")
    assert "the same command goes on from there" in err

    def interrupted_again(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "train", interrupted_again)
    assert cli.main(arguments) == 130
    folder = next(root.iterdir())
    assert capsys.readouterr().err.startswith(f"flatminima: going on with the unfinished run in {folder}\n")


@pytest.mark.parametrize("rank", [0, 1])
def test_of_several_processes_the_first_speaks(
    rank: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"TORCHELASTIC_RUN_ID": "none", "RANK": str(rank), "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)

    def said(status: int, *arguments: str) -> str:
        assert cli.main(list(arguments)) == status
        captured = capsys.readouterr()
        assert captured.out == ""
        return captured.err

    error = said(2, "train", "digits", "--batch-size", "63", "--root", str(tmp_path))
    refusal = said(2, "measure", "runs/any")
    if rank > 0:
        assert error == refusal == ""
    else:
        assert error.startswith("flatminima: error: batch_size 63 cannot be shared equally by 2 processes")
        assert refusal.startswith("flatminima: error: only `train` can be shared by several processes")
        assert len((error + refusal).splitlines()) == 2

    def unlucky(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(runs, "train", unlucky)
    assert "out of memory" in said(1, "train", "digits")  # the others may know nothing of it


def test_output_may_be_cut_short_by_its_reader() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "flatminima", "train", "--help"]
    completed = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert (completed.returncode, completed.stderr) == (1, "")
