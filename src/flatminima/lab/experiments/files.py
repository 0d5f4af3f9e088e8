"""What experiments write down as JSON: summaries (``--json``, beside every page, in results/), a search's winners."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from flatminima.errors import FlatminimaError
from flatminima.lab.experiments.experiment import Experiment
from flatminima.lab.experiments.paper import Winners
from flatminima.lab.experiments.summary import Summary
from flatminima.lab.runs import RegularizerSpec
from flatminima.lab.storage import write_file

_WINNERS = "chosen.json"


def plain(summaries: Sequence[Summary]) -> list[dict[str, Any]]:
    """As JSON can hold them; NaN and infinities as None."""
    values: list[dict[str, Any]] = json.loads(_adapter().dump_json(tuple(summaries)))
    return values


def read_summaries(path: Path) -> tuple[Summary, ...]:
    """What a page's JSON, or a file in results/, holds.

    Raises:
        FlatminimaError: It cannot be read, or holds something else.
    """
    try:
        return _adapter().validate_json(path.read_bytes())
    except OSError as error:
        raise FlatminimaError(f"cannot read {path}: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise FlatminimaError(
            f"{path} holds no summaries of experiments ({where + ': ' if where else ''}{first['msg']})"
        ) from None


def write_winners(folder: Path, search: Experiment, summary: Summary) -> None:
    """Keep what a search has chosen for the experiments that follow."""
    specs = {(setting.case, setting.arm): setting.spec.regularizer for setting in search.settings}
    winners = {case: specs[case, arm] for case, arm in summary.chosen.items()}
    values = {case: dataclasses.asdict(winner) for case, winner in winners.items() if winner is not None}
    write_file(folder / _WINNERS, json.dumps(values, indent=1) + "\n")


def read_winners(folder: Path) -> Winners:
    """What :func:`write_winners` has kept; nothing before a search.

    Raises:
        FlatminimaError: it cannot be read.
    """
    path = folder / _WINNERS
    if not path.exists():
        return {}
    try:
        return {
            case: RegularizerSpec(**values) for case, values in json.loads(path.read_text(encoding="utf-8")).items()
        }
    except (ValueError, TypeError, AttributeError):
        raise FlatminimaError(f"{path} is damaged: delete it, and run the search again") from None


@functools.cache
def _adapter() -> TypeAdapter[tuple[Summary, ...]]:
    return TypeAdapter(tuple[Summary, ...], config=ConfigDict(ser_json_inf_nan="null"))
