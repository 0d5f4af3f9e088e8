"""The matched protocol: the same experiments, whose runs end at the same loss."""

from __future__ import annotations

from pathlib import Path

import pytest

from flatminima.errors import FlatminimaError
from flatminima.lab.experiments import PRESETS
from flatminima.lab.names import Protocol
from flatminima.lab.reports import progress_line
from flatminima.lab.reproduce import Reproduction

SCENARIOS = ("scenario-1", "scenario-2", "scenario-3")


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", SCENARIOS)
def test_all_runs_of_a_scenario_end_at_one_loss_and_vary_what_they_did(preset, name: str, tmp_path: Path) -> None:
    paper, matched = (
        Reproduction((name,), preset, tmp_path, protocol=protocol).experiment(name) for protocol in ("paper", "matched")
    )
    assert {setting.spec.stop_at_loss for setting in paper.settings} == {None}
    (target,) = {setting.spec.stop_at_loss for setting in matched.settings}
    assert 0 < target <= 0.05
    assert matched.cases == paper.cases
    assert matched.seeds == paper.seeds


def test_its_pages_and_runs_have_a_folder_of_their_own_and_say_so(tmp_path: Path) -> None:
    matched = Reproduction(SCENARIOS, "digits", tmp_path, protocol="matched")
    assert matched.folder == tmp_path / "digits-matched"
    assert "equally well" in matched.lead
    assert "matched" in matched.heading


@pytest.mark.parametrize(("protocol", "bound"), [("paper", "about"), ("matched", "at most")])
def test_before_any_run_has_ended_the_time_left_is_a_bound(protocol: Protocol, bound: str, tmp_path: Path) -> None:
    asked = Reproduction(("scenario-1",), "digits", tmp_path, protocol=protocol)
    assert f"are left, {bound} " in progress_line(asked.summary("scenario-1"))


def test_it_is_refused_for_tables(tmp_path: Path) -> None:
    with pytest.raises(FlatminimaError, match="leave table-1 out"):
        Reproduction(("scenario-1", "table-1"), "digits", tmp_path, protocol="matched")
