"""Images of any size in class folders, read as torchvision's ImageFolder and its transforms read them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from flatminima.errors import FlatminimaError
from flatminima.lab.data import ImageSet, Normalization, Pictures, load_data, open_data, open_test_data
from flatminima.lab.reading import Reading
from support.messages import one_line
from support.own_data import class_folders, write_image


def opened(folder: Path, **reading: object) -> Pictures:
    data = open_data(str(folder), Reading(**reading)).data  # type: ignore[arg-type]
    assert isinstance(data, Pictures)
    return data


def pixels_of(image: Image.Image) -> Tensor:
    array = np.array(image)
    return torch.from_numpy(array[None] if array.ndim == 2 else array.transpose(2, 0, 1))


def test_class_folders_are_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    folder = class_folders(tmp_path / "photos", count=2, classes=("b", "a"))
    kept = write_image(folder / "a" / "deeper" / "9.PNG", seed=9)
    (folder / "a" / "notes.txt").write_text("no image")
    (folder / ".hidden").mkdir()
    data = opened(folder)
    assert (len(data), data.num_classes, data.channels) == (5, 2, 3)
    inputs, labels = data.fetch([0, 2, 3])
    assert labels.tolist() == [0, 0, 1]
    torch.testing.assert_close(inputs[1], pixels_of(kept) / 255)
    with Image.open(folder / "b" / "0.png") as image:
        torch.testing.assert_close(inputs[2], pixels_of(image) / 255)


def test_what_was_taken_for_what_is_said(tmp_path: Path) -> None:
    class_folders(tmp_path / "photos" / "train", count=3)
    class_folders(tmp_path / "photos" / "val", count=1)
    said = open_data(str(tmp_path / "photos")).about
    assert said is not None
    assert "part train: 6 RGB images" in said
    assert "2 classes, numbered in this order: cat, dog" in said
    assert len(opened(tmp_path / "photos", split="val")) == 2


def test_the_shorter_side_is_resized_and_the_middle_cropped(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    wide, tall = write_image(folder / "a" / "0.png", 10, 16), write_image(folder / "b" / "0.png", 15, 11)
    inputs, _ = opened(folder, resize="8", crop=6).fetch([0, 1])
    # 10×16 → 8×12 → its middle 6×6; 15×11 → 10×8 → its middle
    expected = [
        wide.resize((12, 8), Image.Resampling.BILINEAR).crop((3, 1, 9, 7)),
        tall.resize((8, 10), Image.Resampling.BILINEAR).crop((1, 2, 7, 8)),
    ]
    torch.testing.assert_close(inputs, torch.stack([pixels_of(image) for image in expected]) / 255)
    assert opened(folder, resize="7x5").fetch([0, 1])[0].shape == (2, 3, 7, 5)


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("RGB", 3)])
def test_images_are_grey_or_rgb_as_the_first_one_is(mode: str, channels: int, tmp_path: Path) -> None:
    data = opened(class_folders(tmp_path / "photos", mode=mode))
    assert data.channels == channels
    assert data.fetch([0])[0].shape == (1, channels, 6, 8)


def test_all_are_converted_where_that_is_said(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    images = [write_image(folder / "a" / f"{mode}.png", mode=mode) for mode in ("L", "P", "RGB", "RGBA")]
    pixels = opened(folder, in_channels=3).pixels(range(4))
    assert torch.equal(pixels, torch.stack([pixels_of(image.convert("RGB")) for image in images]))
    assert opened(folder, in_channels=1).pixels([3]).shape == (1, 1, 6, 8)


def test_statistics_are_those_of_all_pixels(tmp_path: Path) -> None:
    data = opened(class_folders(tmp_path / "photos", count=60))  # more than are read at once
    everything = data.pixels(range(len(data))).double() / 255
    mean, std = data.statistics()
    torch.testing.assert_close(mean, everything.mean((0, 2, 3)).float())
    torch.testing.assert_close(std, everything.std((0, 2, 3), unbiased=False).float())
    normalized, _ = Normalization.of(data).apply(data).fetch(range(len(data)))
    assert normalized.double().mean().item() == pytest.approx(0, abs=1e-5)
    assert normalized.double().std().item() == pytest.approx(1, abs=1e-3)


def test_a_subset_of_a_subset_has_the_images_it_says(tmp_path: Path) -> None:
    data = opened(class_folders(tmp_path / "photos"))
    inner = data.subset([7, 1, 11]).subset(torch.tensor([2, 0]))
    assert inner.labels.tolist() == [1, 1]
    assert torch.equal(inner.fetch([0, 1])[0], data.fetch([11, 7])[0])


def test_a_train_size_draws_the_same_samples_every_time(tmp_path: Path) -> None:
    folder = class_folders(tmp_path / "photos", count=20)
    first, again = opened(folder, train_size=10), opened(folder, train_size=10)
    assert len(first) == 10
    assert torch.equal(first.pixels(range(10)), again.pixels(range(10)))
    assert set(first.labels.tolist()) == {0, 1}


def test_images_in_memory_are_prepared_as_files_are() -> None:
    digits = load_data("digits")[0]
    data = open_data("digits", Reading(resize="16", in_channels=3)).data
    assert isinstance(data, Pictures)
    assert (len(data), data.num_classes) == (len(digits), 10)
    image = Image.fromarray(digits.images[5, 0].numpy()).convert("RGB").resize((16, 16), Image.Resampling.BILINEAR)
    assert torch.equal(data.pixels([5])[0], pixels_of(image))
    assert isinstance(open_data("digits").data, ImageSet)


def no_classes(folder: Path) -> None:
    folder.mkdir()


def loose(folder: Path) -> None:
    write_image(folder / "0.png")


def empty_class(folder: Path) -> None:
    class_folders(folder)
    (folder / "emu").mkdir()


def other_parts(folder: Path) -> None:
    class_folders(folder / "val")


def sizes(folder: Path) -> None:
    write_image(class_folders(folder) / "cat" / "3.png", 5, 9)


def damaged(folder: Path) -> None:
    (class_folders(folder) / "cat" / "3.png").write_bytes(b"no image")


def truncated(folder: Path) -> None:
    path = class_folders(folder) / "cat" / "3.png"
    path.write_bytes(path.read_bytes()[:60])


def transparent(folder: Path) -> None:
    class_folders(folder, mode="RGBA")


def mixed(folder: Path) -> None:
    write_image(class_folders(folder) / "cat" / "3.png", mode="L")


def deep(folder: Path) -> None:
    Image.fromarray(np.zeros((6, 8), np.uint16)).save(class_folders(folder) / "cat" / "3.png")


def flat(folder: Path) -> None:
    for path in class_folders(folder, count=2).rglob("*.png"):
        Image.new("RGB", (8, 6), (0, int(path.stem), 9)).save(path)


@pytest.mark.parametrize(
    ("make", "reading", "said"),
    [
        (no_classes, {}, "has no class folders: it must hold a folder for each class"),
        (loose, {}, "has no class folders: its images lie in it directly"),
        (empty_class, {}, r"class folder emu has no images \(\.png"),
        (other_parts, {}, "has the parts val, none called 'train'"),
        (sizes, {}, r"cat/3\.png is 5×9, cat/0\.png 6×8: give resize"),
        (damaged, {}, r"cannot decode cat/3\.png \(no known format\)"),
        (truncated, {}, r"cannot decode cat/3\.png"),
        (transparent, {}, r"cat/0\.png has mode RGBA, neither RGB nor L \(grey\): give in_channels"),
        (mixed, {}, r"cat/3\.png has mode L, the first image RGB: give in_channels"),
        (deep, {"in_channels": 3}, r"cat/3\.png has mode I;16, more than 8 bits"),
        (class_folders, {"crop": 7}, r"cat/0\.png is 6×8 after resizing, smaller than crop=7"),
        (class_folders, {"train_size": 13}, "train_size=13, but .* has 12 samples"),
        (class_folders, {"max_length": 3}, "max_length is for texts"),
        (flat, {"normalize": "data"}, r"a channel has the same value in every pixel .*: give normalize"),
    ],
)
def test_an_image_folder_that_is_wrong_is_one_line(
    make: Callable[[Path], object], reading: dict[str, object], said: str, tmp_path: Path
) -> None:
    make(tmp_path / "photos")
    with pytest.raises(FlatminimaError, match=said) as caught:
        _ = read_through(opened(tmp_path / "photos", **reading))
    assert str(tmp_path / "photos") in one_line(caught)


def read_through(data: Pictures) -> Tensor:
    return Normalization.of(data).apply(data).fetch(range(len(data)))[0]


def test_a_source_that_is_nothing_is_one_line_that_says_what_there_is(tmp_path: Path) -> None:
    class_folders(tmp_path / "photos")
    with pytest.raises(FlatminimaError, match=r"did you mean '.*photos'\?") as caught:
        open_data(str(tmp_path / "photo"))
    said = one_line(caught)
    for kind in ("digits, cifar10", "class folders", "hf:NAME", ".npz", "package.module:factory"):
        assert kind in said


def test_test_data_of_other_classes_are_refused_as_their_numbers_mean_others(tmp_path: Path) -> None:
    trained = open_data(str(class_folders(tmp_path / "train", classes=("ant", "bee", "cat"))))
    there = str(class_folders(tmp_path / "test", classes=("ant", "cat")))
    with pytest.raises(FlatminimaError, match=r"class 1 is cat, in the training data bee: give test data of the same"):
        open_test_data(there, Reading(), classes=trained.classes)
    assert open_test_data(there, Reading(), classes=("ant", "cat")).classes == ("ant", "cat")
