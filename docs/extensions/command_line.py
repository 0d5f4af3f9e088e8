"""``{command-help} train``: what ``flatminima train --help`` prints."""

from __future__ import annotations

import contextlib
import io
import os
from typing import Any, ClassVar

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from flatminima.cli import main

COLUMNS = "88"


def help_of(command: str) -> str:
    """The help of a command, of the program itself for ``flatminima``."""
    arguments = ["--help"] if command == "flatminima" else [command, "--help"]
    shown = io.StringIO()
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = COLUMNS
    try:
        with contextlib.redirect_stdout(shown):
            status = main(arguments)
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before
    if status or not shown.getvalue():
        raise ValueError(f"flatminima {' '.join(arguments)} ended with status {status}")
    return shown.getvalue().rstrip()


class CommandHelp(SphinxDirective):
    """The help as a block of text."""

    required_arguments = 1
    option_spec: ClassVar[dict[str, Any]] = {}

    def run(self) -> list[nodes.Node]:
        """One literal block."""
        text = help_of(self.arguments[0])
        return [nodes.literal_block(text, text, language="text")]


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the directive."""
    app.add_directive("command-help", CommandHelp)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
