from __future__ import annotations

import dataclasses
import io
import itertools
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import DataLoader

from flatminima.errors import FlatminimaError
from flatminima.lab.data import sources as data
from flatminima.lab.data.augmentation import AUGMENTATIONS, augment, confuse, hold_out
from flatminima.lab.data.images import ImageSet
from flatminima.lab.data.sources import default_cache_dir, load_data

PADDING = {"no-aug": 0, "flip-only": 0, "1-crop-f": 1, "4-crop-f": 4}


def random_images(count: int, channels: int = 3, height: int = 5, width: int = 6, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, channels, height, width), dtype=torch.uint8, generator=generator)


def image_set(count: int = 7, num_classes: int = 3, **changes: Any) -> ImageSet:
    fields: dict[str, Any] = {
        "images": random_images(count),
        "labels": torch.arange(count) % num_classes,
        "num_classes": num_classes,
        "mean": torch.tensor([0.4, 0.5, 0.6]),
        "std": torch.tensor([0.2, 0.25, 0.3]),
    }
    return ImageSet(**(fields | changes))


def one_line(caught: pytest.ExceptionInfo[FlatminimaError]) -> str:
    message = str(caught.value)
    assert message
    assert "\n" not in message
    return message


# --- ImageSet ---


def test_items_are_normalized_pixels_and_labels() -> None:
    samples = image_set()
    image, label = samples[4]
    assert image.dtype == torch.float32
    assert image.shape == (3, 5, 6)
    assert label.shape == ()
    assert label == 1
    for channel in range(3):
        expected = (samples.images[4, channel].double() / 255 - samples.mean[channel]) / samples.std[channel]
        torch.testing.assert_close(image[channel].double(), expected, rtol=1e-6, atol=1e-6)


def test_every_way_to_fetch_gives_the_same_bits() -> None:
    samples = image_set()
    inputs, labels = samples.tensors()
    indices = [5, 0, 5, -1]
    batch = samples.__getitems__(indices)
    assert len(batch) == 4
    for position, index in enumerate(indices):
        for image, label in (samples[index], batch[position], samples.subset(indices)[position]):
            assert torch.equal(image, inputs[index])
            assert torch.equal(label, labels[index])


def test_data_loader_batches_equal_the_tensors() -> None:
    samples = image_set()
    batches = list(DataLoader(samples, batch_size=3))
    assert [len(labels) for _, labels in batches] == [3, 3, 1]
    inputs, labels = samples.tensors()
    assert torch.equal(torch.cat([x for x, _ in batches]), inputs)
    assert torch.equal(torch.cat([y for _, y in batches]), labels)


def test_iteration_ends() -> None:
    samples = image_set()
    assert len(samples) == 7
    with pytest.raises(IndexError):
        samples[7]


@pytest.mark.parametrize(
    "indices", [[2, 0], torch.tensor([2, 0]), range(2, -1, -2), np.array([2, 0])], ids=["list", "tensor", "range", "np"]
)
def test_subset_keeps_order_and_normalization(indices: Any) -> None:
    samples = image_set()
    part = samples.subset(indices)
    assert torch.equal(part.images, samples.images[[2, 0]])
    assert part.labels.tolist() == [2, 0]
    assert torch.equal(part.mean, samples.mean)
    assert part.num_classes == 3


def test_subset_by_mask_and_of_nothing() -> None:
    samples = image_set()
    assert samples.subset(samples.labels == 1).labels.tolist() == [1, 1]
    assert len(samples.subset([])) == 0
    assert samples.__getitems__([]) == []


@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
)
def test_to_moves_every_tensor(device: str) -> None:
    samples = image_set()
    moved = samples.to(device)
    assert {t.device.type for t in (moved.images, moved.labels, moved.mean, moved.std)} == {device}
    assert torch.equal(moved.tensors()[0].cpu(), samples.tensors()[0])
    assert torch.equal(moved.subset([3, 1]).labels.cpu(), samples.labels[[3, 1]])
    crops = augment(moved.images, "4-crop-f", torch.Generator().manual_seed(0))
    assert torch.equal(crops.cpu(), augment(samples.images, "4-crop-f", torch.Generator().manual_seed(0)))


