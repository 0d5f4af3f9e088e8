from __future__ import annotations

import contextlib
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from flatminima import cli
from flatminima.lab import demo
from flatminima.lab.models import build_model

TRAIN = ["train", "digits", "--model", "mlp", "--epochs", "2", "--train-size", "200", "--no-progress"]
MEASURE = ["--subset-size", "20", "--trials", "2", "--no-progress"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with two trained runs of the same images."""
    root = tmp_path_factory.mktemp("runs")
    for extra in ([], ["--regularizer.beta", "50", "--regularizer.num-sub-batches", "2"]):
        assert cli.main([*TRAIN, *extra, "--root", str(root)]) == 0
    return root


@pytest.fixture
def quiet() -> Any:
    """These networks are trained too briefly to be minima, and the command line is to say so, not to fail."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("FLATMINIMA_DEBUG", raising=False)
        yield


def error_of(capsys: pytest.CaptureFixture[str], arguments: list[str], status: int = 2) -> str:
    """The command's one line on standard error."""
    assert cli.main(arguments) == status
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert captured.out == ""
    assert len(lines) == 1
    assert lines[0].startswith("flatminima: error: ")
    return lines[0]


def test_train_says_what_came_out_and_what_to_type_next(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*TRAIN, "--root", str(trained)]) == 0
    out = capsys.readouterr().out
    assert "was trained before" in out
    assert "test error" in out
    next_command = out.strip().splitlines()[-1].removeprefix("next: flatminima ").split()
    assert next_command[0] == "measure"
    assert Path(next_command[1]).is_dir()


def test_regularizer_options_switch_it_on(trained: Path) -> None:
    specs = [json.loads(path.read_text()) for path in trained.glob("*/spec.json")]
    regularizers = sorted((spec["regularizer"] or {}).get("beta", 0) for spec in specs)
    assert regularizers == [0, 50]


