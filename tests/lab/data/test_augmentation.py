from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flatminima.errors import FlatminimaError
from flatminima.lab.data.augmentation import AUGMENTATIONS, augment, confuse, hold_out
from support.images import numbered_set, numbers, random_images
from support.messages import one_line

PADDING = {"no-aug": 0, "flip-only": 0, "1-crop-f": 1, "4-crop-f": 4}


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
