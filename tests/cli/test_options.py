from __future__ import annotations

import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len

from flatminima import cli
from flatminima.cli.commands import recipe_of
from flatminima.cli.main import INTERRUPTED
from flatminima.cli.options import (
    Compare,
    Demo,
    Measure,
    Reproduce,
    RunOptions,
    Train,
    option_names,
    options_meant,
    parse,
)
from flatminima.cli.refusals import refusal
from flatminima.lab import runs
from flatminima.lab.runs.spec import RECIPES, RegularizerSpec, RunSpec, SharpnessAwareSpec
from support.command_line import TRAIN, error_of
from support.commands import Command


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

    monkeypatch.setattr(runs, "train", trained)
    assert cli.main([*TRAIN, *options, "--root", str(tmp_path)]) == INTERRUPTED


@pytest.mark.parametrize(
    ("arguments", "regularizer"),
    [([], None), (["--regularizer"], RegularizerSpec()), (["--regularizer.beta=3"], RegularizerSpec(beta=3.0))],
)
def test_options_override_the_recipe(
    arguments: list[str],
    regularizer: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)  # where there are no runs
    asked: list[Any] = []

    def train(spec: Any, root: Path, **options: Any) -> None:
        asked.append(spec)
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "train", train)
    short = ["-d", "x", "-e", "3", "-b", "32", "-s", "5"]
    assert cli.main(["train", "wrn28-2", *short, *arguments]) == 130
    expected = replace(RECIPES["wrn28-2"], data="x", epochs=3, batch_size=32, seed=5, regularizer=regularizer)
    assert asked == [expected]
    assert capsys.readouterr().err == "flatminima: interrupted: the same command starts again\n"


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


