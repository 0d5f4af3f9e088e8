from __future__ import annotations

from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    SequentialSampler,
    TensorDataset,
    default_collate,
)

from flatminima.errors import FlatminimaError, ShuffledLoaderWarning
from flatminima.network.samples import explained_errors, samples_of

X, Y = torch.randn(30, 4), torch.arange(30)


class Dicts(Dataset):
    def __len__(self) -> int:
        return 30

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"pixel_values": X[i], "labels": Y[i]}


class Augmented(TensorDataset):
    def __getitem__(self, i: int) -> tuple[Tensor, ...]:
        x, y = super().__getitem__(i)
        return (x.flip(0) if torch.rand(()) < 0.5 else x), y


class Stream(IterableDataset):
    def __init__(self, shuffle: bool = False) -> None:
        self.shuffle = shuffle

    def __iter__(self):
        order = torch.randperm(30) if self.shuffle else torch.arange(30)
        return iter([(X[i], Y[i]) for i in order])


class ViaBatch(TensorDataset):
    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, Tensor]]:
        return list(zip(X[indices], Y[indices], strict=True))


@pytest.mark.parametrize(
    "data",
    [
        (X, Y),
        TensorDataset(X, Y),
        ViaBatch(X, Y),
        DataLoader(TensorDataset(X, Y), batch_size=7),
        DataLoader(Stream(), batch_size=7),
    ],
    ids=["tensors", "dataset", "batched dataset", "loader", "stream"],
)
def test_every_form_gives_the_same_samples(data) -> None:
    samples = samples_of(data)
    inputs, targets = samples.fetch([3, 29, 0])
    assert len(samples) == 30
    assert torch.equal(inputs, X[[3, 29, 0]])
    assert torch.equal(targets, torch.tensor([3, 29, 0]))


def test_mappings_are_split_at_labels() -> None:
    inputs, targets = samples_of(Dicts()).fetch([5, 2])
    assert inputs.keys() == {"pixel_values"}
    assert targets.tolist() == [5, 2]


def test_a_shuffling_loader_is_indexed_with_a_warning() -> None:
    with pytest.warns(ShuffledLoaderWarning, match="RandomSampler"):
        samples = samples_of(DataLoader(TensorDataset(X, Y), shuffle=True, batch_size=8))
    assert samples.fetch([4, 1])[1].tolist() == [4, 1]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (Augmented(X, Y), "differs between two passes"),
        (DataLoader(Augmented(X, Y), batch_size=8), "differs between two passes"),
        (DataLoader(Stream(shuffle=True), batch_size=16), "differs between two passes"),
        ((X[:0], Y[:0]), "empty"),
        (X, "not understood"),
        ((X, Y[:5]), "share their first dimension"),
        (TensorDataset(X), "not understood"),
    ],
    ids=["augmented", "augmented loader", "shuffling stream", "empty", "bare tensor", "unequal", "no targets"],
)
def test_unsuitable_data_are_refused(data, message: str) -> None:
    with pytest.raises(FlatminimaError, match=message):
        samples_of(data).fetch([0])


class Bucketing(BatchSampler):
    """Batches of neighbours in another order than the data set's."""

    def __iter__(self):
        return iter(list(super().__iter__())[::-1])