def test_repr_is_short() -> None:
    assert repr(image_set()) == "ImageSet(7 images 3×5×6, 3 classes, on cpu)"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": torch.zeros(7, 3, 5, 6)}, "images must be uint8"),
        ({"images": torch.zeros(7, 5, 6, dtype=torch.uint8)}, "images must be uint8 of shape"),
        ({"labels": torch.zeros(7)}, "labels must be int64"),
        ({"labels": torch.zeros(6, dtype=torch.int64)}, r"labels must be int64 of shape \(7,\)"),
        ({"labels": torch.tensor([0, 1, 2, 3, 3, 0, 0])}, r"label 3 in row 3 is outside 0\.\.2 \(2 such rows\)"),
        ({"labels": torch.tensor([0, -1, 2, 0, 0, 0, 0])}, "label -1 in row 1"),
        ({"mean": torch.zeros(1)}, "one value for each of 3 channels"),
        ({"std": torch.tensor([0.2, 0.0, 0.3])}, "same value in every training pixel"),
        ({"std": torch.tensor([0.2, float("nan"), 0.3])}, "cannot be normalized"),
    ],
)
def test_inconsistent_sets_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FlatminimaError, match=message) as caught:
        image_set(**changes)
    one_line(caught)


def test_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        image_set().num_classes = 4  # type: ignore[misc]


# --- digits ---


def test_digits_are_split_once_and_for_all() -> None:
    train, test = load_data("digits")
    assert (len(train), len(test)) == (1297, 500)
    assert train.images.shape[1:] == (1, 8, 8)
    assert train.num_classes == test.num_classes == 10
    # Results of different machines and releases compare only if the split never moves.
    assert zlib.crc32(test.images.numpy().tobytes() + test.labels.numpy().tobytes()) == 2_861_886_871


def test_digits_hold_every_original_image_once_with_its_label() -> None:
    train, test = load_data("digits")
    original = load_digits()
    key = [
        (*image.ravel().astype(int).tolist(), int(label))
        for image, label in zip(original.images, original.target, strict=True)
    ]
    images = torch.cat([train.images, test.images]).double() * 16 / 255
    labels = torch.cat([train.labels, test.labels])
    found = [(*image.flatten().round().int().tolist(), int(label)) for image, label in zip(images, labels, strict=True)]
    assert sorted(found) == sorted(key)


def test_digits_are_stratified() -> None:
    train, test = load_data("digits")
    share = torch.bincount(test.labels) / (torch.bincount(train.labels) + torch.bincount(test.labels))
    torch.testing.assert_close(share, torch.full((10,), 500 / 1797), rtol=0, atol=0.005)


def test_training_split_is_normalized_to_mean_0_and_std_1() -> None:
    train, test = load_data("digits")
    inputs, _ = train.tensors()
    assert inputs.double().mean().item() == pytest.approx(0, abs=1e-5)
    assert inputs.double().std(unbiased=False).item() == pytest.approx(1, abs=1e-5)
    assert torch.equal(test.mean, train.mean)
    assert torch.equal(test.std, train.std)


# --- parquet folders ---

TEST_SHARD = "test-00000-of-00001.parquet"


def encode(pixels: np.ndarray, image_format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, image_format, lossless=True)
    return buffer.getvalue()


def encode_all(images: Tensor, image_format: str = "PNG") -> list[bytes]:
    return [encode(image.permute(1, 2, 0).squeeze(2).numpy(), image_format) for image in images]


