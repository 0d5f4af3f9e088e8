from __future__ import annotations

from typing import Any

import pytest

from flatminima.errors import FlatminimaError
from flatminima.lab.reading import Reading
from support.messages import one_line


def test_a_size_is_the_shorter_side_or_both() -> None:
    assert Reading().size is None
    assert Reading(resize="256").size == (256,)
    assert Reading(resize="224x160").size == (224, 160)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"resize": "large"}, "resize must be a number of pixels, or HEIGHTxWIDTH as in 224x224, got 'large'"),
        ({"resize": "0"}, "resize must be"),
        ({"resize": "1x2x3"}, "resize must be"),
        ({"crop": 0}, "crop must be a positive number, got 0"),
        ({"train_size": -1}, "train_size must be a positive number"),
        ({"max_length": 0}, "max_length must be a positive number"),
        ({"in_channels": 2}, r"in_channels must be 1 \(grey\) or 3 \(RGB\), got 2"),
        ({"input_column": ("a", "b", "c")}, "input_column takes one name, or two, got a, b, c"),
    ],
)
def test_what_is_out_of_range_is_one_line(options: dict[str, Any], said: str) -> None:
    with pytest.raises(FlatminimaError, match=said) as caught:
        Reading(**options)
    one_line(caught)


@pytest.mark.parametrize("option", [{"normalize": "none"}, {"resize": "8"}, {"crop": 8}, {"in_channels": 3}])
def test_options_of_images_take_the_place_of_a_networks_own_transforms(option: dict[str, Any]) -> None:
    assert Reading(**option).changes_images
    assert not Reading(split="test", max_length=3, train_size=5, label_column="y").changes_images
