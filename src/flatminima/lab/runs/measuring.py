"""Measures of trained runs, kept in their folders; comparisons of runs on one training set."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
from collections.abc import Mapping
from dataclasses import dataclass as plain_dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic.dataclasses import dataclass
from torch import nn

from flatminima import errors
from flatminima.errors import FlatminimaError, FlatminimaWarning, naming, recorded_warnings, warn
from flatminima.lab.data import ImageSet
from flatminima.lab.errors import DamagedFileError, DamagedRunWarning
from flatminima.lab.networks import resolve_device
from flatminima.lab.runs.folder import RunFolder
from flatminima.lab.runs.networks import LoadedNetwork, NetworkInputs, load_networks, type_of
from flatminima.lab.runs.records import RunProgress
from flatminima.lab.runs.sets import digest_of_images, load_run
from flatminima.lab.schema import RECORD, parse, plain
from flatminima.lab.storage import digest_of
from flatminima.measures import Characterization, Comparison, PlainOptions, compare, comparison_of, measure
from flatminima.network import float64_device
from flatminima.progress import track


@plain_dataclass(frozen=True)
class Measuring(PlainOptions):
    """How minima are measured."""

    fisher: Literal["empirical", "model"] = "empirical"
    """One gradient per sample, or the K classes' weighted by the model's probabilities: K - 1 times the cost."""
    measures: tuple[str, ...] = ("paper",)
    """Beside γ̂ and its parts: names of measures, or of groups: paper, free, cheap, weights, all."""
    memory_gib: float | None = None
    """Memory that may be used beside the network, in GiB (None: half of what is free); the results are the same."""
    per_parameter: bool = False
    """Also report every parameter's share of ξ, and so every layer's."""
    double: bool = False
    """Measure in float64."""

    def of(self, model: nn.Module, data: ImageSet, *, device: str = "auto", progress: bool = True) -> Characterization:
        """Measure ``model`` on ``data``; it stays on ``device``, in float64 if ``double``.

        Raises and warns as :func:`flatminima.measure` does.
        """
        self._place(model, device)
        return measure(model, NetworkInputs.of(data, model), progress=progress, **self._options())

    def compare(
        self, models: Mapping[str, nn.Module], data: ImageSet, *, device: str = "auto", progress: bool = True
    ) -> Comparison:
        """Compare ``models`` on ``data``, trial by trial; they stay on ``device``, in float64 if ``double``.

        Raises and warns as :func:`flatminima.compare` does; networks of several floating-point types it refuses.
        """
        for model in models.values():
            self._place(model, device)
        types = {name: type_of(model) for name, model in models.items()}
        if len(set(types.values())) > 1:
            found = ", ".join(f"{name}: {dtype}" for name, dtype in types.items())
            raise FlatminimaError(f"the networks are of several types ({found}): compare them in float64 (double)")
        inputs = NetworkInputs.of(data, next(iter(models.values())))
        return compare(models, inputs, progress=progress, **self._options())

    def _place(self, model: nn.Module, device: str) -> None:
        where = resolve_device(device)
        if self.double and float64_device(where) != where:
            raise FlatminimaError(f"device {device!r} has no float64: measure on the CPU, or in float32")
        model.to(where, torch.float64 if self.double else None)

    def _options(self) -> dict[str, Any]:
        """Those of :func:`flatminima.measure`."""
        options = dataclasses.asdict(self)
        del options["double"]
        gib = options.pop("memory_gib")
        return {**options, "memory_budget": None if gib is None else int(gib * 2**30)}


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
        DamagedRunWarning: if what the folder kept cannot be read; it is measured again.
        FlatminimaWarning: as :func:`flatminima.measure` does.
    """
    folder = RunFolder(path)
    folder.read_spec()  # whoever names another folder is told so
    folder.require_result()
    folder.tidy()
    found = _answer(folder, _question(folder, how, device))
    if found is None:
        with folder.lock(wait=True):  # of two commands on one folder the second reads what the first has measured
            asked = _question(folder, how, device)
            found = _answer(folder, asked) or _new_answer(folder, how, asked, device, progress)
    return _with_warnings(found)


