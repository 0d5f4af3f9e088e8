"""Which tensor of a checkpoint is which of the model's, whatever wrappers have made of its name."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from flatminima.errors import FlatminimaError

_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Parts that torch's own wrappers put into names; no user's module is called like that."""
_OWNERS = ("module", "model", "net", "network")
"""What trainers call the network among other things that have tensors: losses, metrics, averages."""
_COUNTER = "num_batches_tracked"
"""BatchNorm's; older programs do not write it, and nothing is computed from it with a fixed momentum."""
_NAMED = 3  # names that a message lists before it counts the rest


@dataclass(frozen=True)
class _Match:
    """One way to see the model's tensors in a file."""

    names: Mapping[str, str]
    """The file's name by the model's."""
    prefix: str
    """Before all of them."""
    dropped: Collection[str]
    """Parts that were left out within them."""


def matched(
    expected: Mapping[str, Tensor], found: Mapping[str, Tensor], path: Path, *, exactly: bool = False
) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of a file by the model's names, and remarks on what was taken off, left out or is missing.

    Args:
        expected: The model's.
        found: The file's.
        path: The file, which an error names.
        exactly: Take no name for another, and miss none.

    Raises:
        FlatminimaError: They are not the model's by name or shape, or are there several times.
    """
    needed = [{name} for name in expected] if exactly else _needed(expected)
    remarks: list[str] = []
    if not exactly and not (found.keys() <= expected.keys() and _has_all(needed, found)):
        found, remarks = _renamed(expected, needed, found, path)
    _check_fit(expected, needed, found, path)
    missing = sorted(name for name in expected.keys() - found.keys() if _is_counter(name))
    remarks += [f"{_listed(missing)} are not in it and stay as they are"] if missing else []
    return {name: found.get(name, tensor) for name, tensor in expected.items()}, remarks


def _needed(expected: Mapping[str, Tensor]) -> list[set[str]]:
    """What a file must have: of names for the same memory (tied weights) one, of BatchNorm's counters none."""
    needed: dict[object, set[str]] = {}
    for name, tensor in expected.items():
        has_memory = tensor.numel() > 0 and tensor.layout == torch.strided and not tensor.is_meta
        place = (tensor.data_ptr(), tensor.shape, tensor.stride()) if has_memory else name
        if not _is_counter(name):
            needed.setdefault(place, set()).add(name)
    return list(needed.values())


def _has_all(needed: Sequence[set[str]], names: Collection[str]) -> bool:
    return all(any(name in names for name in alternatives) for alternatives in needed)


def _renamed(
    expected: Mapping[str, Tensor], needed: Sequence[set[str]], found: Mapping[str, Tensor], path: Path
) -> tuple[Mapping[str, Tensor], list[str]]:
    """The tensors by the names that the model would give them, where there is one way to see them as its own."""
    ways = list(_ways(expected, needed, found))
    if len(ways) > 1:
        under = " and ".join(repr(way.prefix) for way in ways)
        raise FlatminimaError(f"{path} has the names of this model several times, under {under}: keep one of them")
    if not ways:
        return found, []
    (way,) = ways
    remarks = [f"{part!r} was taken off the names" for part in (way.prefix, *way.dropped) if part]
    left = sorted(found.keys() - set(way.names.values()))
    remarks += [f"{_listed(left)} were left out"] if left else []
    return {ours: found[theirs] for ours, theirs in way.names.items()}, remarks


def _ways(expected: Collection[str], needed: Sequence[set[str]], found: Collection[str]) -> Iterator[_Match]:
    """What can stand before the names, by the fewest parts left out within them."""
    for dropped in ((), _WRAPPERS, (*_WRAPPERS, "module")):
        ours = {_without(name, dropped): name for name in expected}
        theirs = {_without(name, dropped): name for name in found}
        if not needed or len(ours) < len(expected) or len(theirs) < len(found):  # two names became one
            continue
        some = [_without(name, dropped) for name in needed[0]]
        prefixes = {name.removesuffix(own) for own in some for name in theirs if f".{name}".endswith(f".{own}")}
        there = False
        for prefix in sorted(prefixes):
            under = {name.removeprefix(prefix): full for name, full in theirs.items() if name.startswith(prefix)}
            names = {ours[name]: full for name, full in under.items() if name in ours}
            is_the_networks = len(under) == len(found) or prefix.rstrip(".").rpartition(".")[2] in _OWNERS
            if is_the_networks and len(names) == len(under) and _has_all(needed, names):
                there = True
                yield _Match(names, prefix, [part for part in dropped if any(part in n.split(".") for n in found)])
        if there:
            return


def _without(name: str, dropped: Collection[str]) -> str:
    return ".".join(part for part in name.split(".") if part not in dropped)


def _is_counter(name: str) -> bool:
    return name.rpartition(".")[2] == _COUNTER


def _check_fit(
    expected: Mapping[str, Tensor], needed: Sequence[set[str]], found: Mapping[str, Tensor], path: Path
) -> None:
    unexpected = sorted(found.keys() - expected.keys())
    missing = [] if _has_all(needed, found) else sorted(expected.keys() - found.keys())
    if missing or unexpected:
        raise FlatminimaError(
            f"{path} is not of this model: missing {_listed(missing)}; unexpected {_listed(unexpected)}; "
            "build the model it was saved from"
        )
    for name, tensor in expected.items():
        if name in found and found[name].shape != tensor.shape:
            raise FlatminimaError(
                f"{path} is not of this model: {name} is {tuple(found[name].shape)} in the file and "
                f"{tuple(tensor.shape)} in the model; is its number of classes or its width another?"
            )


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_NAMED]) or "nothing"
    return shown + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
