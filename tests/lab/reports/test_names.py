"""Names are text, wherever they are shown."""

from __future__ import annotations

import html
import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from flatminima import progress
from flatminima.cli import main
from flatminima.cli.commands import COMMANDS
from flatminima.cli.output import Report
from flatminima.lab.demo import DemoStudy
from flatminima.lab.jobs import Local
from flatminima.lab.reports.pages import write_reports
from flatminima.lab.study import table
from flatminima.tables import Table, markdown_text

NAMES = ["net[v2]", "[/]", "[bold]b[/bold]", "a|b", "`rm`", "<b>&amp;", ":smile:", "x$y$", "_x_", "a_b", "\\[", "**"]


def shown(renderable: object, **options: bool) -> str:
    buffer = io.StringIO()
    Console(file=buffer, width=300, **options).print(renderable)
    return buffer.getvalue()


def test_a_table_shows_names_as_they_are_on_a_terminal() -> None:
    text = shown(Table(NAMES[0], tuple(NAMES), (tuple(NAMES), tuple(NAMES))))
    assert all(text.count(name) >= 3 for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_markdown_shows_names_as_they_are(name: str) -> None:
    written = markdown_text(name)
    # What a reader of Markdown sees: a backslash before punctuation stands for it.
    assert re.sub(r"\\([^\w\s]|_)", r"\1", written) == name
    plain = re.sub(r"\\([^\w\s]|_)", "", written)
    assert not re.search(r"[`*\[\]<|$&\\]|(?<!\w)_|_(?!\w)", plain)


def test_a_row_of_markdown_has_as_many_cells_as_the_table() -> None:
    text = Table("title", ("a", "b"), (("x|y\nz", "1"),)).markdown()
    assert "| x\\|y z | 1 |" in text


@pytest.mark.parametrize("name", NAMES)
def test_a_failed_runs_message_is_text_on_the_terminal_and_on_pages(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    study = DemoStudy(tmp_path, Local(), 1)
    run = study.tasks("minima")[0].folder.path.name
    summaries = [study.summary("minima", {run: f"no {name} here"})]
    monkeypatch.setitem(COMMANDS, "demo", lambda given: (False, Report({}, table(summaries))))
    assert main(["demo"]) == 0
    assert f"no {name} here" in " ".join(capsys.readouterr().out.split())
    write_reports(summaries, tmp_path / "page", heading=name, lead=name)
    assert html.escape(f"no {name} here") in html.escape(html.unescape((tmp_path / "page.html").read_text()))
    assert f"no {name} here" not in (tmp_path / "page.html").read_text() or name == html.escape(name)
    assert f"no {markdown_text(name)} here" in (tmp_path / "page.md").read_text()


def test_a_bar_shows_a_path_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    buffer = io.StringIO()
    console = Console(file=buffer, width=200, force_terminal=True)
    monkeypatch.setattr(progress, "terminal", lambda enabled=True: console)
    monkeypatch.setattr(progress, "PATIENCE_SECONDS", 0.0)
    with progress.ProgressBar("decoding data[v2]/[/]", 3) as bar:
        bar.advance()
    assert "decoding data[v2]/[/]" in buffer.getvalue()
