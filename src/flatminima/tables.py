"""Numbers and tables as text: on a terminal, in Markdown, LaTeX and HTML."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import StringIO
from typing import Any

import rich.table
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.text import Text

TEXT_WIDTH = 80
"""Columns of what is printed as text, whatever the terminal."""

UNCERTAIN_DIGITS = 2
"""Significant digits of a standard error; its value ends where it does."""

CERTAIN_DIGITS = 5
"""Significant digits of a value without a standard error."""

_PLAIN_EXPONENTS = range(-3, 6)
"""Powers of ten of numbers that are written out; others are written with their power."""


def rounded(value: float, error: float = math.nan, *, signed: bool = False) -> str:
    """A value and its standard error, rounded at the same place: the error to two significant digits.

    Args:
        value: a number.
        error: zero or NaN where there is none: the value has five significant digits then.
        signed: with a plus where it is positive.

    Example:
        >>> rounded(-1093.7, 41.2), rounded(1.2345e-5, 4.1e-7), rounded(0.5)
        ('-1094 ± 41', '(1.234 ± 0.041)e-05', '0.5')
    """
    if not math.isfinite(value):
        return str(value)
    mean, deviation, power = _rounded_together(value, error, "+" if signed else "")
    if not deviation:
        return mean
    return f"({mean} ± {deviation}){power}" if power else f"{mean} ± {deviation}"


def rounded_alone(value: float, error: float) -> str:
    """As :func:`rounded`, without the error that says where to round.

    Example:
        >>> rounded_alone(-1093.7, 41.2), rounded_alone(1.2345e-5, 4.1e-7)
        ('-1094', '1.234e-05')
    """
    if not math.isfinite(value):
        return str(value)
    mean, _, power = _rounded_together(value, error, "")
    return f"{mean}{power}"


def _rounded_together(value: float, error: float, sign: str) -> tuple[str, str, str]:
    """Value, error, and the power of ten that both are to be multiplied by; without an error the value alone."""
    if not (math.isfinite(error) and error > 0):
        return f"{value:{sign}.{CERTAIN_DIGITS}g}", "", ""
    error = float(f"{error:.{UNCERTAIN_DIGITS - 1}e}")
    last = _power_of_ten(error) - (UNCERTAIN_DIGITS - 1)
    power = _power_of_ten(max(abs(round(value, -last)), error))  # as shown: 9.998 ± 0.55 is 10.00 ± 0.55
    scale = 0 if power in _PLAIN_EXPONENTS else power
    places = scale - last
    mean, deviation = (_ending_at(number / 10.0**scale, places, form) for number, form in ((value, sign), (error, "")))
    return mean, deviation, f"e{scale:+03d}" if scale else ""


def _power_of_ten(number: float) -> int:
    return math.floor(math.log10(number))


def _ending_at(number: float, places: int, sign: str) -> str:
    return f"{round(number, places) + 0.0:{sign}.{max(places, 0)}f}"  # 0.0: no negative zero


@dataclass(frozen=True)
class Table:
    """Cells of text, with a heading for every column and every row, in several languages.

    Attributes:
        title: stands above it.
        header: as long as a row; the first heading is that of the rows' names.
        rows: a name and its cells. A cell may have several lines, on the terminal and on pages.
        caption: stands below it: how the numbers were obtained.
        rules: numbers of the rows above which there is a line.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""
    rules: tuple[int, ...] = ()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """As many columns beside each other as fit, then the others below: nothing is cut."""
        if self.title:
            yield Text(self.title, "table.title")
        yield from self._parts(console, options)
        if self.caption:
            yield Text(self.caption, "table.caption")

    def _parts(self, console: Console, options: ConsoleOptions) -> Iterator[rich.table.Table]:
        chosen = [0]
        for column in range(1, len(self.header)):
            if len(chosen) > 1 and not self._fits([*chosen, column], console, options):
                yield self._part(chosen)
                chosen = [0]
            chosen.append(column)
        yield self._part(chosen)

    def _fits(self, columns: Sequence[int], console: Console, options: ConsoleOptions) -> bool:
        unlimited = options.update(max_width=100_000)
        return Measurement.get(console, unlimited, self._part(columns)).maximum <= options.max_width

    def _part(self, columns: Sequence[int]) -> rich.table.Table:
        # Cells may be names, and a name is text: neither markup nor an emoji.
        shown = rich.table.Table()
        for column in columns:
            justify = "left" if column == 0 else "right"
            shown.add_column(Text(self.header[column]), justify=justify, overflow="fold")  # type: ignore[arg-type]
        for number, row in enumerate(self.rows):
            if number in self.rules:
                shown.add_section()
            shown.add_row(*(Text(row[column]) for column in columns))
        return shown

    def __str__(self) -> str:
        return rendered(self)

    def markdown(self) -> str:
        """The table with its title above it and its caption below."""
        rule = ("---", *("---:" for _ in self.header[1:]))
        lines = [[markdown_text(cell) for cell in line] for line in (self.header, *self.rows)]
        body = "\n".join("| " + " | ".join(line) + " |" for line in (lines[0], rule, *lines[1:]))
        caption = f"\n{markdown_text(self.caption)}\n" if self.caption else ""
        return f"**{markdown_text(self.title)}**\n\n{body}\n{caption}"

    def latex(self, label: str | None = None) -> str:
        r"""A ``table`` with title and caption, for ``\usepackage{booktabs}``."""
        sentences = [part if part.endswith(".") else f"{part}." for part in (self.title, self.caption) if part]
        lines = [
            r"\begin{table}",
            r"\centering\small\setlength{\tabcolsep}{4pt}",
            rf"\caption{{{latex_text(' '.join(sentences))}}}",
            *([] if label is None else [rf"\label{{{label}}}"]),
            rf"\begin{{tabular}}{{l{'r' * (len(self.header) - 1)}}}",
            r"\toprule",
            _latex_row(map(latex_text, self.header)),
            r"\midrule",
        ]
        for number, (name, *cells) in enumerate(self.rows):
            lines += [r"\midrule"] if number in self.rules else []
            indent = r"\quad " * ((len(name) - len(name.lstrip())) // 2)
            lines.append(_latex_row([indent + latex_text(name), *map(_latex_cell, cells)]))
        return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}"]) + "\n"

    def html(self) -> str:
        """A ``table`` element without style, for notebooks."""
        heading = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in self.header)
        rows = "".join(
            f'<tr><th scope="row">{html.escape(name).replace("  ", "&emsp;")}</th>'
            + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
            + "</tr>"
            for name, *cells in self.rows
        )
        words = " ".join(f"{part}." for part in (self.title, self.caption) if part)
        caption = f"<caption>{html.escape(words)}</caption>"
        return f"<table>{caption}<thead><tr>{heading}</tr></thead><tbody>{rows}</tbody></table>"


