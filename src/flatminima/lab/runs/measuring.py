"""Measures of trained runs, kept in their folders; comparisons of runs on one training set."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from flatminima import errors
from flatminima.errors import FlatminimaError, FlatminimaWarning, naming, recorded_warnings, require, warn
from flatminima.gramian import default_budget
from flatminima.lab.data import TrainingData
from flatminima.lab.errors import DamagedFileError, DamagedRunWarning, UnkeptMeasuresWarning
from flatminima.lab.jobs import Failure, WorkerPool, run_all
from flatminima.lab.networks import resolve_device
from flatminima.lab.runs.folder import RunFolder
from flatminima.lab.runs.measuring_options import Measuring
from flatminima.lab.runs.networks import LoadedNetwork, NetworkInputs, type_of
from flatminima.lab.runs.own_measures import options_of, selection_of, sources_of
from flatminima.lab.runs.records import RunProgress
from flatminima.lab.runs.sets import code_of_model, digest_of_images, initial_network, load_run
from flatminima.lab.schema import RECORD, parse, plain
from flatminima.lab.storage import digest_of
from flatminima.measures import Characterization, Comparison, compare, comparison_of, measure
from flatminima.network import float64_device, restored_generators
from flatminima.progress import track, track_parts

_FROM_INITIAL = "distance_from_initialization"


def measure_images(
    model: nn.Module,
    data: TrainingData,
    how: Measuring,
    *,
    initial: Mapping[str, Tensor] | None = None,
    device: str = "auto",
    progress: bool = True,
) -> Characterization:
    """Measure ``model``, trained from ``initial``, on ``data``; it stays on ``device``, in float64 if ``how.double``.

    Raises and warns as :func:`flatminima.measure` does.
    """
    _place(model, how, device)
    inputs = NetworkInputs.of(data, model)
    return measure(model, inputs, loss=data.loss, initial=initial, progress=progress, **options_of(how))


def compare_images(
    models: Mapping[str, nn.Module], data: TrainingData, how: Measuring, *, device: str = "auto", progress: bool = True
) -> Comparison:
    """Compare ``models`` on ``data``, trial by trial; they stay on ``device``, in float64 if ``how.double``.

    Raises and warns as :func:`flatminima.compare` does; networks of several floating-point types it refuses.
    """
    for model in models.values():
        _place(model, how, device)
    types = {name: type_of(model) for name, model in models.items()}
    if len(set(types.values())) > 1:
        found = ", ".join(f"{name}: {dtype}" for name, dtype in types.items())
        raise FlatminimaError(f"the networks are of several types ({found}): compare them in float64 (double)")
    inputs = NetworkInputs.of(data, next(iter(models.values())))
    return compare(models, inputs, loss=data.loss, progress=progress, **options_of(how))


def _place(model: nn.Module, how: Measuring, device: str) -> None:
    where = resolve_device(device)
    if how.double and float64_device(where) != where:
        raise FlatminimaError(f"device {device!r} has no float64: measure on the CPU, or in float32")
    model.to(where, torch.float64 if how.double else None)


@dataclass(frozen=True, config=RECORD)
class KeptMeasures:
    """One of the measurements in ``measures.json``."""

    asked: dict[str, Any]
    """What must be equal for it to be the answer: options, weights, device, version."""
    warnings: list[tuple[str, str]]
    """Category and text of the warnings given when it was taken."""
    characterization: dict[str, Any]
    """The measures, as :meth:`Characterization.to_json` writes them."""


def measure_run(path: Path, how: Measuring, *, device: str = "auto", progress: bool = True) -> Characterization:
    """The measures of a finished run on its clean, un-augmented training images.

    They are kept in the run folder: asked for again, with the same weights, options, device and version of flatminima,
    they are read from there, with the warnings that were given when they were taken.

    Raises:
        FlatminimaError: if the run cannot be loaded, or whatever :func:`flatminima.measure` raises.

    Warns:
        DamagedRunWarning: if what the folder kept cannot be read, and is measured and written anew.
        UnkeptMeasuresWarning: if the folder is read-only.
        FlatminimaWarning: as :func:`flatminima.measure` does.
    """
    folder = RunFolder(path)
    folder.read_spec()  # whoever names another folder is told so
    folder.require_result()
    folder.tidy()
    asked = _question(folder, how, device)
    found = _answer(folder, asked)
    if found is None and not folder.is_writable:
        warn(f"what is measured of {path} is not kept there: it is read-only", UnkeptMeasuresWarning)
        found = _new_answer(folder, how, asked, device, progress)
    elif found is None:
        with folder.lock(wait=True):  # of two commands on one folder the second reads what the first has measured
            asked = _question(folder, how, device)
            found = _answer(folder, asked)
            if found is None:
                found = _new_answer(folder, how, asked, device, progress)
                _keep(folder, found)
    return _with_warnings(found)


def _new_answer(folder: RunFolder, how: Measuring, asked: dict[str, Any], device: str, progress: bool) -> KeptMeasures:
    with restored_generators(()):  # building a network draws its weights
        spec, model, clean, _ = load_run(folder.path)
        initial = initial_network(spec, clean).state_dict()
    with folder.watched() as note, recorded_warnings() as recorded:
        note(RunProgress("measuring"))
        characterization = measure_images(model, clean, how, initial=initial, device=device, progress=progress)
    messages = [(type(warning).__name__, str(warning)) for warning in recorded]
    return KeptMeasures(asked, messages, json.loads(characterization.to_json()))


def _keep(folder: RunFolder, found: KeptMeasures) -> None:
    """Beside the others; the caller holds the folder alone."""
    try:
        others = read_kept(folder)
    except DamagedFileError as error:
        warn(f"measured again: {error}", DamagedRunWarning)
        others = []
    folder.write_measures(json.dumps([plain(kept) for kept in (*others, found)]) + "\n")


def kept_measures(path: Path, how: Measuring, *, device: str = "auto") -> Characterization | None:
    """What :func:`measure_run` would read from a finished run's folder; None if it would have to measure."""
    folder = RunFolder(path)
    found = _answer(folder, _question(folder, how, device))
    return None if found is None else _with_warnings(found)


