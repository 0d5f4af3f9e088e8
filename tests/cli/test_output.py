"""What a command says of the files that it writes."""

from __future__ import annotations

from pathlib import Path

from flatminima.cli.output import Files
from flatminima.errors import FlatminimaError


def test_every_file_that_cannot_be_written_is_named() -> None:
    def no_space(path: Path) -> None:
        raise FlatminimaError(f"cannot write {path}: No space left on device")

    files = Files()
    for name in ("page", "table"):
        files.write(name, Path(f"{name}.md"), "has it.", no_space)
    files.write("plot", Path("plot.svg"), "shows it.", lambda path: None)
    assert str(files.unwritten) == "; ".join(
        f"cannot write {name}.md: No space left on device" for name in ("page", "table")
    )
    assert files.named_in({}) == {"plot": "plot.svg"}
