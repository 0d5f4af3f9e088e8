"""Records as a ledger, one row a minimum: what the protocols judge, and what stands as CSV beside every page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flatminima.errors import recorded_warnings
from flatminima.files import write_file
from flatminima.lab.experiments.experiment import Record
from flatminima.lab.experiments.summary import Summary
from flatminima.protocols import Evaluation, Ledger, evaluate

if TYPE_CHECKING:  # imported where it is needed: every worker imports this file
    import pandas as pd

ERROR, GIVEN, SEED = "test_error", "train_loss", "seed"
"""What the protocols take for the error, for what a measure must add to, and for the seeds."""

NONE = "none"
"""The level of what a run has not, such as β without a regularizer."""

_SETTING = ("case", "arm")
_OF_RECORD = ("run", SEED, ERROR, "validation_error", "train_accuracy")


def evaluation_of(records: Sequence[Record], test_size: int) -> Evaluation | None:
    """What the protocols say of every measure that the records have; None without measures or the training loss."""
    import pandas as pd

    frame = pd.DataFrame([_row(record) for record in records])
    values = [item for record in records for item in record.indicators.items()]
    measured = list(dict.fromkeys(name for name, value in values if value is not None))
    if GIVEN not in measured or len(measured) < 2:
        return None
    with recorded_warnings():  # of minima without a measure: their number is in the findings
        ledger = Ledger.of(
            frame,
            error=ERROR,
            given=GIVEN,
            hyper_parameters=[name for name in _SETTING if frame[name].nunique() > 1] or ["case"],
            measures=[name for name in measured if name != GIVEN],
            seed=SEED,
            test_size=test_size,
        )
        return evaluate(ledger)


def write_ledger(path: Path, summaries: Sequence[Summary]) -> None:
    """Write the minima of some experiments; those of others that the file holds already stay in it.

    A row has the experiment, what varies in it of the runs' descriptions (``none`` where a run has no such thing), case
    and arm, the run folder's name, the seed, errors and accuracy, and every measure under its own name.
    """
    import pandas as pd

    tables = [_kept(path, [summary.name for summary in summaries])]
    tables += [pd.DataFrame(_rows(summary)).map(_text) for summary in summaries]
    whole = pd.concat([table for table in tables if len(table)] or [pd.DataFrame(columns=["experiment"])])
    write_file(path, whole.to_csv(index=False))


def _kept(path: Path, replaced: Sequence[str]) -> pd.DataFrame:
    """The rows of other experiments, cell by cell as they stand; a file that is none of ours is replaced."""
    import pandas as pd

    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
        return table[~table["experiment"].isin(replaced)]
    except (OSError, ValueError, KeyError):
        return pd.DataFrame()


def _text(value: Any) -> str:
    """A cell; a float so that it is read back to the bit."""
    return "" if value is None or value != value else str(value)


def _level(value: Any) -> Any:
    """A run without such a hyper-parameter is not one of which it is unknown, and an empty cell would say that."""
    return NONE if value is None else value


def _rows(summary: Summary) -> list[dict[str, Any]]:
    specs = {setting: _flat(spec) for setting, spec in summary.specs.items()}
    names = dict.fromkeys(name for spec in specs.values() for name in spec)
    varied = [name for name in names if len({str(spec.get(name)) for spec in specs.values()}) > 1]
    return [
        {
            "experiment": summary.name,
            **{
                name: _level(specs[f"{record.case} / {record.arm}"].get(name))
                for name in varied
                if name not in _SETTING
            },
            **_row(record),
        }
        for record in summary.records
    ]


def _row(record: Record) -> dict[str, Any]:
    """A minimum's own columns."""
    return {**{name: getattr(record, name) for name in (*_SETTING, *_OF_RECORD)}, **record.indicators}


def _flat(spec: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested descriptions with dots, without the seed, which is every run's own."""
    found: dict[str, Any] = {}
    for name, value in spec.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{name}.")
        elif prefix or name != SEED:
            found[prefix + name] = value
    return found
