"""The whole way on the digits, with short runs; statistics, costs and definitions have tests of their own."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import random
import resource
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from flatminima import cli
from flatminima.errors import FlatminimaError
from flatminima.files import beside
from flatminima.lab import reproduce, study
from flatminima.lab.experiments import Summary, json_of, paper, presets, read_summaries, read_winners, write_winners
from flatminima.lab.experiments.experiment import Record, Task, look_up, perform
from flatminima.lab.experiments.paper import PLAIN, REGULARIZED
from flatminima.lab.jobs import Failure, Local
from flatminima.lab.reports import pages
from flatminima.lab.reports.pages import progress_line
from flatminima.lab.reproduce import Reproduction
from flatminima.lab.runs import interrupts
from flatminima.lab.runs.spec import RegularizerSpec
from support.commands import Command
from support.presets import tiny_preset

pytestmark = pytest.mark.xdist_group("commands")  # they share the undisturbed runs, and the server of forked commands

_RUN = presets.PRESETS["digits"].scenario
TINY = tiny_preset(replace(_RUN, epochs=8), replace(_RUN, epochs=4), images=200, subset_size=20, trials=3)


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(presets.PRESETS, "digits", TINY)
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
    assert {(r.case, r.seed) for r in summary.records} == {("0", 0), ("200", 0), ("0", 1), ("200", 1)}
    assert (summary.left, summary.failures) == ((), {})
    assert summary.correlations["log_det_fisher"].defined
    assert summary.verdict[0].startswith("γ̂ ")
    stem = tmp_path / "digits" / "scenario-1"
    assert json.loads(stem.with_suffix(".json").read_text()) == json_of([summary])
    page = _Page()
    page.feed(stem.with_suffix(".html").read_text())
    assert (page.pictures, page.loaded) == (7, [])
    ledger = stem.with_name("ledger.csv").read_text().splitlines()
    assert len(ledger) == 1 + len(summary.records)
    assert set(ledger[0].split(",")) >= {"experiment", "confusion", "case", "seed", "test_error", *summary.correlations}
    text = stem.with_suffix(".md").read_text()
    assert all(line in text for line in summary.verdict)
    assert "| images with random labels | 0 | 200 |" in text


@pytest.fixture
def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take longer than the runs."""
    monkeypatch.setattr(pages, "figures", lambda summary: [])


@pytest.mark.usefixtures("without_pictures")
def test_what_was_cut_short_is_shown_and_goes_on(tmp_path: Path) -> None:
    asked = reproduction(tmp_path, "scenario-1")
    tasks = asked.experiment("scenario-1").tasks(asked.folder / "runs")
    first = perform(tasks[0])
    assert look_up(tasks[0]) == first
    assert look_up(tasks[1]) is None
    summary = asked.summary("scenario-1")
    assert (len(summary.records), len(summary.left)) == (1, 3)
    assert summary.seconds_left > 0
    assert summary.verdict[-1] == "3 runs are still to come: what stands here may change."
    assert progress_line(summary).startswith("1 of 4 runs are done, 3 are left, about")
    trained = {path: path.stat().st_mtime_ns for path in asked.folder.rglob("checkpoint.safetensors")}
    (whole,) = asked.run(progress=False)
    assert whole.records[0] == first
    assert {path: path.stat().st_mtime_ns for path in trained} == trained


@pytest.mark.usefixtures("without_pictures")
def test_the_page_is_written_also_when_the_work_is_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(task: Task) -> Record:
        if task.setting.case != "25":
            raise KeyboardInterrupt
        return perform(task)

    monkeypatch.setattr(study, "perform", interrupted)
    asked = reproduction(tmp_path, "scenario-3")
    with pytest.raises(KeyboardInterrupt):
        asked.run(progress=False)
    assert "1 of 8 runs are done, 7 are left" in asked.page.read_text()


def test_before_any_run_the_page_says_so(tmp_path: Path) -> None:
    asked = reproduction(tmp_path, *paper.EXPERIMENTS)
    asked.report([asked.summary(name) for name in asked.names])
    assert asked.page.name == "all.html"
    assert asked.page.read_text().count("No run is finished yet.") == len(paper.EXPERIMENTS)


