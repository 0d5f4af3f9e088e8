"""Numbers and tables as text."""

from __future__ import annotations

import io
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from flatminima.tables import Table, latex_text, rendered, rounded, rounded_alone

NAMES = ["net[v2]", "[/]", "a|b", "<b>&amp;", "x$y$", "a_b", "\\[", "100%", "{x}", "~^#"]


@pytest.mark.parametrize(
    ("value", "error", "said"),
    [
        (-1093.7, 41.2, "-1094 ± 41"),
        (-1093.7, 412.0, "-1090 ± 410"),
        (0.0, 12.0, "0 ± 12"),
        (-0.3, 12.0, "0 ± 12"),
        (1.2345, 0.0996, "1.23 ± 0.10"),
        (1.2345e-5, 4.1e-7, "(1.234 ± 0.041)e-05"),
        (2.5e8, 4.2e7, "(2.50 ± 0.42)e+08"),
        (-9.998e-24, 5.5e-25, "(-1.000 ± 0.055)e-23"),
        (2e-25, 9.96e-24, "(0.0 ± 1.0)e-23"),
        (-358.0, 0.0, "-358"),
        (1.23456789, math.nan, "1.2346"),
        (math.nan, math.nan, "nan"),
        (math.inf, 1.0, "inf"),
    ],
)
def test_a_value_and_its_error_end_at_the_same_place(value: float, error: float, said: str) -> None:
    assert rounded(value, error) == said


@given(st.floats(-1e12, 1e12), st.floats(1e-12, 1e12))
def test_rounding_moves_a_value_by_a_twentieth_of_its_error_at_most(value: float, error: float) -> None:
    found = re.fullmatch(r"\(?(-?[\d.]+) ± ([\d.]+)\)?(e[+-]\d+)?", rounded(value, error))
    assert found
    mean, deviation = (float(found[group] + (found[3] or "")) for group in (1, 2))
    tiny = 1e-9 * abs(value)
    assert abs(mean - value) <= 0.0501 * error + tiny
    assert abs(deviation - error) <= 0.0501 * error
    assert len(found[1].partition(".")[2]) == len(found[2].partition(".")[2])
    assert float(rounded_alone(value, error)) == pytest.approx(mean, rel=1e-12, abs=1e-300)


def test_a_positive_difference_has_its_sign() -> None:
    assert rounded(12.3, 1.2, signed=True) == "+12.3 ± 1.2"
    assert rounded(1.2e-7, 1.2e-8, signed=True) == "(+1.20 ± 0.12)e-07"


def wide(columns: int) -> Table:
    header = ("measure", *(f"a minimum called {number}" for number in range(columns)))
    return Table(
        "title", header, (("γ̂", *map(str, range(100, 100 + columns))), ("trace", *("" for _ in range(columns))))
    )


@pytest.mark.parametrize("width", [40, 80, 200])
def test_a_table_that_is_too_wide_goes_on_below_and_nothing_is_cut(width: int) -> None:
    buffer = io.StringIO()
    Console(file=buffer, width=width).print(wide(7))
    lines = buffer.getvalue().splitlines()
    assert max(map(cell_len, lines)) <= width
    assert "…" not in buffer.getvalue()
    for number in range(7):
        assert f"a minimum called {number}" in buffer.getvalue()
        assert str(100 + number) in buffer.getvalue()
    assert sum("measure" in line for line in lines) == {40: 7, 80: 3, 200: 1}[width]


def test_a_name_longer_than_the_terminal_is_folded() -> None:
    name = "".join(f"{number:03d}" for number in range(60))
    shown = rendered(Table("", ("", name), (("x", "1"),)))
    assert name in re.sub(r"[^\d]", "", shown)


@pytest.mark.parametrize("name", NAMES)
def test_names_are_text_in_html_and_latex(name: str) -> None:
    page = Table(name, ("measure", name), ((name, name),)).html()
    assert "<b>" not in page.replace("<tbody>", "")
    text = latex_text(name)
    assert not re.search(r"(?<!\\)[&%#_{}](?!\})", re.sub(r"\\text\w+\{\}|\$\\\w+\$", "", text))


def test_latex_has_numbers_and_greek_letters_in_its_mathematics() -> None:
    table = Table(
        "γ̂", ("measure", "a_b"), (("  ξ²", "(-1.234 ± 0.041)e-05"), ("n", "-3 ± 2"), ("loss", "")), "how", (2,)
    )
    assert table.latex("tab:x").splitlines() == [
        r"\begin{table}",
        r"\centering\small\setlength{\tabcolsep}{4pt}",
        r"\caption{$\hat{\gamma}$. how.}",
        r"\label{tab:x}",
        r"\begin{tabular}{lr}",
        r"\toprule",
        r"measure & a\_b \\",
        r"\midrule",
        r"\quad $\xi$$^2$ & $(-1.234 \pm 0.041) \times 10^{-5}$ \\",
        r"n & $-3 \pm 2$ \\",
        r"\midrule",
        r"loss &  \\",
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]


def test_markdown_has_the_caption_below() -> None:
    assert wide(1).markdown().count("\n") == 6
    assert Table("t", ("a",), (("b",),), "20 subsets").markdown().endswith("\n\n20 subsets\n")
