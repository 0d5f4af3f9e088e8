"""The colours of pictures: told apart in grey too, and on a page each stands for one of its own, light or dark."""

from __future__ import annotations

PAPER, INK, MUTED, LINE = "#fefefe", "#1a1a1b", "#6f767f", "#dde2e9"
"""Of what lies beneath, of text, of frames, of grids."""

SERIES = ("#1f4e8c", "#d9822b", "#2e8b70")
"""Of minima or of kinds of training, one after the other; their markers differ too."""

PARTS = ("#d5dbe3", "#5b9bd5", "#1f3b63")
"""Of γ̂'s residual, sensitivity and diversity, from light to dark."""

VARIABLES = {
    **{PAPER: "card", INK: "ink", MUTED: "muted", LINE: "line"},
    **dict(zip(SERIES, ("first", "second", "third"), strict=True)),
    **dict(zip(PARTS, ("residual", "sensitivity", "diversity"), strict=True)),
}
"""The names of the page's own colours (CSS variables)."""
