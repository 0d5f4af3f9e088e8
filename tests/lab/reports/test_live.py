from __future__ import annotations

import io
import itertools
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from flatminima.lab.experiments.experiment import Setting, Task
from flatminima.lab.jobs import Failure, Local
from flatminima.lab.reports import live as watching
from flatminima.lab.reports.live import watch
from flatminima.lab.runs.records import RunProgress
from flatminima.lab.runs.spec import RunSpec

SPEC = RunSpec(model="mlp", data="digits", epochs=8)
TRAINING = RunProgress("training", iteration=30, iterations=80, epoch=4, epochs=8, loss=0.123)


def tasks(root: Path) -> list[Task]:
    return [Task(Setting("a case", "[an arm]", replace(SPEC, seed=seed)), None, root) for seed in (0, 1)]


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Callable[[], str]:
    """A terminal of 80 columns, looked at without delay; what it has shown so far."""
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=80, height=20, color_system=None)
    monkeypatch.setattr("flatminima.progress.Console", lambda **_: console)
    monkeypatch.setattr("flatminima.progress.PATIENCE_SECONDS", 0.0)
    monkeypatch.setattr(watching, "LOOK_SECONDS", 0.001)
    return file.getvalue


def wait_for(screen: Callable[[], str], text: str, *, shown: bool = True) -> None:
    """Wait until the present frame has the text, or has it no longer."""
    deadline = time.monotonic() + 60
    while (text in frames(screen)[-1]) != shown:
        assert time.monotonic() < deadline, screen()[-1000:]
        time.sleep(0.005)


def frames(screen: Callable[[], str]) -> list[str]:
    """What was written between the codes that wipe it away again, without other codes."""
    return [re.sub(r"\x1b\[[?\w]*", "", frame) for frame in re.split(r"\r\x1b\[(?:1A\x1b\[)?2K", screen())]


def test_runs_in_progress_are_shown_until_they_end(tmp_path: Path, screen: Callable[[], str]) -> None:
    first, second = tasks(tmp_path)
    for task in (first, second):
        task.folder.path.mkdir()

    def run() -> Iterator[tuple[int, Any]]:
        wait_for(screen, "0/2 runs")
        with first.folder.watched() as note:
            note(TRAINING)
            wait_for(screen, "a case, [an arm], seed 0")
            wait_for(screen, "epoch 4/8")
            wait_for(screen, "loss 0.123")
        wait_for(screen, "seed 0", shown=False)
        with second.folder.watched() as note:
            note(RunProgress("measuring"))
            wait_for(screen, "measuring")
            yield 0, "done"
            wait_for(screen, "1/2 runs")
            wait_for(screen, "seed 1")
        yield 1, Failure(second, "no luck")

    assert [number for number, _ in watch(run(), 2, [first, second], "experiment")] == [0, 1]
    assert max(len(line) for frame in frames(screen) for line in frame.split("\n")) == 77  # room for a terminal's ^C
    assert frames(screen)[-1] == ""
    assert "\x1b[?25h" in screen()  # the cursor is back


def test_of_runs_that_may_end_early_the_time_left_is_a_bound_and_that_of_all_is_not_told(
    tmp_path: Path, screen: Callable[[], str]
) -> None:
    task, _ = tasks(tmp_path)
    task.folder.path.mkdir()

    def run() -> Iterator[tuple[int, Any]]:
        with task.folder.watched() as note:
            note(TRAINING)
            wait_for(screen, "at most -:--:--")
        yield 0, "done"

    list(watch(run(), 1, [task], "experiment", may_end_early=True))
    lines = [line for line in screen().splitlines() if "--:--" in line]
    assert all("seed 0" in line and "experiment" not in line for line in lines)


