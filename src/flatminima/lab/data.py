"""Image data as uint8 tensors: the digits, CIFAR-10 and CIFAR-100; augmentation; confusion sets (Jia & Su, Sec. 7.1).

A data set is decoded once and kept in a cache (``$FLATMINIMA_CACHE``, else ``flatminima`` in the user's cache folder).
After that it is two tensors, small enough to live on the training device: batches are slices, augmentation is tensor
code, and normalization happens last.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import os
import tempfile
import uuid
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from torch.utils.data import Dataset

from flatminima.errors import FlatminimaError

__all__ = ["AUGMENTATIONS", "ImageSet", "augment", "confuse", "default_cache_dir", "hold_out", "load_data"]

_HUB_NAMES = {"cifar10": "uoft-cs/cifar10", "cifar100": "uoft-cs/cifar100"}
_IMAGE_COLUMNS = ("img", "image")
_LABEL_COLUMNS = ("label", "fine_label", "labels")
_SPLITS = ("train", "test")
_CACHED = tuple(f"{split}_{kind}" for split in _SPLITS for kind in ("images", "labels"))

# Part of every cache key: raise it when the cached tensors change their meaning, and old files are left alone.
_CACHE_VERSION = "1"


# ---------------------------------------------------------------------------------------------------------------------
# The data set
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, repr=False)
class ImageSet(Dataset[tuple[Tensor, Tensor]]):
    """Labelled images, held as uint8 and handed out normalized.

    Attributes:
        images: ``(N, C, H, W)`` uint8.
        labels: ``(N,)`` int64, each in ``0..num_classes-1``.
        num_classes: Number of classes.
        mean: ``(C,)`` float32, mean of each channel over the whole training split, in units where white is 1.
        std: ``(C,)`` float32, standard deviation of each channel, likewise.

    Raises:
        FlatminimaError: A tensor has the wrong type or shape, a label is out of range, or a channel never varies.
    """

    images: Tensor
    labels: Tensor
    num_classes: int
    mean: Tensor
    std: Tensor

    def __post_init__(self) -> None:
        _check_images(self.images)
        count, channels = self.images.shape[:2]
        if self.labels.dtype != torch.int64 or self.labels.shape != (count,):
            raise FlatminimaError(
                f"labels must be int64 of shape ({count},), one for each image; "
                f"got {self.labels.dtype} of shape {tuple(self.labels.shape)}"
            )
        if self.mean.shape != (channels,) or self.std.shape != (channels,):
            raise FlatminimaError(
                f"mean and std need one value for each of {channels} channels, "
                f"got shapes {tuple(self.mean.shape)} and {tuple(self.std.shape)}"
            )
        if not bool((self.std > 0).all()):
            raise FlatminimaError(
                f"a channel has the same value in every training pixel (std {self.std.tolist()}) and cannot be "
                "normalized; drop that channel"
            )
        _check_labels(self.labels, self.num_classes)

    def __repr__(self) -> str:
        shape = "×".join(map(str, self.images.shape[1:]))
        return f"ImageSet({len(self)} images {shape}, {self.num_classes} classes, on {self.images.device})"

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """The normalized image ``(C, H, W)`` and its label, a scalar tensor."""
        return self.normalize(self.images[index]), self.labels[index]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """What ``[self[i] for i in indices]`` gives, normalized in one go; a ``DataLoader`` asks for it."""
        images, labels = self.subset(indices).tensors()
        return list(zip(images, labels, strict=True))

    def fetch(self, indices: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
        """The images at ``indices`` as one batch: (B, C, H, W) normalized float32, and (B,) labels."""
        chosen = torch.as_tensor(indices, device=self.labels.device)
        return self.normalize(self.images[chosen]), self.labels[chosen]

    def normalize(self, images: Tensor) -> Tensor:
        """Images ``(..., C, H, W)`` uint8 to float32, each channel with the training split's mean 0 and std 1."""
        return (images.to(torch.float32) / 255 - self.mean[:, None, None]) / self.std[:, None, None]

    def tensors(self) -> tuple[Tensor, Tensor]:
        """All images, normalized ``(N, C, H, W)`` float32, and all labels ``(N,)``."""
        return self.normalize(self.images), self.labels

    def subset(self, indices: Sequence[int] | Tensor) -> ImageSet:
        """The images at ``indices``, in that order, with the same normalization."""
        # An empty list would become a float tensor, which does not index.
        index = torch.as_tensor(indices, device=self.labels.device) if len(indices) else slice(0)
        return dataclasses.replace(self, images=self.images[index], labels=self.labels[index])

    def to(self, device: torch.device | str) -> ImageSet:
        """The same data on ``device``."""
        return dataclasses.replace(
            self,
            images=self.images.to(device),
            labels=self.labels.to(device),
            mean=self.mean.to(device),
            std=self.std.to(device),
        )


