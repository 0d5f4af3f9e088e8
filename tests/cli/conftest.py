from __future__ import annotations

from pathlib import Path

import pytest

from flatminima import cli
from support.command_line import TRAIN


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with two trained runs of the same images."""
    root = tmp_path_factory.mktemp("runs")
    for extra in ([], ["--regularizer.beta", "50", "--regularizer.num-sub-batches", "2"]):
        assert cli.main([*TRAIN, *extra, "--root", str(root)]) == 0
    return root


@pytest.fixture(autouse=True)
def no_debugging(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLATMINIMA_DEBUG", raising=False)


@pytest.fixture
def runs(trained: Path) -> list[str]:
    return sorted(map(str, trained.iterdir()))
