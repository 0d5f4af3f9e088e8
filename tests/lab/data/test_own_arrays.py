from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from flatminima.errors import FlatminimaError
from flatminima.lab.data import ImageSet, ReadySamples, open_data
from flatminima.lab.reading import Reading
from support.images import random_images
from support.messages import one_line

IMAGES = random_images(9, 3, 5, 6).numpy()
LABELS = np.arange(9) % 3


def saved(path: Path, **arrays: Any) -> str:
    if path.suffix == ".npz":
        np.savez(path, **arrays)
    else:
        save_file({name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}, path)
    return str(path)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize("last", [False, True])
def test_bytes_are_images_with_their_channels_first_or_last(suffix: str, last: bool, tmp_path: Path) -> None:
    images = IMAGES.transpose(0, 2, 3, 1) if last else IMAGES
    opened = open_data(saved(tmp_path / f"a{suffix}", images=images, labels=LABELS.astype(np.uint8)))
    assert isinstance(opened.data, ImageSet)
    assert torch.equal(opened.data.images, torch.from_numpy(IMAGES))
    assert opened.data.labels.tolist() == LABELS.tolist()
    assert opened.data.num_classes == 3
    torch.testing.assert_close(opened.data.mean, torch.from_numpy(IMAGES).double().mean((0, 2, 3)).float() / 255)
    assert opened.about is not None
    assert "array 'images'" in opened.about
    assert "labels from 'labels' (3 classes)" in opened.about


def test_grey_images_need_no_channels(tmp_path: Path) -> None:
    data = open_data(saved(tmp_path / "a.npz", x_train=IMAGES[:, 0], y_train=LABELS[:, None], x_test=IMAGES)).data
    assert isinstance(data, ImageSet)
    assert data.images.shape == (9, 1, 5, 6)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64])
def test_other_numbers_are_inputs_as_they_are(dtype: type, tmp_path: Path) -> None:
    inputs = np.random.default_rng(0).integers(5, size=(9, 4)).astype(dtype)
    data = open_data(
        saved(tmp_path / "a.npz", features=inputs, kind=LABELS),
        Reading(input_column=("features",), label_column="kind"),
    ).data
    assert isinstance(data, ReadySamples)
    fetched, labels = data.fetch([8, 2])
    assert torch.equal(fetched, torch.from_numpy(inputs[[8, 2]]))
    assert labels.tolist() == [2, 2]
    assert torch.equal(data.subset([4, 8]).fetch([1])[0], torch.from_numpy(inputs[[8]]))


@pytest.mark.parametrize(
    ("arrays", "reading", "said"),
    [
        (
            {"images": IMAGES},
            {},
            "has no array of numbers among train_labels, .*; it has images: name it as label_column",
        ),
        ({"pictures": IMAGES, "labels": LABELS}, {}, "it has pictures, labels: name it as input_column"),
        (
            {"pictures": IMAGES, "labels": LABELS},
            {"input_column": ("picture",)},
            r"no array of numbers 'picture' \(did you mean 'pictures'\?\)",
        ),
        ({"images": IMAGES, "labels": LABELS[:8]}, {}, r"'images' has shape \(9, 3, 5, 6\), 'labels' \(8,\)"),
        ({"images": IMAGES, "labels": LABELS / 2}, {}, "labels 'labels' are float64, not integers"),
        ({"images": IMAGES, "labels": np.eye(3)[LABELS]}, {}, r"labels 'labels' have shape \(9, 3\), .*argmax"),
        ({"images": IMAGES, "labels": LABELS - 1}, {}, r"label -1 in row 0 is outside 0\.\.1"),
        ({"images": IMAGES, "labels": LABELS * 10**7}, {}, "label 20000000 in row 2 is far above"),
        ({"images": IMAGES[:, :2], "labels": LABELS}, {}, r"of shape \(9, 2, 5, 6\) uint8 are not images"),
        ({"images": IMAGES[:, :, 0, 0], "labels": LABELS}, {}, r"of shape \(9, 3\) uint8 are not images"),
        ({"images": IMAGES[:0], "labels": LABELS[:0]}, {}, "there are no samples"),
        ({"images": np.array(["a"] * 9), "labels": LABELS}, {}, "has no array of numbers among"),
        ({"images": IMAGES / 255, "labels": LABELS}, {"normalize": "imagenet"}, "normalize: only images of 8 bits"),
    ],
)
def test_arrays_that_are_wrong_are_one_line(
    arrays: dict[str, Any], reading: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(FlatminimaError, match=said) as caught:
        open_data(saved(tmp_path / "a.npz", **arrays), Reading(**reading))
    assert "a.npz" in one_line(caught)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_a_file_that_is_none_is_one_line(suffix: str, tmp_path: Path) -> None:
    with pytest.raises(FlatminimaError, match="there is no file"):
        open_data(str(tmp_path / f"a{suffix}"))
    (tmp_path / f"a{suffix}").write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(FlatminimaError, match=rf"cannot be read .*: is it a whole {suffix} file\?") as caught:
        open_data(str(tmp_path / f"a{suffix}"))
    one_line(caught)


def test_pickled_objects_are_never_loaded(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "sprung",))

    np.savez(tmp_path / "a.npz", images=np.array([Trap()] * 9, dtype=object), labels=LABELS)
    with pytest.raises(FlatminimaError, match="has no array of numbers"):
        open_data(str(tmp_path / "a.npz"))
    assert not (tmp_path / "sprung").exists()
