"""The README's tables and picture, from the committed records: ``make numbers`` writes them, a test compares them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from extensions.tables import BENCHMARK_TABLES, ROOT, summaries_of, with_interval

from flatminima.lab.experiments import SHORT_NAMES, Summary
from flatminima.tables import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

README = ROOT / "README.md"
PICTURES = {"light": ("#1a1a1b", "#fefefe"), "dark": ("#e6e9ee", "#15181d")}
"""Ink and paper."""

SIZES = {"middle size": ("medium", "medium-matched"), "small size": ("small-fresh", "small-matched")}
"""Rows of the picture: the folders of results, of the paper's protocol and of the matched one."""

SCENARIOS = {"scenario-1": "I, random labels", "scenario-2": "II, augmentation", "scenario-3": "III, batch size"}
FITS = ("", " (matched fit)")

MEASURES = (
    "log_det_fisher",
    "log_det_unit_fisher",
    "sensitivity",
    "diversity",
    "effective_dimension",
    "spectral_radius",
    "fisher_trace",
    "robustness",
    "train_loss",
)


def rankings_of(size: str) -> dict[str, Summary | None]:
    """The experiments of a size by their titles; none where runs are left, as what they show may still change."""
    found = {}
    for folder, fit in zip(SIZES[size], FITS, strict=True):
        whole = {summary.name: summary for summary in summaries_of(folder) if not summary.left}
        found.update({title + fit: whole.get(name) for name, title in SCENARIOS.items()})
    return found


def images_of(summary: Summary) -> int:
    """How many training images with right labels an experiment has."""
    (images,) = {spec["train_size"] for spec in summary.specs.values()}
    return images


def rankings() -> str:
    """Kendall's τ with the test error: an experiment a row, a measure a column."""
    rows = [
        (
            f"{title}, {images_of(found):,} images: {len(found.records)} minima",
            *(with_interval(found.correlations.get(measure)) for measure in MEASURES),
        )
        for size in SIZES
        for title, found in rankings_of(size).items()
        if found is not None
    ]
    return markdown(("", *(SHORT_NAMES[measure] for measure in MEASURES)), rows)


def gram() -> str:
    """One ξ beside other libraries: the smallest and largest ratios alone."""
    table: Table = BENCHMARK_TABLES["gram"][1]()
    columns = ["network", "samples", "flatminima", "vmap_grad", "backpack", "nngeometry", "opacus", "torchjd"]
    return markdown(columns, [[_range(row[table.header.index(name)]) for name in columns] for row in table.rows])


def regularizer() -> str:
    """A training step: ratios alone; of every tenth step with a penalty, the mean over ten."""
    table: Table = BENCHMARK_TABLES["regularizer"][1]()
    rows = {row[0]: [_range(cell) for cell in row[1:]] for row in table.rows}
    penalized = rows["finite-difference, M=8, main_gradient=sub-batches"]
    between = rows["step between penalties (every > 1)"]
    tenth = [_mean_of_ten(*cells) for cells in zip(penalized, between, strict=True)]
    shown = {
        "regularizer": penalized,
        "regularizer, `every=10`": tenth,
        "SAM (pytorch_optimizer)": rows["SAM"],
        "gradient norm penalty by double backward": rows["gradient norm penalty by double backward"],
    }
    return markdown(("", *table.header[1:]), [(said, *cells) for said, cells in shown.items()])


def _range(cell: str) -> str:
    """What a cell has in brackets, the smallest and largest; a cell without stays as it is."""
    found = re.search(r"\((\S+) to (\S+)\)", cell)
    return cell if found is None else f"{found[1]}–{found[2]}"


def _mean_of_ten(penalized: str, between: str) -> str:
    """Of one step with a penalty and nine between."""
    ends = zip(penalized.split("–"), between.split("–"), strict=True)
    return "–".join(f"{(float(with_penalty) + 9 * float(plain)) / 10:.2f}" for with_penalty, plain in ends)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; the second line aligns numbers."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


TABLES: dict[str, Callable[[], str]] = {"rankings": rankings, "gram": gram, "regularizer": regularizer}


def with_tables(text: str) -> str:
    """A text with what stands between its marks made anew."""
    for name, table in TABLES.items():
        mark = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        text, count = mark.subn(lambda m, table=table: f"{m[1]}\n{table()}\n\n{m[2]}", text)
        if count != 1:
            raise ValueError(f"README.md has {count} places for the table {name}")
    return text


def draw(path: Path, ink: str, paper: str) -> None:
    """Kendall's τ with its interval: a panel an experiment, in rows of one size; a measure a line."""
    import matplotlib as mpl
    import matplotlib.pyplot as plt

    style = {"font.size": 9, "text.color": ink, "axes.edgecolor": ink, "axes.labelcolor": ink, "xtick.color": ink}
    shape = len(SIZES), len(SCENARIOS) * len(FITS)
    with mpl.rc_context({**style, "ytick.color": ink, "svg.hashsalt": "flatminima"}):
        figure, panels = plt.subplots(*shape, figsize=(9.6, 4.9), sharex=True, sharey=True, layout="constrained")
        for row, size in zip(panels, SIZES, strict=True):
            row[0].set_ylabel(size, fontsize=8)
            for panel, (title, found) in zip(row, rankings_of(size).items(), strict=True):
                _draw_ranking(panel, title, found, ink, paper)
        panels[0, 0].set_xlim(-1.05, 1.05)
        panels[0, 0].set_yticks(range(len(MEASURES)), [SHORT_NAMES[name].strip() for name in MEASURES])
        panels[0, 0].invert_yaxis()
        figure.supxlabel("Kendall's τ with the test error, 95 % interval over seeds", fontsize=8)
        figure.savefig(path, facecolor=paper, metadata={"Date": None})
        plt.close(figure)


def _draw_ranking(panel: Axes, title: str, found: Summary | None, ink: str, paper: str) -> None:
    """The measures of one experiment, with γ̂ and its parts filled."""
    panel.set_facecolor(paper)
    panel.spines[["top", "right"]].set_visible(False)
    panel.axvline(0, color=ink, lw=0.6, ls=":")
    size = "not all run yet" if found is None else f"{len(found.records)} minima\n{images_of(found):,} images"
    panel.set_title(title.replace(" (", "\n(") + "\n" + size, fontsize=8)
    if found is None:
        return
    for row, name in enumerate(MEASURES):
        tau = found.correlations.get(name)
        if tau is None or not tau.defined:
            panel.text(0, row, "not measured", ha="center", va="center", fontsize=7)
            continue
        own = name in ("log_det_fisher", "log_det_unit_fisher", "sensitivity", "diversity")
        panel.plot([tau.low, tau.high], [row, row], color=ink, lw=1.2)
        panel.plot(tau.tau, row, "o" if own else "s", color=ink, mfc=ink if own else paper, ms=5)


def main() -> None:
    """Write them all."""
    README.write_text(with_tables(README.read_text(encoding="utf-8")), encoding="utf-8")
    for name, (ink, paper) in PICTURES.items():
        draw(ROOT / "docs" / "static" / f"rankings-{name}.svg", ink, paper)


if __name__ == "__main__":
    main()
