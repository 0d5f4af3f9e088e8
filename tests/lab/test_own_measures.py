"""A measure of the user's own goes the whole way: measure, compare, JSON, reproduce, ledger, evaluate, pages."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch

import flatminima as fm
from flatminima import cli
from flatminima.lab.experiments import presets
from flatminima.lab.jobs import Local
from flatminima.lab.reproduce import Reproduction
from flatminima.lab.runs.folder import RunFolder
from flatminima.lab.runs.measuring import Measuring, measure_run
from flatminima.measures import Trial
from support.command_line import error_of

pytestmark = [pytest.mark.filterwarnings("ignore::flatminima.errors.FlatminimaWarning")]

MODULE = "own_measures_of_a_user"
SOURCE = """
def largest_loss(trial):
    return trial.losses.max().item()
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module in the current directory, and what names its function."""
    (tmp_path / f"{MODULE}.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    yield f"{MODULE}:largest_loss"
    sys.modules.pop(MODULE, None)


def largest_loss(trial: Trial) -> float:
    return trial.losses.max().item()


def test_it_is_measured_and_compared_in_pairs_and_written_as_json() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(12, 20), torch.arange(12) % 3
    models = {name: torch.nn.Linear(20, 3) for name in ("a", "b")}
    how = {"subset_size": 6, "trials": 4, "measures": [largest_loss], "progress": False}
    compared = fm.compare(models, (x, y), **how)
    for name, model in models.items():
        found = fm.measure(model, (x, y), **how)
        assert found.estimates()["largest_loss"] == compared.characterizations[name].estimates()["largest_loss"]
        assert json.loads(found.to_json())["others"]["largest_loss"]["mean"] == found.estimates()["largest_loss"].mean
    a, b = (compared.characterizations[name].estimates()["largest_loss"].per_trial for name in models)
    difference = compared.difference("a", "b", "largest_loss")
    assert difference.per_trial == tuple(p - q for p, q in zip(a, b, strict=True))
    pair = json.loads(compared.to_json())["differences"]["largest_loss"]["a - b"]
    assert pair["standard_error"] == pytest.approx(difference.standard_error)
    assert "largest_loss" in str(compared)


def test_it_goes_from_runs_to_the_ledger_and_its_evaluation(
    own: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = presets.PRESETS["digits"]
    tiny = replace(
        tiny,
        scenario=replace(tiny.scenario, epochs=4),
        clean_images=100,
        confusion=(0, 100),
        measuring=Measuring(subset_size=20, trials=3, measures=("free",), on_singular="skip"),
    )
    monkeypatch.setitem(presets.PRESETS, "digits", tiny)
    study = Reproduction(("scenario-1",), "digits", Path("out"), seeds=(0, 1), executor=Local(), measures=(own,))
    (summary,) = study.run(progress=False)
    assert summary.evaluation is not None
    assert "largest_loss" in summary.evaluation.measures
    assert "largest_loss" in study.page.with_suffix(".md").read_text()
    run = study.folder / "runs" / summary.records[0].run
    expected = summary.records[0].indicators["largest_loss"]

    ledger = study.folder / "ledger.csv"
    assert pd.read_csv(ledger)["largest_loss"].tolist() == [r.indicators["largest_loss"] for r in summary.records]
    assert cli.main(["evaluate", str(ledger), "--measures", "largest_loss", "fisher_trace"]) == 0
    assert "largest_loss" in capsys.readouterr().out
    assert "largest_loss" in Path("evaluation.html").read_text(encoding="utf-8")

    options = ["--subset-size", "20", "--trials", "3", "--on-singular", "skip", "--measures", own, "--json"]
    assert cli.main(["measure", str(run), *options]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["others"]["largest_loss"]["mean"] == expected


def test_one_that_was_changed_is_taken_again(own: str, tmp_path: Path) -> None:
    run = _a_run(tmp_path)
    how = Measuring(subset_size=20, trials=2, measures=(own,), on_singular="skip")
    first = measure_run(run, how, progress=False).estimates()["largest_loss"].mean
    assert len(json.loads((run / "measures.json").read_text())) == 1
    measure_run(run, how, progress=False)
    assert len(json.loads((run / "measures.json").read_text())) == 1
    (tmp_path / f"{MODULE}.py").write_text(SOURCE.replace("max().item()", "max().item() + 100.0"))
    sys.modules.pop(MODULE)
    assert measure_run(run, how, progress=False).estimates()["largest_loss"].mean == pytest.approx(first + 100)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere:function", r"measure nowhere:function: cannot import 'nowhere'"),
        (f"{MODULE}:smallest_loss", f"{MODULE} has no function or class 'smallest_loss'"),
        ("largest_loss", "unknown measure 'largest_loss'"),
    ],
)
def test_one_that_is_not_there_is_refused_before_anything_runs(
    name: str, message: str, own: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(_a_run(tmp_path))
    for command in (["reproduce", "scenario-1"], ["measure", run]):
        said = error_of(capsys, [*command, "--measures", name])
        assert message in said
        assert "\n" not in said.strip()
    assert not Path("reproduction").exists()


def _a_run(root: Path) -> Path:
    from flatminima.lab.runs.training import train

    spec = replace(presets.PRESETS["digits"].scenario, epochs=1, train_size=100)
    train(spec, root, progress=False)
    return RunFolder.of(root, spec).path