@pytest.mark.usefixtures("without_pictures")
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

    monkeypatch.setattr(study, "perform", perform_or_fail)
    (summary,) = asked.run(progress=False)
    names = before.folder.path.name, now.folder.path.name
    assert "the loss is nan" in summary.failures[names[0]]
    assert summary.failures[names[1]] == "no such luck"
    assert {record.seed for record in summary.records} == {1}
    page = asked.page.read_text()
    assert "2 of 4 runs are done, 2 failed." in page
    assert "no such luck" in page


def test_the_winner_is_trained_in_the_tables(tmp_path: Path) -> None:
    asked = reproduction(tmp_path, "table-2", "search", "table-1", "search")
    assert asked.names == ("search", "table-1", "table-2")  # whatever the order in which they are named
    search, one, two = asked.run(progress=False)
    errors = {record.arm: record.validation_error for record in search.records}
    winner = search.chosen["MLP, digits"]
    assert errors[winner] == min(errors.values())
    beta = float(winner.split(",")[0].removeprefix("β="))
    assert one.specs[f"MLP, digits / {REGULARIZED}"]["regularizer"]["beta"] == beta
    differences = [d for d in one.differences if d.against == PLAIN]
    gains = [
        a.test_error - b.test_error
        for a in one.records
        for b in one.records
        if (a.arm, b.arm) == (REGULARIZED, PLAIN) and a.seed == b.seed
    ]
    assert differences[0].mean == pytest.approx(sum(gains) / 2)
    assert {r.run for r in two.records} < {r.run for r in one.records}
    assert "γ̂, normalized" in two.verdict[0]


@pytest.mark.usefixtures("without_pictures")
def test_a_run_that_diverges_loses_the_search_and_one_without_luck_leaves_it_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = reproduction(tmp_path, "search")
    first, second = asked.tasks("search")

    def perform_or_fail(task: Task) -> Record:
        if task == first:
            raise FlatminimaError("no space left")
        return perform(task)

    with monkeypatch.context() as patched:
        patched.setattr(study, "perform", perform_or_fail)
        (summary,) = asked.run(progress=False)
    assert (summary.chosen, list(summary.failures)) == ({}, [first.name])
    first.folder.path.mkdir(parents=True, exist_ok=True)
    first.folder.write_spec(first.setting.spec)
    first.folder.write_failure("the loss is nan", [])
    (summary,) = asked.run(progress=False)
    assert summary.chosen == {"MLP, digits": second.setting.arm}
    (kept,) = json.loads((asked.folder / "chosen.json").read_text()).values()
    assert kept["beta"] == second.setting.spec.regularizer.beta  # type: ignore[union-attr]
    assert f"counted as the worst: {first.setting.arm}." in asked.page.with_suffix(".md").read_text()


def test_an_experiment_that_there_is_not_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FlatminimaError, match=r"unknown experiment 'tabel-1' \(did you mean 'table-1'"):
        reproduction(tmp_path, "tabel-1")


def test_measures_that_nothing_takes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        FlatminimaError, match=r"nothing is measured in search and table-1, where .*: add a scenario or"
    ):
        replace(reproduction(tmp_path, "table-1", "search"), measures=("all",))
    assert replace(reproduction(tmp_path, "table-1", "table-2"), measures=("all",)).measures == ("all",)


