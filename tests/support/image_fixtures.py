"""Fixtures of the tests that load images; a test file asks for them by ``pytest_plugins``."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.images import Folder, make_folder


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return make_folder(tmp_path / "flowers")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"
