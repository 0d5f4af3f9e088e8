"""Runs that are finished by the records of another place, and only the missing ones run."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flatminima import cli
from flatminima.errors import FlatminimaError
from flatminima.lab import study
from flatminima.lab.experiments import Archive, Record, Summary, Task, json_of, presets, read_summaries, write_winners
from flatminima.lab.experiments.experiment import perform
from flatminima.lab.experiments.paper import REGULARIZED
from flatminima.lab.jobs import Local
from flatminima.lab.reports import pages
from flatminima.lab.reproduce import Reproduction
from flatminima.lab.runs import RegularizerSpec
from support.presets import tiny_preset

RESULTS = Path(__file__).parents[2] / "results"
SCENARIO = "scenario-1"

_RUN = replace(presets.PRESETS["digits"].scenario, epochs=2, evaluate_every=2)
TINY = tiny_preset(_RUN, replace(_RUN, train_size=100), images=100, subset_size=10, trials=2)


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(presets.PRESETS, "digits", TINY)
    monkeypatch.setattr(pages, "figures", lambda summary: [])  # they take longer than the runs
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture
def performed(monkeypatch: pytest.MonkeyPatch) -> list[Task]:
    """The tasks that are performed from now on."""
    tasks: list[Task] = []

    def noted(task: Task) -> Record:
        tasks.append(task)
        return perform(task)

    monkeypatch.setattr(study, "perform", noted)
    return tasks


def reproduction(
    out: Path, *names: str, seeds: tuple[int, ...] = (0, 1), records: Path | None = None, **options: Any
) -> Reproduction:
    return Reproduction(names, "digits", out, seeds=seeds, executor=Local(), records=records, **options)


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The records of seed 0 of scenario I, without the runs' folders."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setitem(presets.PRESETS, "digits", TINY)
        patch.setattr(pages, "figures", lambda summary: [])
        asked = reproduction(tmp_path_factory.mktemp("first"), SCENARIO, seeds=(0,))
        asked.run(progress=False)
    records = tmp_path_factory.mktemp("records")
    asked.page.with_suffix(".json").rename(records / "scenario-1.json")
    return records


def changed(records: Path, to: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """The records with a change to their first summary, elsewhere."""
    values = json.loads((records / "scenario-1.json").read_text(encoding="utf-8"))
    change(values[0])
    to.mkdir()
    (to / "scenario-1.json").write_text(json.dumps(values), encoding="utf-8")
    return to


def numbers(summary: Summary) -> dict[str, Any]:
    """A summary as it is written, without times."""
    (values,) = json_of([summary])
    for record in values["records"]:
        del record["seconds"]
    return {name: value for name, value in values.items() if name not in ("seconds_left", "workers")}


def test_on_a_new_machine_only_the_missing_runs_are_run_and_the_table_is_the_same(
    half: Path, tmp_path: Path, performed: list[Task]
) -> None:
    (whole,) = reproduction(tmp_path / "whole", SCENARIO).run(progress=False)
    performed.clear()
    (joined,) = reproduction(tmp_path / "joined", SCENARIO, records=half).run(progress=False)
    assert {(task.setting.case, task.setting.spec.seed) for task in performed} == {("0", 1), ("100", 1)}
    assert numbers(joined) == numbers(whole)


def test_what_is_archived_is_planned_and_run_no_more(half: Path, tmp_path: Path, performed: list[Task]) -> None:
    asked = reproduction(tmp_path, SCENARIO, seeds=(0,), records=half)
    assert sum(row.left for row in asked.plan()) == 0
    (again,) = asked.run(progress=False)
    assert (performed, again.left, len(again.records)) == ([], (), 2)


def test_after_every_run_the_json_has_it_and_names_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, seen = reproduction(tmp_path, SCENARIO), []

    def looked(task: Task) -> Record:
        path = asked.page.with_suffix(".json")
        seen.append(read_summaries(path)[0] if path.exists() else None)
        return perform(task)

    monkeypatch.setattr(study, "perform", looked)
    asked.run(progress=False)
    assert seen[0] is None
    known = [summary for summary in seen if summary is not None]
    assert [len(summary.records) for summary in known] == [1, 2, 3]
    assert [len(summary.left) for summary in known] == [3, 2, 1]
    assert known[-1].unfinished == {known[-1].left[0]: "100, plain, seed 1"}


def test_a_folder_goes_before_records(half: Path, tmp_path: Path) -> None:
    asked = reproduction(tmp_path, SCENARIO, seeds=(0,))
    asked.run(progress=False)

    def alter(summary: dict[str, Any]) -> None:
        summary["records"][0]["test_error"] = 0.123

    records = changed(half, tmp_path / "records", alter)
    assert numbers(replace(asked, records=records).summary(SCENARIO)) == numbers(asked.summary(SCENARIO))
    elsewhere = reproduction(tmp_path / "elsewhere", SCENARIO, seeds=(0,), records=records).summary(SCENARIO)
    assert elsewhere.records[0].test_error == 0.123


@pytest.mark.parametrize(
    "other",
    [
        replace(TINY, scenario=replace(_RUN, epochs=3)),
        replace(TINY, measuring=replace(TINY.measuring, trials=3)),
        replace(TINY, measuring=replace(TINY.measuring, measures=("free",))),
    ],
    ids=["another run", "other trials", "other measures"],
)
def test_another_description_is_another_run(
    other: presets.Preset, half: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(presets.PRESETS, "digits", other)
    summary = reproduction(tmp_path, SCENARIO, seeds=(0,), records=half).summary(SCENARIO)
    assert (len(summary.records), len(summary.left)) == (0, 2)


def test_measures_of_a_users_own_are_measured_again(half: Path, tmp_path: Path) -> None:
    def own(summary: dict[str, Any]) -> None:
        summary["measuring"]["measures"] += ["math:sqrt"]

    archive = Archive.read(changed(half, tmp_path / "records", own))
    (task, *_) = reproduction(tmp_path, SCENARIO, measures=("math:sqrt",)).tasks(SCENARIO)
    assert archive.of(task) is None


def test_runs_of_another_machine_keep_its_environment(half: Path, tmp_path: Path) -> None:
    def moved(summary: dict[str, Any]) -> None:
        summary["records"][0]["environment"]["torch"] = "9.8.7"

    asked = reproduction(tmp_path, SCENARIO, seeds=(0,), records=changed(half, tmp_path / "records", moved))
    (summary,) = asked.report_finished()
    assert [record.environment["torch"] for record in summary.records] == ["9.8.7", torch.__version__]
    page = asked.page.read_text(encoding="utf-8")
    assert "torch 9.8.7" in page
    assert f"torch {torch.__version__}" in page


def test_runs_are_taken_across_tables_and_search(tmp_path: Path, performed: list[Task]) -> None:
    first = reproduction(tmp_path / "first", "search", "table-2")
    search, two = first.run(progress=False)
    performed.clear()
    records = first.page.parent
    asked = reproduction(tmp_path / "second", "table-1", records=records)
    one = asked.summary("table-1")
    winner = float(search.chosen["MLP, digits"].split(",")[0].removeprefix("β="))
    assert one.specs[f"MLP, digits / {REGULARIZED}"]["regularizer"]["beta"] == winner
    assert {record.run for record in one.records} == {record.run for record in two.records}
    write_winners(asked.folder, {"a network that the records have not": RegularizerSpec(beta=3)})
    assert asked.summary("table-1").specs == one.specs
    assert all(record.indicators == {} for record in one.records)
    assert len(one.left) == 6
    assert reproduction(tmp_path / "third", "table-2", records=records).summary("table-2").left == ()


def test_the_winners_of_a_search_by_trials_are_taken(tmp_path: Path) -> None:
    first = reproduction(tmp_path / "first", "search", trials=1)  # of two settings
    (search,) = first.run(progress=False)
    (winner,) = search.chosen.values()
    beta = float(winner.split(",")[0].removeprefix("β="))
    asked = reproduction(tmp_path / "second", "table-1", records=first.folder)
    specs = asked.experiment("table-1")
    assert "β, M and τ are the search's." in specs.question
    assert {s.spec.regularizer.beta for s in specs.settings if s.arm == REGULARIZED} == {beta}  # type: ignore[union-attr]


def test_a_search_among_other_settings_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = reproduction(tmp_path / "first", "search", trials=1)
    first.run(progress=False)
    monkeypatch.setitem(presets.PRESETS, "digits", replace(TINY, betas=(10, 20, 30)))
    table = reproduction(tmp_path / "second", "table-1", records=first.folder).experiment("table-1")
    assert "they are a guess" in table.question


def test_a_search_that_a_run_has_lost_is_decided_by_its_records(tmp_path: Path) -> None:
    first = reproduction(tmp_path / "first", "search")
    lost, _ = first.tasks("search")
    lost.folder.path.mkdir(parents=True)
    lost.folder.write_spec(lost.setting.spec)
    lost.folder.write_failure("the loss is nan", [])
    (search,) = first.run(progress=False)
    asked = reproduction(tmp_path / "second", "table-1", records=first.folder).experiment("table-1")
    assert search.chosen["MLP, digits"] != lost.setting.arm
    assert "β, M and τ are the search's." in asked.question


def test_damaged_records_are_refused_in_a_line(half: Path, tmp_path: Path) -> None:
    def other_seed(summary: dict[str, Any]) -> None:
        summary["records"][0]["seed"] = 7

    def no_spec(summary: dict[str, Any]) -> None:
        summary["specs"] = {}

    cases = {"seed": (other_seed, "is another than its description says"), "spec": (no_spec, "has no description")}
    for name, (change, said) in cases.items():
        with pytest.raises(FlatminimaError, match=rf"scenario-1.json is damaged \(the run mlp-.* {said}\)") as refused:
            reproduction(tmp_path, SCENARIO, records=changed(half, tmp_path / name, change))
        assert "\n" not in str(refused.value)
    (tmp_path / "seed" / "scenario-1.json").write_text("[{", encoding="utf-8")
    with pytest.raises(FlatminimaError, match=r"scenario-1\.json holds no summaries of experiments"):
        reproduction(tmp_path, SCENARIO, records=tmp_path / "seed")
    with pytest.raises(FlatminimaError, match=r"there is no folder .*nowhere to read records from"):
        reproduction(tmp_path, SCENARIO, records=tmp_path / "nowhere")


def test_a_search_by_trials_takes_no_records(half: Path, tmp_path: Path) -> None:
    with pytest.raises(FlatminimaError, match="leave out trials or records"):
        reproduction(tmp_path, "search", trials=3, records=half)


def test_tables_are_written_from_records_alone(
    half: Path, tmp_path: Path, performed: list[Task], capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--preset", "digits", "--seeds", "0", "1", "--out", str(tmp_path), "--executor", "local"]
    assert cli.main(["reproduce", SCENARIO, *options, "--records", str(half), "--no-runs"]) == 0
    assert "2 of 4 runs are done, 2 are left" in capsys.readouterr().out
    text = (tmp_path / "digits" / "scenario-1.md").read_text(encoding="utf-8")
    assert "2 runs are still to come: what stands here may change." in text
    assert performed == []
    assert not (tmp_path / "digits" / "runs").exists()


def test_records_of_the_first_version_are_known_by_what_they_describe(tmp_path: Path) -> None:
    asked = Reproduction(("search", "table-1", "table-2"), "small", tmp_path, records=RESULTS / "small")
    (search,), (table,) = (read_summaries(RESULTS / "small" / f"{name}.json") for name in ("search", "table-1"))
    assert [asked.archive.of(task) for task in asked.tasks("search")] == list(search.records)
    winner = min(search.records, key=lambda record: record.value("validation_error"))
    assert f"{winner.case} / {winner.arm}" in search.specs
    found = [record for task in asked.tasks("table-1") if (record := asked.archive.of(task)) is not None]
    assert sorted(record.run for record in found) == sorted(record.run for record in table.records)
    assert [asked.archive.of(task) for task in asked.tasks("table-2")] == [None] * 10  # measured by fewer measures


def test_the_published_fresh_scenario_needs_no_run(tmp_path: Path) -> None:
    asked = Reproduction(
        ("scenario-2",), "small", tmp_path, seeds=(5, 6, 7, 8, 9), records=RESULTS / "small-fresh", executor=Local()
    )
    (published,) = read_summaries(RESULTS / "small-fresh" / "scenario-2.json")
    assert [asked.archive.of(task) for task in asked.tasks("scenario-2")] == list(published.records)