def write_shard(
    path: Path,
    images: list[bytes | None],
    labels: list[Any],
    *,
    image_column: str = "img",
    label_column: str = "label",
    label_feature: Any = None,
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = [None if image is None else {"bytes": image, "path": None} for image in images]
    features = datasets.Features(
        {image_column: datasets.Image(), label_column: label_feature or datasets.ClassLabel(names=["a", "b", "c"])}
    )
    if isinstance(label_feature, datasets.Value):
        convert = {"string": str, "float32": float}.get(label_feature.dtype, int)
        labels = [convert(label) for label in labels]
    rows = datasets.Dataset.from_dict({image_column: cells, label_column: labels}, features=features)
    rows.to_parquet(path)


@dataclasses.dataclass
class Folder:
    """A folder of three shards and what is in it."""

    path: Path
    train_images: Tensor
    train_labels: list[int]
    test_images: Tensor
    test_labels: list[int]


def make_folder(path: Path, *, channels: int = 3, image_format: str = "PNG", **columns: Any) -> Folder:
    train, test = random_images(7, channels), random_images(4, channels, seed=1)
    train_labels, test_labels = [0, 1, 2, 1, 0, 2, 2], [2, 1, 0, 0]
    encoded = encode_all(train, image_format)
    write_shard(path / "train-00000-of-00002.parquet", encoded[:4], train_labels[:4], **columns)
    write_shard(path / "train-00001-of-00002.parquet", encoded[4:], train_labels[4:], **columns)
    write_shard(path / TEST_SHARD, encode_all(test, image_format), test_labels, **columns)
    return Folder(path, train, train_labels, test, test_labels)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return make_folder(tmp_path / "flowers")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def assert_holds(folder: Folder, loaded: tuple[ImageSet, ImageSet]) -> None:
    train, test = loaded
    assert torch.equal(train.images, folder.train_images)
    assert torch.equal(test.images, folder.test_images)
    assert train.labels.tolist() == folder.train_labels
    assert test.labels.tolist() == folder.test_labels


@pytest.fixture
def forbid_decoding(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    def forbid() -> None:
        def refuse(*_: Any) -> None:
            raise AssertionError("decoded although the cache is there")

        monkeypatch.setattr(data, "_decode", refuse)

    return forbid


@pytest.mark.parametrize("image_format", ["PNG", "WEBP"])
@pytest.mark.parametrize(
    ("image_column", "label_column"), [("img", "label"), ("image", "labels"), ("img", "fine_label")]
)
def test_folder_loads_every_pixel(
    tmp_path: Path, cache: Path, image_format: str, image_column: str, label_column: str
) -> None:
    folder = make_folder(
        tmp_path / "x", image_format=image_format, image_column=image_column, label_column=label_column
    )
    loaded = load_data(str(folder.path), cache_dir=cache)
    assert_holds(folder, loaded)
    assert loaded[0].num_classes == 3


def test_grey_images_have_one_channel(tmp_path: Path, cache: Path) -> None:
    folder = make_folder(tmp_path / "grey", channels=1)
    assert_holds(folder, load_data(str(folder.path), cache_dir=cache))


def test_mixed_file_formats(tmp_path: Path, cache: Path) -> None:
    folder = make_folder(tmp_path / "x")
    write_shard(
        folder.path / TEST_SHARD,
        [encode_all(folder.test_images, kind)[i] for i, kind in enumerate(["PNG", "WEBP", "BMP", "PNG"])],
        folder.test_labels,
    )
    assert_holds(folder, load_data(str(folder.path), cache_dir=cache))


def test_mean_and_std_are_those_of_the_training_split(folder: Folder, cache: Path) -> None:
    train, test = load_data(str(folder.path), cache_dir=cache)
    pixels = folder.train_images.double() / 255
    torch.testing.assert_close(train.mean, pixels.mean((0, 2, 3)).float())
    torch.testing.assert_close(train.std, pixels.std((0, 2, 3), unbiased=False).float())
    assert torch.equal(test.mean, train.mean)
    assert torch.equal(test.std, train.std)


def test_classes_are_those_the_column_declares(tmp_path: Path, cache: Path) -> None:
    """A class may be absent from the training split; the network still needs its logit."""
    folder = make_folder(tmp_path / "x", label_feature=datasets.ClassLabel(num_classes=5))
    assert load_data(str(folder.path), cache_dir=cache)[0].num_classes == 5


def test_plain_integer_labels_count_their_classes(tmp_path: Path, cache: Path) -> None:
    folder = make_folder(tmp_path / "x", label_feature=datasets.Value("int32"))
    assert load_data(str(folder.path), cache_dir=cache)[0].num_classes == 3


def test_decoded_once(folder: Folder, cache: Path, forbid_decoding: Callable[[], None]) -> None:
    first = load_data(str(folder.path), cache_dir=cache)
    assert [path.suffix for path in cache.iterdir()] == [".safetensors"]
    forbid_decoding()
    second = load_data(str(folder.path), cache_dir=cache)
    assert_holds(folder, second)
    assert torch.equal(first[0].mean, second[0].mean)
    assert second[0].num_classes == 3


def test_changed_files_are_decoded_again(folder: Folder, cache: Path) -> None:
    load_data(str(folder.path), cache_dir=cache)
    folder.test_labels = [1, 2, 0, 0]
    shard = folder.path / TEST_SHARD
    before = shard.stat()
    write_shard(shard, encode_all(folder.test_images), folder.test_labels)
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert shard.stat().st_size == before.st_size
    assert_holds(folder, load_data(str(folder.path), cache_dir=cache))


def test_files_of_another_size_are_decoded_again(folder: Folder, cache: Path) -> None:
    load_data(str(folder.path), cache_dir=cache)
    folder.test_images, folder.test_labels = folder.test_images[:3], folder.test_labels[:3]
    shard = folder.path / TEST_SHARD
    before = shard.stat()
    write_shard(shard, encode_all(folder.test_images), folder.test_labels)
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert_holds(folder, load_data(str(folder.path), cache_dir=cache))


def test_folders_of_one_name_do_not_share_a_cache(tmp_path: Path, cache: Path) -> None:
    one, other = make_folder(tmp_path / "a" / "x"), make_folder(tmp_path / "b" / "x")
    other.test_labels = [1, 2, 0, 0]
    write_shard(other.path / TEST_SHARD, encode_all(other.test_images), other.test_labels)
    for file in [*one.path.iterdir(), *other.path.iterdir()]:
        os.utime(file, ns=(0, 0))
    assert [(one.path / file.name).stat().st_size == file.stat().st_size for file in other.path.iterdir()] == [True] * 3
    assert_holds(one, load_data(str(one.path), cache_dir=cache))
    assert_holds(other, load_data(str(other.path), cache_dir=cache))


def flip_last_bit(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: b"nonsense" * 100,
        lambda content: content[: len(content) // 2],
        lambda content: content + b"\0",
        flip_last_bit,
        lambda content: content.replace(b'"num_classes":"3"', b'"num_classes":"x"'),
        lambda content: content.replace(b'"checksum"', b'"checksux"'),
        lambda content: content.replace(b'"test_labels"', b'"text_labels"'),
    ],
    ids=["empty", "garbage", "truncated", "longer", "bit", "metadata", "no-checksum", "renamed"],
)
def test_damaged_cache_is_rebuilt(folder: Folder, cache: Path, damage: Callable[[bytes], bytes]) -> None:
    load_data(str(folder.path), cache_dir=cache)
    (file,) = cache.iterdir()
    intact = file.read_bytes()
    file.write_bytes(damage(intact))
    assert file.read_bytes() != intact
    assert_holds(folder, load_data(str(folder.path), cache_dir=cache))
    assert list(cache.iterdir()) == [file]
    assert data._read_cache(file) is not None


def test_cache_that_cannot_be_written(folder: Folder, cache: Path) -> None:
    cache.write_text("a file where the folder should be")
    with pytest.raises(FlatminimaError, match="FLATMINIMA_CACHE") as caught:
        load_data(str(folder.path), cache_dir=cache)
    one_line(caught)


def test_cache_folder_from_the_environment(folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLATMINIMA_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_cache_dir() == tmp_path / "home" / ".cache" / "flatminima"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_cache_dir() == tmp_path / "xdg" / "flatminima"
    monkeypatch.setenv("FLATMINIMA_CACHE", str(tmp_path / "own"))
    load_data(str(folder.path))
    assert len(list((tmp_path / "own").iterdir())) == 1


# --- bad folders ---


@pytest.mark.parametrize("source", ["imagenet", "no/such/folder"])
def test_unknown_source(source: str) -> None:
    with pytest.raises(FlatminimaError, match="digits, cifar10, cifar100") as caught:
        load_data(source)
    assert source in one_line(caught)


@pytest.mark.parametrize("split", ["train", "test"])
def test_folder_with_one_split(folder: Folder, cache: Path, split: str) -> None:
    for file in folder.path.glob(f"{split}-*"):
        file.unlink()
    with pytest.raises(FlatminimaError, match=rf"no {split}-\*\.parquet") as caught:
        load_data(str(folder.path), cache_dir=cache)
    one_line(caught)


def test_damaged_parquet(folder: Folder, cache: Path) -> None:
    (folder.path / "train-00001-of-00002.parquet").write_bytes(b"PAR1 this is not a table")
    with pytest.raises(FlatminimaError, match="cannot read the parquet files of") as caught:
        load_data(str(folder.path), cache_dir=cache)
    one_line(caught)
    assert not cache.exists()


(ONE_IMAGE,) = encode_all(random_images(1))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"image_column": "picture"}, "train split: no column img or image among picture, label"),
        ({"label_column": "target"}, "train split: no column label or fine_label or labels among img, target"),
        (
            {"label_feature": datasets.Value("float32")},
            "column label must hold an integer in every row; it has type float",
        ),
        (
            {"label_feature": datasets.Value("string")},
            "column label must hold an integer in every row; it has type string",
        ),
    ],
)
def test_wrong_columns(tmp_path: Path, cache: Path, columns: dict[str, Any], message: str) -> None:
    folder = make_folder(tmp_path / "x", **columns)
    with pytest.raises(FlatminimaError, match=message) as caught:
        load_data(str(folder.path), cache_dir=cache)
    one_line(caught)
    assert not cache.exists()


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        ([ONE_IMAGE, ONE_IMAGE], [0, -1], r"test split: label -1 in row 1 is outside 0\.\.2"),
        ([ONE_IMAGE, ONE_IMAGE], [0, None], "must hold an integer in every row; it has type int64 and 1 empty rows"),
        ([ONE_IMAGE, b"not an image"], [0, 1], r"test split: cannot decode image 1 \(no known format\)"),
        ([ONE_IMAGE, ONE_IMAGE[:50]], [0, 1], "cannot decode image 1"),
        ([ONE_IMAGE, None], [0, 1], "cannot decode image 1"),
        ([ONE_IMAGE, encode(np.zeros((5, 5, 3), np.uint8))], [0, 1], r"image 1 has .* \(5, 5, 3\)"),
        ([ONE_IMAGE, encode(np.zeros((5, 6), np.uint8))], [0, 1], r"image 1 has .* \(5, 6, 1\)"),
        ([encode(np.zeros((5, 6, 4), np.uint8))], [0], "image 0 has mode RGBA"),
        ([encode(np.zeros((5, 5, 3), np.uint8))], [0], r"shape \(3, 5, 6\), test images \(3, 5, 5\)"),
        ([], [], 'cannot read the parquet files of .* "test" corresponds to no data'),
    ],
)
def test_bad_rows(folder: Folder, cache: Path, images: list[bytes | None], labels: list[Any], message: str) -> None:
    write_shard(folder.path / TEST_SHARD, images, labels)
    with pytest.raises(FlatminimaError, match=message) as caught:
        load_data(str(folder.path), cache_dir=cache)
    one_line(caught)
    assert not cache.exists()


