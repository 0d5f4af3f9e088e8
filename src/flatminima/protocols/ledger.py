"""A ledger: one row a minimum, with its measures, its error, its hyper-parameters; read, checked, named.

pandas is imported where a table is touched: it is slow to import, and every process that trains a run imports this.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from flatminima.errors import FlatminimaError, LedgerWarning, did_you_mean, first_line, require, warn

if TYPE_CHECKING:
    import pandas as pd

TEST_SIZE = 10_000
"""Test samples where nothing else is said: those of CIFAR."""

_LEFT_ASIDE = ("seed", "unnamed:")
"""How columns begin that are no measures unless they are named: seeds, and an index that pandas wrote."""

_MISSING = frozenset({"", "na", "n/a", "#n/a", "<na>", "nan", "-nan", "none", "null"})
"""What stands for no number, whatever its case; a hyper-parameter has levels of these names like any others."""

_SHOWN = 8
"""Rows and columns that a message names."""

_LONGEST_CELL = 60
"""Characters of a cell that a message repeats."""


@dataclass(frozen=True, eq=False)
class Minima:
    """The n minima that have a value of one measure, as the protocols take them.

    Attributes:
        measure: the measure, (n,).
        error: the test error, (n,).
        given: what the measure must add to, (n,); None where no such column is named.
        factors: every hyper-parameter's values as codes, (n, H).
        names: of the hyper-parameters, H.
        levels: every hyper-parameter's values by code, as text.
        settings: codes of the combinations of hyper-parameters, (n,).
        seeds: codes of the seeds, (n,); None where no such column is named.
        test_size: samples that an error is a fraction of.
    """

    measure: NDArray[np.float64]
    error: NDArray[np.float64]
    given: NDArray[np.float64] | None
    factors: NDArray[np.intp]
    names: tuple[str, ...]
    levels: tuple[tuple[str, ...], ...]
    settings: NDArray[np.intp]
    seeds: NDArray[np.intp] | None
    test_size: int

    def __len__(self) -> int:
        return len(self.error)

    @property
    def units(self) -> NDArray[np.intp]:
        """What is redrawn as a whole for intervals, as codes, (n,): seeds, or without them every minimum by itself."""
        return np.arange(len(self)) if self.seeds is None else self.seeds

    @property
    def nests_seeds(self) -> bool:
        """Whether seeds are named, and every one is of a single setting: then they pair no minima of different ones."""
        pairs = np.unique(np.stack([self.units, self.settings]), axis=1)
        return self.seeds is not None and pairs.shape[1] == len(np.unique(self.units))


@dataclass(frozen=True, eq=False)
class Ledger:
    """Minima × (measures, test error, hyper-parameters), and which column is what; :meth:`of` and :meth:`read` check.

    Attributes:
        frame: one row a minimum; its error and its hyper-parameters are known, other cells may be missing.
        error: the test error of every row: the column's, or 1 − accuracy.
        target: the column that it comes from.
        given: the column that a measure must add to, the training loss above all; None if there is none.
        hyper_parameters: the columns that make a setting.
        measures: the columns that are judged.
        seed: the column that tells apart minima of one setting, and pairs those of different settings; None if none.
        test_size: samples in the test set, of which an error is a fraction.
    """

    frame: pd.DataFrame
    error: NDArray[np.float64]
    target: str
    given: str | None
    hyper_parameters: tuple[str, ...]
    measures: tuple[str, ...]
    seed: str | None
    test_size: int

    @classmethod
    def read(cls, path: Path | str, *, where: Sequence[str] = (), **columns: Any) -> Ledger:
        """A ledger from a CSV file with a line of names.

        Args:
            path: the file.
            where: only rows that hold these values, each as ``"column=value"``.
            **columns: which column is what, and the rest, as in :meth:`of`.

        Raises:
            FlatminimaError: the file cannot be read, or see :meth:`of`.
        """
        return cls.of(read_table(path, where), **columns)

    @classmethod
    def of(
        cls,
        frame: pd.DataFrame,
        *,
        error: str | None = None,
        accuracy: str | None = None,
        given: str | None = None,
        hyper_parameters: Sequence[str] = (),
        measures: Sequence[str] = (),
        seed: str | None = None,
        test_size: int = TEST_SIZE,
    ) -> Ledger:
        """A ledger from a DataFrame.

        Rows without an error or a hyper-parameter are left out, and a missing or infinite measure leaves its row out
        of that measure alone; what is left out is said (:class:`~flatminima.errors.LedgerWarning`). Where numbers are
        asked for, ``NA``, ``nan``, ``None`` and the like are missing; a hyper-parameter's levels may be called so.

        Args:
            frame: one row a minimum.
            error: the column of the test error, or of the generalization gap; smaller is better.
            accuracy: in its place, the column of the test accuracy.
            given: what a measure must add to: the training loss.
            hyper_parameters: columns that tell settings apart, numbers or text.
            measures: columns to judge (none: all numeric columns that are named nowhere else and not called ``seed``).
            seed: the column of seeds.
            test_size: samples in the test set.

        Raises:
            FlatminimaError: a column is not there or not numeric, holds what cannot be a level, is named twice, or no
                row is left.
        """
        require(error is None or accuracy is None, "error and accuracy are the same turned round: name one of them")
        target = error or accuracy
        require(target is not None, f"name the column of the test error, or of the accuracy: {_listed(frame.columns)}")
        assert target is not None
        require(test_size >= 1, f"test_size must be at least 1, got {test_size}")
        frame = frame.rename(columns=str).reset_index(drop=True)
        named = [target, *([given] if given else []), *hyper_parameters, *([seed] if seed else [])]
        for name in (*named, *measures):
            _require_column(frame, name)
        repeated = sorted({name for name in named if named.count(name) > 1} | (set(measures) & {target}))
        require(not repeated, f"named for two things at once: {', '.join(repeated)}")
        measures = tuple(dict.fromkeys(measures)) or _numeric(frame, named)
        require(bool(measures), f"no numeric column is left to be judged: {_listed(frame.columns)}")
        numbers = {
            name: _numbers(frame, name) for name in dict.fromkeys((target, *([given] if given else []), *measures))
        }
        places = [*hyper_parameters, *([seed] if seed else [])]
        for name in places:
            _require_levels(frame, name)
        for name in hyper_parameters:
            _say_level_among_numbers(frame, name)
        known = np.isfinite(numbers[target]) & frame[places].notna().all(axis=1).to_numpy()
        if seed is not None:
            known &= ~frame[seed].map(_is_missing).to_numpy(dtype=bool)
        require(bool(known.any()), f"no row has a value in each of {', '.join([target, *places])}")
        _say_missing(known, numbers, [target, *places])
        kept = frame.assign(**numbers)[known]
        _say_copies(kept, list(hyper_parameters), seed)
        values = kept[target].to_numpy(dtype=float)
        return cls(
            frame=kept,
            error=values if accuracy is None else 1.0 - values,
            target=target,
            given=given,
            hyper_parameters=tuple(hyper_parameters),
            measures=tuple(measures),
            seed=seed,
            test_size=test_size,
        )

    @functools.cached_property
    def all(self) -> Minima:
        """All minima, with a measure of zeros."""
        import pandas as pd

        coded = [pd.factorize(self.frame[name], sort=True) for name in self.hyper_parameters]
        columns = [codes for codes, _ in coded]
        factors = np.stack(columns, axis=1) if columns else np.zeros((len(self.frame), 0), dtype=np.intp)
        return Minima(
            measure=np.zeros(len(self.frame)),
            error=self.error,
            given=None if self.given is None else self.frame[self.given].to_numpy(dtype=float),
            factors=factors,
            names=self.hyper_parameters,
            levels=tuple(tuple(map(str, values)) for _, values in coded),
            settings=combinations_of(factors),
            seeds=None if self.seed is None else pd.factorize(self.frame[self.seed])[0],
            test_size=self.test_size,
        )

    def minima(self, measure: str, *, given: bool = False) -> Minima:
        """The minima that have a value of a measure, and of ``given`` where asked for."""
        found, values = self.all, self.frame[measure].to_numpy(dtype=float)
        known = np.isfinite(values)
        if given and found.given is not None:
            known &= np.isfinite(found.given)
        return replace(
            found,
            measure=values[known],
            error=found.error[known],
            given=None if found.given is None else found.given[known],
            factors=found.factors[known],
            settings=found.settings[known],
            seeds=None if found.seeds is None else found.seeds[known],
        )


def read_table(path: Path | str, where: Sequence[str] = ()) -> pd.DataFrame:
    """A CSV file with a line of names, or the rows of it that hold the values of ``where``, as in :meth:`Ledger.read`.

    Raises:
        FlatminimaError: the file cannot be read, or no row is left.
    """
    import pandas as pd

    try:
        frame = pd.read_csv(path, dtype=str, keep_default_na=False, na_values=[""])  # NA may be the name of a level
        names = frame.columns.to_series()
        if names.str.rpartition(".")[0].isin(names).any():  # as pandas names a second column x: x.1
            names = pd.read_csv(path, dtype=str, header=None, nrows=1).iloc[0]
    except OSError as error:
        raise FlatminimaError(f"cannot read {path}: {error.strerror or error}") from None
    except ValueError as error:  # no text, no table, nothing at all
        raise FlatminimaError(f"{path} is no table with a line of names ({first_line(error)})") from None
    twice = names[names.duplicated()].dropna().unique()
    require(len(twice) == 0, f"{path} has several columns called {_listed(twice)}: give each a name of its own")
    if not isinstance(frame.index, pd.RangeIndex):  # pandas takes the first cells for the rows' names
        raise FlatminimaError(
            f"{path}: every row has {frame.index.nlevels} more cell{'s' * (frame.index.nlevels > 1)} than there are "
            "names. Do rows end with a comma, or have numbers decimal commas?"
        )
    for condition in where:
        frame = _chosen(frame, condition)
    return frame.apply(_typed)


def combinations_of(factors: NDArray[np.intp]) -> NDArray[np.intp]:
    """Equal rows of codes as one code each; of no columns, all rows are equal."""
    if factors.shape[1] == 0:
        return np.zeros(len(factors), dtype=np.intp)
    return np.unique(factors, axis=0, return_inverse=True)[1].reshape(-1)


def _require_column(frame: pd.DataFrame, name: str) -> None:
    names = list(map(str, frame.columns))
    require(name in names, f"no column {name!r}{did_you_mean(name, names)} in the ledger: {_listed(names)}")
    require(names.count(name) == 1, f"the ledger has {names.count(name)} columns called {name!r}")


def _require_levels(frame: pd.DataFrame, name: str) -> None:
    """Refuse a column of dicts, lists and the like: settings cannot be told apart by them."""
    for row, cell in enumerate(frame[name]):
        require(
            _has_hash(cell),
            f"column {name!r} cannot tell settings apart: row {row + 1} has a {type(cell).__name__}; give numbers or "
            "text",
        )


def _say_level_among_numbers(frame: pd.DataFrame, name: str) -> None:
    """A cell that may stand for an unknown number, and is taken for a level; ``none`` is said on purpose."""
    others = [cell for cell in frame[name] if not _is_missing(cell)]
    doubtful = [
        row
        for row, cell in enumerate(frame[name])
        if isinstance(cell, str) and _is_missing(cell) and cell.strip().lower() not in ("", "none")
    ]
    if doubtful and others and None not in map(_number, others):
        warn(
            f"column {name!r}: {_cell(frame, name, doubtful[0])}, which is taken for a level beside the numbers; leave "
            "the cell empty where the value is not known",
            LedgerWarning,
        )


def _has_hash(cell: Any) -> bool:
    try:
        hash(cell)
    except TypeError:
        return False
    return True


def _numeric(frame: pd.DataFrame, named: Sequence[str]) -> tuple[str, ...]:
    """The columns that are taken for measures where none is named; of a column that nearly is one, why it is not."""
    found = []
    for name in frame.columns:
        if name in named or str(name).lower().startswith(_LEFT_ASIDE):
            continue
        numbers, others = _numbers_and_others(frame[name])
        if numbers and not others:
            found.append(name)
        elif numbers > len(others):
            warn(
                f"column {name!r} is not judged: {_cell(frame, name, others[0])}, which is no number; leave the cell "
                "empty where there is none",
                LedgerWarning,
            )
    return tuple(found)


def _numbers_and_others(column: pd.Series) -> tuple[int, list[int]]:
    """How many cells a measure may have (of a column of text: could have), and the places of those that it may not."""
    from pandas.api.types import is_bool_dtype, is_numeric_dtype

    if is_numeric_dtype(column):
        return (0, []) if is_bool_dtype(column) else (len(column), [])
    is_text = [isinstance(cell, str) and not _is_missing(cell) for cell in column]
    others = [row for row, cell in enumerate(column) if _number(cell) is None or isinstance(cell, bool)]
    numbers = sum(not _is_missing(cell) for cell in column) - len(others)
    if any(is_text) and not others:  # all of them numerals, but a column of text all the same
        return 0, []
    return numbers, others


def _numbers(frame: pd.DataFrame, name: str) -> NDArray[np.float64]:
    """A column as floats, with NaN for what is missing or infinite."""
    from pandas.api.types import is_numeric_dtype

    column = frame[name]
    if is_numeric_dtype(column):
        values = column.to_numpy(dtype=float, na_value=np.nan)
    else:
        cells = [_number(cell) for cell in column]
        if None in cells:
            where = _cell(frame, name, cells.index(None))
            raise FlatminimaError(f"column {name!r} holds something else than numbers: {where}")
        values = np.array(cells, dtype=float)
    return np.where(np.isfinite(values), values, np.nan)


def _number(cell: Any) -> float | None:
    """A cell as a float: NaN where it is missing, infinite where it is too large for one, None where it is none."""
    if _is_missing(cell):
        return float("nan")
    try:
        return float(cell)
    except OverflowError:  # an integer of hundreds of digits
        return float("inf")
    except (TypeError, ValueError):
        return None


def _is_missing(cell: Any) -> bool:
    """Whether a cell stands for no number."""
    if isinstance(cell, str):
        return cell.strip().lower() in _MISSING
    import pandas as pd

    return cell is None or cell is pd.NA or cell is pd.NaT or (isinstance(cell, float) and cell != cell)


def _cell(frame: pd.DataFrame, name: str, row: int) -> str:
    shown = repr(frame[name].iloc[row])
    return f"row {row + 1} has {shown if len(shown) <= _LONGEST_CELL else f'{shown[:_LONGEST_CELL]}...'}"


def _say_missing(known: NDArray[np.bool_], numbers: dict[str, NDArray[np.float64]], needed: Sequence[str]) -> None:
    if not known.all():
        rows = _rows(np.flatnonzero(~known))
        warn(f"left out, as a value is missing or infinite in {' or '.join(needed)}: {rows}", LedgerWarning)
    lacking = {name: int(np.isnan(values[known]).sum()) for name, values in numbers.items()}
    if some := [f"{name} ({count})" for name, count in lacking.items() if count]:
        warn(f"minima without a value, left out of what needs it: {_listed(some)}", LedgerWarning)


def _say_copies(kept: pd.DataFrame, hyper_parameters: list[str], seed: str | None) -> None:
    hashable = kept.apply(lambda column: column.map(repr) if column.dtype == object else column)  # dicts are not
    copies = hashable.duplicated().to_numpy()
    if copies.any():
        warn(f"{_rows(kept.index[copies])}: exactly as an earlier row; is a minimum counted twice?", LedgerWarning)
    elif seed is not None and (again := kept.duplicated([*hyper_parameters, seed]).to_numpy()).any():
        warn(
            f"{_rows(kept.index[again])}: the setting and the {seed} of an earlier row; name the hyper-parameter in "
            "which they differ",
            LedgerWarning,
        )


def _typed(texts: pd.Series) -> pd.Series:
    """A column of numbers, if it is one: to the bit, where pandas' own way depends on its version.

    What may stand for a missing number, and for a level of this name, is left as it is.
    """
    for kind in (int, float):
        try:
            return (
                texts.astype(object)
                .map(lambda cell, kind=kind: cell if _is_missing(cell) else kind(cell), na_action="ignore")
                .infer_objects()
            )
        except ValueError:  # noqa: PERF203
            continue
    return texts


def _chosen(frame: pd.DataFrame, condition: str) -> pd.DataFrame:
    """The rows with one value in one column."""
    name, equals, value = condition.partition("=")
    require(bool(equals), f"where takes column=value, got {condition!r}")
    _require_column(frame, name)
    found = frame[frame[name] == value]
    values = list(frame[name].dropna().unique())
    require(len(found) > 0, f"no row has {name} = {value!r}{did_you_mean(value, values)}; there are {_listed(values)}")
    return found


def _rows(places: Any) -> str:
    """Rows by number, the first below the names being 1."""
    shown, more = ", ".join(str(place + 1) for place in places[:_SHOWN]), len(places) - _SHOWN
    return f"row{'s' * (len(places) > 1)} {shown}" + (f" and {more} more" if more > 0 else "")


def _listed(names: Any) -> str:
    """Names in a message, the first few of many."""
    names = list(map(str, names))
    return ", ".join(names[: 3 * _SHOWN]) + (f" and {len(names) - 3 * _SHOWN} more" if len(names) > 3 * _SHOWN else "")
