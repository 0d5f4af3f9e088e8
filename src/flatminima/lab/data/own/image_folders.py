"""A folder of images, one folder for each class, as torchvision's ImageFolder has it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from flatminima.errors import FlatminimaError, require
from flatminima.lab.data.own.hugging_face import is_saved
from flatminima.lab.data.own.registry import Opened, source_kind
from flatminima.lab.data.pictures import Pictures
from flatminima.lab.errors import NoPartsError
from flatminima.lab.reading import Reading

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
_SPLITS = ("train", "training", "val", "valid", "validation", "test", "testing")
"""Folders of these names alone are parts of a data set, not its classes."""
_LISTED = 5  # class names that are said before the rest is counted


def _recognizes(source: str) -> bool:
    folder = _folder(source)
    return folder.is_dir() and not is_saved(folder)


@source_kind("a folder of class folders with PNG, JPEG and the like", _recognizes)
def open_image_folder(source: str, reading: Reading) -> Opened:
    """The images below each class folder, however deep; classes are numbered in the order of their names.

    Raises:
        FlatminimaError: There are no class folders, or one has no images.
    """
    folder = _folder(source)
    classes = _subfolders(folder)
    note = ""
    if classes and {each.name.lower() for each in classes} <= set(_SPLITS):
        parts = {each.name: each for each in classes}
        if reading.split not in parts:
            raise FlatminimaError(
                f"{source} has the parts {', '.join(parts)}, none called {reading.split!r}: name the one that was "
                "trained on (split)"
            )
        folder, note = parts[reading.split], f", part {reading.split}"
        classes = _subfolders(folder)
    else:
        if reading.split != "train":
            raise NoPartsError(f"{source} has no parts, such as train and val: leave split out")
    columns = [*reading.input_column, *([] if reading.label_column is None else [reading.label_column])]
    require(not columns, f"{source} has no columns {', '.join(columns)}: folders are the labels; leave them out")
    where = source + note
    loose = len(classes) == 0 and any(_is_image(path) for path in folder.iterdir())
    hint = "its images lie in it directly: put those of each class into a folder of its own" if loose else _WANTED
    require(len(classes) > 0, f"{where} has no class folders: {hint}")
    files, labels = [], []
    for number, each in enumerate(classes):
        found = sorted(path for path in _walked(each) if _is_image(path))
        if not found:
            raise FlatminimaError(
                f"{where}: class folder {each.name} has no images ({', '.join(_SUFFIXES)}): remove it, or fill it"
            )
        files += found
        labels += [number] * len(found)
    pictures = Pictures.of(_Files(folder, files, where), torch.tensor(labels), len(classes), reading)
    names = ", ".join(each.name for each in classes[:_LISTED]) + (", …" if len(classes) > _LISTED else "")
    kind = "grey" if pictures.channels == 1 else "RGB"
    return Opened(
        pictures,
        f"{where}: {len(files)} {kind} images from the class folders as labels, {len(classes)} classes, numbered in "
        f"this order: {names}",
        tuple(each.name for each in classes),
    )


_WANTED = "it must hold a folder for each class with its images, or train-*.parquet and test-*.parquet"


@dataclass(frozen=True)
class _Files:
    folder: Path
    files: list[Path]
    where: str

    def __len__(self) -> int:
        return len(self.files)

    def encoded(self, indices: Sequence[int]) -> list[Path]:
        return [self.files[i] for i in indices]

    def name(self, index: int) -> str:
        return str(self.files[index].relative_to(self.folder))


def _folder(source: str) -> Path:
    return Path(source).expanduser()


def _subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _walked(folder: Path) -> Iterator[Path]:
    for path in folder.iterdir():
        if path.is_dir():
            yield from _walked(path)
        else:
            yield path


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in _SUFFIXES and not path.name.startswith(".")
