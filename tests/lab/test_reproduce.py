"""The whole way on the digits, with short runs; statistics, costs and definitions have tests of their own."""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from flatminima.errors import FlatminimaError
from flatminima.lab import reproduce, reproductions
from flatminima.lab.executors import Local
from flatminima.lab.experiments import Record, Task, look_up, perform
from flatminima.lab.measuring import Measuring
from flatminima.lab.pages import progress
from flatminima.lab.reproduce import Reproduction
from flatminima.lab.reproductions import PLAIN, REGULARIZED
from flatminima.lab.specs import RegularizerSpec

TINY = replace(
    reproductions.PRESETS["digits"],
    scenario=replace(reproductions.PRESETS["digits"].scenario, epochs=8),
    augmented=replace(reproductions.PRESETS["digits"].scenario, epochs=8),
    confusion=(0, 200),
    clean_images=200,
    networks={"MLP, digits": replace(reproductions.PRESETS["digits"].scenario, epochs=4)},
    measured=("MLP, digits",),
    betas=(10, 20),
    sub_batches=(5,),
    clipping=(5,),
    measuring=Measuring(subset_size=20, trials=3, robustness_samples=2, on_singular="skip"),
)


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(reproductions.PRESETS, "digits", TINY)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def reproduction(out: Path, *names: str, seeds: tuple[int, ...] = (0, 1)) -> Reproduction:
    # worker processes would see the real presets, and their start takes longer than these runs
    return Reproduction(names, "digits", out, seeds=seeds, executor=Local())


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.pictures = 0
        self.loaded: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.pictures += tag == "svg"
        self.loaded += [v for k, v in attrs if k in ("src", "href") and v and not v.startswith(("#", "data:"))]
        assert tag != "script"


def test_a_scenario_from_end_to_end(tmp_path: Path) -> None:
    (summary,) = reproduction(tmp_path, "scenario-1").run(progress=False)
    assert {(r["case"], r["seed"]) for r in summary["records"]} == {("0", 0), ("200", 0), ("0", 1), ("200", 1)}
    assert (summary["left"], summary["failures"]) == ([], {})
    assert summary["correlations"]["log_det_fisher"]["tau"] is not None
    assert summary["verdict"][0].startswith("γ̂ ")
    stem = tmp_path / "digits" / "scenario-1"
    assert json.loads(stem.with_suffix(".json").read_text()) == [json.loads(json.dumps(summary))]
    page = _Page()
    page.feed(stem.with_suffix(".html").read_text())
    assert (page.pictures, page.loaded) == (2 * 7, [])
    text = stem.with_suffix(".md").read_text()
    assert all(line in text for line in summary["verdict"])
    assert "| images with random labels | 0 | 200 |" in text


def test_what_was_cut_short_is_shown_and_goes_on(tmp_path: Path) -> None:
    asked = reproduction(tmp_path, "scenario-1")
    tasks = asked.experiment("scenario-1").tasks(asked.folder / "runs")
    first = perform(tasks[0])
    assert look_up(tasks[0]) == first
    assert look_up(tasks[1]) is None
    summary = asked.summary("scenario-1")
    assert (len(summary["records"]), len(summary["left"])) == (1, 3)
    assert summary["seconds_left"] > 0
    assert summary["verdict"][-1] == "3 runs are still to come: what stands here may change."
    assert progress(summary).startswith("1 of 4 runs are done, 3 are left, about")
    trained = {path: path.stat().st_mtime_ns for path in asked.folder.rglob("checkpoint.safetensors")}
    (whole,) = asked.run(progress=False)
    assert whole["records"][0] == first
    assert {path: path.stat().st_mtime_ns for path in trained} == trained


def test_the_page_is_written_also_when_the_work_is_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(task: Task) -> Record:
        if task.setting.case != "25":
            raise KeyboardInterrupt
        return perform(task)

    monkeypatch.setattr(reproduce, "perform", interrupted)
    asked = reproduction(tmp_path, "scenario-3")
    with pytest.raises(KeyboardInterrupt):
        asked.run(progress=False)
    assert "1 of 8 runs are done, 7 are left" in asked.page.read_text()


