"""Measures of checkpoints, kept in a file as soon as they are known."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass as plain_dataclass
from pathlib import Path
from typing import Any

from pydantic.dataclasses import dataclass

from flatminima.errors import (
    FlatminimaError,
    NonFiniteError,
    NotAMinimumWarning,
    RankDeficientError,
    UntrackedEpochWarning,
    recorded_warnings,
    require,
    warn,
)
from flatminima.files import write_file
from flatminima.lab.data import Normalization, OwnData, TrainingData, digest_of_data
from flatminima.lab.errors import GuessedNormalizationWarning
from flatminima.lab.reading import Reading
from flatminima.lab.runs.checkpoints import Checkpoint
from flatminima.lab.runs.folder import RunFolder
from flatminima.lab.runs.measuring import measure_images, question
from flatminima.lab.runs.measuring_options import Measuring
from flatminima.lab.runs.networks import LoadedNetwork, NetworkInputs, load_checkpoint
from flatminima.lab.runs.own_measures import sources_of
from flatminima.lab.runs.sets import code_of_model
from flatminima.lab.schema import RECORD, parse, plain
from flatminima.lab.storage import bytes_of, digest_of, locked, read_text
from flatminima.measures import Characterization, evaluate
from flatminima.network import Samples, tensors_of
from flatminima.progress import track_parts
from flatminima.sampling import draw_subsets


@plain_dataclass(frozen=True)
class TrackedCheckpoint:
    """A checkpoint's measures.

    Attributes:
        checkpoint: which.
        characterization: on the training data.
        test: ``test_error``, or ``test_loss`` where nothing is classified; empty without test data.
        preparation: how inputs were made.
    """

    checkpoint: Checkpoint
    characterization: Characterization
    test: dict[str, float]
    preparation: dict[str, Any]


@plain_dataclass(frozen=True)
class Subject:
    """What checkpoints are of, and what they are measured on.

    Attributes:
        model: as for :func:`~flatminima.lab.runs.networks.load_checkpoint`.
        data: the training data.
        reading: how they are read.
        test: test data, if there are any.
    """

    model: str | None
    data: OwnData
    reading: Reading
    test: OwnData | None = None


@dataclass(frozen=True, config=RECORD)
class _Line:
    """A line of the file."""

    checkpoint: str
    unit: str
    number: int
    asked: dict[str, Any]
    """What must be equal for it to be the answer: weights, data, options."""
    characterization: dict[str, Any]
    test: dict[str, float]


def measure_checkpoints(
    checkpoints: Sequence[Checkpoint],
    subject: Subject,
    how: Measuring,
    path: Path,
    *,
    device: str = "auto",
    progress: bool = True,
) -> list[TrackedCheckpoint]:
    """The measures of checkpoints on the same subsets, in their order; those that cannot be measured are left out.

    A guess of how images were normalized is made at a run's last checkpoint, which fits best, for all of the run.

    Args:
        checkpoints: in order.
        subject: what they are of.
        how: how they are measured.
        path: a file that holds every checkpoint's measures as a line of JSON as soon as they are known; what it holds
            of the same weights, data and options is not measured again.
        device: where.
        progress: show a bar with the time left.

    Raises:
        FlatminimaError: a checkpoint cannot be loaded, whatever measuring refuses, or a file that this did not write.

    Warns:
        UntrackedEpochWarning: a checkpoint cannot be measured: NaN, or a singular ξ.
        FlatminimaWarning: what loading and measuring warn of, once for all checkpoints.
    """
    file, found, said = _File(path), list[TrackedCheckpoint](), set[str]()
    contents = _contents(subject)
    readings: dict[str, Reading] = {}
    runs = _by_run(checkpoints)
    # of every run the last and then the others: what is guessed at the last is needed for all
    order = [each for of_run in runs.values() for each in (of_run[-1], *of_run[:-1])]
    for _, checkpoint in track_parts({str(each): each for each in order}, progress):
        with _warning_once(checkpoint.path, said):
            if checkpoint.run in readings:
                network = _loaded(checkpoint, subject, readings[checkpoint.run])
            else:
                network, readings[checkpoint.run] = _load_last(runs[checkpoint.run], subject)
            unchanged = contents | {"code": _code(checkpoint.path, subject.model)}
            tracked = _tracked(checkpoint, network, subject.test, how, unchanged, file, device, progress)
        found += [] if tracked is None else [tracked]
    return sorted(found, key=lambda each: checkpoints.index(each.checkpoint))


def _by_run(checkpoints: Sequence[Checkpoint]) -> dict[str, list[Checkpoint]]:
    runs: dict[str, list[Checkpoint]] = {}
    for each in checkpoints:
        runs.setdefault(each.run, []).append(each)
    return runs


def _loaded(checkpoint: Checkpoint, subject: Subject, reading: Reading) -> LoadedNetwork:
    return load_checkpoint(checkpoint.path, subject.data, subject.model, reading)


def _load_last(checkpoints: Sequence[Checkpoint], subject: Subject) -> tuple[LoadedNetwork, Reading]:
    """A run's last network, and how all read their data: a guess is the one at the last whose weights are finite."""
    with recorded_warnings() as recorded:
        last = _loaded(checkpoints[-1], subject, subject.reading)
    guesses = [warning for warning in recorded if isinstance(warning, GuessedNormalizationWarning)]
    is_finite = all(bool(parameter.isfinite().all()) for parameter in last.model.parameters())
    for warning in recorded:
        if is_finite or warning not in guesses:
            warn(str(warning), type(warning))
    if not is_finite and len(checkpoints) > 1:
        return last, _load_last(checkpoints[:-1], subject)[1]
    if guesses and isinstance(last.preparation, Normalization):
        return last, dataclasses.replace(subject.reading, normalize=last.preparation.as_text())
    return last, subject.reading


