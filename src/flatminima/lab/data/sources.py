"""Where image data come from: the embedded digits, the Hugging Face hub, folders of parquet files; cached."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import tempfile
import uuid
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from flatminima.errors import FlatminimaError, first_line
from flatminima.lab.data.images import ImageSet, check_labels

_HUB_NAMES = {"cifar10": "uoft-cs/cifar10", "cifar100": "uoft-cs/cifar100"}


_IMAGE_COLUMNS = ("img", "image")


_LABEL_COLUMNS = ("label", "fine_label", "labels")


_SPLITS = ("train", "test")


_CACHED = tuple(f"{split}_{kind}" for split in _SPLITS for kind in ("images", "labels"))

# Part of every cache key: raise it when the cached tensors change their meaning, and old files are left alone.
_CACHE_VERSION = "1"


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
    return first_line(cause)


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
        check_labels(tensors[f"{split}_labels"], num_classes, f"{source}, {split} split: ")
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