def compare_runs(
    runs: Mapping[str, Path], how: Measuring, *, workers: int = 1, device: str = "auto", progress: bool = True
) -> Comparison:
    """Finished runs on the same subsets of the clean images that all of them were trained on.

    Each is measured as by :func:`measure_run`, and read where it was measured before. With ``max_standard_error`` they
    are measured together instead, until their differences are that precise, which nothing is kept of.

    Args:
        runs: name → folder.
        how: how they are measured.
        workers: how many at once, in processes that share this one's threads and the memory.
        device: where.
        progress: show a bar.

    Raises:
        FlatminimaError: with fewer than two runs, if their clean training images differ, for several workers with
            ``max_standard_error``, or whatever :func:`measure_run` raises, naming the run.

    Warns:
        UnequalLossWarning: as :func:`flatminima.compare` does; and whatever :func:`measure_run` warns of.
    """
    _require_two(runs)
    require(workers >= 1, f"workers must be 1 or more, got {workers}")
    if how.max_standard_error is not None and _FROM_INITIAL in how.measures:
        raise FlatminimaError(f"{_FROM_INITIAL} is measured run by run: leave max_standard_error out")
    require(
        workers == 1 or how.max_standard_error is None,
        "until their differences are precise, runs are measured together in one process: leave workers out, or "
        "max_standard_error",
    )
    digests = {name: _clean_digest(path) for name, path in track(runs.items(), "reading", progress)}
    first = next(iter(runs))
    for name, digest in digests.items():
        if digest != digests[first]:
            raise FlatminimaError(
                f"{name} and {first} were trained on different images, so their measures do not compare: compare runs "
                "of one training set (same data, train_size and seed), or name the data to measure both on"
            )
    if how.max_standard_error is not None:
        models = {name: load_run(path)[1] for name, path in runs.items()}
        return compare_images(models, load_run(runs[first])[2], how, device=device, progress=progress)
    if workers > 1:
        _measure_at_once(runs, how, workers, device, progress)
    measured = {}
    for name, path in track_parts(runs, progress):
        with naming(name):
            measured[name] = measure_run(path, how, device=device, progress=progress)
    return comparison_of(measured)