def _contents(subject: Subject) -> dict[str, Any]:
    """Digests of all data, as the training loss and the test error are over all of them."""
    sets = {"data": subject.data} | ({} if subject.test is None else {"test": subject.test})
    return {"contents": {name: digest_of_data(data) for name, data in sets.items()}}


def _code(path: Path, model: str | None) -> dict[str, str]:
    """A digest of the module that a user's own network is from: the weights do not say what is done with them."""
    folder = RunFolder(path)
    source = folder.read_spec().model if path.is_dir() and not folder.is_empty else model
    return {} if source is None else code_of_model(source)


def _tracked(
    checkpoint: Checkpoint,
    network: LoadedNetwork,
    test: OwnData | None,
    how: Measuring,
    unchanged: dict[str, Any],
    file: _File,
    device: str,
    progress: bool,
) -> TrackedCheckpoint | None:
    """One checkpoint's measures: from the file, or taken now and kept there; None with a warning if there are none."""
    tested = None if test is None else network.prepared(test)
    asked = unchanged | _question(network, tested, how, device)
    line = file.answer(asked)
    if line is None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", NotAMinimumWarning)  # it still trains, and its loss stands beside
                measured = measure_images(network.model, network.data, how, device=device, progress=progress)
            scores = {} if tested is None else _tested(network, tested)
        except (NonFiniteError, RankDeficientError) as error:
            warn(f"{checkpoint.unit} {checkpoint.number} is not tracked: {error}", UntrackedEpochWarning)
            return None
        body = json.loads(measured.to_json())
        line = _Line(str(checkpoint.path), checkpoint.unit, checkpoint.number, asked, body, scores)
        file.add(line)
    characterization = Characterization.from_json(json.dumps(line.characterization))
    return TrackedCheckpoint(checkpoint, characterization, line.test, network.preparation.as_json())


def _tested(network: LoadedNetwork, tested: TrainingData) -> dict[str, float]:
    found = evaluate(network.model, NetworkInputs.of(tested, network.model), network.data.loss)
    return {"test_loss": found.loss} | ({} if found.correct is None else {"test_error": found.error})


def _question(network: LoadedNetwork, tested: TrainingData | None, how: Measuring, device: str) -> dict[str, Any]:
    """What must be equal for kept measures to be the answer, beside the data's contents and the code."""
    first = draw_subsets(len(network.data), how.subset_size, 1, how.seed)[0]
    prepared = _digest_of(network.data, first)
    require(
        tested is None or len(tested) != len(network.data) or _digest_of(tested, first) != prepared,
        "the test data are the training data: name others, or the part to test on",
    )
    weights = network.model.state_dict()
    digest = digest_of(
        repr(network.model).encode(),
        *(part for name, tensor in weights.items() for part in (name.encode(), bytes_of(tensor))),
    )
    return question(how, device, digest, sources_of(how)) | {"prepared": prepared}


def _digest_of(samples: Samples, indices: Sequence[int]) -> str:
    """Of how many there are, and of some of them as the network gets them."""
    inputs, targets = samples.fetch(indices)
    return digest_of(str(len(samples)).encode(), *(bytes_of(tensor) for tensor in (*tensors_of(inputs), targets)))


class _File:
    """What was measured, a line each; lines of other checkpoints, data, options and processes stay."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lines: list[_Line] = []
        if path.exists():
            try:
                self._lines = [parse(_Line, line) for line in read_text(path).splitlines()]
            except FlatminimaError:
                raise FlatminimaError(f"{path} is not what track wrote: name another file") from None

    def answer(self, asked: dict[str, Any]) -> _Line | None:
        return next((line for line in self._lines if line.asked == asked), None)

    def add(self, line: _Line) -> None:
        self._lines.append(line)
        with locked(self._path.with_name(f".{self._path.name}.lock")):
            others = read_text(self._path).splitlines() if self._path.exists() else []
            write_file(self._path, "".join(f"{text}\n" for text in (*others, json.dumps(plain(line)))))


@contextmanager
def _warning_once(path: Path, said: set[str]) -> Iterator[None]:
    """Name the checkpoint in errors and warnings, and warn of nothing that was said of another."""
    with recorded_warnings() as recorded:
        try:
            yield
        except FlatminimaError as error:
            if str(path) in str(error):
                raise
            raise type(error)(f"{path}: {error}") from error
    for warning in recorded:
        text = str(warning).removeprefix(f"{path}: ")
        if text not in said:
            said.add(text)
            warn(f"{path}: {text}", type(warning))
