from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from flatminima.errors import FlatminimaError
from flatminima.lab.errors import TrainingInterrupted
from flatminima.lab.runs.folder import RunFolder
from flatminima.lab.runs.spec import RunSpec
from flatminima.lab.runs.training import train
from support.runs import PLAIN, SPECS, bits, interrupting, start, wait_for_update

pytest_plugins = ("support.run_fixtures",)
pytestmark = pytest.mark.usefixtures("one_thread")


def test_ctrl_c_in_a_process_saves_and_the_same_command_goes_on(tmp_path: Path) -> None:
    spec = replace(PLAIN, epochs=100, iterations=400)
    train(spec, tmp_path / "uninterrupted")
    folder = RunFolder.of(tmp_path / "stopped", spec)
    process = start(spec, tmp_path / "stopped")
    wait_for_update(process, folder, 3)
    with pytest.raises(FlatminimaError, match="another process is training") as caught:
        train(spec, tmp_path / "stopped")
    assert "\n" not in str(caught.value)
    process.send_signal(signal.SIGINT)
    message = process.communicate()[1].strip()
    assert process.returncode == 1
    assert message.startswith("TrainingInterrupted: stopped after ")
    assert "of 400 updates; the same command goes on from there" in message
    assert "\n" not in message
    train(spec, tmp_path / "stopped")
    assert bits(tmp_path / "stopped", spec) == bits(tmp_path / "uninterrupted", spec)


@pytest.fixture
def default_handler() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, before)


@SPECS
@pytest.mark.usefixtures("default_handler")
def test_ctrl_c_finishes_the_update_first(
    spec: RunSpec, tmp_path: Path, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupting(monkeypatch, at=3, times=1)
    with pytest.raises(TrainingInterrupted, match=r"stopped after 4 of \d+ updates"):
        train(spec, tmp_path, checkpoint_seconds=1e9)
    point = RunFolder.of(tmp_path, spec).read_resume_point()
    assert point is not None
    assert point.iteration == 4
    train(spec, tmp_path)
    assert bits(tmp_path, spec) == bits(uninterrupted, spec)


@pytest.mark.usefixtures("default_handler")
def test_a_second_ctrl_c_stops_at_once(tmp_path: Path, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupting(monkeypatch, at=5, times=2)
    with pytest.raises(KeyboardInterrupt) as caught:
        train(PLAIN, tmp_path, checkpoint_seconds=0.0)
    assert caught.type is KeyboardInterrupt
    monkeypatch.undo()
    train(PLAIN, tmp_path)
    assert bits(tmp_path, PLAIN) == bits(uninterrupted, PLAIN)


def test_a_callers_own_handler_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    presses: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: presses.append(number))
    try:
        interrupting(monkeypatch, at=5, times=1)
        train(PLAIN, tmp_path)
    finally:
        signal.signal(signal.SIGINT, before)
    assert presses == [signal.SIGINT]
