"""Data sets of the ``datasets`` library: of the hub by name, saved on disk, or files that it reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flatminima.errors import FlatminimaError, did_you_mean, require
from flatminima.lab.data.decoding import root_cause
from flatminima.lab.data.labels import classes_of, labels_of
from flatminima.lab.data.own.registry import Opened, source_kind
from flatminima.lab.data.pictures import Pictures
from flatminima.lab.data.sources import bars_like_ours
from flatminima.lab.data.texts import Texts
from flatminima.lab.errors import NoPartsError
from flatminima.lab.reading import Reading
from flatminima.network import index_batches

PREFIX = "hf:"
_READERS = {".csv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".txt": "text"}
"""Files that it reads, with or without the prefix, and by what."""
_AT_ONCE = 10_000  # rows whose texts are looked at
_SAVED = ("dataset_dict.json", "state.json")
"""What ``save_to_disk`` writes."""
_IMAGES = ("img", "image", "pixel_values", "picture")
_TEXTS = ("text", "sentence", "content", "document", "review")
_PAIRS = (("sentence1", "sentence2"), ("premise", "hypothesis"), ("question", "sentence"), ("question1", "question2"))
_LABELS = ("label", "labels", "fine_label", "target", "class", "y")
"""Columns as people call them: where several are of the right type, the first of these is taken, and said."""


def is_saved(folder: Path) -> bool:
    """Whether ``save_to_disk`` wrote it."""
    return any((folder / name).is_file() for name in _SAVED)


def _recognizes(source: str) -> bool:
    path = Path(source).expanduser()
    return source.startswith(PREFIX) or path.suffix in _READERS or is_saved(path)


@source_kind(
    f"{PREFIX}NAME of the Hugging Face hub (NAME:CONFIG where it has several), {PREFIX}FOLDER saved by save_to_disk, a "
    f"file ({', '.join(_READERS)})",
    _recognizes,
)
def open_hugging_face(source: str, reading: Reading) -> Opened:
    """A column of images, or one or two of texts; and one of labels, which texts may do without.

    Raises:
        FlatminimaError: It cannot be loaded, a split or column is missing or of another type, or a label is no class.
    """
    loaded = _load(source.removeprefix(PREFIX), source)
    if reading.split != "train" and not (isinstance(loaded, dict) and Path(source).suffix not in _READERS):
        raise NoPartsError(f"{source} is a single data set without splits: leave split out")
    rows, where = (
        (_split(loaded, source, reading), f"{source}, split {reading.split}")
        if isinstance(loaded, dict)
        else (loaded, source)
    )
    require(len(rows) > 0, f"{where} is empty: name another split")
    inputs = _input_columns(rows, reading, where)
    said = f"{where}: {len(rows)} {{}} from column {' and '.join(map(repr, inputs))}, {{}}"
    if _is_image(rows.features[inputs[0]]):
        labels, classes, about = _labels(rows, reading, where)
        pictures = Pictures.of(_Rows(rows, inputs[0], where), labels, classes, reading)
        return Opened(pictures, said.format("images", about), _names(rows, reading, where))
    columns = rows.select_columns(list(inputs))

    def texts(places: Sequence[int]) -> tuple[list[str], ...]:
        found = columns[list(places)]
        return tuple(found[name] for name in inputs)

    places = _with_text(texts, len(rows))
    require(
        len(places) > 0, f"{where}: every row of {' and '.join(inputs)} is blank: name another column (input_column)"
    )
    if len(places) < len(rows):
        said += f"; {len(rows) - len(places)} rows without text are left out"
    try:
        labels, classes, about = _labels(rows, reading, where)
    except FlatminimaError as error:
        if reading.label_column is not None:
            raise
        return Opened(Texts(where, texts, places, None, None, str(error)), said.format("texts", "no labels"))
    of_texts = Texts(where, texts, places, labels[places], classes)
    return Opened(of_texts, said.format("texts", about), _names(rows, reading, where))


def _with_text(texts: Callable[[Sequence[int]], tuple[list[str], ...]], count: int) -> Tensor:
    """The places of rows that have some in every column."""
    kept: list[int] = []
    for some in index_batches(count, _AT_ONCE):
        cells = zip(*texts(some), strict=True)
        kept += [place for place, row in zip(some, cells, strict=True) if all(text and text.strip() for text in row)]
    return torch.tensor(kept, dtype=torch.long)


def _labels(rows: Any, reading: Reading, where: str) -> tuple[Tensor, int, str]:
    """The labels, the number of classes, and where they are from."""
    name = _label_column(rows, reading, where)
    if name is None:
        raise FlatminimaError(
            f"{where}: no column of labels among {', '.join(rows.column_names)}: name it (label_column)"
        )
    values = rows.select_columns(name).with_format("arrow")[:].column(name).to_numpy()  # empty rows make it floats
    labels = labels_of(np.asarray(values), f"{where}: labels in column {name!r}")
    classes = classes_of(labels, getattr(rows.features[name], "num_classes", None), where)
    return labels, classes, f"labels from {name!r} ({classes} classes)"


def _names(rows: Any, reading: Reading, where: str) -> tuple[str, ...]:
    """Of the classes, where the labels declare them."""
    return tuple(getattr(rows.features[_label_column(rows, reading, where)], "names", None) or ())


def _load(name: str, source: str) -> Any:
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise FlatminimaError(f"{source} needs the package datasets: pip install datasets") from error
    path = Path(name).expanduser()
    try:
        with bars_like_ours():
            if is_saved(path):
                return datasets.load_from_disk(str(path))
            if path.suffix in _READERS:
                require(path.is_file(), f"there is no file {name}")
                return datasets.load_dataset(_READERS[path.suffix], data_files={"train": str(path)})
            if path.exists():
                return datasets.load_dataset(str(path))
            repository, _, config = name.partition(":")
            return datasets.load_dataset(repository, config or None)
    except FlatminimaError:
        raise
    # What an unreachable hub or a damaged file raises depends on the versions of three packages below this call.
    except Exception as error:
        hint = "" if path.exists() else "; there is no such folder either: connect to the network once, or correct it"
        raise FlatminimaError(f"{source}: datasets cannot load it ({root_cause(error)}){hint}") from error


def _split(loaded: dict[str, Any], source: str, reading: Reading) -> Any:
    if reading.split not in loaded:
        raise FlatminimaError(
            f"{source} has no split {reading.split!r}, only {', '.join(map(str, loaded))}: name the one that was "
            "trained on (split)"
        )
    return loaded[reading.split]


def _input_columns(rows: Any, reading: Reading, where: str) -> tuple[str, ...]:
    """Of images one, of texts one or two."""
    for name in reading.input_column:
        _require_column(rows, name, "input_column", where)
        feature = rows.features[name]
        if not (_is_image(feature) or _is_text(feature)):
            raise FlatminimaError(
                f"{where}: column {name!r} holds {_kind(feature)}, neither images nor texts: name another "
                "(input_column), or pass the data as package.module:factory"
            )
    if reading.input_column:
        return reading.input_column
    images = [name for name in rows.column_names if _is_image(rows.features[name])]
    texts = [name for name in rows.column_names if _is_text(rows.features[name])]
    pair = next((pair for pair in _PAIRS if set(pair) <= set(texts)), None)
    for found, known in ((images, _IMAGES), (texts, _TEXTS)):
        best = next((name for name in known if name in found), found[0] if len(found) == 1 else None)
        if best is not None:
            return (best,)
        if found is texts and pair is not None:
            return pair
        if found:
            raise FlatminimaError(
                f"{where}: any of the columns {', '.join(found)} may be the network's input: name it (input_column)"
            )
    described = ", ".join(f"{name} ({_kind(rows.features[name])})" for name in rows.column_names)
    raise FlatminimaError(
        f"{where}: no column of images or texts, only {described}: store images as the Image feature, or pass the data "
        "as package.module:factory"
    )


def _label_column(rows: Any, reading: Reading, where: str) -> str | None:
    if reading.label_column is not None:
        _require_column(rows, reading.label_column, "label_column", where)
        return reading.label_column
    declared = [name for name in rows.column_names if hasattr(rows.features[name], "num_classes")]
    for found in (declared, rows.column_names):
        best = next((name for name in _LABELS if name in found), None)
        if best is not None:
            return best
    return declared[0] if len(declared) == 1 else None


def _require_column(rows: Any, name: str, option: str, where: str) -> None:
    if name not in rows.column_names:
        raise FlatminimaError(
            f"{where}: no column {name!r}{did_you_mean(name, rows.column_names)} among "
            f"{', '.join(rows.column_names)} ({option})"
        )


def _is_image(feature: Any) -> bool:
    return type(feature).__name__ == "Image"


def _is_text(feature: Any) -> bool:
    return getattr(feature, "dtype", None) in ("string", "large_string")


def _kind(feature: Any) -> str:
    return str(getattr(feature, "dtype", None) or type(feature).__name__)


@dataclass(frozen=True)
class _Rows:
    rows: Any
    column: str
    where: str

    def __len__(self) -> int:
        return len(self.rows)

    def encoded(self, indices: Sequence[int]) -> list[bytes | Path]:
        import datasets

        column = self.rows.select_columns(self.column).cast_column(self.column, datasets.Image(decode=False))
        cells = column[list(indices)][self.column]
        return [cell["bytes"] or Path(cell["path"] or "") if cell else b"" for cell in cells]

    def name(self, index: int) -> str:
        return f"image {index}"
