"""Progress where there is a terminal, and where there is none."""

from __future__ import annotations

import io
import itertools
import re
import time
from collections.abc import Callable

import pytest
from rich.console import Console

from flatminima import progress
from flatminima.progress import Lines, ProgressBar, aside, silent, track, track_parts


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[], str]:
    """Standard error without a terminal, written to without delay; what it has shown so far."""
    monkeypatch.setattr(progress, "LINE_SECONDS", (0.001, 0.002, 0.001))
    shown: list[str] = []

    def so_far() -> str:
        shown.append(capsys.readouterr().err)
        return "".join(shown)

    return so_far


def wait_for(shown: Callable[[], str], text: str) -> None:
    deadline = time.monotonic() + 60
    while text not in shown():
        assert time.monotonic() < deadline, shown()
        time.sleep(0.001)


def test_without_a_terminal_a_line_says_how_far_it_is(lines: Callable[[], str]) -> None:
    for number in track(range(3), "trials"):
        wait_for(lines, f"trials: {number} of 3, 0:00:0")
    shown = lines()
    assert re.search(r"^trials: 2 of 3, 0:00:\d\d so far, 0:00:\d\d left$", shown, re.M)
    time.sleep(0.01)
    assert lines() == shown  # no thread is left that writes
    assert "\x1b" not in shown


def test_a_bar_within_another_is_in_its_line(lines: Callable[[], str]) -> None:
    with ProgressBar("checkpoints", 2), ProgressBar("trials", None) as inner:
        inner.advance(7)
        wait_for(lines, "so far; trials: 7, 0:00:0")
    with ProgressBar("next", 1):
        wait_for(lines, "\nnext: 0 of 1, 0:00:0")


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What is written to a terminal of 80 columns, without delay."""
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=80, color_system=None)
    monkeypatch.setattr(progress, "Console", lambda **_: console)
    monkeypatch.setattr(progress, "PATIENCE_SECONDS", 0.0)
    return file


def last_frame(screen: io.StringIO) -> list[str]:
    """The lines that were written last, without what moves the cursor."""
    written = re.split(r"\r(?:\x1b\[1A)?\x1b\[2K(?:\x1b\[1A\x1b\[2K)*", screen.getvalue())[-1]
    return [line.rstrip() for line in re.sub(r"\x1b\[[?\w]*", "", written).split("\n")]


def wait_for_frame(screen: io.StringIO, *texts: str) -> None:
    """Wait until the last frame has an empty line, and below it a line that begins with each of the texts."""
    deadline = time.monotonic() + 60
    while True:
        frame = last_frame(screen)
        if len(frame) == len(texts) + 1 and all(map(str.startswith, frame[1:], texts)) and frame[0] == "":
            return
        assert time.monotonic() < deadline, frame
        time.sleep(0.005)


def test_a_bar_is_there_before_its_first_step(screen: io.StringIO) -> None:
    file = screen
    with ProgressBar("checkpoints", 2), ProgressBar("trials", 5):
        wait_for(file.getvalue, "0/2")
        wait_for(file.getvalue, "0/5")
    assert file.getvalue().endswith("\x1b[2K")  # gone at the end


def test_what_says_no_more_than_that_something_is_done_makes_room_for_what_does(screen: io.StringIO) -> None:
    with ProgressBar("measure", None):
        wait_for_frame(screen, "measure")
        with ProgressBar("preparing", None):
            wait_for_frame(screen, "preparing")
            with ProgressBar("training loss", 3), ProgressBar("batches", 2):
                wait_for_frame(screen, "training loss", "batches")
        wait_for_frame(screen, "measure")


def test_works_that_are_parts_share_one_bar(screen: io.StringIO) -> None:
    for name, before in track_parts({"a": 0, "b": 1}):
        with ProgressBar("training loss", 1) as inner:
            wait_for_frame(screen, f"{name}: training loss {'━' * 20 * before}")
            inner.advance()
        for number in track(range(2), "measuring", is_part=True):
            wait_for_frame(screen, f"{name}: measuring {'━' * (20 * before + 10 * number)} ")
            line = last_frame(screen)[1]
            assert f" {before}/2 " in line
            assert ("0:00:" in line) == bool(before or number)  # half of the first part tells the time that all take
    for _, trials in track_parts({"alone": 2}):
        for _ in track(range(trials), "measuring", is_part=True):
            wait_for_frame(screen, "measuring")


def test_a_name_that_is_too_long_leaves_the_time_its_place(screen: io.StringIO) -> None:
    with ProgressBar(f"{'long ' * 20}", 1234, completed=1000) as bar:
        bar.advance()
        wait_for_frame(screen, "long long")
        line = last_frame(screen)[1]
        assert "…" in line
        assert re.search(r" 1001/1234 \d:\d\d:\d\d left$", line)
        assert len(line) <= 80 - progress.ROOM


def test_the_time_left_is_known_though_a_step_takes_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with ProgressBar("trials", 10, enabled=False) as bar:
        assert bar.time == "-:--:-- left"
        for _ in range(3):
            now += 600
            bar.advance()
        assert bar.time == "1:10:00 left"
        now += 300  # within a step it goes down
        assert bar.time == "1:05:00 left"
        now += 300
        bar.advance()
        for _ in range(3):
            now += 60
            bar.advance()
        assert bar.time == "0:03:00 left"  # by the last steps


def test_bars_make_room_for_another_view(screen: io.StringIO) -> None:
    with ProgressBar("demo", None):
        wait_for_frame(screen, "demo")
        with aside():
            shown = screen.getvalue()
            assert last_frame(screen) == [""]
            time.sleep(0.3)
            assert screen.getvalue() == shown
        wait_for_frame(screen, "demo")


def test_a_notebooks_line_is_written_anew_and_wiped_away(
    lines: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "Console", lambda **_: type("Of", (), {"is_jupyter": True, "is_terminal": False})())
    monkeypatch.setattr(progress, "NOTEBOOK_SECONDS", 0.001)
    counter = itertools.count()
    said = Lines(lambda: f"step {next(counter)}")
    wait_for(lines, "\rstep 1\rstep 2")
    said.close()
    assert lines().endswith("\r")
    assert lines().rstrip("\r").rpartition("\r")[2].strip() == ""


@pytest.mark.parametrize("how", ["not wanted", "silent", "second process"])
def test_nobody_is_told_twice_or_unasked(how: str, lines: Callable[[], str], monkeypatch: pytest.MonkeyPatch) -> None:
    if how == "second process":
        for name, value in {"TORCHELASTIC_RUN_ID": "x", "RANK": "1", "WORLD_SIZE": "2"}.items():
            monkeypatch.setenv(name, value)
    with silent(how == "silent"), ProgressBar("trials", 2, enabled=how != "not wanted"):
        time.sleep(0.02)
    assert lines() == ""
