"""The page of a comparison: which minimum, by how much, is that sure, how much of it is fit, which layers."""

from __future__ import annotations

import datetime
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from flatminima.errors import FlatminimaError, needing
from flatminima.measures import Comparison

if TYPE_CHECKING:  # an extra
    from flatminima.pages.drawing import Picture

_WIDTH_INCHES = 4.4

Kind = Literal["parts", "differences", "shares", "trials", "spectrum"]


def report(comparison: Comparison, path: str | os.PathLike[str]) -> Path:
    """Write a self-contained HTML page of compared minima, with pictures and every number (extra ``report``).

    Layers are shown where the minima were measured with ``per_parameter=True``.

    Args:
        comparison: what :func:`~flatminima.compare` returns.
        path: the page; its folder is made if there is none.

    Returns:
        The path.

    Raises:
        FlatminimaError: for anything but a comparison, without the packages, or where the page cannot be written.
    """
    if not isinstance(comparison, Comparison):
        raise FlatminimaError(f"report takes a comparison, got {type(comparison).__name__}: compare the models first")
    with needing("report", "a page"):  # named before what is a part of it: pictures, and intervals in the findings
        import matplotlib  # noqa: F401
        import scipy  # noqa: F401

        from flatminima.pages.writing import write_page
    page = Path(path)
    write_page(
        page,
        "comparison.html.j2",
        minima=comparison.characterizations,
        findings=comparison.findings(),
        pictures=_pictures(comparison),
        tables=comparison.tables(),
        details={name: c.tables() for name, c in comparison.characterizations.items()},
        has_shares=_has_shares(comparison),
        written=f"{datetime.datetime.now().astimezone():%Y-%m-%d at %H:%M %Z}",
    )
    return page


def _pictures(comparison: Comparison) -> list[Picture]:
    reference, decisive = comparison.reference, comparison.decisive or "log_det_fisher"
    return [
        *([_picture(comparison, "parts", "What γ̂ is made of")] if comparison.has_parts else []),
        _picture(comparison, "differences", f"How far from {reference}, by the same subsets"),
        _picture(comparison, "trials", "Every trial, and the mean ± standard error", measure=decisive),
        *([_picture(comparison, "shares", "Which layers the Fisher trace lies in")] if _has_shares(comparison) else []),
        _picture(comparison, "spectrum", "Eigenvalues of ξ"),
    ]


def _picture(comparison: Comparison, kind: Kind, title: str, **options: Any) -> Picture:
    """In the colours of the page; the numbers behind it are in the tables, which its description says."""
    with needing("report", "a page"):
        from flatminima.pages.drawing import picture
    rows = {"spectrum": 4.0, "shares": 6.5, "differences": len(comparison) - 0.5}.get(kind, float(len(comparison)))
    return picture(
        title,
        f"{title}, of {', '.join(comparison)}; the numbers are in the tables below",
        lambda axes: comparison.plot(kind, ax=axes, **options),
        (_WIDTH_INCHES, 1.3 + 0.45 * rows),
    )


def _has_shares(comparison: Comparison) -> bool:
    return all(comparison[name].shares is not None for name in comparison)