def test_test_label_that_training_never_saw(tmp_path: Path, cache: Path) -> None:
    folder = make_folder(tmp_path / "x", label_feature=datasets.Value("int64"))
    write_shard(folder.path / TEST_SHARD, [ONE_IMAGE], [3], label_feature=datasets.Value("int64"))
    with pytest.raises(FlatminimaError, match=r"test split: label 3 in row 0 is outside 0\.\.2") as caught:
        load_data(str(folder.path), cache_dir=cache)
    one_line(caught)


def test_column_that_holds_no_images(tmp_path: Path, cache: Path) -> None:
    for split in ("train", "test"):
        rows = datasets.Dataset.from_dict({"image": [1.5, 2.5], "label": [0, 1]})
        (tmp_path / "x").mkdir(exist_ok=True)
        rows.to_parquet(tmp_path / "x" / f"{split}-0.parquet")
    with pytest.raises(FlatminimaError, match="column image does not hold encoded images") as caught:
        load_data(str(tmp_path / "x"), cache_dir=cache)
    one_line(caught)


# --- hub ---


@pytest.mark.parametrize(("name", "repository"), [("cifar10", "uoft-cs/cifar10"), ("cifar100", "uoft-cs/cifar100")])
def test_hub_is_asked_once(
    folder: Folder, cache: Path, monkeypatch: pytest.MonkeyPatch, name: str, repository: str
) -> None:
    asked = []
    files = {split: [str(path) for path in folder.path.glob(f"{split}-*")] for split in ("train", "test")}
    for paths in files.values():
        paths.sort()
    stand_in = datasets.load_dataset("parquet", data_files=files, cache_dir=str(cache / "hub"))

    def load_dataset(path: str) -> Any:
        asked.append(path)
        return stand_in

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert_holds(folder, load_data(name, cache_dir=cache))
    assert_holds(folder, load_data(name, cache_dir=cache))
    assert asked == [repository]


