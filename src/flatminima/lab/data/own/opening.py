"""Any source of data, by its name: what it is, is told by the name and by what lies there."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import torch

from flatminima.errors import FlatminimaError, did_you_mean, require
from flatminima.lab.data.cache import SPLITS
from flatminima.lab.data.images import ImageSet
from flatminima.lab.data.own.hugging_face import open_hugging_face
from flatminima.lab.data.own.registry import KINDS, Opened, source_kind
from flatminima.lab.data.pictures import Pictures, as_pictures
from flatminima.lab.data.ready import OwnData
from flatminima.lab.data.sources import LOADERS, load_data
from flatminima.lab.data.texts import Texts
from flatminima.lab.errors import NoPartsError
from flatminima.lab.reading import Reading

_DRAWING_SEED = -2  # no run's, and not that of images held out


@source_kind("", lambda source: source in LOADERS or any(Path(source).expanduser().glob("train-*.parquet")))
def open_known(source: str, reading: Reading) -> Opened:
    """A data set by its name, or a folder of parquet files, as runs are trained on them."""
    if reading.input_column or reading.label_column or reading.split not in SPLITS:
        if source in LOADERS:
            raise FlatminimaError(
                f"{source} has its own columns, and the parts {' and '.join(SPLITS)}: leave columns and split out"
            )
        return open_hugging_face(source, reading)
    return Opened(load_data(source)[SPLITS.index(reading.split)])


def open_data(source: str, reading: Reading | None = None) -> Opened:
    """The training data that a network is measured on, from wherever they are.

    Args:
        source: ``digits``, ``cifar10``, ``cifar100`` or a folder of parquet files, as for :func:`load_data`;
            ``hf:NAME`` or ``hf:FOLDER`` for the ``datasets`` library; a file of texts (``.csv``, ``.jsonl``, ...); a
            folder of class folders with images; a file of arrays (``.npz``, ``.safetensors``); or
            ``package.module:factory`` for a data set or loader of one's own.
        reading: Which columns, and how images are prepared.

    Raises:
        FlatminimaError: There is no such source, or whatever is wrong with it, naming the column, file or row.
    """
    reading = reading or Reading()
    require(source != "", "the name of the data is empty")
    kind = next((kind for kind in reversed(KINDS) if kind.recognizes(source)), None)
    if kind is None:
        known = "; ".join(kind.described for kind in KINDS if kind.described)
        if Path(source).is_file():
            raise FlatminimaError(f"{source}: its name does not say what is in the file; give a folder, or {known}")
        hint = did_you_mean(source, [*LOADERS, *_beside(source)])
        raise FlatminimaError(
            f"no data {source!r}{hint}: it is neither {', '.join(LOADERS)} nor an existing "
            f"folder or file; give one of those, or {known}"
        )
    opened = kind.open(source, reading)
    data = _with_options(opened.data, source, reading)
    return dataclasses.replace(opened, data=_drawn(data, source, reading.train_size))


def open_test_data(source: str, reading: Reading, split: str | None = None, *, classes: tuple[str, ...] = ()) -> Opened:
    """Data to test a network on, read as its training data are, all of them.

    Args:
        source: As for :func:`open_data`.
        reading: Of the training data; its ``split`` and ``train_size`` are not looked at.
        split: The part (None: ``test`` where there are parts, else all).
        classes: Names of the training data's, in their order, where they have names.

    Raises:
        FlatminimaError: As :func:`open_data` does, or these have other classes, or theirs in another order: the numbers
            would mean others.
    """
    whole = dataclasses.replace(reading, train_size=None, split="train")
    try:
        opened = open_data(source, dataclasses.replace(whole, split=split or "test"))
    except NoPartsError:
        if split is not None:
            raise
        opened = open_data(source, whole)
    if classes and opened.classes:
        for number, (trained, tested) in enumerate(itertools.zip_longest(classes, opened.classes)):
            require(
                trained == tested,
                f"test data {source}: class {number} is {tested or 'missing'}, in the training data "
                f"{trained or 'missing'}: give test data of the same classes, in the same order",
            )
    return opened


def _beside(source: str) -> list[str]:
    """What lies where a path says that it does."""
    folder = Path(source).expanduser().parent
    try:
        return [str(folder / path.name) for path in folder.iterdir()]
    except OSError:
        return []


def _with_options(data: OwnData, source: str, reading: Reading) -> OwnData:
    if isinstance(data, ImageSet) and (reading.size or reading.crop or reading.in_channels):
        return as_pictures(data, source, reading)
    if not isinstance(data, (ImageSet, Pictures)):
        given = [name for name in ("normalize", "resize", "crop", "in_channels") if getattr(reading, name) is not None]
        if given:
            raise FlatminimaError(
                f"{', '.join(given)}: only images of 8 bits are prepared here, and {source} gives "
                f"{'texts' if isinstance(data, Texts) else 'a network its inputs as they are'}: leave that out"
            )
    require(
        reading.max_length is None or isinstance(data, Texts),
        f"max_length is for texts: {source} has none; leave it out",
    )
    return data


def _drawn(data: OwnData, source: str, count: int | None) -> OwnData:
    """So many samples, the same for all networks that are measured on them."""
    if count is None:
        return data
    require(count <= len(data), f"train_size={count}, but {source} has {len(data)} samples: ask for at most these")
    drawn = torch.randperm(len(data), generator=torch.Generator().manual_seed(_DRAWING_SEED))[:count]
    return data.subset(drawn.sort().values)
