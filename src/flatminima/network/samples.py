"""The training data that a measure draws its subsets from, by index, the same every time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, SequentialSampler, default_collate

from flatminima.errors import FlatminimaError, ShuffledLoaderWarning, warn
from flatminima.network.batches import Inputs, batch_size, map_tensors, take, tensors_of

Data = Any
"""A map-style ``Dataset`` of (inputs, target) pairs, a ``DataLoader``, or a tuple of tensors ``(inputs, targets)``."""

REPEATS_CHECKED = 16
"""How many samples are read twice, to see that the data do not change between passes."""


@runtime_checkable
class Samples(Protocol):
    """Training samples by index. A data set that has ``fetch`` hands out whole batches without collating samples."""

    def __len__(self) -> int: ...

    def fetch(self, indices: Sequence[int]) -> tuple[Inputs, Tensor]:
        """The samples at ``indices`` as one batch (inputs, targets)."""
        ...


def samples_of(data: Data) -> Samples:
    """Samples by index, whatever form the data come in.

    A DataLoader's own order is ignored (with a :class:`ShuffledLoaderWarning` if it has one): its data set is indexed.
    A loader that cannot be indexed is read into memory.

    Raises:
        FlatminimaError: if the data change between two passes (augmentation, a shuffling stream), are empty, or have
            a form that is not understood.
    """
    if isinstance(data, Samples):
        samples = data
    elif isinstance(data, DataLoader):
        samples = _from_loader(data)
    elif isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        samples = _IndexedSamples(data, default_collate)
    elif isinstance(data, (tuple, list)) and len(data) == 2 and isinstance(data[1], Tensor):
        samples = _TensorSamples(*data)
    else:
        raise FlatminimaError(
            f"data of type {type(data).__name__} is not understood: pass a map-style Dataset, a DataLoader, "
            "or a tuple of tensors (inputs, targets)"
        )
    if not len(samples):
        raise FlatminimaError("the data set is empty: pass the training set")
    _refuse_changing(samples)
    return samples


def draw_subsets(num_samples: int, subset_size: int, trials: int, seed: int) -> list[list[int]]:
    """``trials`` subsets of ``subset_size`` distinct indices below ``num_samples``; the same for the same arguments.

    Trial t is the same whatever ``trials`` is.

    Raises:
        FlatminimaError: if there are fewer samples than ``subset_size``, or an argument is not positive.
    """
    if subset_size < 1 or trials < 1:
        raise FlatminimaError(f"subset_size and trials must be at least 1, got {subset_size} and {trials}")
    if num_samples < subset_size:
        raise FlatminimaError(
            f"the data set has {num_samples} samples, fewer than subset_size={subset_size}: "
            "lower subset_size or pass more data"
        )
    generator = torch.Generator().manual_seed(seed)
    return [torch.randperm(num_samples, generator=generator)[:subset_size].tolist() for _ in range(trials)]


class _TensorSamples:
    def __init__(self, inputs: Inputs, targets: Tensor) -> None:
        batch_size((inputs, targets))
        self.inputs, self.targets = inputs, targets

    def __len__(self) -> int:
        return len(self.targets)

    def fetch(self, indices: Sequence[int]) -> tuple[Inputs, Tensor]:
        index = torch.as_tensor(indices, device=self.targets.device)
        return take(self.inputs, index), self.targets[index]


class _IndexedSamples:
    def __init__(self, dataset: Dataset[Any], collate: Any) -> None:
        if not hasattr(dataset, "__len__"):
            raise FlatminimaError(f"{type(dataset).__name__} has no length: pass a map-style Dataset or tensors")
        self.dataset, self.collate = dataset, collate

    def __len__(self) -> int:
        return len(self.dataset)

    def fetch(self, indices: Sequence[int]) -> tuple[Inputs, Tensor]:
        if hasattr(self.dataset, "__getitems__"):
            items = self.dataset.__getitems__(list(indices))
        else:
            items = [self.dataset[i] for i in indices]
        return split_batch(self.collate(items))


def split_batch(batch: Any) -> tuple[Inputs, Tensor]:
    """A collated batch as (inputs, targets): a pair, or a mapping with ``labels`` (Hugging Face).

    Raises:
        FlatminimaError: if it is neither.
    """
    if isinstance(batch, (tuple, list)) and len(batch) == 2 and isinstance(batch[1], Tensor):
        return batch[0], batch[1]
    if hasattr(batch, "keys") and "labels" in batch:
        return {key: value for key, value in batch.items() if key != "labels"}, batch["labels"]
    raise FlatminimaError(
        f"a batch of type {type(batch).__name__} is not understood: "
        "samples must be (inputs, target) pairs, or mappings with 'labels'"
    )


def _from_loader(loader: DataLoader[Any]) -> Samples:
    dataset = loader.dataset
    if isinstance(dataset, IterableDataset) or loader.batch_size is None:
        return _from_stream(loader)
    if not isinstance(loader.sampler, SequentialSampler):
        warn(
            f"the DataLoader's order comes from a {type(loader.sampler).__name__}: it is ignored, subsets are drawn by "
            "index from all of loader.dataset with the measure's own seed",
            ShuffledLoaderWarning,
        )
    return _IndexedSamples(dataset, loader.collate_fn)


def _from_stream(loader: DataLoader[Any]) -> Samples:
    first = next((split_batch(batch) for batch in loader), None)
    parts = [split_batch(batch) for batch in loader]
    if not parts:
        raise FlatminimaError("the data set is empty: pass the training set")
    if not _same(first, parts[0]):
        raise FlatminimaError(_CHANGING.format("the DataLoader's first batch"))
    inputs = _concatenate([inputs for inputs, _ in parts])
    return _TensorSamples(inputs, torch.cat([targets for _, targets in parts]))


_CHANGING = (
    "{} differs between two passes, so it shuffles or augments at random: "
    "measure on the fixed, un-augmented training set (no random transforms, shuffle=False)"
)


def _concatenate(parts: list[Inputs]) -> Inputs:
    columns = zip(*(tensors_of(part) for part in parts), strict=True)
    joined = iter([torch.cat(column) for column in columns])
    return map_tensors(lambda _: next(joined), parts[0])


def _refuse_changing(samples: Samples) -> None:
    indices = range(min(REPEATS_CHECKED, len(samples)))
    if not _same(samples.fetch(indices), samples.fetch(indices)):
        raise FlatminimaError(_CHANGING.format("the data set"))


def _same(first: Any, second: Any) -> bool:
    pairs = zip(tensors_of(first), tensors_of(second), strict=False)
    return all(a.shape == b.shape and torch.equal(a, b) for a, b in pairs)