def test_unreachable_hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(path: str) -> Any:
        raise ConnectionError("Couldn't reach the Hub\nand a second line")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(FlatminimaError, match=r"Couldn't reach the Hub.*folder of parquet files") as caught:
        load_data("cifar10", cache_dir=cache)
    one_line(caught)


def test_hub_data_without_a_test_split(folder: Folder, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda path: {"train": None, "validation": None})
    with pytest.raises(FlatminimaError, match="cifar10 has no test split, only train, validation") as caught:
        load_data("cifar10", cache_dir=cache)
    one_line(caught)


# --- augmentation ---


def crop_and_flip(image: Tensor, padding: int, top: int, left: int, flip: bool) -> Tensor:
    """One sample, pixel by pixel."""
    channels, height, width = image.shape
    out = torch.zeros_like(image)
    for c, y, x in itertools.product(range(channels), range(height), range(width)):
        source_y = y + top - padding
        source_x = (width - 1 - x if flip else x) + left - padding
        if 0 <= source_y < height and 0 <= source_x < width:
            out[c, y, x] = image[c, source_y, source_x]
    return out


batches = st.builds(
    random_images,
    count=st.integers(1, 5),
    channels=st.integers(1, 3),
    height=st.integers(1, 6),
    width=st.integers(1, 6),
    seed=st.integers(0, 1000),
)


