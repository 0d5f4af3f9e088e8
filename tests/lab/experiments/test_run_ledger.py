from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from flatminima.lab.experiments import Summary, write_ledger
from flatminima.lab.experiments.analysis import summarize
from flatminima.lab.experiments.paper import PLAIN, REGULARIZED, scenario_1, scenario_3, table_1
from flatminima.lab.experiments.presets import PRESETS
from flatminima.lab.reports import tables
from flatminima.protocols import Ledger, evaluate
from support.records import record_of


def summary_of(build: object = scenario_3, name: str = "scenario-3", lost: bool = False) -> Summary:
    """Five minima a setting, of which one may lack γ̂; with a measure that flatminima does not know."""
    experiment = replace(build(PRESETS["paper"], {}), name=name)
    records = []
    for k, case in enumerate(experiment.cases):
        for seed in range(5):
            error = 0.1 * k + 0.013 * seed
            gamma = None if lost and (k, seed) == (1, 2) else error / 7
            measures = {"log_det_fisher": gamma, "train_loss": 0.1 * seed + 0.01 * k, "of_mine": -error / 3}
            records.append(record_of(case, PLAIN, seed, error, **measures))
    return summarize(experiment, records)


def test_the_ledger_has_a_row_a_minimum_and_all_of_its_measures_to_the_bit(tmp_path: Path) -> None:
    summary = summary_of(lost=True)
    write_ledger(tmp_path / "ledger.csv", [summary])
    ledger = pd.read_csv(tmp_path / "ledger.csv", dtype={"case": str})
    expected = "experiment batch_size case arm run seed test_error validation_error train_accuracy log_det_fisher"
    assert list(ledger)[:10] == expected.split()
    assert ledger["batch_size"].map("{:,}".format).tolist() == ledger["case"].tolist()  # what this scenario varies
    assert len(ledger) == len(summary.records)
    for row, record in zip(ledger.to_dict("records"), summary.records, strict=True):
        assert (row["experiment"], row["case"], row["seed"]) == ("scenario-3", record.case, record.seed)
        assert row["test_error"] == record.test_error
        for name, value in record.indicators.items():
            assert pd.isna(row[name]) if value is None else row[name] == value


def test_the_summary_says_what_the_protocols_say_of_the_ledger(tmp_path: Path) -> None:
    summary = summary_of()
    write_ledger(tmp_path / "ledger.csv", [summary])
    assert summary.evaluation is not None
    again = Ledger.read(
        tmp_path / "ledger.csv",
        error="test_error",
        given="train_loss",
        hyper_parameters=["case"],
        measures=list(summary.evaluation.measures),
        seed="seed",
    )
    assert evaluate(again) == summary.evaluation
    gamma = summary.evaluation.measures["log_det_fisher"]
    assert gamma.kendall.value == summary.correlations["log_det_fisher"].tau == 1
    assert gamma.sign_error.value == 0
    assert "of_mine" in summary.evaluation.measures
    assert summary.verdict[0].startswith("γ̂ follows the test error through all settings")
    (ground,) = [line for line in summary.verdict if line.startswith("20 minima of 4 settings, ordered by test error.")]
    assert "Of training loss alone, τ = " in ground
    (against,) = [line for line in summary.verdict if line.startswith("Go against the error beyond training loss")]
    assert "of_mine" in against


def test_what_a_run_has_not_is_a_level_of_its_ledger(tmp_path: Path) -> None:
    experiment = table_1(PRESETS["small"], {})
    (case,) = experiment.cases
    records = [
        record_of(case, arm, seed, 0.1 * k + 0.01 * seed)
        for k, arm in enumerate((PLAIN, REGULARIZED))
        for seed in range(3)
    ]
    write_ledger(tmp_path / "ledger.csv", [replace(summarize(experiment, records), name="table-1")])
    ledger = Ledger.read(
        tmp_path / "ledger.csv",
        error="test_error",
        hyper_parameters=["regularizer.beta"],
        measures=["fisher_trace"],
        seed="seed",
    )
    assert (len(ledger.all), set(ledger.all.levels[0])) == (6, {"none", "100.0"})


def test_the_paper_is_held_beside_the_protocols() -> None:
    _, evidence = tables(summary_of())
    assert evidence.header[:2] == ("measure", "partial τ")
    rows = {row[0]: row for row in evidence.rows}
    assert (rows["γ̂"][-1], rows["robustness"][-1], rows["training loss"][-1]) == ("follows", "fails", "")


def test_experiments_of_other_pages_stay_in_the_ledger(tmp_path: Path) -> None:
    path = tmp_path / "ledger.csv"
    first, second = summary_of(), summary_of(scenario_1, "scenario-1")
    write_ledger(path, [first])
    alone = path.read_text(encoding="utf-8")
    write_ledger(path, [first])
    assert path.read_text(encoding="utf-8") == alone
    write_ledger(path, [second])
    both = pd.read_csv(path)
    assert both["experiment"].value_counts().to_dict() == {"scenario-3": 20, "scenario-1": 30}
    assert both["confusion"].isna().sum() == 20  # which scenario 3 does not vary
    of_first = pd.read_csv(path, dtype=str, keep_default_na=False).query("experiment == 'scenario-3'")
    assert of_first["test_error"].tolist() == [str(record.test_error) for record in first.records]


@pytest.mark.parametrize("text", ["", "a,b\n1,2\n", 'experiment\n"'])
def test_another_file_in_its_place_is_replaced(text: str, tmp_path: Path) -> None:
    path = tmp_path / "ledger.csv"
    path.write_text(text)
    write_ledger(path, [summary_of()])
    assert pd.read_csv(path)["experiment"].tolist() == ["scenario-3"] * 20
