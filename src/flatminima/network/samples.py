"""The training data that a measure draws its subsets from, by index, the same every time."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, SequentialSampler, default_collate

from flatminima.errors import FlatminimaError, ShuffledLoaderWarning, first_line, require, warn
from flatminima.network.batches import Inputs, batch_size, map_tensors, take, tensors_of
from flatminima.torch_compat import needs_more_than_one_sample

Data = Any
"""A map-style data set (PyTorch's, Hugging Face's, a list) of (inputs, target) pairs or mappings with labels, a
``DataLoader``, or a tuple ``(inputs, targets)`` of tensors or arrays."""

LABELS = ("labels", "label", "label_ids")
"""How mappings call their targets, as Hugging Face's collators know them."""

REPEATS_CHECKED = 16
"""How many samples are read twice, to see that the data do not change between passes."""


@runtime_checkable
class Samples(Protocol):
    """Training samples by index. A data set that has ``fetch`` hands out whole batches without collating samples."""

    def __len__(self) -> int: ...

    def fetch(self, indices: Sequence[int]) -> tuple[Inputs, Tensor]:
        """The samples at ``indices`` as one batch (inputs, targets)."""
        ...


def index_batches(samples: int, batch: int) -> list[range]:
    """All samples by index, ``batch`` at a time."""
    return [range(start, min(start + batch, samples)) for start in range(0, samples, batch)]


def samples_of(data: Data) -> Samples:
    """Samples by index, whatever form the data come in.

    A DataLoader's own order is ignored (with a :class:`ShuffledLoaderWarning` if it has one): its data set is indexed.
    A loader that cannot be indexed is read into memory. Hugging Face's data sets are read as tensors.

    Raises:
        FlatminimaError: if the data change between two passes (augmentation, a shuffling stream), are empty, or have
            a form that is not understood.
    """
    if isinstance(data, Samples):
        samples = data
    elif isinstance(data, DataLoader):
        samples = _from_loader(data)
    elif isinstance(data, (tuple, list)) and len(data) == 2 and isinstance(_tensors_for_arrays(data[1]), Tensor):
        samples = _TensorSamples(*map(_tensors_for_arrays, data))
    elif _is_map_style(data):
        samples = _IndexedSamples(_read_as_tensors(data), default_collate)
    else:
        raise FlatminimaError(
            f"data of type {type(data).__name__} is not understood: pass a map-style Dataset, a DataLoader, "
            "or a tuple of tensors (inputs, targets)"
        )
    if not len(samples):
        raise FlatminimaError("the data set is empty: pass the training set")
    _refuse_changing(samples)
    return samples


def model_inputs(model: nn.Module, inputs: Inputs, targets: Tensor) -> Inputs:
    """The inputs that a model needs beside what the data give: those of a decoder, which it makes of the labels.

    Raises:
        FlatminimaError: if an encoder–decoder model's inputs are no mapping.
    """
    shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if shift is None or targets.dim() < 2:
        return inputs
    require(
        isinstance(inputs, Mapping),
        f"{type(model).__name__} has a decoder, whose inputs come from the labels: pass the inputs as a mapping, "
        "{'input_ids': ..., 'attention_mask': ...}",
    )
    if {"decoder_input_ids", "decoder_inputs_embeds"} & inputs.keys():
        return inputs
    return {**inputs, "decoder_input_ids": shift(targets)}


@dataclass(frozen=True)
class SamplesOfModel:
    """Samples with all that one model needs of them (:func:`model_inputs`)."""

    model: nn.Module
    samples: Samples

    def __len__(self) -> int:
        return len(self.samples)

    def fetch(self, indices: Sequence[int]) -> tuple[Inputs, Tensor]:
        """As of the samples."""
        inputs, targets = self.samples.fetch(indices)
        return model_inputs(self.model, inputs, targets), targets


