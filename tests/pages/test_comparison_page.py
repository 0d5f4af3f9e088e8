"""The page of a comparison."""

from __future__ import annotations

import dataclasses
import html
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

import flatminima as fm
from flatminima.errors import FlatminimaError
from flatminima.pages.drawing import picture
from support.results import characterization, comparison

ODD = "<b>a</b> & $x$"


def two(*, shares: bool = True, loss: float = 1e-3) -> fm.Comparison:
    return comparison(
        **{
            "plain": characterization(-600, 250, draw=1, shares=shares, train_loss=loss),
            ODD: characterization(-610, 200, draw=2, shares=shares),
        }
    )


class Outline(HTMLParser):
    """What a page loads, and whether its elements are closed."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.scripts = 0
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.scripts += tag == "script"
        self.loaded += [value or "" for name, value in attributes if name in ("src", "href", "xlink:href")]
        if tag not in ("meta", "link", "path", "use", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.loaded += [value or "" for name, value in attributes if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag: str) -> None:
        if tag in self.open:
            assert self.open.pop() == tag


def test_the_page_is_whole_in_itself_and_has_what_the_comparison_says(tmp_path: Path) -> None:
    both = two()
    page = fm.report(both, tmp_path / "folder" / "page.html")
    assert page == tmp_path / "folder" / "page.html"
    text = page.read_text()
    outline = Outline()
    outline.feed(text)
    assert (outline.open, outline.scripts) == ([], 0)
    assert all(address.startswith(("#", "data:,")) for address in outline.loaded)
    assert "<b>a</b>" not in text
    words = " ".join(html.unescape(text).split())
    for line in both.findings():
        assert line in words
    assert len(re.findall("<figure>", text)) == 5
    assert "Shares of the Fisher trace by module" in words
    assert "Shares by parameter" in words
    assert "flatminima 0.1.0, PyTorch 2.6.0" in words


def test_without_shares_the_page_says_how_to_get_them(tmp_path: Path) -> None:
    text = fm.report(two(shares=False), tmp_path / "page.html").read_text()
    assert "per_parameter=True" in text
    assert len(re.findall("<figure>", text)) == 4


def test_a_page_of_unequal_losses_calls_none_the_best_by_gamma(tmp_path: Path) -> None:
    text = html.unescape(fm.report(two(loss=1e-1), tmp_path / "page.html").read_text())
    assert "read γ̂ at unit residuals, not γ̂" in text
    assert "the best by γ̂" not in text


def test_a_page_takes_comparisons_alone_and_folders_that_can_be_written(tmp_path: Path) -> None:
    with pytest.raises(FlatminimaError, match="takes a comparison, got Characterization: compare the models first"):
        fm.report(characterization(), tmp_path / "page.html")  # type: ignore[arg-type]
    (tmp_path / "file").write_text("")
    with pytest.raises(FlatminimaError, match="cannot write"):
        fm.report(two(), tmp_path / "file" / "page.html")


@pytest.mark.parametrize("package", ["jinja2", "matplotlib", "scipy"])
def test_without_its_packages_the_extra_is_named(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "flatminima.pages.writing", raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(FlatminimaError, match=rf"a page needs {package}: pip install 'flatminima\[report\]'"):
        fm.report(two(), tmp_path / "page.html")


def test_powers_of_ten_are_letters_where_dollars_are_dollars() -> None:
    drawn: list[str] = []

    def draw(axes) -> None:
        axes.semilogy([1, 2], [1e-3, 1e3])
        original = axes.yaxis.set_major_formatter

        def kept(formatter) -> None:
            original(formatter)
            formatter.set_axis(axes.yaxis)
            formatter.set_locs([1e-3, 1.0, 1e3])
            drawn.extend(formatter(value) for value in (1e-3, 1.0, 1e3))

        axes.yaxis.set_major_formatter = kept

    picture("title", "description", draw)
    assert drawn == ["10⁻³", "10⁰", "10³"]


def test_importing_the_library_imports_no_extra() -> None:
    code = (
        "import sys, flatminima\n"
        "flatminima.report, flatminima.Comparison\n"
        "print(sorted({'matplotlib', 'jinja2', 'pandas', 'scipy', 'safetensors', 'pydantic'} & set(sys.modules)))"
    )
    completed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert completed.stdout.strip() == "[]"


def test_a_minimum_without_parts_has_a_page_too(tmp_path: Path) -> None:
    parts = dict.fromkeys(("residual", "sensitivity", "diversity", "log_det_unit_fisher"))
    both = comparison(**{name: dataclasses.replace(c, **parts) for name, c in two().characterizations.items()})
    text = fm.report(both, tmp_path / "page.html").read_text()
    assert len(re.findall("<figure>", text)) == 4