def rendered(renderable: Any) -> str:
    """What a terminal of 80 columns would show."""
    buffer = StringIO()
    Console(file=buffer, width=TEXT_WIDTH).print(renderable)
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines())


def markdown_text(text: str) -> str:
    """Markdown that shows ``text`` as it is, in one line: names may have anything in them."""
    return re.sub(r"[\\`*\[\]<>|$~&]|(?<!\w)_|_(?!\w)", r"\\\g<0>", " ".join(text.split()))


_NUMBER = re.compile(r"\(?[+-]?\d[\d.]*(?: ± [\d.]+)?\)?(?:e(?P<power>[+-]\d+))?")

_LATEX_MARKS = {
    **{mark: f"\\{mark}" for mark in "{}$&#%_"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "–": "--",
    "—": "---",
}
_LATEX_MATHEMATICS = {
    **{"α": r"\alpha", "β": r"\beta", "γ": r"\gamma", "δ": r"\delta", "ε": r"\varepsilon", "λ": r"\lambda"},
    **{"μ": r"\mu", "ξ": r"\xi", "ρ": r"\rho", "σ": r"\sigma", "τ": r"\tau", "Π": r"\Pi", "Σ": r"\Sigma"},
    **{"Ψ": r"\Psi", "ℓ": r"\ell", "∞": r"\infty", "‖": r"\Vert", "²": "^2", "⁴": "^4", "ᵀ": r"^\top"},
    **{"±": r"\pm", "×": r"\times", "·": r"\cdot", "−": "-", "≤": r"\le", "≥": r"\ge", "→": r"\to", "…": r"\dots"},
    **{"|": r"\vert", "<": "<", ">": ">"},
}


def latex_text(text: str) -> str:
    """LaTeX that shows ``text`` as it is: names may have anything in them, and labels have Greek letters."""
    return re.sub(r"(.)(\u0302?)", _latex_mark, " ".join(text.split()))


def _latex_mark(found: re.Match[str]) -> str:
    mark, hat = found.groups()
    if mark in _LATEX_MATHEMATICS:
        symbol = _LATEX_MATHEMATICS[mark]
        return rf"$\hat{{{symbol}}}$" if hat else f"${symbol}$"
    return _LATEX_MARKS.get(mark, mark) + hat


def _latex_cell(text: str) -> str:
    number = _NUMBER.fullmatch(text)
    if number is None:
        return latex_text(text)
    digits = text.partition("e")[0].replace("±", r"\pm")
    return f"${digits}$" if number["power"] is None else rf"${digits} \times 10^{{{int(number['power'])}}}$"


def _latex_row(cells: Iterable[str]) -> str:
    return rf"{' & '.join(cells)} \\"
