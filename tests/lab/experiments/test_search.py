"""Searches by trials of runs of a second; what a search leads to (pages, tables) is in test_reproduce."""

from __future__ import annotations

import json
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import optuna
import pytest

from flatminima.errors import FlatminimaError
from flatminima.lab.experiments import paper, presets
from flatminima.lab.experiments import search as tuning
from flatminima.lab.experiments.experiment import Experiment, perform
from flatminima.lab.experiments.search import Case, Tuning, perform_search_trial, rungs
from flatminima.lab.jobs import Failure, Local, WorkerPool, run_all
from flatminima.lab.reproduce import Reproduction
from flatminima.lab.runs.folder import RunFolder
from support.commands import Command

pytestmark = pytest.mark.xdist_group("search")  # they share one whole search

TINY = replace(
    presets.PRESETS["digits"],
    networks={"MLP, digits": replace(presets.PRESETS["digits"].scenario, train_size=200, epochs=4)},
    betas=(10, 1000),
    sub_batches=(2,),
    clipping=(0.01, 1, 5, 10),  # with the first hardly anything is learned
    validation=200,
)
SETTINGS = 8


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(presets.PRESETS, "digits", TINY)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def grid() -> Experiment:
    return paper.search(TINY, {})


def search(folder: Path, trials: int) -> Tuning:
    return Tuning(grid(), trials, folder)


def run(folder: Path, trials: int) -> list[dict[str, Any]]:
    """Perform all trials one after another; how they ended."""
    asked = search(folder, trials)
    run_all(perform_search_trial, asked.tasks(), Local(), progress=False)
    return ended(folder, trials)


def run_tiny(folder: Path, trials: int) -> None:
    """In another process, where the presets are the real ones."""
    presets.PRESETS["digits"] = TINY
    run(folder, trials)


def ended(folder: Path, trials: int) -> list[dict[str, Any]]:
    return [asdict(trial.summary()) for trial in search(folder, trials).statuses({})]


def made(folder: Path) -> list[optuna.trial.FrozenTrial]:
    return _case(folder).made()


def _case(folder: Path) -> Case:
    return search(folder, 1).tasks()[0].case


def folder_of(folder: Path, arm: str) -> RunFolder:
    (task,) = (task for task in grid().tasks(folder / "runs") if task.setting.arm == arm)
    return task.folder