def test_schedule_options_are_those_of_the_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "scenario", "--help"]) == 0
    out = capsys.readouterr().out
    assert "--schedule.patience" in out
    assert "--schedule.milestones" not in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "digits", "--epoch", "3"], "unrecognized options: --epoch (did you mean '--epochs'?)"),
        (["train", "digits", "--regularizer.bet=3"], "did you mean '--regularizer.beta'?"),
        (["train", "digits", "extra"], "unrecognized arguments: extra"),
        (["train", "--epochs", "many"], "error: --epochs: "),
        (["train", "--seed"], "error: --seed needs a value"),
        (["train", "--precision", "8"], "'32-true', 'bf16-mixed'"),
        (["train", "--model", "resnet2"], "did you mean 'resnet20'?"),
        (["train", "resnet2"], "did you mean 'resnet20'?"),
        (["train", "--epochs", "many"], "--epochs: 'many' cannot be used, it takes an integer or None"),
        (["measure", "--batchnorm", "x"], "--batchnorm: 'x' cannot be used, it takes an integer or eval"),
        (["train", "--lr", "fast"], "--lr: 'fast' cannot be used, it takes a number"),
        (["train", "--lr", "nan"], "got nan; it must be finite (options: --lr)"),
        (["train", "--batch-size", "0"], "batch_size must be >= 1, got 0 (options: --batch-size)"),
        (["demo", "--workers", "0"], "--workers must be positive, got 0"),
        (["reproduce", "table-1", "--seeds"], "--seeds needs at least one number"),
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
        (["compare", "x", "y", "--workers", "0"], "--workers must be positive, got 0"),
        (["compare", "x", "y", "--data", "digits", "--workers", "2"], "--workers goes with run folders"),
        (["demo", "--workers", "few"], "--workers"),
        (["mesure"], "did you mean 'measure'?"),
    ],
)
def test_a_wrong_argument_is_one_line_that_says_what_is_right(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert said in error_of(capsys, arguments)


@pytest.mark.xdist_group("processes")
def test_a_wrong_argument_of_the_program_is_one_line_on_a_terminal_of_unicode_too(tmp_path: Path) -> None:
    code = (
        "import runpy, sys\n"
        "sys.argv = ['flatminima', 'measure', '--trial', '3']\n"
        "sys.stdout.reconfigure(encoding='utf-8')\n"
        "sys.stderr.reconfigure(encoding='utf-8')\n"
        "runpy.run_module('flatminima', run_name='__main__')"
    )
    process = Command(tmp_path, exec, code, {})
    expected = "flatminima: error: unrecognized options: --trial (did you mean '--trials'?)"
    assert process.communicate() == ("", f"{expected} (flatminima measure --help explains)\n")
    assert process.returncode == 2


@pytest.mark.parametrize("command", ["", "demo", "train", "measure", "compare", "reproduce"])
def test_help_keeps_to_eighty_columns(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main([*filter(None, [command]), "--help"]) == 0
    assert max(map(cell_len, capsys.readouterr().out.splitlines())) <= 80


def words_of_help(command: str, columns: int, capsys: pytest.CaptureFixture[str]) -> list[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", str(columns))
        assert cli.main([command, "--help"]) == 0
    return re.sub(r"[╭╮╰╯│─]", " ", capsys.readouterr().out).split()


@pytest.mark.parametrize("command", ["demo", "train", "measure", "compare", "evaluate", "reproduce"])
def test_help_breaks_no_word_and_shows_what_an_option_takes(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    narrow, wide = words_of_help(command, 80, capsys), words_of_help(command, 1000, capsys)
    assert set(narrow) <= set(wide)
    assert not [word for word in narrow if "{None}" in word or "``" in word]


@pytest.mark.parametrize("command", ["measure", "compare"])
def test_boxes_of_the_help_end_in_one_column(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main([command, "--help"]) == 0
    out = capsys.readouterr().out
    assert "γ̂" in out
    assert {cell_len(line) for line in out.splitlines() if line.startswith("│")} == {80}


def test_an_option_that_may_be_left_open_can_be_set_back() -> None:
    run = ["--iterations", "5", "--epochs", "None"]
    given = parse(Train, run, prog="train", default=Train(RunOptions.of(RECIPES["resnet20"])))
    assert (given.run.epochs, given.run.iterations) == (None, 5)
    assert parse(Compare, ["--normalize", "none"], prog="compare").reading.normalize == "none"
    assert parse(Compare, ["--report", "page.html"], prog="compare").report == Path("page.html")
    assert parse(Reproduce, ["table-1", "--seeds", "1", "2"], prog="reproduce").seeds == (1, 2)


def test_completion_for_shells_is_printed_as_it_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main(["measure", "--tyro-print-completion", "bash"]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) > 80


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_a_shell_completes_commands_and_their_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--tyro-print-completion", "bash"]) == 0
    script = tmp_path / "completion.bash"
    script.write_text(capsys.readouterr().out)
    ask = (
        f'source {script}\nCOMP_WORDS=("$@")\nCOMP_CWORD=$(($# - 1))\n'
        "$(complete -p flatminima | sed 's/.*-F \\([^ ]*\\).*/\\1/')\necho ${COMPREPLY[@]}"
    )
    for typed, meant in (
        ("mea", "measure"),
        ("measure --per", "--per-parameter"),
        ("compare --rep", "--report"),
        ("train --regularizer.b", "--regularizer.beta"),
    ):
        command = ["bash", "-c", ask, "bash", "flatminima", *typed.split()]
        assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == meant
    assert "unknown shell 'fish'" in error_of(capsys, ["--tyro-print-completion", "fish"])
    assert "takes a shell" in error_of(capsys, ["--tyro-print-completion"])


def test_options_are_named_as_they_are_typed() -> None:
    names = option_names(Train(RunOptions.of(RECIPES["resnet20"])))
    assert options_meant("batch_size 5 is larger", names) == ["--batch-size"]
    assert options_meant("clip with max_grad_norm", names) == ["--regularizer.max-grad-norm", "--sam.max-grad-norm"]
    assert options_meant("regularizer.max_grad_norm must be positive", names) == ["--regularizer.max-grad-norm"]
    assert options_meant("the data, the model and the seed, e.g. batch_sizes: see --batch-size", names) == []


class Unknown:
    """A problem of a kind that the installed release does not have."""


def test_a_problem_that_is_not_known_is_left_to_tyro(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert refusal(Unknown(), []) == ""
    monkeypatch.setitem(sys.modules, "tyro._errors", None)  # a release without it
    assert cli.main(["measure", "--trial", "3"]) == 2
    captured = capsys.readouterr()
    assert "--trial" in captured.err
    assert "flatminima measure --help" in captured.err
    assert captured.out == ""


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("demo", Demo()),
        ("train resnet20", Train(RunOptions.of(RECIPES["resnet20"]))),
        ("train scenario", Train(RunOptions.of(RECIPES["scenario"]))),
        ("measure", Measure()),
        ("compare", Compare()),
        ("reproduce", Reproduce()),
    ],
)
def test_the_options_hinted_at_are_those_of_the_help(
    command: str, options: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*command.split(), "--help"]) == 0
    words = (word.strip(",") for word in capsys.readouterr().out.split())
    shown = {word for word in words if word.startswith("--") and word.strip("-")}
    names = set(option_names(options))
    groups = {name for name in names if any(other.startswith(f"{name}.") for other in names)}
    assert names - groups - {"--runs", "--experiments"} <= shown  # the last two are given without their names
    of_others = {"--help", "--nproc-per-node"}  # the second is torchrun's, in an example
    assert {name.replace("no-", "") for name in shown - of_others} <= {name.replace("no-", "") for name in names}


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