def padded(items: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    inputs, targets = zip(*items, strict=True)
    return torch.nn.utils.rnn.pad_sequence(inputs, batch_first=True), torch.stack(targets)


class Ragged(Dataset):
    """Sample i has i % 4 + 1 tokens, all of them i."""

    def __len__(self) -> int:
        return 30

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return torch.full((i % 4 + 1,), i), torch.tensor(i)


OTHER_FORMS: dict[str, Any] = {
    "arrays": (X.numpy(), Y.numpy()),
    "an array that cannot be written to": (numpy.broadcast_to(X.numpy(), X.shape), Y.numpy()),
    "labels in a list": (X, Y.tolist()),
    "a list of pairs": [(x, int(y)) for x, y in zip(X, Y, strict=True)],
    "a list of arrays and labels": list(zip(X.numpy(), Y.tolist(), strict=True)),
    "batch sampler": DataLoader(TensorDataset(X, Y), batch_sampler=BatchSampler(SequentialSampler(X), 7, False)),
    "arrays from a collate_fn": DataLoader(
        TensorDataset(X, Y),
        batch_size=7,
        collate_fn=lambda items: tuple(numpy.stack([i[k].numpy() for i in items]) for k in (0, 1)),
    ),
}


@pytest.mark.parametrize("form", OTHER_FORMS)
def test_other_forms_give_the_same_samples(form: str) -> None:
    inputs, targets = samples_of(OTHER_FORMS[form]).fetch([3, 29, 0])
    assert torch.equal(inputs, X[[3, 29, 0]])
    assert targets.tolist() == [3, 29, 0]


def test_arrays_in_mappings_become_tensors() -> None:
    inputs, targets = samples_of(({"a": X.numpy(), "b": (X.numpy(), Y)}, Y)).fetch([5, 2])
    assert torch.equal(inputs["a"], X[[5, 2]])
    assert torch.equal(inputs["b"][0], X[[5, 2]])
    assert targets.tolist() == [5, 2]


@pytest.mark.parametrize("name", ["labels", "label", "label_ids"])
def test_labels_go_by_the_names_that_hugging_faces_collators_know(name: str) -> None:
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    data = datasets.Dataset.from_dict({"x": X.tolist(), name: Y.tolist()})
    inputs, targets = samples_of(data).fetch([5, 2])
    assert torch.equal(inputs["x"], X[[5, 2]])
    assert targets.tolist() == [5, 2]
    assert data.format["type"] is None


def test_a_bucketing_loader_is_indexed_with_a_warning_and_pads_every_subset() -> None:
    loader = DataLoader(Ragged(), batch_sampler=Bucketing(SequentialSampler(Ragged()), 4, False), collate_fn=padded)
    with pytest.warns(ShuffledLoaderWarning, match="Bucketing"):
        samples = samples_of(loader)
    inputs, targets = samples.fetch([2, 0])
    assert inputs.tolist() == [[2, 2, 2], [0, 0, 0]]
    assert targets.tolist() == [2, 0]


def test_a_batchnorm_without_statistics_is_the_reason_that_is_told() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3, track_running_stats=False)).eval()
    x = torch.ones(1, 2)
    with pytest.raises(FlatminimaError, match="has no running statistics, so that"), explained_errors(model, x):
        model(x)


def test_missing_values_are_the_same_in_two_passes() -> None:
    x = X.clone()
    x[3, 0] = torch.nan
    assert samples_of((x, Y)).fetch([3])[0].isnan().any()


class PaddedStream(IterableDataset):
    def __iter__(self):
        return iter([padded([Ragged()[i] for i in range(k, k + 2)]) for k in range(0, 6, 2)])


class Pictures(Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> tuple[Any, int]:
        from PIL import Image

        return Image.new("RGB", (4, 4)), i


class Batches(IterableDataset):
    """A stream of what it was given."""

    def __init__(self, *batches: Any) -> None:
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


def without_the_first(items: list[Any]) -> Any:
    return default_collate(items[1:])


def stream(*batches: Any) -> DataLoader[Any]:
    return DataLoader(Batches(*batches), batch_size=None)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (DataLoader(PaddedStream(), batch_size=None), "pad all to one length"),
        (stream((X[0], Y[0]), (X[1], Y[1])), "single samples, not batches: give it a batch_size"),
        (stream({"x": X, "labels": Y}, {"x": X, "m": X, "labels": Y}), "different numbers of tensors"),
        (stream({"x": X, "t": torch.tensor(1.0), "labels": Y}), "a tensor without dimensions"),
        (DataLoader(TensorDataset(X, Y), collate_fn=without_the_first), "15 targets from 16 samples"),
        ((X.to_sparse(), Y), "sparse tensors cannot be indexed"),
        ((X[:1], Y[0]), "the targets are a single number"),
        (Ragged(), "cannot be made a batch: .* with a collate_fn that pads"),
        (Pictures(), "cannot be made a batch: .*give the data set a transform to tensors"),
        ((torch.nested.nested_tensor([X[0], X[1, :2]], layout=torch.jagged), Y[:2]), "nested tensors"),
        ((numpy.array(["a", "b"]), Y[:2]), "holds no numbers"),
        ((X, Y, Y), "data of type tuple is not understood"),
        ("data.pt", "data of type str is not understood"),
        ({"x": X, "labels": Y}, "data of type dict is not understood"),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else "",
)
def test_data_that_cannot_be_indexed_are_refused_in_one_line(data: Any, message: str) -> None:
    with pytest.raises(FlatminimaError, match=message) as raised:
        samples_of(data)
    assert "\n" not in str(raised.value)
