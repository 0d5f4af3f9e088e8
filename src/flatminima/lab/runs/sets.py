"""The data of a run, and a finished run with its data."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from flatminima.errors import FlatminimaError, warn
from flatminima.lab.data import ImageSet, confuse, hold_out, load_data
from flatminima.lab.errors import ChangedCodeWarning
from flatminima.lab.networks import assign_weights, is_factory, new_network
from flatminima.lab.runs.folder import RunFolder
from flatminima.lab.runs.own_measures import digest_of_module
from flatminima.lab.runs.records import RunResult
from flatminima.lab.runs.spec import RunSpec, derived_seed
from flatminima.lab.storage import bytes_of, digest_of
from flatminima.lab.user_code import found_by_name
from flatminima.network import restored_generators


@dataclass(frozen=True)
class TrainingSets:
    """The data of a run."""

    clean: ImageSet
    """The training images with their own labels: what measures are taken on."""
    train: ImageSet
    """What is trained on: the clean images and the confusion set."""
    test: ImageSet
    """The test set."""
    validation: ImageSet
    """Training images held out."""

    def digest(self) -> str:
        """A digest of all images and labels."""
        return digest_of_images(self.train, self.test, self.validation)


def digest_of_images(*sets: ImageSet) -> str:
    """A digest of the images and labels of some sets."""
    return digest_of(*(bytes_of(tensor) for images in sets for tensor in (images.images, images.labels)))


def load_sets(spec: RunSpec, *, cache_dir: Path | None = None) -> TrainingSets:
    """Load the data of a run; its subset and its confusion set follow from the spec's seed.

    Raises:
        FlatminimaError: The data cannot be loaded, or has too few images.
    """
    full, test = load_data(spec.source, cache_dir=cache_dir)
    full, validation = hold_out(full, spec.validation)
    if spec.train_size is None and spec.confusion == 0:
        return TrainingSets(full, full, test, validation)  # in the order of the files, whatever the seed
    clean, train = confuse(full, num_clean=spec.train_size, num_confused=spec.confusion, seed=spec.seed)
    return TrainingSets(clean, train, test, validation)


def initial_network(spec: RunSpec, images: ImageSet) -> nn.Module:
    """The network as the run begins, on the CPU; its weights follow from the spec's seed, given to all generators.

    Args:
        spec: the run's.
        images: some of its images.
    """
    seed = derived_seed(spec.seed, "weights", 0)
    torch.manual_seed(seed)
    seed_python_and_numpy(seed)
    return new_network(spec.model, images)


def seed_python_and_numpy(seed: int) -> None:
    """Seed the global generators that are not torch's: a user's own network may draw from them."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 (that one is meant; it takes no larger seeds)


def code_of_model(model: str) -> dict[str, str]:
    """A digest of the module that a user's own network is from, as an entry of a run's environment; of no other."""
    return {"model": digest_of_module(found_by_name(model, "model"))[:12]} if is_factory(model) else {}


def has_changed_code(spec: RunSpec, result: RunResult) -> bool:
    """Whether the module that a user's own network is from is another than when it was trained."""
    return code_of_model(spec.model).get("model") != result.environment.get("model")


def load_run(path: Path | str, *, cache_dir: Path | None = None) -> tuple[RunSpec, nn.Module, ImageSet, ImageSet]:
    """A finished run: its spec, the trained network in evaluation mode, and the data to measure it on.

    Returns:
        The spec, the network on the CPU, the un-augmented clean training set, and the test set.

    Raises:
        FlatminimaError: The folder is no run's, the run is unfinished or failed, a file is damaged, or the data are
            no longer those the network was trained on.

    Warns:
        ChangedCodeWarning: The module that a user's own network is from is another than when it was trained.
    """
    folder = RunFolder(path)
    spec = folder.read_spec()
    result = folder.require_result()
    sets = load_sets(spec, cache_dir=cache_dir)
    if sets.digest() != result.data_digest:
        raise FlatminimaError(f"the data {spec.source!r} have changed since {folder.path} was trained; train it again")
    with restored_generators(()):
        model = initial_network(spec, sets.train)  # a user's own may draw more than weights: what it connects, say
    if has_changed_code(spec, result):
        warn(f"the code of model {spec.model} has changed since {folder.path} was trained", ChangedCodeWarning)
    assign_weights(model, folder.read_checkpoint(), source=folder.checkpoint)
    return spec, model.eval(), sets.clean, sets.test
