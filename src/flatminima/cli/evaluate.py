"""``flatminima evaluate``: a ledger in, out what counts as evidence that a measure works."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from rich.console import Group
from rich.text import Text
from tyro.conf import OmitArgPrefixes, Positional, arg

from flatminima.cli.options import Output, parse
from flatminima.cli.output import Files, Report, working
from flatminima.errors import FlatminimaError
from flatminima.files import require_writable
from flatminima.progress import ProgressBar


@dataclass(frozen=True)
class Evaluate:
    """Judge measures by a ledger of minima: which say something about the error beyond the training loss?

    LEDGER is a CSV file with a line of names and a row for every minimum, such as `reproduce` writes. Prints for every
    measure Kendall's τ, partial and granulated τ, conditional mutual information and the robust sign error, with
    bootstrap intervals, and writes the same as a page. docs/ideas/protocols.md says what each tells, and does not.

    Example: flatminima evaluate ledger.csv --error test_error --given train_loss --hyper-parameters lr batch_size

    Example: flatminima evaluate ledger.csv --accuracy final_acc --given train_loss --measures fisher_trace sharpness
    """

    ledger: Annotated[Positional[Path | None], arg(metavar="LEDGER")] = None
    """The CSV file."""
    error: str | None = None
    """Column of the test error, or of the generalization gap (None: test_error)."""
    accuracy: str | None = None
    """In its place, the column of the test accuracy."""
    given: str | None = None
    """Column that a measure must add to (None: train_loss, where there is one)."""
    hyper_parameters: tuple[str, ...] = ()
    """Columns that make a setting; without them no granulated τ, mutual information or sign error."""
    measures: tuple[str, ...] = ()
    """Columns to judge (none: all numeric columns that are not named otherwise, nor called seed)."""
    seed_column: str | None = None
    """Column of seeds: they are then what is redrawn for the intervals (None: single minima are)."""
    where: tuple[str, ...] = ()
    """Only rows with these values, as COLUMN=VALUE."""
    test_size: int = 10_000
    """Samples in the test set, from which the sign error knows which differences of errors are sure."""
    report: Annotated[Path, arg(aliases=("-o",))] = Path("evaluation.html")
    """The page to write."""
    output: OmitArgPrefixes[Output] = field(default_factory=Output)


def evaluate(given: list[str]) -> tuple[bool, Report]:
    """Options in, a report out."""
    options = parse(Evaluate, given, prog="evaluate")
    if options.ledger is None:
        raise FlatminimaError("evaluate takes a ledger: a CSV file with a line of names and a row for every minimum")
    with working("evaluate", options.output):
        require_writable(options.report)

        from flatminima.lab.reports import evidence_table, write_evaluation
        from flatminima.measures import jsonable
        from flatminima.protocols import Ledger, evaluate, read_table

        table = read_table(options.ledger, options.where)
        usual = {name: name if name in table else None for name in ("test_error", "train_loss")}
        ledger = Ledger.of(
            table,
            error=options.error or (usual["test_error"] if options.accuracy is None else None),
            accuracy=options.accuracy,
            given=options.given or usual["train_loss"],
            hyper_parameters=options.hyper_parameters,
            measures=options.measures,
            seed=options.seed_column,
            test_size=options.test_size,
        )
        with ProgressBar("protocols", len(ledger.measures)) as bar:
            evaluation = evaluate(ledger, lambda measure: bar.advance())
        files = Files()
        files.write(
            "report",
            options.report,
            "shows it in pictures.",
            lambda path: write_evaluation(evaluation, path, source=str(options.ledger)),
        )
    lines = [Text(f"• {line}") for line in evaluation.conclusions()]
    shown = Group(evidence_table(evaluation), *lines, *files.shown)
    return options.output.json, Report(files.named_in(jsonable(evaluation.to_dict())), shown, unwritten=files.unwritten)
