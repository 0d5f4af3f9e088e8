"""Tables of results as text."""

from __future__ import annotations

from io import StringIO
from typing import Any

from rich.console import Console


def rendered(renderable: Any) -> str:
    """What a terminal of 120 columns would show."""
    buffer = StringIO()
    Console(file=buffer, width=120).print(renderable)
    return buffer.getvalue().rstrip()
