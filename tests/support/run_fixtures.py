"""Fixtures of the tests that train; a test file asks for them by ``pytest_plugins``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from flatminima.lab.runs.training import train
from support.runs import ALL


@pytest.fixture
def one_thread() -> Iterator[None]:
    """The same number of threads here and in the processes that get killed: sums depend on it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with all runs, each trained in one go; nobody writes there."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("uninterrupted")
    for spec in ALL.values():
        train(spec, root)
    torch.set_num_threads(threads)
    return root
