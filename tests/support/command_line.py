"""The command line called in this process, with quick runs."""

from __future__ import annotations

import pytest

from flatminima import cli

TRAIN = ["train", "digits", "--model", "mlp", "--epochs", "2", "--train-size", "200", "--no-progress"]
MEASURE = ["--subset-size", "20", "--trials", "2", "--no-progress"]


def error_of(capsys: pytest.CaptureFixture[str], arguments: list[str], status: int = 2, lines: int = 1) -> str:
    """The command's last line on standard error; by default the only one."""
    assert cli.main(arguments) == status
    captured = capsys.readouterr()
    said = captured.err.strip().splitlines()
    assert captured.out == ""
    assert len(said) == lines
    assert said[-1].startswith("flatminima: error: ")
    return said[-1]