def _measure_at_once(runs: Mapping[str, Path], how: Measuring, workers: int, device: str, progress: bool) -> None:
    """Measure in worker processes those runs that have not been measured yet and whose folders can be written to.

    Nothing is returned: the caller reads the measures from the folders. A run that fails here is measured again by the
    caller, who so gets the error itself.
    """
    folders = {name: folder for name, path in runs.items() if (folder := RunFolder(path)).is_writable}
    new = [name for name, folder in folders.items() if _answer(folder, _question(folder, how, device)) is None]
    workers = min(workers, len(new))
    if workers < 2:
        return
    pool = WorkerPool(workers, threads=max(1, torch.get_num_threads() // workers))
    gib = default_budget(resolve_device(device)) / 2**30 if how.memory_gib is None else how.memory_gib
    measuring = partial(_measure_silently, how=dataclasses.replace(how, memory_gib=gib / workers), device=device)
    outcomes = run_all(measuring, [runs[name] for name in new], pool, description="measuring", progress=progress)
    for name, outcome in zip(new, outcomes, strict=True):
        for warning in [] if isinstance(outcome, Failure) else outcome:
            with naming(name):
                warn(str(warning), type(warning))


def _measure_silently(path: Path, how: Measuring, device: str) -> list[DamagedRunWarning]:
    """Measure a run in a worker; the warnings that its folder does not keep."""
    with recorded_warnings() as recorded:
        measure_run(path, how, device=device, progress=False)
    return [warning for warning in recorded if isinstance(warning, DamagedRunWarning)]


def compare_loaded(
    networks: Mapping[str, LoadedNetwork], how: Measuring, *, device: str = "auto", progress: bool = True
) -> Comparison:
    """Networks on the same subsets of one training set, each with its inputs as in its training.

    Raises:
        FlatminimaError: with fewer than two, or whatever measuring raises, naming the network.

    Warns:
        UnequalLossWarning: as :func:`flatminima.compare` does.
    """
    _require_two(networks)
    first = next(iter(networks.values()))
    if all(network.preparation.is_that_of(first.preparation) for network in networks.values()):
        models = {name: network.model for name, network in networks.items()}
        return compare_images(models, first.data, how, device=device, progress=progress)
    if how.max_standard_error is not None:
        raise FlatminimaError(
            "the networks were trained on differently normalized images, or inputs prepared in another way, so they "
            "cannot be measured together until their differences are precise: leave max_standard_error out"
        )
    measured = {}
    for name, network in track_parts(networks, progress):
        with naming(name):
            measured[name] = measure_images(network.model, network.data, how, device=device, progress=progress)
    return comparison_of(measured)


def question(how: Measuring, device: str, weights: str, sources: Mapping[str, str]) -> dict[str, Any]:
    """What must be equal for kept measures of a network to be the answer.

    Args:
        how: how it is measured.
        device: where.
        weights: a digest of the network.
        sources: digests of the user's own modules that take part, by what they are for.
    """
    options = dataclasses.asdict(how)
    del options["memory_gib"]
    if sources:
        options["sources"] = dict(sources)
    if not how.per_parameter:
        del options["per_parameter"]  # as questions were before there was this one
    return {
        **options,
        "measures": list(how.measures),  # as JSON has it
        "device": resolve_device(device).type,
        "weights": weights,
        "flatminima": importlib.metadata.version("flatminima"),
    }


def _question(folder: RunFolder, how: Measuring, device: str) -> dict[str, Any]:
    """Of a run."""
    sources = sources_of(how) | code_of_model(folder.read_spec().model)
    asked = question(how, device, digest_of(folder.checkpoint.read_bytes()), sources)
    if _FROM_INITIAL in {measure.name for measure in selection_of(how).measures}:
        asked["initial"] = True  # what was measured before runs knew their initial weights is no answer
    return asked


def _answer(folder: RunFolder, asked: dict[str, Any]) -> KeptMeasures | None:
    """The entry that is the answer; None if there is none that can be read."""
    with contextlib.suppress(DamagedFileError):
        return next((entry for entry in read_kept(folder) if entry.asked == asked), None)
    return None


def read_kept(folder: RunFolder) -> list[KeptMeasures]:
    """All entries.

    Raises:
        DamagedFileError: they cannot be read.
    """
    try:
        kept = parse(list[KeptMeasures], folder.read_measures() or "[]")
        for entry in kept:
            _characterization(entry)
    except (FlatminimaError, AttributeError):
        raise DamagedFileError(f"the measures kept in {folder.path} are damaged or of another version") from None
    return kept


def _characterization(kept: KeptMeasures) -> Characterization:
    """The measures of an entry, every value of its declared type."""
    values = dataclasses.asdict(Characterization.from_json(json.dumps(kept.characterization)))
    return parse(Characterization, json.dumps(values), strict=True)


def _with_warnings(found: KeptMeasures) -> Characterization:
    """A kept entry's measures, with the warnings that were given when they were taken."""
    for name, message in found.warnings:
        category = getattr(errors, name, None)
        if not (isinstance(category, type) and issubclass(category, FlatminimaWarning)):
            category = FlatminimaWarning
        warn(message, category)
    return _characterization(found)


def _clean_digest(path: Path) -> str:
    return digest_of_images(load_run(path)[2])


def _require_two(runs: Mapping[str, object]) -> None:
    if len(runs) < 2:
        raise FlatminimaError(f"compare needs at least two minima, got {len(runs)}: use measure for one")
