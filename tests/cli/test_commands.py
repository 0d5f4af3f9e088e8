from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import flatminima as fm
from flatminima import cli
from flatminima.errors import FlatminimaError
from flatminima.lab import demo, study
from flatminima.lab.experiments import Summary
from flatminima.lab.networks.paper import build_model
from flatminima.lab.reproduce import Reproduction
from support.command_line import MEASURE, TRAIN, error_of


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
    first = capsys.readouterr()

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("measured again")

    monkeypatch.setattr("flatminima.lab.runs.measuring.measure", refuse)
    assert cli.main(["measure", run, *MEASURE]) == 0
    assert capsys.readouterr() == first
    assert "RuntimeError: measured again" in error_of(capsys, ["measure", run, *MEASURE, "--seed", "1"], status=1)


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


def test_compare_hands_on_how_many_runs_to_measure_at_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fake(paths: dict[str, Path], how: Any, *, workers: int, **where: Any) -> None:
        raise FlatminimaError(f"{', '.join(paths)} by {workers}")

    monkeypatch.setattr("flatminima.lab.runs.compare_runs", fake)
    assert "a, b by 3" in error_of(capsys, ["compare", "a=x", "b=y", "-w", "3"])


def test_compare_writes_a_page_and_shares_by_layer_where_asked_for(
    runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    command = ["compare", f"plain={runs[0]}", f"other={runs[1]}", *MEASURE, "--per-parameter", "--report", str(page)]
    assert cli.main(command) == 0
    out = capsys.readouterr().out
    assert "Shares of the Fisher trace by module" in out
    assert "page.html shows it in pictures" in " ".join(out.split())
    assert "Which layers the Fisher trace lies in" in page.read_text()
    assert cli.main([*command, "--json"]) == 0
    body = capsys.readouterr().out
    assert json.loads(body)["report"] == str(page)
    assert {"plot", "table"}.isdisjoint(json.loads(body))
    assert list(fm.Comparison.from_json(body)["plain"].shares or ()) != []
    assert cli.main(["measure", runs[0], *MEASURE, "--per-parameter"]) == 0
    assert "Shares by parameter" in capsys.readouterr().out


def test_a_disk_that_is_full_in_the_end_takes_nothing_from_what_is_printed(
    runs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(path: Path, content: object) -> None:
        if path.suffix == ".html":
            raise FlatminimaError(f"cannot write {path}: No space left on device")
        path.touch()

    monkeypatch.setattr("flatminima.files.write_whole", no_space)
    page, table = tmp_path / "page.html", tmp_path / "table.md"
    command = ["compare", *runs[:2], *MEASURE, "--report", str(page), "--table", str(table)]
    for options in ([], ["--json"]):
        assert cli.main([*command, *options]) == 2
        said = capsys.readouterr()
        assert said.err.splitlines()[-1].endswith(f"error: cannot write {page}: No space left on device")
        assert "log_det_fisher" in said.out if options else "table.md has the table." in " ".join(said.out.split())
        assert "page.html" not in said.out
    body = json.loads(said.out)
    assert (body["table"], "report" in body) == (str(table), False)


def test_a_plot_of_parts_that_there_will_not_be_is_refused_before_all_measuring(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["compare", "a=x", "b=y", "--batchnorm", "10", "--plot", str(tmp_path / "p.pdf")]
    assert "with batch statistics there are none: leave out --plot or --batchnorm" in error_of(capsys, command)


def test_names_are_text_in_tables(runs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compare", f"net[v2]={runs[0]}", f"[/]={runs[1]}", *MEASURE]) == 0
    header = capsys.readouterr().out.splitlines()[2]
    assert "net[v2]" in header
    assert "[/]" in header


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
    singular = [
        "measure",
        "--model",
        "mynets:linear",
        *data,
        "--normalize",
        "data",
        "--subset-size",
        "640",
        "--trials",
        "1",
    ]
    assert "--on-singular skip" in error_of(capsys, singular, lines=2)
    assert "no function or class 'nets'" in error_of(capsys, ["measure", "--model", "mynets:nets", *data])
    assert "cannot import 'nothere'" in error_of(capsys, ["measure", "--model", "nothere:net", *data])
    assert "no weights here" in error_of(capsys, ["measure", "--model", "mynets:broken", *data])
    assert "returned int" in error_of(capsys, ["measure", "--model", "mynets:number", *data])
    assert "needs its training data" in error_of(capsys, ["measure", "--model", "mynets:net"])


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


def test_demo_prints_the_table_and_where_the_report_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fake(out: Path, *, workers: int | None, progress: bool) -> demo.DemoResult:
        given.append((out, workers, progress))
        return demo.DemoResult([], 1.0)

    given: list[Any] = []

    monkeypatch.setattr(demo, "demo", fake)
    monkeypatch.setattr(study, "table", lambda summaries: "THE TABLE")
    assert cli.main(["demo", "--out", str(tmp_path), "--workers", "1"]) == 0
    out = capsys.readouterr().out
    assert "THE TABLE" in out
    assert "report.html" in out
    assert cli.main(["demo", "--out", str(tmp_path), "--json", "--no-progress"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "experiments": [],
        "seconds": 1.0,
        "report": str(tmp_path / "report.html"),
    }
    assert given == [(tmp_path, 1, True), (tmp_path, None, False)]


def test_reproduce_says_what_would_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["reproduce", "table-1", "--preset", "digits", "--out", str(tmp_path), "--seeds", "3", "--dry-run"]
    assert cli.main([*command, "--workers", "2"]) == 0
    said = capsys.readouterr().out
    assert "36 runs are left" in said
    assert "with 2 workers" in " ".join(said.split())
    assert cli.main([*command, "--json"]) == 0
    assert sum(row["left"] for row in json.loads(capsys.readouterr().out)["plan"]) == 36
    assert cli.main(["reproduce", "search", "--out", str(tmp_path), "--dry-run", "--json", "--trials", "3"]) == 0
    assert [row["left"] for row in json.loads(capsys.readouterr().out)["plan"]] == [6, 6]
    command = ["reproduce", "table-1", "search", "--preset", "digits", "--seeds", "3", "--dry-run", "--json"]
    assert cli.main([*command, "--out", str(tmp_path)]) == 0
    rows = json.loads(capsys.readouterr().out)["plan"]
    assert list(dict.fromkeys(row["experiment"] for row in rows)) == ["search", "table-1"]  # which trains by its choice
    assert list(tmp_path.iterdir()) == []


def test_reproduce_in_this_process_takes_no_workers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["reproduce", "table-1", "--out", str(tmp_path), "--dry-run", "--executor", "local", "--workers"]
    assert "--executor local is this process alone, got --workers 8: leave out one" in error_of(capsys, [*command, "8"])


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
    assert cli.main([*command, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert [each["name"] for each in found["experiments"]] == ["scenario-1"]
    assert found["report"] == str(tmp_path / "digits" / "scenario-1.html")
