"""Kinds of sources beside those that come along."""

from __future__ import annotations

import pytest

from flatminima.lab.data import ImageSet, open_data
from flatminima.lab.data.own import KINDS, Opened, source_kind
from flatminima.lab.reading import Reading
from support.images import image_set


@pytest.fixture(autouse=True)
def _kinds_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flatminima.lab.data.own.registry.KINDS", kinds := list(KINDS))
    monkeypatch.setattr("flatminima.lab.data.own.opening.KINDS", kinds)


def test_a_kind_of_ones_own_is_opened_by_its_name_and_drawn_from() -> None:
    @source_kind("zip:FILE", lambda source: source.startswith("zip:"))
    def open_zip(source: str, reading: Reading) -> Opened:
        return Opened(image_set(), f"{source}: 7 images")

    opened = open_data("zip:a", Reading(train_size=3))
    assert isinstance(opened.data, ImageSet)
    assert len(opened.data) == 3
    assert opened.about == "zip:a: 7 images"