@settings(deadline=None, max_examples=60)
@given(images=batches, scheme=st.sampled_from(AUGMENTATIONS[1:]), seed=st.integers(0, 2**31 - 1))
def test_augment_equals_the_naive_reference(images: Tensor, scheme: str, seed: int) -> None:
    padding = PADDING[scheme]
    generator = torch.Generator().manual_seed(seed)
    top, left, flip = (
        torch.randint(high, (len(images), 1), generator=generator).flatten().tolist()
        for high in (2 * padding + 1, 2 * padding + 1, 2)
    )
    expected = torch.stack(
        [crop_and_flip(images[i], padding, top[i], left[i], flip[i] == 1) for i in range(len(images))]
    )
    actual = augment(images, scheme, torch.Generator().manual_seed(seed))
    assert actual.dtype == torch.uint8
    assert torch.equal(actual, expected)


def test_no_augmentation_changes_and_draws_nothing() -> None:
    images = random_images(4)
    generator = torch.Generator().manual_seed(0)
    state = generator.get_state()
    assert torch.equal(augment(images, "no-aug", generator), images)
    assert torch.equal(generator.get_state(), state)


@pytest.mark.parametrize("scheme", AUGMENTATIONS[1:])
def test_augment_leaves_its_input_alone(scheme: str) -> None:
    images = random_images(4)
    before = images.clone()
    augment(images, scheme, torch.Generator().manual_seed(0))
    assert torch.equal(images, before)


