"""What experiments write down as JSON: summaries (``--json``, beside every page, in results/), a search's winners."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flatminima.errors import FlatminimaError, one_line
from flatminima.files import write_file
from flatminima.lab.experiments.experiment import Experiment
from flatminima.lab.experiments.paper import Winners
from flatminima.lab.experiments.summary import Summary
from flatminima.lab.runs import RegularizerSpec
from flatminima.lab.schema import parse
from flatminima.lab.storage import locked
from flatminima.measures import jsonable

WINNERS = "chosen.json"
"""The file of a search's winners, beside the summaries."""


def json_of(summaries: Sequence[Summary]) -> list[dict[str, Any]]:
    """Summaries as JSON can hold them; NaN and infinities as None."""
    values: list[dict[str, Any]] = jsonable([dataclasses.asdict(summary) for summary in summaries])
    return values


def read_summaries(path: Path) -> tuple[Summary, ...]:
    """What a page's JSON, or a file in results/, holds.

    Raises:
        FlatminimaError: It cannot be read, or holds something else.
    """
    try:
        return parse(tuple[Summary, ...], path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FlatminimaError(f"cannot read {path}: {error.strerror}") from None
    except (FlatminimaError, UnicodeDecodeError) as error:
        raise FlatminimaError(f"{path} holds no summaries of experiments ({one_line(error)})") from None


def winners_of(search: Experiment, chosen: Mapping[str, str]) -> Winners:
    """What the arms that a search has chosen, by case, train with."""
    specs = {(setting.case, setting.arm): setting.spec.regularizer for setting in search.settings}
    winners = {case: specs[case, arm] for case, arm in chosen.items()}
    return {case: winner for case, winner in winners.items() if isinstance(winner, RegularizerSpec)}


def write_winners(folder: Path, winners: Winners) -> None:
    """Keep what a search has chosen for the experiments that follow, beside what is kept of other cases.

    Several commands may search in one folder: what one has not decided is not taken from another that has.
    """
    with locked(folder / "chosen.lock"):
        before = read_winners(folder)
        after = {**before, **winners}
        if after != before:
            values = {case: dataclasses.asdict(winner) for case, winner in after.items()}
            write_file(folder / WINNERS, json.dumps(values, indent=1) + "\n")


def read_winners(folder: Path) -> Winners:
    """What :func:`write_winners` has kept; nothing before a search.

    Raises:
        FlatminimaError: it cannot be read.
    """
    path = folder / WINNERS
    if not path.exists():
        return {}
    try:
        return parse(dict[str, RegularizerSpec], path.read_text(encoding="utf-8"))
    except ValueError:
        raise FlatminimaError(f"{path} is damaged: delete it, and run the search again") from None