def test_before_any_run_the_page_says_so(tmp_path: Path) -> None:
    asked = reproduction(tmp_path, *reproductions.EXPERIMENTS)
    asked.report([asked.summary(name) for name in asked.names])
    assert asked.page.name == "all.html"
    assert asked.page.read_text().count("No run is finished yet.") == len(reproductions.EXPERIMENTS)


def test_failed_runs_are_listed_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = reproduction(tmp_path, "scenario-1")
    before, now, *_ = asked.experiment("scenario-1").tasks(asked.folder / "runs")
    before.folder.path.mkdir(parents=True)
    before.folder.write_spec(before.setting.spec)
    before.folder.write_failure("the loss is nan", [])

    def perform_or_fail(task: Task) -> Record:
        if task == now:
            raise FlatminimaError("no such luck")
        return perform(task)

    monkeypatch.setattr(reproduce, "perform", perform_or_fail)
    (summary,) = asked.run(progress=False)
    names = before.folder.path.name, now.folder.path.name
    assert "the loss is nan" in summary["failures"][names[0]]
    assert summary["failures"][names[1]] == "no such luck"
    assert {record["seed"] for record in summary["records"]} == {1}
    page = asked.page.read_text()
    assert "2 of 4 runs are done, 2 failed." in page
    assert "no such luck" in page


def test_the_winner_is_trained_in_the_tables(tmp_path: Path) -> None:
    search, one, two = reproduction(tmp_path, "search", "table-1", "table-2").run(progress=False)
    errors = {record["arm"]: record["validation_error"] for record in search["records"]}
    winner = search["chosen"]["MLP, digits"]
    assert errors[winner] == min(errors.values())
    beta = float(winner.split(",")[0].removeprefix("β="))
    assert one["specs"][f"MLP, digits / {REGULARIZED}"]["regularizer"]["beta"] == beta
    differences = [d for d in one["differences"] if d["against"] == PLAIN]
    gains = [
        a["test_error"] - b["test_error"]
        for a in one["records"]
        for b in one["records"]
        if (a["arm"], b["arm"]) == (REGULARIZED, PLAIN) and a["seed"] == b["seed"]
    ]
    assert differences[0]["mean"] == pytest.approx(sum(gains) / 2)
    assert {r["run"] for r in two["records"]} < {r["run"] for r in one["records"]}
    assert "γ̂, normalized" in two["verdict"][0]


def test_a_damaged_choice_is_named(tmp_path: Path) -> None:
    asked = reproduction(tmp_path, "table-1")
    asked.folder.mkdir()
    (asked.folder / "chosen.json").write_text('{"MLP, digits": 7}')
    with pytest.raises(FlatminimaError, match=r"chosen.json is damaged: delete it"):
        asked.plan()


def test_the_plan_counts_what_is_left(tmp_path: Path) -> None:
    asked = reproduction(tmp_path, "table-1", "table-2")
    before = asked.plan()
    assert sum(row.left for row in before) == 10 + 4
    one, two = ({row.training: row for row in before if row.experiment == name} for name in asked.names)
    assert two[PLAIN].passes < one[PLAIN].passes  # its runs are trained by then, and only measured
    assert one[REGULARIZED].passes > 2 * one[PLAIN].passes
    assert all(row.seconds > 0 for row in before)
    asked.run(progress=False)
    assert sum(row.left for row in asked.plan()) == 0
    console = Console(width=160, file=io.StringIO(), record=True)
    console.print(reproduce.plan_table(before, 2))
    assert "14 runs are left" in console.export_text()


def test_default_regularizer_is_the_presets(tmp_path: Path) -> None:
    specs = [s.spec.regularizer for s in reproduction(tmp_path, "table-1").experiment("table-1").settings]
    assert TINY.regularizer in specs
    assert isinstance(TINY.regularizer, RegularizerSpec)
