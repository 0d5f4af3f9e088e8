from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from flatminima import cli
from flatminima.cli.commands import COMMANDS, Report, recipe_of
from flatminima.cli.main import INTERRUPTED
from flatminima.errors import FlatminimaWarning
from flatminima.lab import demo
from flatminima.lab.experiments import Summary
from flatminima.lab.networks.paper import build_model
from flatminima.lab.reproduce import Reproduction
from flatminima.lab.runs import training
from flatminima.lab.runs.spec import RECIPES, RegularizerSpec, RunSpec, SharpnessAwareSpec

TRAIN = ["train", "digits", "--model", "mlp", "--epochs", "2", "--train-size", "200", "--no-progress"]
MEASURE = ["--subset-size", "20", "--trials", "2", "--no-progress"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with two trained runs of the same images."""
    root = tmp_path_factory.mktemp("runs")
    for extra in ([], ["--regularizer.beta", "50", "--regularizer.num-sub-batches", "2"]):
        assert cli.main([*TRAIN, *extra, "--root", str(root)]) == 0
    return root


@pytest.fixture(autouse=True)
def no_debugging(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLATMINIMA_DEBUG", raising=False)


@pytest.fixture
def runs(trained: Path) -> list[str]:
    return sorted(map(str, trained.iterdir()))


def error_of(capsys: pytest.CaptureFixture[str], arguments: list[str], status: int = 2, lines: int = 1) -> str:
    """The command's last line on standard error; by default the only one."""
    assert cli.main(arguments) == status
    captured = capsys.readouterr()
    said = captured.err.strip().splitlines()
    assert captured.out == ""
    assert len(said) == lines
    assert said[-1].startswith("flatminima: error: ")
    return said[-1]


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


@pytest.mark.parametrize(
    ("options", "regularizer"),
    [
        ([], None),
        (["--regularizer"], RegularizerSpec()),
        (["--sam"], SharpnessAwareSpec()),
        (["--sam.rho", "0.5", "--sam.adaptive"], SharpnessAwareSpec(rho=0.5, adaptive=True)),
    ],
)
def test_one_option_switches_on_the_regularizer_or_its_rival(
    options: list[str], regularizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trained(spec: RunSpec, *args: Any, **kwargs: Any) -> None:
        assert spec.regularizer == regularizer
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "train", trained)
    assert cli.main([*TRAIN, *options, "--root", str(tmp_path)]) == INTERRUPTED


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
    first = capsys.readouterr()

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("measured again")

    monkeypatch.setattr("flatminima.lab.runs.measuring.measure", refuse)
    assert cli.main(["measure", run, *MEASURE]) == 0
    assert capsys.readouterr() == first
    assert "RuntimeError: measured again" in error_of(capsys, ["measure", run, *MEASURE, "--seed", "1"], status=1)


def test_a_network_that_is_not_ours(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mynets.py").write_text(
        "from torch import nn\n"
        "def net(num_classes):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, num_classes))\n"
        "def linear():\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n"
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
    singular = ["measure", "--model", "mynets:linear", *data, "--subset-size", "640", "--trials", "1"]
    assert "--on-singular skip" in error_of(capsys, singular, lines=2)
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


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "digits", "--epoch", "3"], "perhaps you meant"),
        (["train", "digits", "extra"], "extra"),
        (["train", "--epochs", "many"], "--epochs"),
        (["train", "--seed"], "--seed"),
        (["train", "--precision", "8"], "'32-true', 'bf16-mixed'"),
        (["train", "--model", "resnet2"], "did you mean 'resnet20'?"),
        (["train", "resnet2"], "did you mean 'resnet20'?"),
        (["train", "--lr", "-1"], "error: lr must be positive"),
        (["train", "--sam.rho", "0"], "error: sam.rho must be positive"),
        (["train", "--sam", "--regularizer.beta", "1"], "--regularizer and --sam are rivals"),
        (["train", "--regularizer.beta", "-1"], "error: regularizer.beta must not be negative"),
        (["train", "digits", "--data", "nowhere"], "no data set 'nowhere'"),
        (["train", "digits", "--batch-size", "5000"], "batch_size 5000 is larger"),
        (["measure", "--trials", "2.5"], "--trials"),
        (["measure", "x", "--data", "digits"], "go with --model"),
        (["measure", "x", "--device", "abacus"], "'auto', 'cpu', 'cuda'"),
        (["compare", "a=x", "a=y"], "the same name"),
        (["compare", "x", "--model", "mlp"], "--model needs the training data"),
        (["demo", "--workers", "few"], "--workers"),
        (["mesure"], "did you mean 'measure'?"),
    ],
)
def test_a_wrong_argument_is_one_line_that_says_what_is_right(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert said in error_of(capsys, arguments)


def test_a_device_that_is_not_there(
    runs: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    if torch.cuda.device_count():
        pytest.skip("it is there")
    assert "device 'cuda' cannot be used here" in error_of(capsys, ["measure", runs[0], "--device", "cuda"])
    assert "device 'cuda' cannot be used here" in error_of(capsys, [*TRAIN, "--device", "cuda"])


def test_a_wrong_argument_is_one_line_in_a_box_of_unicode_too() -> None:
    command = [sys.executable, "-m", "flatminima.cli", "measure", "--trial", "3"]
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}  # the captured output of the other tests gets ASCII boxes
    completed = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    expected = "flatminima: error: Unrecognized options: --trial, 3; perhaps you meant --trials"
    assert completed.stderr == f"{expected} (flatminima measure --help explains)\n"


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


def test_help_shows_the_defaults_of_the_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "cnn", "--help"]) == 0
    assert "those of 'cnn'" in capsys.readouterr().out
    for arguments, recipe in (
        (["--model=wrn28-2"], "wrn28-2"),
        (["-m", "cnn", "-e", "3"], "cnn"),
        (["-d", "digits", "-m", "mlp"], "digits"),
        (["--epochs", "3"], "resnet20"),
    ):
        assert recipe_of(arguments) == (recipe, arguments)