@pytest.mark.usefixtures("without_pictures")
def test_a_winner_is_kept_as_soon_as_its_case_is_decided(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two = {**TINY.networks, "MLP, again": replace(TINY.networks["MLP, digits"], epochs=5)}
    monkeypatch.setitem(presets.PRESETS, "digits", replace(TINY, networks=two))
    asked = reproduction(tmp_path, "search")
    tasks = asked.tasks("search")

    def interrupted(task: Task) -> Record:
        if task == tasks[3]:
            raise KeyboardInterrupt
        return perform(task)

    monkeypatch.setattr(study, "perform", interrupted)
    with pytest.raises(KeyboardInterrupt):
        asked.run(progress=False)
    assert [task.setting.case for task in tasks] == ["MLP, digits"] * 2 + ["MLP, again"] * 2
    assert list(json.loads((asked.folder / "chosen.json").read_text())) == ["MLP, digits"]


def test_winners_of_several_searches_in_one_folder_stand_beside_each_other(tmp_path: Path) -> None:
    first, second = RegularizerSpec(beta=3), RegularizerSpec(beta=4)
    write_winners(tmp_path, {"a": first, "b": first})
    write_winners(tmp_path, {"b": second})
    write_winners(tmp_path, {})
    assert read_winners(tmp_path) == {"a": first, "b": second}


def test_a_damaged_choice_is_named(tmp_path: Path) -> None:
    asked = reproduction(tmp_path, "table-1")
    asked.folder.mkdir()
    (asked.folder / "chosen.json").write_text('{"MLP, digits": 7}')
    with pytest.raises(FlatminimaError, match=r"chosen.json is damaged: delete it"):
        asked.plan()


@pytest.mark.usefixtures("without_pictures")
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


# ---------------------------------------------------------------------------------------------------------------------
# Kills, full disks, damage: the same command again, and the same numbers
# ---------------------------------------------------------------------------------------------------------------------

LONGER = replace(TINY, scenario=replace(TINY.scenario, epochs=25))
SEEDS = (0, 1)


def perform_noted(task: Task) -> Record:
    """A worker's part: its process is noted, and a resume point saved after every epoch."""
    interrupts.EPOCH_END_SECONDS = 0.0
    task.root.mkdir(parents=True, exist_ok=True)
    (task.root / f"worker.{os.getpid()}").touch()
    return perform(task)


def reproduce_longer(out: Path) -> None:
    presets.PRESETS["digits"] = LONGER
    study.perform = perform_noted
    pages.figures = lambda summary: []  # type: ignore[assignment]
    seeds = [str(seed) for seed in SEEDS]
    options = ["--preset", "digits", "--seeds", *seeds, "--workers", "2", "--out", str(out)]
    sys.exit(cli.main(["reproduce", "scenario-1", *options]))


@contextlib.contextmanager
def command(out: Path) -> Iterator[Command]:
    """The command as a process of its own."""
    process = Command(out.parent, reproduce_longer, out)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """As workers have: sums depend on it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The numbers of scenario I by preset."""
    found = {}
    for name, preset in (("tiny", TINY), ("longer", LONGER)):
        with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(), one_thread():
            warnings.simplefilter("ignore")
            patch.setattr(pages, "figures", lambda summary: [])
            patch.setitem(presets.PRESETS, "digits", preset)
            out = tmp_path_factory.mktemp(name)
            found[name] = numbers(reproduction(out, "scenario-1", seeds=SEEDS).run(progress=False)[0])
    return found


def numbers(summary: Summary) -> dict[str, Any]:
    """A summary as it is written, without times."""
    (values,) = json_of([summary])
    for record in values["records"]:
        del record["seconds"]
    return {name: value for name, value in values.items() if name not in ("seconds_left", "workers")}


def written(tasks: list[Task]) -> dict[Path, int]:
    """When the files of finished and measured runs were written: work that is done twice has another time."""
    done = [task for task in tasks if task.folder.status == "finished" and look_up(task) is not None]
    return {path: path.stat().st_mtime_ns for task in done for path in task.folder.path.iterdir() if path.is_file()}


def leftovers(out: Path) -> list[Path]:
    return [path for path in out.rglob("*") if path.suffix == ".tmp" or path.name == "progress.json"]


def lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def workers_of(out: Path) -> list[int]:
    """The workers that live."""
    return [pid for path in out.rglob("worker.*") if lives(pid := int(path.suffix[1:]))]


def wait_until(condition: Callable[[], Any], process: Command | None = None) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)  # the condition reads files: asked all the time, it takes a core from the workers


@pytest.mark.timeout(900)
def test_killed_commands_end_in_the_same_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: Any
) -> None:
    """SIGKILL of a worker, then of the command, whose workers must not live on; then two commands finish it at once."""
    monkeypatch.setitem(presets.PRESETS, "digits", LONGER)
    asked, moments = reproduction(tmp_path, "scenario-1", seeds=SEEDS), random.Random(1)
    tasks = asked.experiment("scenario-1").tasks(asked.folder / "runs")
    with command(tmp_path) as process:
        wait_until(lambda: any(task.folder.read_history() for task in tasks), process)
        time.sleep(moments.uniform(0, 0.3))
        os.kill(moments.choice(workers_of(tmp_path)), signal.SIGKILL)
        wait_until(lambda: written(tasks), process)
        time.sleep(moments.uniform(0, 0.3))
        process.kill()
        wait_until(lambda: not workers_of(tmp_path))
    before = written(tasks)
    assert 0 < len(before) < len(tasks) * 5
    with command(tmp_path) as first, command(tmp_path) as second:
        for process in (first, second):
            said, errors = process.communicate()
            assert (process.returncode, errors) == (0, ""), said
    (summary,) = read_summaries(asked.page.with_suffix(".json"))
    assert numbers(summary) == undisturbed["longer"]
    assert written(tasks).items() >= before.items()
    assert leftovers(tmp_path) == []