@pytest.fixture(scope="module", autouse=True)
def revisions() -> Iterator[None]:
    """Optuna declares all tables that a database ever had whenever it opens one: here once."""
    from alembic.script import ScriptDirectory

    found: dict[str | None, Any] = {}
    read = ScriptDirectory.from_config

    def once(config: Any) -> Any:
        location = config.get_main_option("script_location")
        found[location] = found.get(location) or read(config)
        return found[location]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ScriptDirectory, "from_config", once)
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A search of as many trials as there are settings, in one sitting."""
    folder = tmp_path_factory.mktemp("whole")
    run(folder, SETTINGS)
    return folder


def test_trials_are_all_different_and_some_are_pruned(whole: Path) -> None:
    trials = ended(whole, SETTINGS)
    assert {trial["arm"] for trial in trials} == set(grid().arms)
    states = [trial["state"] for trial in trials]
    assert set(states) == {"finished", "pruned"}
    assert "pruned" not in states[: tuning.STARTUP_RUNS]


def test_the_pruned_were_above_the_median_of_the_finished(whole: Path) -> None:
    trials = made(whole)
    assert any(trial.state.name == "PRUNED" for trial in trials)
    for trial in trials:
        before = [t for t in trials[: trial.number] if t.state.name == "COMPLETE"]
        for step in trial.intermediate_values:
            best = min(error for at, error in trial.intermediate_values.items() if at <= step)
            others = sorted(t.intermediate_values[step] for t in before)
            middle = len(others) // 2
            median = (others[middle] + others[~middle]) / 2 if others else 1.0
            pruned = len(before) >= tuning.STARTUP_RUNS and best > median
            assert pruned == (trial.state.name == "PRUNED" and step == trial.last_step)


def test_a_pruned_run_goes_on_when_the_grid_asks_for_it(whole: Path, tmp_path: Path) -> None:
    pruned = next(trial for trial in ended(whole, SETTINGS) if trial["state"] == "pruned")
    stopped = folder_of(whole, pruned["arm"])
    point = stopped.read_resume_point()
    assert stopped.status == "unfinished"
    assert point is not None
    assert len(point.history) == pruned["epoch"]
    (task,) = (task for task in grid().tasks(tmp_path) if task.setting.arm == pruned["arm"])
    (tmp_path / stopped.path.name).mkdir()
    for file in stopped.path.iterdir():
        if file.is_file():
            (tmp_path / stopped.path.name / file.name).write_bytes(file.read_bytes())
    went_on, at_once = perform(task), perform(replace(task, root=tmp_path / "fresh"))
    assert replace(went_on, seconds=0) == replace(at_once, seconds=0)
    for name, tensor in task.folder.read_checkpoint().items():
        assert tensor.equal(replace(task, root=tmp_path / "fresh").folder.read_checkpoint()[name])


def test_what_the_grid_finished_a_trial_need_not_train(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = ended(whole, 1)
    (task,) = (task for task in grid().tasks(tmp_path / "runs") if task.setting.arm == first[0]["arm"])
    perform(task)
    monkeypatch.setattr("flatminima.lab.runs.session.Session.update", _must_not_be_called)
    assert run(tmp_path, 1) == first


def test_ended_trials_are_not_performed_again(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = ended(whole, SETTINGS)
    monkeypatch.setattr("flatminima.lab.runs.session.Session.update", _must_not_be_called)
    assert run(whole, SETTINGS) == before
    assert len(made(whole)) == SETTINGS


def test_more_trials_go_on_with_the_search_and_fewer_are_its_first(whole: Path, tmp_path: Path) -> None:
    assert run(tmp_path, 1) == ended(whole, 1)
    assert run(tmp_path, 3) == ended(whole, 3)
    assert ended(tmp_path, 1) == ended(whole, 1)


class _Killed(BaseException):
    pass


@pytest.mark.parametrize(
    ("moment", "after"),
    [
        ("optuna.Study.add_trial", True),
        ("optuna.Trial.report", True),
        ("flatminima.lab.runs.folder.RunFolder.write_resume_point", False),
        ("flatminima.lab.runs.folder.RunFolder.write_resume_point", True),
        ("flatminima.lab.runs.folder.RunFolder.write_result", True),
        ("optuna.Study.tell", False),
    ],
)
def test_a_search_cut_short_anywhere_ends_the_same(
    moment: str, after: bool, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = ended(whole, SETTINGS)
    trials = 1 + next(trial["trial"] for trial in expected if trial["state"] == "pruned")
    sittings = 0
    while True:
        sittings += 1
        with monkeypatch.context() as patched:
            _die_at(patched, moment, sittings, after)
            try:
                run(tmp_path, trials)
            except _Killed:
                continue
        break
    assert sittings > 1
    assert ended(tmp_path, trials) == expected[:trials]
    assert len(made(tmp_path)) == trials


def _die_at(monkeypatch: pytest.MonkeyPatch, moment: str, number: int, after: bool) -> None:
    """Die at a function's call of this number, before or after it."""
    owner, _, name = moment.rpartition(".")
    calls = 0
    module, _, kind = owner.rpartition(".")
    original = getattr(getattr(sys.modules[module], kind), name)

    def dying(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number and not after:
            raise _Killed
        result = original(*arguments, **options)
        if calls == number:
            raise _Killed
        return result

    monkeypatch.setattr(moment, dying)


def test_a_search_is_killed_and_goes_on(whole: Path, tmp_path: Path) -> None:
    trials = 4
    process = Command(tmp_path.parent, run_tiny, tmp_path, trials)
    while not list((tmp_path / "runs").glob("*/result.json")):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    begun = len(made(tmp_path))
    assert begun < trials
    assert run(tmp_path, trials) == ended(whole, trials)
    assert len(made(tmp_path)) == trials


def test_several_workers_share_the_trials(tmp_path: Path) -> None:
    asked = search(tmp_path, 4)
    outcomes = run_all(perform_search_trial, asked.tasks(), WorkerPool(2), progress=False)
    assert not [outcome for outcome in outcomes if isinstance(outcome, Failure)]
    trials = ended(tmp_path, 4)
    assert len({trial["arm"] for trial in trials}) == len(made(tmp_path)) == 4
    assert "left" not in {trial["state"] for trial in trials}


def test_a_run_that_fails_is_a_failed_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (case,) = search(tmp_path, 2).experiment.cases
    original = tuning.train

    def fails(spec: Any, root: Path, **options: Any) -> Any:
        if RunFolder.of(root, spec).path == first:
            folder = RunFolder(first)
            folder.path.mkdir(parents=True)
            folder.write_spec(spec)
            folder.write_failure("the loss is nan", [])
            raise FlatminimaError("the loss is nan")
        return original(spec, root, **options)

    with _case(tmp_path).attempt(0) as attempt:
        parameters = attempt.study.trials[0].params
    first = _case(tmp_path).task(parameters).folder.path
    monkeypatch.setattr(tuning, "train", fails)
    assert [trial["state"] for trial in run(tmp_path, 2)] == ["failed", "finished"]
    summary = search(tmp_path, 2).summary({}, 1)
    assert "the loss is nan" in summary.failures[f"{case}, trial 0"]
    assert summary.chosen[case] == ended(tmp_path, 2)[1]["arm"]
    assert summary.verdict[0].endswith("Of Optuna's 2 trials, 1 went to the end and 0 were pruned; 1 failed.")


def test_what_was_no_fault_of_the_run_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(*arguments: Any, **options: Any) -> None:
        raise FlatminimaError("cannot write")

    with monkeypatch.context() as patched:
        patched.setattr(tuning, "train", no_space)
        assert [trial["state"] for trial in run(tmp_path, 2)] == ["left", "left"]
        name = search(tmp_path, 2).tasks()[0].name
        assert search(tmp_path, 2).summary({name: "cannot write"}, 1).failures == {name: "cannot write"}
    assert [trial["state"] for trial in run(tmp_path, 2)] == ["finished", "finished"]
    assert len(made(tmp_path)) == 2


def test_a_lost_run_folder_is_made_again(tmp_path: Path) -> None:
    before = run(tmp_path, 2)
    folder_of(tmp_path, before[0]["arm"]).clear()
    assert [trial["state"] for trial in ended(tmp_path, 2)] == ["left", "finished"]
    assert run(tmp_path, 2) == before


def test_another_grid_is_another_study(tmp_path: Path) -> None:
    run(tmp_path, 1)
    shorter = replace(TINY, networks={"MLP, digits": replace(TINY.networks["MLP, digits"], epochs=3)})
    asked = Tuning(paper.search(shorter, {}), 1, tmp_path)
    assert [trial.state for trial in asked.statuses({})] == ["left"]
    run_all(perform_search_trial, asked.tasks(), Local(), progress=False)
    assert [trial.state for trial in asked.statuses({})] == ["finished"]


def test_before_any_trial_nothing_is_written(tmp_path: Path) -> None:
    summary = search(tmp_path, 20).summary({}, 1)
    assert len(summary.left) == SETTINGS  # there are no more
    assert summary.seconds_left > 0
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_study_is_named(tmp_path: Path) -> None:
    run(tmp_path, 1)
    (tmp_path / "search" / "optuna.db").write_bytes(b"no database" * 1000)
    with pytest.raises(FlatminimaError, match=r"cannot use .*optuna.db: .*not a database.*; without it"):
        search(tmp_path, 1).tasks()


@pytest.mark.parametrize(
    ("epochs", "expected"),
    [(200, {50, 75, 100, 125, 150, 175}), (40, {10, 15, 20, 25, 30, 35}), (3, {1, 2}), (1, set())],
)
def test_rungs(epochs: int, expected: set[int]) -> None:
    assert rungs(epochs) == expected


def test_what_cannot_be_searched_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FlatminimaError, match="at least one trial, got 0"):
        Reproduction(("search",), "digits", tmp_path, trials=0)
    with pytest.raises(FlatminimaError, match="add search to the experiments"):
        Reproduction(("scenario-1",), "digits", tmp_path, trials=3)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FlatminimaError, match=r"needs optuna: pip install 'flatminima\[search\]'"):
        Reproduction(("search",), "digits", tmp_path, trials=3)