@contextmanager
def explained_errors(model: nn.Module, inputs: Inputs, name: str | None = None) -> Iterator[None]:
    """Turn what a model raises for inputs that it does not take into one line that says what it was given.

    Args:
        model: the model.
        inputs: what it is given.
        name: how the line calls it (None: by its type).
    """
    try:
        yield
    except (FlatminimaError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        given = ", ".join(f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in tensors_of(inputs)[:8])
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        floats = {t.dtype for t in tensors_of(inputs) if t.is_floating_point()}
        if isinstance(error, ValueError) and needs_more_than_one_sample(error):
            remedy = (
                "a BatchNorm layer has no running statistics, so that samples would depend on one another: train it "
                "with track_running_stats=True"
            )
        elif floats - {dtype}:
            remedy = f"convert the inputs to the parameters' type, {dtype}"
        elif any(t.dtype == torch.uint8 for t in tensors_of(inputs)):
            remedy = "convert bytes as in training (to floating point, scaled, normalized; tokens to int64)"
        elif dtype == torch.float64:
            remedy = "pass the data as the model takes them, and let its forward make no tensors of a fixed type"
        else:
            remedy = "pass the data as the model takes them"
        raise FlatminimaError(
            f"{name or type(model).__name__} cannot be run on these inputs ({given}): {type(error).__name__}: "
            f"{first_line(error)}; {remedy}"
        ) from error


def _is_map_style(data: Any) -> bool:
    if isinstance(data, Dataset):
        return not isinstance(data, IterableDataset)
    items = isinstance(data, list) and bool(data) and isinstance(data[0], (tuple, list, Mapping))
    return items or (hasattr(data, "__getitem__") and hasattr(data, "column_names"))


def _read_as_tensors(data: Any) -> Any:
    """A data set of Hugging Face's, which gives lists otherwise, so that it gives tensors; any other as it is."""
    if hasattr(data, "with_format") and getattr(data, "format", {}).get("type") is None:
        return data.with_format("torch")
    return data


def _tensors_for_arrays(value: Any) -> Any:
    """Numpy's arrays, and lists of numbers, as tensors; without an import, as there is no array where numpy is not."""
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.ndarray):
        require(
            value.dtype.kind in "biufc",
            f"an array of type {value.dtype} holds no numbers: convert it, or pad its rows to one length",
        )
        return torch.from_numpy(value if value.flags.writeable else value.copy())
    if isinstance(value, list) and value and all(isinstance(item, (int, float)) for item in value):
        return torch.tensor(value, device="cpu")
    if isinstance(value, Mapping):
        return {key: _tensors_for_arrays(item) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_tensors_for_arrays(item) for item in value)
    return value


class _TensorSamples:
    def __init__(self, inputs: Inputs, targets: Tensor) -> None:
        require(targets.dim() > 0, "the targets are a single number: pass one for every sample, in the first dimension")
        batch_size((inputs, targets))
        self.inputs, self.targets = inputs, targets

    def __len__(self) -> int:
        return len(self.targets)

    def fetch(self, indices: Sequence[int]) -> tuple[Inputs, Tensor]:
        index = torch.as_tensor(indices, device="cpu")  # which may index tensors of any device
        return take(self.inputs, index), self.targets[index]


class _IndexedSamples:
    def __init__(self, dataset: Any, collate: Callable[[list[Any]], Any]) -> None:
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
        inputs, targets = split_batch(self._collated(items))
        found = len(targets) if targets.dim() else 1
        require(
            found == len(items),
            f"the collate_fn made a batch of {found} targets from {len(items)} samples: if it leaves some out, leave "
            "them out of the data set",
        )
        return inputs, targets

    def _collated(self, items: list[Any]) -> Any:
        try:
            return self.collate(items)
        except (TypeError, RuntimeError, ValueError) as error:
            own = self.collate is default_collate
            remedy = "give the data set a transform to tensors of one shape" if own else "look at its collate_fn"
            raise FlatminimaError(
                f"the data set's samples cannot be made a batch: {first_line(error)}; {remedy}, or pass a DataLoader "
                "with a collate_fn that pads them"
            ) from error


