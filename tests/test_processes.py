from __future__ import annotations

import pytest

from flatminima.processes import Processes


def test_without_torchrun_a_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setenv("RANK", "3")  # of some other launcher
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert Processes.launched() == Processes(0, 1)


def test_torchrun_says_which_process_this_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"TORCHELASTIC_RUN_ID": "none", "RANK": "3", "WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    assert Processes.launched() == Processes(3, 8)


def test_alone_an_action_is_done_and_its_error_raised() -> None:
    assert Processes().first(lambda: 5) == 5
    with pytest.raises(ZeroDivisionError):
        Processes().first(lambda: 1 // 0)
