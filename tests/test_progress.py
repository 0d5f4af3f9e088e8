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
from flatminima.progress import Lines, ProgressBar, silent, track


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


def test_a_bar_is_there_before_its_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=80, color_system=None)
    monkeypatch.setattr(progress, "Console", lambda **_: console)
    monkeypatch.setattr(progress, "PATIENCE_SECONDS", 0.0)
    with ProgressBar("checkpoints", 2), ProgressBar("trials", 5):
        wait_for(file.getvalue, "0/2")
        wait_for(file.getvalue, "0/5")
    assert file.getvalue().endswith("\x1b[2K")  # gone at the end


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