def split_batch(batch: Any) -> tuple[Inputs, Tensor]:
    """A collated batch as (inputs, targets): a pair, or a mapping with its labels under one of :data:`LABELS`.

    Raises:
        FlatminimaError: if it is neither.
    """
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        inputs, targets = _tensors_for_arrays(batch[0]), _tensors_for_arrays(batch[1])
        if isinstance(targets, Tensor):
            return inputs, targets
    name = next((name for name in LABELS if name in batch), None) if isinstance(batch, Mapping) else None
    if name is not None and isinstance(targets := _tensors_for_arrays(batch[name]), Tensor):
        return {key: _tensors_for_arrays(value) for key, value in batch.items() if key != name}, targets
    raise FlatminimaError(
        f"a batch of type {type(batch).__name__} is not understood: "
        "samples must be (inputs, target) pairs, or mappings with 'labels'"
    )


def _from_loader(loader: DataLoader[Any]) -> Samples:
    dataset = loader.dataset
    if isinstance(dataset, IterableDataset) or loader.batch_sampler is None:
        return _from_stream(loader)
    order = loader.sampler if type(loader.batch_sampler) is BatchSampler else loader.batch_sampler
    if not isinstance(order, SequentialSampler):
        warn(
            f"the DataLoader's order comes from a {type(order).__name__}: it is ignored, subsets are drawn by "
            "index from all of loader.dataset with the measure's own seed",
            ShuffledLoaderWarning,
        )
    own = loader.collate_fn is not default_collate  # one that pads may want what the data set itself gives
    return _IndexedSamples(dataset if own else _read_as_tensors(dataset), loader.collate_fn)


def _from_stream(loader: DataLoader[Any]) -> Samples:
    first = next((split_batch(batch) for batch in loader), None)
    parts = [split_batch(batch) for batch in loader]
    if not parts:
        raise FlatminimaError("the data set is empty: pass the training set")
    require(
        all(targets.dim() > 0 for _, targets in parts),
        "the DataLoader gives single samples, not batches: give it a batch_size",
    )
    if not _same(first, parts[0]):
        raise FlatminimaError(_CHANGING.format("the DataLoader's first batch"))
    return _TensorSamples(*_concatenate(parts))


_CHANGING = (
    "{} differs between two passes, so it shuffles or augments at random: "
    "measure on the fixed, un-augmented training set (no random transforms, shuffle=False)"
)


def _concatenate(parts: list[Inputs]) -> Inputs:
    require(
        len({len(tensors_of(part)) for part in parts}) == 1,
        "the stream's batches hold different numbers of tensors: give all the same, or pass a map-style data set",
    )
    columns = [*zip(*(tensors_of(part) for part in parts), strict=True)]
    require(
        all(tensor.dim() > 0 for column in columns for tensor in column),
        "the stream's batches hold a tensor without dimensions, which belongs to no sample: leave it out",
    )
    require(
        all(len({tensor.shape[1:] for tensor in column}) == 1 for column in columns),
        "the stream's batches have different shapes (padded each to its own length?): pad all to one length, or pass "
        "a map-style data set in a DataLoader with a collate_fn that pads",
    )
    joined = iter([torch.cat(column) for column in columns])
    return map_tensors(lambda _: next(joined), parts[0])


def _refuse_changing(samples: Samples) -> None:
    indices = range(min(REPEATS_CHECKED, len(samples)))
    first = samples.fetch(indices)
    require(
        not any(tensor.is_meta for tensor in tensors_of(first)),
        "the data are on the meta device, without values: make them outside torch.device('meta')",
    )
    if not _same(first, samples.fetch(indices)):
        raise FlatminimaError(_CHANGING.format("the data set"))


def _same(first: Any, second: Any) -> bool:
    pairs = zip(tensors_of(first), tensors_of(second), strict=False)
    return all(a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all()) for a, b in pairs)  # NaN is same