@pytest.mark.parametrize("early", [False, True])
def test_without_a_terminal_the_time_left_is_told_only_where_it_can_be(
    early: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("flatminima.progress.LINE_SECONDS", (0.0, 0.0, 0.001))
    task, _ = tasks(tmp_path)
    task.folder.path.mkdir()
    said: list[str] = []

    def run() -> Iterator[tuple[int, Any]]:
        began = time.monotonic()
        with task.folder.watched() as note:
            for iteration in itertools.count(1):
                note(replace(TRAINING, iteration=iteration, iterations=10**9))
                said.extend(capsys.readouterr().err.splitlines())
                late = time.monotonic() > began + (3 if early else 60)  # where it is told, that is after a second
                if late or any(" left, a case" in line for line in said):
                    break
        yield 0, "done"

    list(watch(run(), 1, [task], "experiment", may_end_early=early))
    assert any(re.search(r"\d:\d\d left, a case", line) for line in said) != early
    assert any("0/1 runs, a case, [an arm], seed 0 epoch 4/8" in line for line in said)


def test_what_was_done_before_is_no_pace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither runs that had ended, nor half of one that goes on."""
    monkeypatch.setattr("flatminima.progress.LINE_SECONDS", (0.0, 0.0, 0.001))
    task, ended = tasks(tmp_path)
    task.folder.path.mkdir()
    said: list[str] = []

    def run() -> Iterator[tuple[int, Any]]:
        yield 1, "done"
        deadline = time.monotonic() + 60
        with task.folder.watched() as note:
            for iteration in itertools.count(10**12):
                note(replace(TRAINING, iteration=iteration, iterations=2 * 10**12))
                said.extend(re.findall(r"runs, (.*) left, a case", capsys.readouterr().err))
                if len(said) > 5 or time.monotonic() > deadline:
                    break
        yield 0, "done"

    list(watch(run(), 3, [task, ended], "experiment", settled=1))
    assert len(said) > 5
    assert all("day" in left for left in said), said


def test_the_end_of_a_run_that_is_known_late_is_no_pace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that has said its last, and whose end is not known yet, is not taken for one that has not begun."""
    monkeypatch.setattr("flatminima.progress.LINE_SECONDS", (0.0, 0.0, 0.001))
    first, second = tasks(tmp_path)
    said: list[str] = []

    def wait_for_lines(pattern: str, count: int) -> list[str]:
        deadline = time.monotonic() + 60
        found: list[str] = []
        while len(found) < count:
            assert time.monotonic() < deadline, said[-5:]
            lines = capsys.readouterr().err.splitlines()
            said.extend(lines)
            found += [line for line in lines if re.search(pattern, line)]
        return found

    def run() -> Iterator[tuple[int, Any]]:
        left = []
        for number, task in enumerate((first, second)):
            task.folder.path.mkdir()
            with task.folder.watched(seconds=0.0) as note:
                for iteration in range(10**14 - 3, 10**14):
                    note(replace(TRAINING, iteration=iteration, iterations=10**14))
                    found = wait_for_lines(f"{number}/3 runs, .*seed {number}", 2)
                    left += re.findall(r"runs, (.*) left", "\n".join(found))
            wait_for_lines(f"{number}/3 runs, .*starting", 1)
            yield number, "done"
        assert left
        assert all("day" in each for each in left), left

    list(watch(run(), 3, [first, second], "experiment"))


def test_failures_are_counted(tmp_path: Path, screen: Callable[[], str]) -> None:
    def run() -> Iterator[tuple[int, Any]]:
        yield 0, Failure(None, "no luck")
        wait_for(screen, "1/2 runs, 1 failed")

    assert len(list(watch(run(), 2, tasks(tmp_path), "experiment"))) == 1


def test_what_a_killed_process_left_is_not_shown(tmp_path: Path, screen: Callable[[], str]) -> None:
    first, second = tasks(tmp_path)
    for task in (first, second):
        task.folder.path.mkdir()
        (task.folder.path / "progress.json").write_text('{"doing": "measuring"}')

    def run() -> Iterator[tuple[int, Any]]:
        with second.folder.watched() as note:
            note(TRAINING)
            wait_for(screen, "seed 1")
            assert "seed 0" not in screen()
        yield 0, "done"

    list(watch(run(), 2, [first, second], "experiment"))


def test_an_interruption_takes_the_view_away(tmp_path: Path, screen: Callable[[], str]) -> None:
    def run() -> Iterator[tuple[int, Any]]:
        wait_for(screen, "0/2 runs")
        raise KeyboardInterrupt
        yield

    with pytest.raises(KeyboardInterrupt):
        list(watch(run(), 2, tasks(tmp_path), "experiment"))
    assert frames(screen)[-1] == ""


def test_without_a_terminal_nothing_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    numbers = list(watch(Local().run(str, [1, 2]), 2, tasks(tmp_path), "experiment"))
    assert numbers == [(0, "1"), (1, "2")]
    assert capsys.readouterr() == ("", "")