def no_space(monkeypatch: pytest.MonkeyPatch, *full: Path) -> None:
    """The disk is full whenever these files are written."""
    sync = os.fsync

    def fail(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        if path in [beside(target) for target in full]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fail)


@pytest.fixture
def scenario(tmp_path: Path, without_pictures: None) -> Iterator[tuple[Reproduction, list[Task]]]:
    """Scenario I before its runs, with one thread."""
    asked = reproduction(tmp_path, "scenario-1", seeds=SEEDS)
    with one_thread():
        yield asked, asked.experiment("scenario-1").tasks(asked.folder / "runs")


def test_a_full_disk_costs_its_runs_alone_until_there_is_space_again(
    scenario: tuple[Reproduction, list[Task]], monkeypatch: pytest.MonkeyPatch, undisturbed: Any
) -> None:
    asked, tasks = scenario
    monkeypatch.setattr(interrupts, "EPOCH_END_SECONDS", 0.0)
    names = "state.safetensors", "result.json", "measures.json"
    full = [task.folder.path / name for task, name in zip(tasks, names, strict=False)]
    with monkeypatch.context() as patch:
        no_space(patch, *full)
        (summary,) = asked.run(progress=False)
    assert summary.failures == {
        path.parent.name: f"cannot write {path}: No space left on device; free some space or choose another folder"
        for path in full
    }
    assert len(summary.records) == len(tasks) - len(names)
    assert leftovers(asked.out) == []
    before = written(tasks)
    assert numbers(asked.run(progress=False)[0]) == undisturbed["tiny"]
    assert written(tasks).items() >= before.items()


def test_a_page_that_the_disk_does_not_take_costs_no_run(
    scenario: tuple[Reproduction, list[Task]], monkeypatch: pytest.MonkeyPatch, undisturbed: Any
) -> None:
    asked, tasks = replace(scenario[0], seeds=(0,)), scenario[1][:2]
    monkeypatch.setattr(study, "REPORT_SECONDS", 0.0)  # after every run
    with monkeypatch.context() as patch:
        no_space(patch, asked.page)
        with pytest.raises(FlatminimaError, match=r"cannot write .*scenario-1\.html: No space left on device; free"):
            asked.run(progress=False)
    before = written(tasks)
    assert leftovers(asked.out) == []
    assert numbers(asked.run(progress=False)[0])["records"] == undisturbed["tiny"]["records"][:2]
    assert written(tasks) == before


@pytest.mark.parametrize("limit", [0, 700, 30_000], ids=["spec", "event log", "checkpoint"])
def test_files_that_may_not_grow_are_named_in_one_line(
    limit: int, scenario: tuple[Reproduction, list[Task]], capsys: pytest.CaptureFixture[str]
) -> None:
    """As a full disk does, a limit on the size of files stops writes half-way, those without a sync too."""
    _, (task, *_) = scenario
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, usual[1]))
    try:
        ((_, outcome),) = Local().run(perform, [task])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    assert isinstance(outcome, Failure)
    assert outcome.error.startswith(f"cannot write {task.folder.path}")
    assert outcome.error.endswith("File too large; free some space or choose another folder")
    assert capsys.readouterr() == ("", "")


def test_damaged_runs_are_made_again_and_nothing_is_mixed(
    scenario: tuple[Reproduction, list[Task]], tmp_path: Path, undisturbed: Any
) -> None:
    asked, tasks = scenario
    asked.run(progress=False)
    weights, measures, other, whole = (task.folder.path for task in tasks)
    before = written(tasks[3:])
    os.truncate(weights / "checkpoint.safetensors", 1000)
    (measures / "measures.json").write_text("[{")
    for path in before:
        (other / path.name).write_bytes(path.read_bytes())
    shown = asked.summary("scenario-1")
    assert shown.left == (weights.name, measures.name)
    assert [record.run for record in shown.records] == [whole.name]
    (summary,) = asked.run(progress=False)
    assert summary.failures == {other.name: f"{other} holds another run than its name says; delete or rename it"}
    other.rename(tmp_path / "elsewhere")
    assert numbers(asked.run(progress=False)[0]) == undisturbed["tiny"]
    assert written(tasks[3:]) == before
