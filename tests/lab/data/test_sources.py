from __future__ import annotations

import os
import zlib
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from flatminima import progress
from flatminima.errors import FlatminimaError
from flatminima.lab.data.cache import Decoded
from flatminima.lab.data.sources import LOADERS, data_set, load_data
from support.images import TEST_SHARD, Folder, assert_holds, encode, encode_all, make_folder, random_images, write_shard
from support.messages import one_line

pytest_plugins = ("support.image_fixtures",)


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


@pytest.mark.parametrize("label", [10**6, 2**40, 2**62])
def test_one_absurd_label_is_one_line(label: int, folder: Folder, cache: Path) -> None:
    path = folder.path / "train-00001-of-00002.parquet"
    write_shard(path, [ONE_IMAGE, ONE_IMAGE], [0, label], label_feature=datasets.Value("int64"))
    write_shard(folder.path / "train-00000-of-00002.parquet", [ONE_IMAGE], [1], label_feature=datasets.Value("int64"))
    with pytest.raises(FlatminimaError, match=rf"label {label} in row 2 is far above .* different labels, 3") as caught:
        load_data(str(folder.path), cache_dir=cache)
    one_line(caught)
    assert not cache.exists()


def test_labels_may_leave_some_out(folder: Folder, cache: Path) -> None:
    for file in folder.path.iterdir():
        write_shard(file, [ONE_IMAGE, ONE_IMAGE], [0, 999], label_feature=datasets.Value("int64"))
    assert load_data(str(folder.path), cache_dir=cache)[0].num_classes == 1000


@pytest.mark.parametrize("header", [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 6 5\n", b"%PDF-1.4\n"])
def test_no_program_is_started_for_an_image(
    header: bytes, folder: Folder, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def started(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a program was started")

    monkeypatch.setattr("subprocess.check_call", started)
    monkeypatch.setattr("subprocess.Popen", started)
    write_shard(folder.path / TEST_SHARD, [ONE_IMAGE, header + b"showpage\n%%EOF\n"], [0, 1])
    with pytest.raises(FlatminimaError, match=r"image 1 \(no known format\).*one of PNG, JPEG, WEBP, BMP, TIFF, GIF"):
        load_data(str(folder.path), cache_dir=cache)


@pytest.mark.parametrize("silenced", [True, False])
def test_bars_of_datasets_are_shown_where_ours_are(
    silenced: bool, folder: Folder, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    load = datasets.load_dataset

    def looked_at(*arguments: Any, **options: Any) -> Any:
        seen.append(datasets.utils.are_progress_bars_disabled())
        return load(*arguments, **options)

    monkeypatch.setattr(datasets, "load_dataset", looked_at)
    monkeypatch.setattr("rich.console.Console.is_terminal", True)
    with progress.silent(silenced):
        load_data(str(folder.path), cache_dir=cache)
    assert seen == [silenced]
    assert not datasets.utils.are_progress_bars_disabled()


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


# --- your own ---


def test_a_registered_data_set_is_loaded_by_its_name(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LOADERS, "noise", LOADERS["digits"])  # taken away after the test
    images, labels = random_images(6), torch.tensor([0, 1, 2, 0, 1, 2])

    @data_set("noise")
    def noise(folder: Path) -> Decoded:
        assert folder == cache
        splits = {"train_images": images[:4], "train_labels": labels[:4]}
        return Decoded({**splits, "test_images": images[4:], "test_labels": labels[4:]}, num_classes=3)

    train, test = load_data("noise", cache_dir=cache)
    assert torch.equal(torch.cat([train.images, test.images]), images)
    assert torch.equal(torch.cat([train.labels, test.labels]), labels)
    with pytest.raises(FlatminimaError, match="neither digits, cifar10, cifar100, noise nor an existing folder"):
        load_data("silence")