def _check_images(images: Tensor) -> None:
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise FlatminimaError(
            f"images must be uint8 of shape (N, C, H, W), got {images.dtype} of shape {tuple(images.shape)}"
        )


def _check_labels(labels: Tensor, num_classes: int, where: str = "") -> None:
    bad = ((labels < 0) | (labels >= num_classes)).nonzero().flatten()
    if len(bad):
        row = int(bad[0])
        raise FlatminimaError(
            f"{where}label {int(labels[row])} in row {row} is outside 0..{num_classes - 1} ({len(bad)} such rows); "
            "correct or drop them"
        )


# ---------------------------------------------------------------------------------------------------------------------
# Loading
# ---------------------------------------------------------------------------------------------------------------------


def load_data(source: str, *, cache_dir: Path | None = None) -> tuple[ImageSet, ImageSet]:
    """Training and test set.

    Args:
        source: ``"digits"`` (scikit-learn's 1,797 images of 8×8, no download; 1,297 to train on, 500 to test, the
            same ones always, each class in proportion), ``"cifar10"`` or ``"cifar100"`` (from the Hugging Face hub), or
            a folder with ``train-*.parquet`` and ``test-*.parquet`` that hold an ``img`` or ``image`` column of encoded
            images and a ``label``, ``fine_label`` or ``labels`` column of integers. A folder that is called like a
            data set is written ``./cifar10``.
        cache_dir: Where decoded data sets are kept; :func:`default_cache_dir` if not given. The cache of a folder is
            good as long as its files keep their names, sizes and modification times.

    Raises:
        FlatminimaError: No such data set or folder, a split or column is missing, the hub cannot be reached, an image
            cannot be decoded or differs in shape, a label is out of range, or the cache cannot be written.
    """
    if source == "digits":
        return _digits()
    key, read = _locate(source)
    cache_file = (cache_dir or default_cache_dir()) / f"{key}.safetensors"
    decoded = _read_cache(cache_file)
    if decoded is None:
        decoded = _decode(read(), source)
        _write_cache(cache_file, decoded)
    return _image_sets(decoded)


def default_cache_dir() -> Path:
    """``$FLATMINIMA_CACHE``, else ``flatminima`` below ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    if own := os.environ.get("FLATMINIMA_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flatminima"


@dataclass(frozen=True)
class _Decoded:
    """Both splits as tensors: what the cache holds."""

    tensors: dict[str, Tensor]  # named by _CACHED
    num_classes: int


def _image_sets(decoded: _Decoded) -> tuple[ImageSet, ImageSet]:
    mean, std = _channel_statistics(decoded.tensors["train_images"])
    train, test = (
        ImageSet(
            images=decoded.tensors[f"{split}_images"],
            labels=decoded.tensors[f"{split}_labels"],
            num_classes=decoded.num_classes,
            mean=mean,
            std=std,
        )
        for split in _SPLITS
    )
    return train, test


def _channel_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and (population) standard deviation of each channel, from exact counts of the 256 values."""
    counts = torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in images.unbind(1)])
    weights = counts.double() / counts.sum(1, keepdim=True)
    values = torch.arange(256, dtype=torch.float64) / 255
    mean = weights @ values
    variance = (weights * (values - mean[:, None]) ** 2).sum(1)
    return mean.float(), variance.sqrt().float()


def _digits() -> tuple[ImageSet, ImageSet]:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = torch.from_numpy(np.rint(digits.images * (255 / 16)).astype(np.uint8))[:, None]
    labels = torch.from_numpy(digits.target.astype(np.int64))
    train, test = train_test_split(np.arange(len(labels)), test_size=500, stratify=digits.target, random_state=0)
    return _image_sets(
        _Decoded(
            {
                "train_images": images[train],
                "train_labels": labels[train],
                "test_images": images[test],
                "test_labels": labels[test],
            },
            num_classes=10,
        )
    )