@pytest.mark.parametrize(
    ("arguments", "regularizer"),
    [([], None), (["--regularizer"], RegularizerSpec()), (["--regularizer.beta=3"], RegularizerSpec(beta=3.0))],
)
def test_options_override_the_recipe(
    arguments: list[str], regularizer: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def train(spec: Any, root: Path, **options: Any) -> None:
        asked.append(spec)
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "train", train)
    short = ["-d", "x", "-e", "3", "-b", "32", "-s", "5"]
    assert cli.main(["train", "wrn28-2", *short, *arguments]) == 130
    expected = replace(RECIPES["wrn28-2"], data="x", epochs=3, batch_size=32, seed=5, regularizer=regularizer)
    assert asked == [expected]
    assert capsys.readouterr().err == "flatminima: interrupted: the same command starts again\n"


def test_schedule_options_are_those_of_the_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "scenario", "--help"]) == 0
    out = capsys.readouterr().out
    assert "--schedule.patience" in out
    assert "--schedule.milestones" not in out


def test_several_runs_are_measured_at_once(runs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["measure", *runs, *MEASURE]) == 0
    assert set(runs) <= set(capsys.readouterr().out.splitlines())
    assert cli.main(["measure", *runs, *MEASURE, "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)) == runs


def test_compare_prints_the_table_and_names_what_it_warns_of(
    runs: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["compare", f"plain={runs[0]}", f"other={runs[1]}", *MEASURE]) == 0
    captured = capsys.readouterr()
    assert "(rank 1)" in captured.out
    lines = captured.err.splitlines()
    assert any(line.startswith("flatminima: warning: plain: training loss") for line in lines)
    assert all(line.startswith("flatminima: warning: ") for line in lines)


def test_compare_takes_checkpoints_of_a_network_that_is_not_ours(
    runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    save_file(build_model("mlp", num_classes=10, in_channels=1).state_dict(), tmp_path / "a.safetensors")
    checkpoint = str(tmp_path / "a.safetensors")
    data = ["--data", "digits", *MEASURE]
    assert cli.main(["compare", checkpoint, f"run={runs[0]}", "--model", "mlp", *data, "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)["characterizations"]) == ["a.safetensors", "run"]
    assert "name its model too" in error_of(capsys, ["compare", checkpoint, runs[0], *data])


def test_what_other_code_prints_is_kept_out_of_standard_output(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "noisy.py").write_text(
        "from torch import nn\n"
        "def net():\n"
        "    print('building')\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n"
    )
    monkeypatch.chdir(tmp_path)
    assert cli.main(["measure", "-m", "noisy:net", "-d", "digits", *MEASURE, "--json"]) == 0
    captured = capsys.readouterr()
    json.loads(captured.out)
    assert "building" in captured.err


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


def test_a_missing_package_is_named_with_its_remedy(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "flatminima.lab.demo", None)
    monkeypatch.delattr("flatminima.lab.demo")
    assert "pip install 'flatminima[lab]'" in error_of(capsys, ["demo"], status=1)


def test_without_the_lab_the_program_says_what_to_install() -> None:
    code = "import sys; sys.modules['tyro'] = None; from flatminima.cli import main; main(['--help'])"
    completed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert completed.returncode == 1
    assert completed.stderr == "flatminima: error: the command line needs tyro: pip install 'flatminima[lab]'\n"


def test_startup_leaves_the_slow_packages_alone() -> None:
    code = (
        "import sys; from flatminima.cli import main; main(['--help'])\n"
        "slow = {'lightning_fabric', 'datasets', 'sklearn', 'scipy', 'matplotlib'} & set(sys.modules)\n"
        "assert not slow, slow"
    )
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)


def test_demo_prints_the_table_and_where_the_report_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fake(out: Path, *, workers: int | None, progress: bool) -> demo.Report:
        given.append((out, workers, progress))
        return demo.Report([], 1.0)

    given: list[Any] = []

    monkeypatch.setattr(demo, "demo", fake)
    monkeypatch.setattr(demo, "table", lambda summaries: "THE TABLE")
    assert cli.main(["demo", "--out", str(tmp_path), "--workers", "1"]) == 0
    out = capsys.readouterr().out
    assert "THE TABLE" in out
    assert "report.html" in out
    assert cli.main(["demo", "--out", str(tmp_path), "--json", "--no-progress"]) == 0
    assert json.loads(capsys.readouterr().out) == {"experiments": [], "seconds": 1.0}
    assert given == [(tmp_path, 1, True), (tmp_path, None, False)]


def test_ctrl_c_says_how_to_go_on_and_the_same_command_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["train", "digits", "--model", "mlp", "--epochs", "100000", "--root", str(tmp_path)]
    command = [sys.executable, "-m", "flatminima.cli", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
    )
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("*/state.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert len(err.splitlines()) == 1
    assert err.startswith("flatminima: interrupted: stopped after")
    assert "the same command goes on from there" in err

    def interrupted_again(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "train", interrupted_again)
    assert cli.main(arguments) == 130
    folder = next(tmp_path.iterdir())
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

    monkeypatch.setattr(training, "train", unlucky)
    assert "out of memory" in said(1, "train", "digits")  # the others may know nothing of it


def test_output_may_be_cut_short_by_its_reader() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "flatminima.cli", "train", "--help"]
    completed = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert (completed.returncode, completed.stderr) == (1, "")


def test_reproduce_says_what_would_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["reproduce", "table-1", "--preset", "digits", "--out", str(tmp_path), "--seeds", "3", "--dry-run"]
    assert cli.main([*command, "--workers", "2"]) == 0
    said = capsys.readouterr().out
    assert "10 runs are left" in said
    assert "with 2 workers" in " ".join(said.split())
    assert cli.main([*command, "--json"]) == 0
    assert sum(row["left"] for row in json.loads(capsys.readouterr().out)) == 10
    assert cli.main(["reproduce", "search", "--out", str(tmp_path), "--dry-run", "--json", "--trials", "3"]) == 0
    assert [row["left"] for row in json.loads(capsys.readouterr().out)] == [3, 3]
    assert list(tmp_path.iterdir()) == []


def test_reproduce_lists_failed_runs_and_its_status_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(asked: Reproduction, *, progress: bool) -> list[Summary]:
        first, *_ = asked.experiment("scenario-1").tasks(asked.folder / "runs")
        return [asked.summary("scenario-1", {first.folder.path.name: "no such luck"})]

    monkeypatch.setattr(Reproduction, "run", run)
    command = ["reproduce", "scenario-1", "--preset", "digits", "--out", str(tmp_path), "--seeds", "3"]
    assert cli.main(command) == 1
    said = capsys.readouterr().out
    assert "failed: 0, plain, seed 3 (mlp-" in said
    assert "no such luck" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["scenario1"], "unknown experiment 'scenario1' (did you mean 'scenario-1'?)"),
        ([], "reproduce takes experiments: choose from search, scenario-1"),
        (["scenario-1", "--preset", "small", "--data", "/nowhere"], "/nowhere"),
        (["search", "--trials", "0"], "a search needs at least one trial, got 0"),
        (["scenario-1", "--trials", "3"], "trials are the search's: add search"),
    ],
)
def test_reproduce_refuses_in_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert said in error_of(capsys, ["reproduce", *arguments])