def test_json_is_all_of_standard_output(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*TRAIN, "--root", str(trained), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["epochs"] == 2
    runs = sorted(map(str, trained.iterdir()))
    assert cli.main(["measure", runs[0], *MEASURE, "--json"]) == 0
    one = json.loads(capsys.readouterr().out)
    assert one["settings"]["trials"] == 2
    assert cli.main(["compare", f"a={runs[0]}", f"b={runs[1]}", *MEASURE, "--json"]) == 0
    both = json.loads(capsys.readouterr().out)
    assert both["differences"]["log_det_fisher"]["a - b"]["per_trial"]
    mean = {"a": one, "b": None}["a"]["log_det_fisher"]["mean"]
    assert both["characterizations"]["a"]["log_det_fisher"]["mean"] == pytest.approx(mean)


def test_a_run_keeps_its_measures(
    trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = str(sorted(trained.iterdir())[0])
    assert cli.main(["measure", run, *MEASURE]) == 0
    first = capsys.readouterr().out

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr("flatminima.measures.measure", refuse)
    assert cli.main(["measure", run, *MEASURE]) == 0
    assert capsys.readouterr().out == first
    with pytest.raises(AssertionError, match="measured again"):
        cli.main(["measure", run, *MEASURE, "--seed", "1"])


def test_a_network_that_is_not_ours(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mynets.py").write_text(
        "from torch import nn\n"
        "def net(num_classes):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, num_classes))\n"
        "def broken():\n"
        "    raise RuntimeError('no weights here')\n"
        "def number():\n"
        "    return 3\n"
    )
    monkeypatch.chdir(tmp_path)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    save_file(model.state_dict(), tmp_path / "net.safetensors")
    torch.save(model.state_dict(), tmp_path / "net.pt")
    for checkpoint in ("net.safetensors", "net.pt"):
        arguments = ["measure", "--model", "mynets:net", "--checkpoint", checkpoint, "--data", "digits"]
        assert cli.main([*arguments, *MEASURE, "--double", "--json"]) == 0
        captured = capsys.readouterr()
        assert json.loads(captured.out)["settings"]["dtype"] == "float64"
        assert "flatminima: warning: training loss" in captured.err
    data = ["--data", "digits"]
    assert "no function or class 'nets'" in error_of(capsys, ["measure", "--model", "mynets:nets", *data])
    assert "cannot import 'nothere'" in error_of(capsys, ["measure", "--model", "nothere:net", *data])
    assert "no weights here" in error_of(capsys, ["measure", "--model", "mynets:broken", *data])
    assert "returned int" in error_of(capsys, ["measure", "--model", "mynets:number", *data])
    assert "needs its training data" in error_of(capsys, ["measure", "--model", "mynets:net"])


class Trap:
    """Unpickling it would leave a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def test_bad_input_is_one_line(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], quiet: None) -> None:
    run = str(sorted(trained.iterdir())[0])
    assert "unknown command 'tran'" in error_of(capsys, ["tran"])
    assert "unknown recipe 'resnet200'" in error_of(capsys, ["train", "resnet200"])
    assert "not a run folder" in error_of(capsys, ["measure", str(tmp_path / "none")])
    assert "give either" in error_of(capsys, ["measure"])
    assert "unknown model 'resnet99'" in error_of(capsys, ["measure", "--model", "resnet99", "--data", "digits"])
    assert "at least two models" in error_of(capsys, ["compare", run])
    assert "same name" in error_of(capsys, ["compare", run, run])
    assert "fewer than subset_size" in error_of(capsys, ["measure", run, "--subset-size", "5000"])
    assert "cannot be used here" in error_of(
        capsys, ["measure", run, "--device", "abacus", *MEASURE[:2], "--seed", "9"]
    )
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


def test_a_wrong_option_exits_with_2_and_names_its_neighbour(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(["train", "digits", "--epoch", "3"])
    assert exit_.value.code == 2
    assert "--epochs" in capsys.readouterr().err


@pytest.mark.parametrize("command", [[], ["--help"], ["train", "--help"], ["measure", "--help"], ["compare", "--help"]])
def test_help_shows_an_example_or_the_commands(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.suppress(SystemExit):
        assert cli.main(command) == 0
    out = capsys.readouterr().out
    assert ("Example: flatminima" in out) == (len(command) == 2)


def test_demo_prints_the_table_and_where_the_report_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fake(out: Path, *, workers: int | None, progress: bool) -> dict[str, Any]:
        return {"seconds": 1.0, "out": str(out), "workers": workers, "progress": progress}

    monkeypatch.setattr(demo, "demo", fake)
    monkeypatch.setattr(demo, "table", lambda summary: "THE TABLE")
    assert cli.main(["demo", "--out", str(tmp_path), "--workers", "1"]) == 0
    out = capsys.readouterr().out
    assert "THE TABLE" in out
    assert "report.html" in out
    assert cli.main(["demo", "--out", str(tmp_path), "--json", "--no-progress"]) == 0
    assert json.loads(capsys.readouterr().out)["progress"] is False


def test_ctrl_c_says_how_to_go_on_and_the_same_command_does(tmp_path: Path) -> None:
    arguments = ["train", "digits", "--model", "mlp", "--epochs", "4000", "--root", str(tmp_path)]
    command = [sys.executable, "-m", "flatminima.cli", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    deadline = time.monotonic() + 200
    while not list(tmp_path.glob("*/state.safetensors")) and time.monotonic() < deadline:  # written every few seconds
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=90)
    assert process.returncode == 130
    assert out == ""
    assert len(err.strip().splitlines()) == 1
    assert "flatminima: interrupted: " in err


def test_output_may_be_cut_short_by_its_reader(trained: Path) -> None:
    run = sorted(trained.iterdir())[0]
    measure = f"{sys.executable} -m flatminima.cli measure {run} {' '.join(MEASURE)}"
    pipe = f"{measure} 2> >(grep -v warning >&2) | head -c 1 > /dev/null"
    shell = ["bash", "-o", "pipefail", "-c", pipe]
    completed = subprocess.run(shell, capture_output=True, text=True, check=False)
    assert completed.returncode == 1
    assert completed.stderr == ""