@pytest.mark.parametrize("scheme", AUGMENTATIONS[1:])
def test_every_crop_and_flip_comes_equally_often(scheme: str) -> None:
    """Follow one bright pixel in the middle, and a mark that tells left from right."""
    padding, count, size = PADDING[scheme], 20_000, 11
    image = torch.zeros(1, 1, size, size, dtype=torch.uint8)
    image[0, 0, 5, 5] = 255
    image[0, 0, 5, 6] = 1
    out = augment(image.expand(count, -1, -1, -1), scheme, torch.Generator().manual_seed(0))
    sample, _, row, column = (out == 255).nonzero(as_tuple=True)
    assert sample.tolist() == list(range(count))
    flipped = out[sample, 0, row, (column + 1).clamp(max=size - 1)] != 1
    outcomes = torch.stack([row, column, flipped.long()], dim=1).unique(dim=0, return_counts=True)[1]
    kinds = 2 * (2 * padding + 1) ** 2
    assert len(outcomes) == kinds
    expected = count / kinds
    assert ((outcomes - expected) ** 2 / expected).sum() < kinds + 5 * (2 * kinds) ** 0.5  # χ², five sigmas


@pytest.mark.parametrize("scheme", AUGMENTATIONS)
def test_augment_of_an_expanded_or_strided_batch(scheme: str) -> None:
    images = random_images(4).permute(0, 1, 3, 2)
    strided = augment(images, scheme, torch.Generator().manual_seed(3))
    assert torch.equal(strided, augment(images.contiguous(), scheme, torch.Generator().manual_seed(3)))


@pytest.mark.parametrize(
    ("images", "scheme", "message"),
    [
        (random_images(2), "2-crop-f", "unknown augmentation '2-crop-f'; use one of no-aug, flip-only"),
        (random_images(2).float(), "flip-only", "images must be uint8"),
        (random_images(2)[0], "no-aug", "images must be uint8 of shape"),
    ],
)
def test_augment_refuses(images: Tensor, scheme: str, message: str) -> None:
    with pytest.raises(FlatminimaError, match=message) as caught:
        augment(images, scheme, torch.Generator())
    one_line(caught)


# --- confusion sets ---