def _new_answer(folder: RunFolder, how: Measuring, asked: dict[str, Any], device: str, progress: bool) -> KeptMeasures:
    """A new entry, kept beside the others; the caller holds the folder alone."""
    try:
        others = read_kept(folder)
    except DamagedFileError as error:
        warn(f"measured again: {error}", DamagedRunWarning)
        others = []
    _, model, clean, _ = load_run(folder.path)
    with folder.watched() as note, recorded_warnings() as recorded:
        note(RunProgress("measuring"))
        characterization = how.of(model, clean, device=device, progress=progress)
    messages = [(type(warning).__name__, str(warning)) for warning in recorded]
    entry = KeptMeasures(asked, messages, json.loads(characterization.to_json()))
    folder.write_measures(json.dumps([plain(kept) for kept in (*others, entry)]) + "\n")
    return entry


def kept_measures(path: Path, how: Measuring, *, device: str = "auto") -> Characterization | None:
    """What :func:`measure_run` would read from a finished run's folder; None if it would have to measure."""
    folder = RunFolder(path)
    found = _answer(folder, _question(folder, how, device))
    return None if found is None else _with_warnings(found)


def compare_runs(
    runs: Mapping[str, Path], how: Measuring, *, device: str = "auto", progress: bool = True
) -> Comparison:
    """Finished runs on the same subsets of the clean images that all of them were trained on.

    Each is measured as by :func:`measure_run`, and read where it was measured before. With ``max_standard_error`` they
    are measured together instead, until their differences are that precise, which nothing is kept of.

    Raises:
        FlatminimaError: with fewer than two runs, if their clean training images differ, or whatever
            :func:`measure_run` raises, naming the run.

    Warns:
        UnequalLossWarning: as :func:`flatminima.compare` does; and whatever :func:`measure_run` warns of.
    """
    _require_two(runs)
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
        return how.compare(models, load_run(runs[first])[2], device=device, progress=progress)
    measured = {}
    for name, path in runs.items():
        with naming(name):
            measured[name] = measure_run(path, how, device=device, progress=progress)
    return comparison_of(measured)


def compare_networks(
    paths: Mapping[str, Path],
    source: str,
    model: str | None,
    how: Measuring,
    *,
    normalize: str | None = None,
    device: str = "auto",
    progress: bool = True,
) -> Comparison:
    """Run folders, and checkpoints of one ``model``, on the same subsets of one training set.

    Args:
        paths: run folder or checkpoint by name.
        source: the training set, as for :func:`~flatminima.lab.data.sources.load_data`.
        model: what the checkpoints are of, as for :func:`~flatminima.lab.networks.foreign.load_model`.
        how: how they are measured.
        normalize: of the checkpoints, as for :func:`~flatminima.lab.runs.networks.load_network`.
        device: where.
        progress: show a bar with the time left on a terminal.

    Raises:
        FlatminimaError: with fewer than two, or whatever loading and measuring raises, naming the network.

    Warns:
        UnequalLossWarning: as :func:`flatminima.compare` does.
    """
    _require_two(paths)
    return compare_loaded(load_networks(paths, source, model, normalize), how, device=device, progress=progress)


def compare_loaded(
    networks: Mapping[str, LoadedNetwork], how: Measuring, *, device: str = "auto", progress: bool = True
) -> Comparison:
    """Networks on the same subsets of the same images, each normalized as in its training.

    Raises and warns as :func:`compare_networks` does.
    """
    _require_two(networks)
    first = next(iter(networks.values()))
    if all(network.normalization.is_that_of(first.normalization) for network in networks.values()):
        models = {name: network.model for name, network in networks.items()}
        return how.compare(models, first.data, device=device, progress=progress)
    if how.max_standard_error is not None:
        raise FlatminimaError(
            "the networks were trained on differently normalized images, so they cannot be measured together until "
            "their differences are precise: leave max_standard_error out"
        )
    measured = {}
    for name, network in networks.items():
        with naming(name):
            measured[name] = how.of(network.model, network.data, device=device, progress=progress)
    return comparison_of(measured)


def _question(folder: RunFolder, how: Measuring, device: str) -> dict[str, Any]:
    """What must be equal for kept measures to be the answer."""
    options = dataclasses.asdict(how)
    del options["memory_gib"]
    if not how.per_parameter:
        del options["per_parameter"]  # as questions were before there was this one
    return {
        **options,
        "measures": list(how.measures),  # as JSON has it
        "device": resolve_device(device).type,
        "weights": digest_of(folder.checkpoint.read_bytes()),
        "flatminima": importlib.metadata.version("flatminima"),
    }


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