def _locate(source: str) -> tuple[str, Callable[[], Any]]:
    """A cache key for ``source``, and a function that reads it as a ``datasets.DatasetDict``."""
    if source in _HUB_NAMES:
        return f"{source}-hub-v{_CACHE_VERSION}", lambda: _read_hub(source)
    folder = Path(source).expanduser()
    if not folder.is_dir():
        raise FlatminimaError(
            f"no data set {source!r}: it is neither digits, {', '.join(_HUB_NAMES)} nor an existing folder "
            "with train-*.parquet and test-*.parquet"
        )
    files = {split: sorted(folder.resolve().glob(f"{split}-*.parquet")) for split in _SPLITS}
    for split, found in files.items():
        if not found:
            raise FlatminimaError(f"{source} holds no {split}-*.parquet; both a train and a test split are needed")
    return f"{folder.resolve().name}-{_fingerprint(files)}", lambda: _read_parquet(files, source)


def _fingerprint(files: dict[str, list[Path]]) -> str:
    digest = hashlib.sha256(_CACHE_VERSION.encode())
    for path in (path for found in files.values() for path in found):
        stat = path.stat()
        digest.update(f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
    return digest.hexdigest()[:16]


def _read_hub(name: str) -> Any:
    import datasets

    try:
        return datasets.load_dataset(_HUB_NAMES[name])
    # What an unreachable hub raises depends on the versions of three packages below this call.
    except Exception as error:
        raise FlatminimaError(
            f"cannot load {name} from the Hugging Face hub ({_root_cause(error)}); connect to the network once, "
            "or give a folder of parquet files instead"
        ) from error


def _read_parquet(files: dict[str, list[Path]], source: str) -> Any:
    import datasets

    # The Arrow copy that `datasets` makes is needed until the images are decoded, and no longer: they are read into
    # memory so that it can go.
    with tempfile.TemporaryDirectory() as arrow:
        try:
            return datasets.load_dataset(
                "parquet",
                data_files={split: [str(path) for path in found] for split, found in files.items()},
                cache_dir=arrow,
                keep_in_memory=True,
            )
        # pyarrow and datasets each have their own families of errors for a damaged file.
        except Exception as error:
            raise FlatminimaError(f"cannot read the parquet files of {source} ({_root_cause(error)})") from error


def _root_cause(error: BaseException) -> str:
    """What went wrong first, in one line: `datasets` wraps it in general statements."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    return (str(cause).strip() or type(cause).__name__).splitlines()[0]


# ---------------------------------------------------------------------------------------------------------------------
# Decoding
# ---------------------------------------------------------------------------------------------------------------------


def _decode(splits: Any, source: str) -> _Decoded:
    """Both splits of a ``datasets.DatasetDict``, checked."""
    for split in _SPLITS:
        if split not in splits:
            raise FlatminimaError(f"{source} has no {split} split, only {', '.join(splits)}; both are needed")
    tensors: dict[str, Tensor] = {}
    for split in _SPLITS:
        tensors[f"{split}_labels"] = _decode_labels(splits[split], f"{source}, {split} split")
    num_classes = _num_classes(splits["train"], tensors["train_labels"])
    for split in _SPLITS:
        _check_labels(tensors[f"{split}_labels"], num_classes, f"{source}, {split} split: ")
        tensors[f"{split}_images"] = _decode_images(splits[split], f"{source}, {split} split")
    shapes = [tuple(tensors[f"{split}_images"].shape[1:]) for split in _SPLITS]
    if shapes[0] != shapes[1]:
        raise FlatminimaError(
            f"{source}: training images have shape {shapes[0]}, test images {shapes[1]}; bring them to one shape"
        )
    return _Decoded(tensors, num_classes)


def _find_column(rows: Any, names: tuple[str, ...], where: str) -> str:
    for name in names:
        if name in rows.column_names:
            return name
    raise FlatminimaError(
        f"{where}: no column {' or '.join(names)} among {', '.join(rows.column_names)}; rename the one that is meant"
    )


def _decode_labels(rows: Any, where: str) -> Tensor:
    """The labels of a split, ``(N,)`` int64, not yet checked for their range."""
    name = _find_column(rows, _LABEL_COLUMNS, where)
    column = rows.select_columns(name).with_format("arrow")[:].column(name)
    values = column.to_numpy()  # empty rows turn integers into floats
    if not np.issubdtype(values.dtype, np.integer):
        raise FlatminimaError(
            f"{where}: column {name} must hold an integer in every row; it has type {column.type} "
            f"and {column.null_count} empty rows"
        )
    return torch.from_numpy(values.astype(np.int64))


def _num_classes(rows: Any, labels: Tensor) -> int:
    """What the label column declares (``datasets.ClassLabel``), else one more than the highest training label."""
    feature = rows.features[_find_column(rows, _LABEL_COLUMNS, "train split")]
    return int(getattr(feature, "num_classes", labels.max() + 1))


def _decode_images(rows: Any, where: str) -> Tensor:
    """The images of a split, ``(N, C, H, W)`` uint8."""
    from PIL import Image, UnidentifiedImageError

    Image.init()
    formats = list(Image.ID)
    images: list[np.ndarray[Any, np.dtype[np.uint8]]] = []
    for i, encoded in enumerate(_encoded_images(rows, where)):
        try:
            image = Image.open(io.BytesIO(encoded), formats=formats)
            pixels = np.atleast_3d(np.asarray(image))
        # Pillow raises OSError, SyntaxError, ValueError and more, by format.
        except Exception as error:
            reason = "no known format" if isinstance(error, UnidentifiedImageError) else _root_cause(error)
            raise FlatminimaError(f"{where}: cannot decode image {i} ({reason}); replace or drop it") from error
        if image.mode not in ("L", "RGB"):
            raise FlatminimaError(f"{where}: image {i} has mode {image.mode}; convert all images to RGB or L (grey)")
        if not images:
            # Pillow tries its formats in this order: with the right one first, decoding takes two thirds of the time.
            formats = [str(image.format), *(known for known in formats if known != image.format)]
        elif pixels.shape != images[0].shape:
            raise FlatminimaError(
                f"{where}: image {i} has (height, width, channels) {pixels.shape}, the first one {images[0].shape}; "
                "bring them to one shape"
            )
        images.append(pixels)
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


def _encoded_images(rows: Any, where: str) -> Iterator[bytes]:
    """Each image's file, empty where there is none, behind a progress bar."""
    import datasets

    name = _find_column(rows, _IMAGE_COLUMNS, where)
    try:
        encoded = rows.select_columns(name).cast_column(name, datasets.Image(decode=False)).with_format("arrow")
    except (TypeError, ValueError, NotImplementedError) as error:  # pyarrow's errors for a wrong type derive from these
        raise FlatminimaError(
            f"{where}: column {name} does not hold encoded images ({_root_cause(error)}); "
            "store them as the datasets library's Image feature does"
        ) from error
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(f"decoding {where}", total=len(rows))
        for batch in encoded.iter(batch_size=1000):
            for cell in batch.column(name).to_pylist():
                yield (cell and cell["bytes"]) or b""
            progress.advance(task, len(batch))


# ---------------------------------------------------------------------------------------------------------------------
# Cache
# ---------------------------------------------------------------------------------------------------------------------


def _read_cache(path: Path) -> _Decoded | None:
    """What :func:`_write_cache` wrote, or None if it is not there or not what was written."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            decoded = _Decoded({name: file.get_tensor(name) for name in _CACHED}, int(metadata["num_classes"]))
            return decoded if metadata["checksum"] == _checksum(decoded.tensors) else None
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None


def _write_cache(path: Path, decoded: _Decoded) -> None:
    """Write aside, then rename: another process sees the whole file or none."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    metadata = {"num_classes": str(decoded.num_classes), "checksum": _checksum(decoded.tensors)}
    aside = path.with_name(f".{path.stem}-{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(decoded.tensors, aside, metadata=metadata)
        aside.replace(path)
    except (OSError, SafetensorError) as error:
        raise FlatminimaError(
            f"cannot keep decoded images in {path.parent} ({_root_cause(error)}); "
            "let the environment variable FLATMINIMA_CACHE name a folder with room that you can write to"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            aside.unlink()


def _checksum(tensors: dict[str, Tensor]) -> str:
    checksum = 0
    for name in sorted(tensors):
        checksum = zlib.crc32(tensors[name].numpy().data, checksum)
    return f"{checksum:08x}"


# ---------------------------------------------------------------------------------------------------------------------
# Augmentation and confusion (Sec. 7.1)
# ---------------------------------------------------------------------------------------------------------------------

AUGMENTATIONS: tuple[str, ...] = ("no-aug", "flip-only", "1-crop-f", "4-crop-f")
"""The schemes of Scenario II, from none to the standard one."""

_HELD_OUT_SEED = -1  # no run's: those are not negative

_CROP_PADDING = {"flip-only": 0, "1-crop-f": 1, "4-crop-f": 4}


def augment(images: Tensor, scheme: str, generator: torch.Generator) -> Tensor:
    """Each image cropped at random out of its zero-padded self and, half of the time, mirrored left to right.

    Args:
        images: ``(B, C, H, W)`` uint8.
        scheme: One of :data:`AUGMENTATIONS`: ``"1-crop-f"`` and ``"4-crop-f"`` pad 1 and 4 pixels on each side,
            ``"flip-only"`` does not crop, ``"no-aug"`` returns the images as they are and draws nothing.
        generator: Source of the randomness, on any device; the same state gives the same result on every device.

    Returns:
        ``(B, C, H, W)`` uint8, on the device of ``images``.

    Raises:
        FlatminimaError: The scheme is unknown, or the images are not uint8 ``(B, C, H, W)``.
    """
    _check_images(images)
    if scheme not in AUGMENTATIONS:
        raise FlatminimaError(f"unknown augmentation {scheme!r}; use one of {', '.join(AUGMENTATIONS)}")
    if scheme == "no-aug":
        return images
    padding = _CROP_PADDING[scheme]
    batch, channels, height, width = images.shape

    highs = (2 * padding + 1, 2 * padding + 1, 2)
    drawn = [torch.randint(high, (batch, 1), generator=generator, device=generator.device) for high in highs]
    # One copy, and to a GPU one that does not wait for the work before it.
    top, left, mirrored = torch.stack(drawn).to(images.device, non_blocking=images.is_cuda)  # (B, 1) each
    rows = top + torch.arange(height, device=images.device)  # (B, H)
    columns = left + torch.arange(width, device=images.device)  # (B, W)
    columns = torch.where(mirrored == 1, columns.flip(1), columns)
    padded = F.pad(images, (padding, padding, padding, padding))
    # One gather over flat pixels is five times as fast as indexing the four axes.
    pixels = rows[:, :, None] * padded.shape[3] + columns[:, None, :]  # (B, H, W)
    pixels = pixels.reshape(batch, 1, height * width).expand(batch, channels, -1)
    return padded.flatten(2).gather(2, pixels).reshape(images.shape)


def hold_out(train: ImageSet, count: int) -> tuple[ImageSet, ImageSet]:
    """``count`` images drawn at random, the same on every call: whoever compares runs compares them on the same images.

    Args:
        train: The set to draw from.
        count: Images to hold out.

    Returns:
        The images that are left, in their order, and those held out.

    Raises:
        FlatminimaError: The count is negative, or leaves none.
    """
    if not 0 <= count < len(train):
        raise FlatminimaError(f"cannot hold out {count} of {len(train)} training images; leave at least 1 to train on")
    drawn = torch.randperm(len(train), generator=torch.Generator().manual_seed(_HELD_OUT_SEED))
    kept = train.subset(drawn[count:].sort().values) if count else train  # without a copy
    return kept, train.subset(drawn[:count])


def confuse(train: ImageSet, *, num_clean: int | None, num_confused: int, seed: int) -> tuple[ImageSet, ImageSet]:
    """Scenario I: images drawn at random, and others beside them whose labels say nothing.

    Args:
        train: The set to draw from.
        num_clean: Images that keep their labels; None for all that are not confused.
        num_confused: Further images, whose labels are drawn uniformly from all classes, the true one included.
        seed: The same seed draws the same images and labels.

    Returns:
        The clean set, on which the measures are evaluated, and the set to train on: the clean one followed by the
        confused one.

    Raises:
        FlatminimaError: A count is negative, the clean set is empty, or both together exceed ``train``.
    """
    if num_clean is None:
        num_clean = len(train) - num_confused
    if num_clean < 1 or num_confused < 0 or num_clean + num_confused > len(train):
        raise FlatminimaError(
            f"cannot draw {num_clean} clean and {num_confused} confused images from {len(train)}; "
            "ask for at least 1 clean, at least 0 confused, and no more than there are"
        )
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(len(train), generator=generator)
    labels = torch.randint(train.num_classes, (num_confused,), generator=generator)
    clean = train.subset(drawn[:num_clean])
    if num_confused == 0:
        return clean, clean
    confused = train.subset(drawn[num_clean : num_clean + num_confused])
    return clean, dataclasses.replace(
        clean,
        images=torch.cat([clean.images, confused.images]),
        labels=torch.cat([clean.labels, labels.to(clean.labels.device)]),
    )