def numbered_set(count: int, num_classes: int) -> ImageSet:
    """Image i says i in its pixels, so that a copy of it can be told."""
    number = torch.arange(count)
    pixels = torch.stack([number // 256, number % 256], dim=1).to(torch.uint8)[:, :, None, None]
    return ImageSet(pixels, number * 7 % num_classes, num_classes, torch.full((2,), 0.5), torch.ones(2))


def numbers(samples: ImageSet) -> list[int]:
    high, low = samples.images[:, :, 0, 0].long().unbind(1)
    return (high * 256 + low).tolist()


@settings(deadline=None)
@given(st.data())
def test_confusion_set(draw: st.DataObject) -> None:
    total = draw.draw(st.integers(1, 400))
    num_clean = draw.draw(st.integers(1, total))
    num_confused = draw.draw(st.integers(0, total - num_clean))
    seed = draw.draw(st.integers(0, 2**31 - 1))
    train = numbered_set(total, num_classes=draw.draw(st.integers(1, 10)))
    clean, both = confuse(train, num_clean=num_clean, num_confused=num_confused, seed=seed)

    assert (len(clean), len(both)) == (num_clean, num_clean + num_confused)
    assert torch.equal(both.images[:num_clean], clean.images)
    assert torch.equal(both.labels[:num_clean], clean.labels)
    assert len(set(numbers(both))) == len(both)  # disjoint, and no image twice
    assert clean.labels.tolist() == train.labels[numbers(clean)].tolist()
    assert both.labels.min() >= 0
    assert both.labels.max() < train.num_classes
    assert torch.equal(both.mean, train.mean)

    again = confuse(train, num_clean=num_clean, num_confused=num_confused, seed=seed)
    assert torch.equal(again[1].images, both.images)
    assert torch.equal(again[1].labels, both.labels)


def test_another_seed_draws_other_images_and_labels() -> None:
    train = numbered_set(1000, 10)
    (clean, both), (other_clean, other_both) = (
        confuse(train, num_clean=300, num_confused=200, seed=seed) for seed in (0, 1)
    )
    assert set(numbers(clean)) != set(numbers(other_clean))
    assert not torch.equal(both.labels[300:], other_both.labels[300:])


def test_confused_labels_are_uniform_and_know_nothing_of_the_true_ones() -> None:
    train = numbered_set(20_000, 5)
    _, both = confuse(train, num_clean=1, num_confused=19_999, seed=0)
    true = train.labels[numbers(both)][1:]
    joint = torch.bincount(true * 5 + both.labels[1:], minlength=25).double()
    expected = torch.bincount(true, minlength=5).double().repeat_interleave(5) / 5
    assert ((joint - expected) ** 2 / expected).sum() < 20 + 5 * 40**0.5  # χ² with 20 degrees of freedom, five sigmas


def test_all_that_are_not_confused_are_clean() -> None:
    train = numbered_set(100, 10)
    clean, both = confuse(train, num_clean=None, num_confused=30, seed=0)
    assert len(clean) == 70
    assert sorted(numbers(both)) == list(range(100))
    whole, same = confuse(train, num_clean=None, num_confused=0, seed=0)
    assert sorted(numbers(whole)) == list(range(100))
    assert same is whole


@pytest.mark.parametrize(
    ("num_clean", "num_confused"), [(8, 3), (0, 3), (-1, 0), (5, -1), (11, 0), (None, 10), (None, -1)]
)
def test_impossible_sizes(num_clean: int | None, num_confused: int) -> None:
    with pytest.raises(FlatminimaError, match="from 10") as caught:
        confuse(numbered_set(10, 2), num_clean=num_clean, num_confused=num_confused, seed=0)
    one_line(caught)


# --- real data, where there is some ---


@pytest.mark.skipif(
    "FLATMINIMA_DATA" not in os.environ, reason="FLATMINIMA_DATA names no folder with cifar10, cifar100"
)
@pytest.mark.parametrize(
    ("name", "classes", "mean", "std"),
    [
        ("cifar10", 10, [0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]),
        ("cifar100", 100, [0.5071, 0.4865, 0.4409], [0.2673, 0.2564, 0.2762]),
    ],
)
def test_cifar(cache: Path, name: str, classes: int, mean: list[float], std: list[float]) -> None:
    train, test = load_data(str(Path(os.environ["FLATMINIMA_DATA"]) / name), cache_dir=cache)
    assert train.images.shape == (50_000, 3, 32, 32)
    assert test.images.shape == (10_000, 3, 32, 32)
    assert torch.bincount(train.labels).tolist() == [50_000 // classes] * classes
    assert torch.bincount(test.labels).tolist() == [10_000 // classes] * classes
    torch.testing.assert_close(train.mean, torch.tensor(mean), rtol=0, atol=6e-5)
    torch.testing.assert_close(train.std, torch.tensor(std), rtol=0, atol=6e-5)


@given(total=st.integers(1, 60), draw=st.data())
def test_held_out_images_are_the_same_every_time_and_the_others_keep_their_order(
    total: int, draw: st.DataObject
) -> None:
    count = draw.draw(st.integers(0, total - 1))
    train = numbered_set(total, 3)
    kept, held_out = hold_out(train, count)
    assert len(held_out) == count
    assert numbers(kept) == sorted(set(range(total)) - set(numbers(held_out)))
    assert held_out.labels.tolist() == train.labels[numbers(held_out)].tolist()
    assert numbers(hold_out(train, count)[1]) == numbers(held_out)


def test_held_out_images_come_from_all_over_the_set() -> None:
    _, held_out = hold_out(numbered_set(10_000, 2), 1000)
    parts = torch.bincount(torch.tensor(numbers(held_out)) // 1000, minlength=10)
    assert (parts > 60).all()  # 100 expected, with a standard deviation of 9


@pytest.mark.parametrize("count", [-1, 10, 11])
def test_something_must_be_left_to_train_on(count: int) -> None:
    with pytest.raises(FlatminimaError, match=f"cannot hold out {count} of 10 training images") as caught:
        hold_out(numbered_set(10, 2), count)
    one_line(caught)
