"""What every message of ours must be."""

from __future__ import annotations

import pytest

from flatminima.errors import FlatminimaError


def one_line(caught: pytest.ExceptionInfo[FlatminimaError]) -> str:
    message = str(caught.value)
    assert message
    assert "\n" not in message
    return message
