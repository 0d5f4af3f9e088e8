"""Where image data come from: named data sets, and folders of parquet files.

A data set is one registered loader, which takes the folder of the cache and returns both splits::

    @data_set("moons")
    def _moons(cache: Path) -> Decoded:
        return Decoded({"train_images": ..., "train_labels": ..., "test_images": ..., "test_labels": ...}, 2)

One of the Hugging Face hub that has a training and a test split, with the columns :func:`load_data` names, is one line:
``data_set("cifar10")(hub_data_set("cifar10", "uoft-cs/cifar10"))``. What is registered is known to ``load_data``, to
specifications and to the command line.
"""

from __future__ import annotations

import contextlib
import functools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flatminima.errors import FlatminimaError
from flatminima.lab.data.cache import CACHE_VERSION, SPLITS, Decoded, default_cache_dir, read_cache, write_cache
from flatminima.lab.data.decoding import decode, root_cause
from flatminima.lab.data.images import ImageSet, channel_statistics
from flatminima.lab.storage import digest_of
from flatminima.progress import terminal

Loader = Callable[[Path], Decoded]

LOADERS: dict[str, Loader] = {}
"""The registered loaders by name."""


def data_set(name: str) -> Callable[[Loader], Loader]:
    """Register the decorated loader as the data set ``name``."""

    def register(loader: Loader) -> Loader:
        LOADERS[name] = loader
        return loader

    return register


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
    cache = cache_dir or default_cache_dir()
    return _image_sets(LOADERS[source](cache) if source in LOADERS else _load_folder(source, cache))


def _image_sets(decoded: Decoded) -> tuple[ImageSet, ImageSet]:
    mean, std = channel_statistics([decoded.tensors["train_images"]])
    train, test = (
        ImageSet(
            images=decoded.tensors[f"{split}_images"],
            labels=decoded.tensors[f"{split}_labels"],
            num_classes=decoded.num_classes,
            mean=mean,
            std=std,
        )
        for split in SPLITS
    )
    return train, test


def _cached(cache: Path, key: str, read: Callable[[], Any], source: str) -> Decoded:
    """What ``read`` gives as a ``datasets.DatasetDict``, decoded now or before."""
    file = cache / f"{key}.safetensors"
    decoded = read_cache(file)
    if decoded is None:
        decoded = decode(read(), source)
        write_cache(file, decoded)
    return decoded


@data_set("digits")
def _digits(cache: Path) -> Decoded:
    images, labels, train, test = _scikit_learns_digits()
    return Decoded(
        {
            "train_images": images[train],
            "train_labels": labels[train],
            "test_images": images[test],
            "test_labels": labels[test],
        },
        num_classes=10,
    )


@functools.cache
def _scikit_learns_digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images, labels, and the numbers of those to train and to test on: read once a process, not twice a run."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = torch.from_numpy(np.rint(digits.images * (255 / 16)).astype(np.uint8))[:, None]
    labels = torch.from_numpy(digits.target.astype(np.int64))
    train, test = train_test_split(np.arange(len(labels)), test_size=500, stratify=digits.target, random_state=0)
    return images, labels, torch.from_numpy(train), torch.from_numpy(test)


def hub_data_set(name: str, repository: str) -> Loader:
    """A loader of a data set of the Hugging Face hub.

    Args:
        name: What it is called here.
        repository: What it is called there.
    """

    def read() -> Any:
        import datasets

        try:
            with bars_like_ours():
                return datasets.load_dataset(repository)
        # What an unreachable hub raises depends on the versions of three packages below this call.
        except Exception as error:
            raise FlatminimaError(
                f"cannot load {name} from the Hugging Face hub ({root_cause(error)}); connect to the network once, "
                "or give a folder of parquet files instead"
            ) from error

    return lambda cache: _cached(cache, f"{name}-hub-v{CACHE_VERSION}", read, name)


@contextlib.contextmanager
def bars_like_ours() -> Iterator[None]:
    """The bars of ``datasets`` and of the hub, only where ours are: they write to files and pipes, too."""
    import datasets.utils
    import huggingface_hub.utils

    switches = (datasets.utils, huggingface_hub.utils)
    shown = [each for each in switches if terminal() is None and not each.are_progress_bars_disabled()]
    for each in shown:
        each.disable_progress_bars()
    try:
        yield
    finally:
        for each in shown:
            each.enable_progress_bars()


data_set("cifar10")(hub_data_set("cifar10", "uoft-cs/cifar10"))
data_set("cifar100")(hub_data_set("cifar100", "uoft-cs/cifar100"))


def _load_folder(source: str, cache: Path) -> Decoded:
    """The data of a folder of parquet files."""
    folder = Path(source).expanduser()
    if not folder.is_dir():
        raise FlatminimaError(
            f"no data set {source!r}: it is neither {', '.join(LOADERS)} nor an existing folder "
            "with train-*.parquet and test-*.parquet"
        )
    files = {split: sorted(folder.resolve().glob(f"{split}-*.parquet")) for split in SPLITS}
    for split, found in files.items():
        if not found:
            raise FlatminimaError(f"{source} holds no {split}-*.parquet; both a train and a test split are needed")
    key = f"{folder.resolve().name}-{_fingerprint(files)}"
    return _cached(cache, key, lambda: _read_parquet(files, source), source)


def _fingerprint(files: dict[str, list[Path]]) -> str:
    parts = [CACHE_VERSION]
    for path in (path for found in files.values() for path in found):
        stat = path.stat()
        parts.append(f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}\0")
    return digest_of(*(part.encode() for part in parts))[:16]


def _read_parquet(files: dict[str, list[Path]], source: str) -> Any:
    import datasets

    # The Arrow copy that `datasets` makes is needed until the images are decoded, and no longer: they are read into
    # memory so that it can go.
    with tempfile.TemporaryDirectory() as arrow, bars_like_ours():
        try:
            return datasets.load_dataset(
                "parquet",
                data_files={split: [str(path) for path in found] for split, found in files.items()},
                cache_dir=arrow,
                keep_in_memory=True,
            )
        # pyarrow and datasets each have their own families of errors for a damaged file.
        except Exception as error:
            raise FlatminimaError(f"cannot read the parquet files of {source} ({root_cause(error)})") from error
