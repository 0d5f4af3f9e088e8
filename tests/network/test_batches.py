"""What a batch may be, and that taking from it neither shares nor loses anything."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, UserDict, defaultdict
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from flatminima.errors import FlatminimaError
from flatminima.network import batch_size, map_tensors, take, tensors_of


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


@dataclasses.dataclass(frozen=True)
class Frozen:
    x: Tensor
    y: Tensor
    note: str = "none"


class Attributes(dict[str, Any]):
    """Items that are attributes as well, by the usual idiom."""

    def __init__(self, items: Any) -> None:
        super().__init__(items)
        self.__dict__ = self


class Copies(dict[str, Any]):
    """Items that its constructor makes attributes of."""

    def __init__(self, items: Any) -> None:
        super().__init__(items)
        for name, value in self.items():
            setattr(self, name, value)


class ReadOnly(Mapping[str, Any]):
    def __init__(self, items: Any) -> None:
        self._items = items

    def __getitem__(self, key: str) -> Any:
        return self._items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)


X, Y = torch.arange(12.0).reshape(6, 2), torch.arange(6)
ITEMS = {"x": X, "y": Y}

CONTAINERS = {
    "tuple": (X, Y),
    "list": [X, Y],
    "named tuple": Pair(X, Y),
    "dict": dict(ITEMS),
    "ordered dict": OrderedDict(ITEMS),
    "default dict": defaultdict(list, ITEMS),
    "user dict": UserDict(ITEMS),
    "attributes": Attributes(ITEMS),
    "copied attributes": Copies(ITEMS),
    "read-only mapping": ReadOnly(ITEMS),
    "dataclass": Frozen(X, Y),
    "nested": {"pair": Pair(X, Y), "more": [{"x": X}, (Y, None)]},
}
INDICES = torch.tensor([4, 1])


@pytest.mark.parametrize("container", CONTAINERS.values(), ids=CONTAINERS)
@pytest.mark.parametrize("indices", [INDICES, slice(1, 3), slice(None)], ids=["indices", "slice", "all"])
def test_what_is_taken_has_the_same_type_and_is_new(container: Any, indices: Any) -> None:
    before = [tensor.clone() for tensor in tensors_of(container)]
    taken = take(container, indices)
    assert type(taken) is type(container)
    for tensor, whole in zip(tensors_of(taken), before, strict=True):
        assert torch.equal(tensor, whole[indices])
        tensor.zero_()
    if isinstance(taken, (dict, UserDict)):
        taken.popitem()
    assert len(tensors_of(container)) == len(before)
    for tensor, whole in zip(tensors_of(container), before, strict=True):
        assert torch.equal(tensor, whole)


@pytest.mark.parametrize("name", ["named tuple", "attributes", "copied attributes", "dataclass"])
def test_attributes_are_those_of_what_is_taken(name: str) -> None:
    taken = take(CONTAINERS[name], INDICES)
    assert torch.equal(taken.x, X[INDICES])
    assert torch.equal(taken.y, Y[INDICES])
    mapped = map_tensors(lambda tensor: tensor + 1, CONTAINERS[name])
    assert torch.equal(mapped.x, X + 1)


def test_a_tokenizers_batch_keeps_its_type_and_attributes() -> None:
    transformers = pytest.importorskip("transformers", reason="Transformers is not installed")
    batch = transformers.BatchEncoding(dict(ITEMS))
    taken = take(batch, INDICES)
    assert isinstance(taken, transformers.BatchEncoding)
    assert torch.equal(taken.x, X[INDICES])


PER_SAMPLE = {
    "strings": (list("abcdef"), list("eb")),
    "tuple": (tuple(range(6)), (4, 1)),
    "array": (np.arange(6) * 10, np.array([40, 10])),
    "nested numbers": ([[i] for i in range(6)], [[4], [1]]),
    "columns of strings": ([tuple("abcdef"), tuple("ghijkl")], [tuple("eb"), tuple("kh")]),
    "mappings": ([{"id": i} for i in range(6)], [{"id": 4}, {"id": 1}]),
}


@pytest.mark.parametrize(("value", "expected"), PER_SAMPLE.values(), ids=PER_SAMPLE)
def test_what_has_one_thing_for_each_sample_is_indexed(value: Any, expected: Any) -> None:
    taken = take({"x": X, "extra": value}, INDICES)["extra"]
    assert type(taken) is type(value)
    assert np.array_equal(taken, expected)


@pytest.mark.parametrize("value", [None, 0.5, "abcdef", np.float32(2), np.bool_(True), torch.tensor(3.0), len, [], {}])
def test_constants_are_handed_on(value: Any) -> None:
    assert take({"x": X, "extra": value}, INDICES)["extra"] == value


@pytest.mark.parametrize("value", [[1, 2], ["a"], np.zeros(4), {"deep": [1.0, 2.0]}, object()])
def test_what_belongs_to_no_sample_is_refused_by_name(value: Any) -> None:
    with pytest.raises(FlatminimaError, match=r"the batch's \['extra'\].* is neither 6 things, one for each sample"):
        take({"x": X, "extra": value}, INDICES)


def test_groups_take_tensors_and_constants_and_refuse_lists() -> None:
    groups = torch.tensor([[4, 1, 0], [2, 3, 5]])
    taken = take({"x": X, "rate": torch.tensor(2.0), "name": "n"}, groups)
    assert torch.equal(taken["x"], X[groups])
    assert taken["rate"].tolist() == [2.0, 2.0]
    assert taken["name"] == "n"
    with pytest.raises(FlatminimaError, match=r"\['names'\] is no tensor.*choose passes='one-by-one'"):
        take({"x": X, "names": list("abcdef")}, groups)


def test_tensors_that_disagree_about_their_samples_are_named() -> None:
    with pytest.raises(FlatminimaError, match=r"\['b'\]\[0\] has 3"):
        batch_size({"a": X, "b": [torch.zeros(3)], "rate": torch.tensor(1.0)})
    with pytest.raises(FlatminimaError, match="found none"):
        batch_size({"rate": torch.tensor(1.0), "note": "x"})


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided], ids=str)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_refused_in_one_line(layout: torch.layout) -> None:
    nested = torch.nested.nested_tensor([torch.ones(2, 4), torch.ones(3, 4)], layout=layout)
    for use in (batch_size, lambda batch: take(batch, slice(0, 1)), lambda batch: take(batch, torch.tensor([1]))):
        with pytest.raises(FlatminimaError, match="pad them to one length"):
            use({"x": nested, "y": torch.arange(2)})
