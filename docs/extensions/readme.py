"""The README's tables and picture, from the committed records: ``make numbers`` writes them, a test compares them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from extensions.tables import BENCHMARK_TABLES, ROOT, summaries_of, with_interval

from flatminima.lab.experiments import SHORT_NAMES, RankCorrelation, Summary
from flatminima.tables import Table

README = ROOT / "README.md"
PICTURES = {"light": ("#1a1a1b", "#fefefe"), "dark": ("#e6e9ee", "#15181d")}
"""Ink and paper."""

EXPERIMENTS = {
    "I, random labels": ("small-fresh", "scenario-1"),
    "II, augmentation": ("small-fresh", "scenario-2"),
    "III, batch size": ("small-fresh", "scenario-3"),
    "I, random labels (matched fit)": ("small-matched", "scenario-1"),
    "II, augmentation (matched fit)": ("small-matched", "scenario-2"),
    "III, batch size (matched fit)": ("small-matched", "scenario-3"),
}
"""Of the picture and of the table: a folder of results, and one of its experiments."""

MEASURES = (
    "log_det_fisher",
    "log_det_unit_fisher",
    "sensitivity",
    "diversity",
    "spectral_radius",
    "fisher_trace",
    "robustness",
    "train_loss",
)


def correlations() -> dict[str, Mapping[str, RankCorrelation]]:
    """By experiment, with the number of minima in its name; by measure."""
    found = {}
    for title, (folder, name) in EXPERIMENTS.items():
        summary: Summary = next(summary for summary in summaries_of(folder) if summary.name == name)
        found[f"{title}: {len(summary.records)} minima"] = summary.correlations
    return found


def rankings() -> str:
    """Kendall's τ with the test error: an experiment a row, a measure a column."""
    rows = tuple(
        (title, *(with_interval(found.get(measure)) for measure in MEASURES)) for title, found in correlations().items()
    )
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
    """Kendall's τ with its interval: a panel an experiment, a measure a row."""
    import matplotlib as mpl
    import matplotlib.pyplot as plt

    found = correlations()
    style = {"font.size": 9, "text.color": ink, "axes.edgecolor": ink, "axes.labelcolor": ink, "xtick.color": ink}
    with mpl.rc_context({**style, "ytick.color": ink, "svg.hashsalt": "flatminima"}):
        figure, panels = plt.subplots(1, len(found), figsize=(9.6, 2.5), sharey=True, layout="constrained")
        for panel, (title, measures) in zip(panels, found.items(), strict=True):
            for row, name in enumerate(MEASURES):
                tau = measures.get(name)
                if tau is None or not tau.defined:
                    panel.text(0, row, "not measured", ha="center", va="center", fontsize=7)
                    continue
                own = name in ("log_det_fisher", "log_det_unit_fisher", "sensitivity", "diversity")
                panel.plot([tau.low, tau.high], [row, row], color=ink, lw=1.2)
                panel.plot(tau.tau, row, "o" if own else "s", color=ink, mfc=ink if own else paper, ms=5)
            panel.axvline(0, color=ink, lw=0.6, ls=":")
            panel.set_title(title.replace(" (", "\n(").replace(": ", "\n"), fontsize=8)
            panel.set_xlim(-1.05, 1.05)
            panel.spines[["top", "right"]].set_visible(False)
            panel.set_facecolor(paper)
        panels[0].set_yticks(range(len(MEASURES)), [SHORT_NAMES[name].strip() for name in MEASURES])
        panels[0].invert_yaxis()
        figure.supxlabel("Kendall's τ with the test error, 95 % interval over seeds", fontsize=8)
        figure.savefig(path, facecolor=paper, metadata={"Date": None})
        plt.close(figure)


def main() -> None:
    """Write them all."""
    README.write_text(with_tables(README.read_text(encoding="utf-8")), encoding="utf-8")
    for name, (ink, paper) in PICTURES.items():
        draw(ROOT / "docs" / "static" / f"rankings-{name}.svg", ink, paper)


if __name__ == "__main__":
    main()
