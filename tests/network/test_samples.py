from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from flatminima.errors import FlatminimaError, ShuffledLoaderWarning
from flatminima.network.samples import draw_subsets, samples_of

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


@given(n=st.integers(1, 50), size=st.integers(1, 50), trials=st.integers(1, 5), seed=st.integers(0, 1000))
def test_subsets_are_distinct_indices_and_do_not_depend_on_the_number_of_trials(n, size, trials, seed) -> None:
    if size > n:
        with pytest.raises(FlatminimaError, match="fewer than subset_size"):
            draw_subsets(n, size, trials, seed)
        return
    subsets = draw_subsets(n, size, trials, seed)
    assert len(subsets) == trials
    assert all(len(set(subset)) == size and set(subset) <= set(range(n)) for subset in subsets)
    assert draw_subsets(n, size, trials + 1, seed)[:trials] == subsets
