"""Results as tables, for terminals and as text."""

from __future__ import annotations

from io import StringIO
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from flatminima.measures.registry import label_of

if TYPE_CHECKING:  # results draw themselves by these functions
    from flatminima.measures.comparison import Comparison
    from flatminima.measures.results import Characterization


def characterization_table(characterization: Characterization) -> Table:
    """Every measure with its standard error, and the training loss."""
    settings = characterization.settings
    table = Table(title=f"Minimum with {characterization.num_parameters:,} parameters")
    for heading in ("measure", "mean", "standard error"):
        table.add_column(heading, justify="left" if heading == "measure" else "right")
    for name, estimate in characterization.estimates().items():
        table.add_row(label_of(name), f"{estimate.mean:.6g}", f"{estimate.standard_error:.2g}")
    table.add_section()
    table.add_row("training loss", f"{characterization.train_loss:.6g}", "")
    if characterization.train_accuracy is not None:
        table.add_row("training accuracy", f"{characterization.train_accuracy:.4%}", "")
    drawn = (
        f"{settings.trials} subsets of {settings.subset_size} from {characterization.num_samples:,} samples, "
        f"seed {settings.seed}"
    )
    fisher = "" if settings.fisher == "empirical" else f", exact Fisher by {settings.fisher}"
    left_out = "".join(f"; no {label_of(name).strip()}: {reason}" for name, reason in settings.left_out.items())
    table.caption = Text(f"{drawn}, BatchNorm {settings.batchnorm}{fisher}{left_out}", "table.caption")
    return table


def comparison_table(comparison: Comparison) -> Table:
    """Every measure of every minimum, with its rank and its difference to the best by γ̂; and the training losses."""
    ranks = comparison.ranks()
    best = min(ranks, key=ranks.__getitem__)
    table = Table(title=Text(f"Minima on the same subsets; differences to {best!r}, the best by γ̂", "table.title"))
    table.add_column("measure")
    for name in comparison.characterizations:
        table.add_column(Text(name), justify="right")  # a name is text: no markup, no emoji
    for measure in comparison.measures():
        cells = [_cell(comparison, name, best, measure) for name in comparison.characterizations]
        table.add_row(Text(label_of(measure)), *cells)
    table.add_section()
    table.add_row("training loss", *(f"{c.train_loss:.4g}" for c in comparison.characterizations.values()))
    return table


def _cell(comparison: Comparison, name: str, best: str, measure: str) -> str:
    estimates = comparison.characterizations[name].estimates()
    if measure not in estimates:
        return ""
    ranks = comparison.ranks(measure)
    text = f"{estimates[measure].mean:.6g}" + (f"  (rank {ranks[name]})" if name in ranks else "")
    if name != best and measure in comparison.characterizations[best].estimates():
        difference = comparison.difference(name, best, measure)
        text += f"\n{difference.mean:+.3g} ± {difference.standard_error:.2g}"
    return text


def rendered(renderable: Any) -> str:
    """What a terminal of 120 columns would show."""
    buffer = StringIO()
    Console(file=buffer, width=120).print(renderable)
    return buffer.getvalue().rstrip()
