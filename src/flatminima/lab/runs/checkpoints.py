"""Checkpoints in the order of a training: which run each is of, and after how many steps or epochs."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from flatminima.errors import FlatminimaError, require
from flatminima.lab.runs.folder import RunFolder

_STEPS, _EPOCHS, _NUMBERS = "step", "epoch", "number"
_COUNTS = (
    (_STEPS, re.compile(r"(?:step|iteration|iter)s?[-_=.]?(\d+)", re.IGNORECASE)),
    (_EPOCHS, re.compile(r"epochs?[-_=.]?(\d+)", re.IGNORECASE)),
    (_NUMBERS, re.compile(r"(\d+)(?!.*\d)")),
)
"""What is counted, and the number in a name: a Lightning checkpoint counts both steps and epochs, where the first tells
more of them apart. Without either word it is the last number."""
_TRAINER = re.compile(r"checkpoint-(\d+)")
"""The Trainer's folders: steps."""


@dataclass(frozen=True)
class Checkpoint:
    """One of a run's networks, as it was in the middle of its training.

    Attributes:
        path: where it is.
        run: the folder that it is in, which stands for its run.
        number: of the steps, epochs or whatever else was counted.
        unit: what was counted: ``step``, ``epoch``, ``number``.
    """

    path: Path
    run: str
    number: int
    unit: str

    def __str__(self) -> str:
        return f"{self.unit} {self.number} ({self.path})"


def in_order(given: Sequence[str]) -> list[Checkpoint]:
    """Checkpoints run by run, each run's by their numbers.

    The number is the one in the last part of the path that has any behind ``step`` or ``epoch``; or else the last in
    the name or its folder's, as numbers further up say something else; of a finished run's folder its epochs.

    Args:
        given: paths, or ``NUMBER=PATH`` where the name does not say it.

    Raises:
        FlatminimaError: a path that does not exist or has no number, two of one run with the same number, or numbers of
            one run that count different things.
    """
    found: dict[str, list[Checkpoint]] = {}
    for text in given:
        checkpoint = _numbered(text)
        found.setdefault(checkpoint.run, []).append(checkpoint)
    return [checkpoint for run, checkpoints in found.items() for checkpoint in _ordered(run, checkpoints)]


def said_order(checkpoints: Iterable[Checkpoint]) -> str:
    """In one line, what was taken for whose number."""
    runs: dict[tuple[str, str], list[int]] = {}
    for checkpoint in checkpoints:
        runs.setdefault((checkpoint.run, checkpoint.unit), []).append(checkpoint.number)
    return "; ".join(f"{run}: {unit} {', '.join(map(str, numbers))}" for (run, unit), numbers in runs.items())


def _numbered(text: str) -> Checkpoint:
    number, equals, rest = text.partition("=")
    if equals and number.isdecimal() and not Path(text).exists():
        path = _existing(rest)
        return Checkpoint(path, str(path.parent), int(number), "")
    path = _existing(text)
    if (path / "spec.json").is_file():
        return Checkpoint(path, str(path.parent), RunFolder(path).require_result().epochs, _EPOCHS)
    for height, part in enumerate((path, *path.parents)):
        name = part.name if part.is_dir() else part.stem
        trainer = _TRAINER.fullmatch(name)
        if trainer is not None:
            return Checkpoint(path, str(part.parent), int(trainer[1]), _STEPS)
        for unit, pattern in _COUNTS:
            match = pattern.search(name)
            if match is not None and (unit != _NUMBERS or height <= 1):
                return Checkpoint(path, str(part.parent), int(match[1]), unit)
    if path.is_dir() and not (path / "config.json").exists():
        raise FlatminimaError(f"{text} is a folder, not a checkpoint: give those in it, as {path / '*.pt'}")
    raise FlatminimaError(f"{text}: no number in its name says when it was written: give it as NUMBER={text}")


def _existing(text: str) -> Path:
    path = Path(text)
    if not path.exists():
        raise FlatminimaError(f"there is no checkpoint {text}{_beside(path)}")
    if path.is_dir() and (inner := sorted(path.glob("checkpoint-*"))):
        raise FlatminimaError(f"{text} holds checkpoints and is none: give {path / 'checkpoint-*'} ({len(inner)})")
    return path


def _beside(path: Path) -> str:
    try:
        others = sorted(each.name for each in path.parent.iterdir() if not each.name.startswith("."))
    except OSError:
        return f": there is no folder {path.parent}"
    return f"; beside it are {', '.join(others[:3])}{' and more' if len(others) > 3 else ''}" if others else ""


def _ordered(run: str, checkpoints: list[Checkpoint]) -> list[Checkpoint]:
    """By number; those that the user has numbered count what the others do."""
    units = {checkpoint.unit: checkpoint for checkpoint in checkpoints if checkpoint.unit}
    if len(units) > 1:
        first, second, *_ = units.values()
        raise FlatminimaError(
            f"{run}: {first.path.name} counts by {first.unit}, {second.path.name} by {second.unit}: give them as "
            "NUMBER=CHECKPOINT, in one unit"
        )
    (unit,) = units or (_NUMBERS,)
    ordered = sorted(checkpoints, key=lambda checkpoint: checkpoint.number)
    for before, after in itertools.pairwise(ordered):
        require(
            before.number != after.number,
            f"{run}: {before.path.name} and {after.path.name} both have the {unit} {after.number}: give each run's "
            "checkpoints in a folder of their own, or as NUMBER=CHECKPOINT",
        )
    return [replace(checkpoint, unit=unit) for checkpoint in ordered]