def test_the_winner_is_kept_and_the_page_says_how_it_was_found(tmp_path: Path) -> None:
    asked = Reproduction(("search",), "digits", tmp_path, executor=Local(), trials=8)
    before = asked.plan()
    assert [(row.runs, row.left) for row in before] == [(8, 8)]
    (summary,) = asked.run(progress=False)
    assert summary.trials is not None
    trials = {trial.arm: trial for trial in summary.trials}
    finished = {arm: trial.validation_error for arm, trial in trials.items() if trial.state == "finished"}
    pruned = len(trials) - len(finished)
    assert pruned > 0
    (winner,) = summary.chosen.values()
    assert finished[winner] == min(finished.values())
    (chosen,) = json.loads((asked.folder / "chosen.json").read_text()).values()
    assert chosen["beta"] == float(winner.split(",")[0].removeprefix("β="))
    for suffix in (".html", ".md"):
        text = asked.page.with_suffix(suffix).read_text()
        assert "Optuna tries 8 of the grid&#39;s 8 settings" in text.replace("'", "&#39;")
        assert f"{pruned} {'was' if pruned == 1 else 'were'} pruned." in text
        assert text.count("pruned after epoch") == pruned
        assert f"{len(finished)} of 8 runs are done, {pruned} pruned." in text
    assert [(row.runs, row.left, row.passes) for row in asked.plan()] == [(8, 0, 0)]
    table = Reproduction(("table-1",), "digits", tmp_path).experiment("table-1")
    assert "are the search's" in table.question


def _must_not_be_called(*arguments: object) -> None:
    pytest.fail("an update was made")
