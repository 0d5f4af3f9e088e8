from __future__ import annotations

import importlib
import os
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from flatminima.errors import FlatminimaError, LedgerWarning
from flatminima.protocols import Ledger, kendall, partial_kendall, read_table
from support.ledgers import ledger_of, random_frame


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_a_file_and_a_frame_are_the_same_ledger(tmp_path: Path) -> None:
    frame = random_frame(21, seeds=5).assign(x=lambda frame: frame["x"] / 7, error=lambda frame: frame["error"] / 7)
    frame.to_csv(tmp_path / "ledger.csv", index=False)
    columns = {"error": "error", "given": "loss", "hyper_parameters": ["lr", "optimizer"], "measures": ["x"]}
    of_file = Ledger.read(tmp_path / "ledger.csv", **columns)
    assert (of_file.frame["x"] == frame["x"]).all()  # to the bit
    assert kendall(of_file, "x") == kendall(Ledger.of(frame, **columns), "x")


def test_the_rows_of_one_experiment_can_be_chosen(tmp_path: Path) -> None:
    path = written(tmp_path / "l.csv", "experiment,lr,x\none,0.1,1\ntwo,0.1,2\none,0.2,3\n")
    assert read_table(path, ["experiment=one"])["x"].tolist() == [1, 3]
    assert read_table(path, ["experiment=one", "lr=0.2"])["x"].tolist() == [3]
    with pytest.raises(
        FlatminimaError, match=r"no row has experiment = 'on' \(did you mean 'one'\?\); there are one, two"
    ):
        read_table(path, ["experiment=on"])
    with pytest.raises(FlatminimaError, match="where takes column=value, got 'one'"):
        read_table(path, ["one"])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("loss,error,x\n0.1,0.5,3,\n0.2,0.6,4,\n", "every row has 1 more cell than .* Do rows end with"),
        ("x,error,loss\n1,5,0,21,0,01\n2,5,0,31,0,02\n", "every row has 3 more cells than .* decimal commas"),
        ("x,error,error\n1,0.5,0.1\n", "has several columns called error: give each a name of its own"),
    ],
)
def test_cells_that_would_go_to_other_columns_are_refused(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(FlatminimaError, match=said):
        read_table(written(tmp_path / "l.csv", text))


def test_a_table_may_come_through_a_pipe() -> None:
    reading, writing = os.pipe()
    os.write(writing, b"lr,error,x\n0.1,0.5,1\n0.2,0.6,2\n")
    os.close(writing)
    assert read_table(f"/dev/fd/{reading}")["x"].tolist() == [1, 2]
    os.close(reading)


def test_a_column_named_like_a_second_one_is_its_own(tmp_path: Path) -> None:
    assert list(read_table(written(tmp_path / "l.csv", "x,x.1\n1,2\n"))) == ["x", "x.1"]


def test_measures_are_all_numeric_columns_that_are_nothing_else() -> None:
    frame = random_frame(22).assign(converged=True, seed=0, y=1.5)
    frame.insert(0, "Unnamed: 0", range(len(frame)))
    ledger = Ledger.of(frame.drop_duplicates(), error="error", given="loss", hyper_parameters=["lr"])
    assert ledger.measures == ("x", "y")


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"error": "eror"}, r"no column 'eror' \(did you mean 'error'\?\) in the ledger: lr, optimizer, x, loss"),
        ({"given": "los"}, r"no column 'los' \(did you mean 'loss'\?\)"),
        ({"hyper_parameters": ["optimiser"]}, r"no column 'optimiser' \(did you mean 'optimizer'\?\)"),
        ({"measures": ["X"]}, "no column 'X'"),
        ({"seed": "seed"}, "no column 'seed'"),
        ({"error": None}, "name the column of the test error, or of the accuracy: lr, optimizer"),
        ({"accuracy": "x"}, "error and accuracy are the same turned round"),
        ({"error": "optimizer", "hyper_parameters": []}, "column 'optimizer' holds something else than numbers"),
        ({"given": "lr"}, "named for two things at once: lr"),
        ({"measures": ["error"]}, "named for two things at once: error"),
        ({"test_size": 0}, "test_size must be at least 1, got 0"),
    ],
)
def test_wrong_columns_are_refused_in_a_line(columns: dict[str, object], said: str) -> None:
    with pytest.raises(FlatminimaError, match=said) as refused:
        ledger_of(random_frame(23), **columns)
    assert "\n" not in str(refused.value)


def test_a_ledger_of_nothing_to_judge_is_refused() -> None:
    frame = random_frame(24)[["lr", "optimizer", "loss", "error"]].drop_duplicates()
    with pytest.raises(FlatminimaError, match="no numeric column is left to be judged"):
        ledger_of(frame, measures=[])
    with pytest.raises(FlatminimaError, match="no row has a value in each of error, lr, optimizer"):
        ledger_of(frame.assign(error=np.nan, x=1.0))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", r"l.csv is no table with a line of names \("),
        ('a,b\n1,2\n"', r"l.csv is no table with a line of names \("),
        ("a,b\n1,2\n1,2,3\n", r"l.csv is no table with a line of names \("),
        ("x,error\n", "no row has a value in each of error"),
    ],
)
def test_files_that_hold_no_ledger_are_refused_in_a_line(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(FlatminimaError, match=said) as refused:
        Ledger.read(written(tmp_path / "l.csv", text), error="error", measures=["x"])
    assert "\n" not in str(refused.value)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(FlatminimaError, match=r"cannot read .*none\.csv: No such file or directory"):
        read_table(tmp_path / "none.csv")
    (tmp_path / "bytes.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(FlatminimaError, match=r"bytes\.csv is no table"):
        read_table(tmp_path / "bytes.csv")


def test_rows_without_an_error_or_a_setting_are_left_out_and_said(tmp_path: Path) -> None:
    text = "lr,optimizer,x,loss,error\n1,a,1,1,.1\n,,,,\n2,a,2,2,.2\n\n3,a,3,3,.3\n4,,4,4,.4\n5,a,5,5,inf\n"
    with pytest.warns(LedgerWarning, match="missing or infinite in error or lr or optimizer: rows 2, 5, 6"):
        ledger = Ledger.read(
            written(tmp_path / "l.csv", text), error="error", hyper_parameters=["lr", "optimizer"], measures=["x"]
        )
    assert ledger.frame["x"].tolist() == [1, 2, 3]


def test_a_missing_measure_leaves_its_minimum_out_of_that_measure_alone() -> None:
    frame = random_frame(25, seeds=4).assign(y=lambda frame: frame["x"] + 1)
    frame.loc[[0, 7], "y"] = [np.nan, np.inf]
    frame.loc[3, "loss"] = np.nan
    with pytest.warns(LedgerWarning, match=r"left out of what needs it: loss \(1\), y \(2\)"):
        ledger = ledger_of(frame, measures=["x", "y"])
    assert (kendall(ledger, "x").n, kendall(ledger, "y").n, partial_kendall(ledger, "y").n) == (24, 22, 21)
    rest = ledger_of(frame.drop([0, 3, 7]), measures=["x", "y"])
    assert partial_kendall(ledger, "y") == partial_kendall(rest, "y")
    assert kendall(ledger, "x").value == kendall(ledger_of(frame.drop(columns="loss"), given=None), "x").value


def test_levels_may_be_called_as_missing_numbers_are(tmp_path: Path) -> None:
    rows = [f"{beta},{norm},{seed},{0.1 * seed + k},{k}" for k, (beta, norm) in enumerate(LEVELS) for seed in (0, 1)]
    path = written(tmp_path / "l.csv", "\n".join(["beta,norm,seed,error,x", *rows]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ledger = Ledger.read(path, error="error", hyper_parameters=["beta", "norm"], seed="seed", measures=["x"])
    assert len(ledger.all) == 2 * len(LEVELS)
    assert len(np.unique(ledger.all.settings)) == len(LEVELS)
    assert set(ledger.all.levels[0]) == {"none", "10", "100"}
    assert set(ledger.all.levels[1]) == {"None", "NA", "nan", "null"}
    assert read_table(path, ["norm=NA"])["x"].tolist() == [1, 1]


LEVELS = [("none", "None"), ("10", "NA"), ("100", "nan"), ("none", "null"), ("10", "None")]


@pytest.mark.parametrize("word", ["", "NA", "nan", "None", "null", "n/a"])
def test_where_numbers_are_asked_for_they_are_missing(word: str, tmp_path: Path) -> None:
    path = written(tmp_path / "l.csv", f"error,x,seed\n.1,1,0\n.2,{word},2\n.3,3,1\n{word},4,1\n.5,5,{word}\n")
    with pytest.warns(LedgerWarning) as said:
        ledger = Ledger.read(path, error="error", seed="seed")
    assert [str(warning.message) for warning in said] == [
        "left out, as a value is missing or infinite in error or seed: rows 4, 5",
        "minima without a value, left out of what needs it: x (1)",
    ]
    assert ledger.measures == ("x",)
    assert (len(ledger.all), ledger.minima("x").measure.tolist()) == (3, [1, 3])


def test_one_cell_of_text_takes_no_column_out_unsaid(tmp_path: Path) -> None:
    path = written(tmp_path / "l.csv", "error,x,y,model\n.1,1,1,a\n.2,2,diverged,18\n.3,3,3,b\n")
    with pytest.warns(LedgerWarning, match="column 'y' is not judged: row 2 has 'diverged', which is no number; leave"):
        assert Ledger.read(path, error="error").measures == ("x",)
    with pytest.raises(FlatminimaError, match="column 'y' holds something else than numbers: row 2 has 'diverged'"):
        Ledger.read(path, error="error", measures=["y"])


def test_an_integer_too_large_for_a_float_is_infinite_and_seeds_are_kept_apart(tmp_path: Path) -> None:
    rows = [f".{k},{k if k != 2 else '9' * 400},{2**70 + k}" for k in range(1, 5)]
    with pytest.warns(LedgerWarning, match=r"left out of what needs it: x \(1\)"):
        ledger = Ledger.read(
            written(tmp_path / "l.csv", "\n".join(["error,x,seed", *rows])), error="error", seed="seed"
        )
    assert ledger.measures == ("x",)
    assert ledger.minima("x").measure.tolist() == [1, 3, 4]
    assert ledger.all.seeds is not None
    assert len(set(ledger.all.seeds)) == 4


def test_dicts_are_refused_where_they_would_be_levels_or_numbers_and_let_be_elsewhere() -> None:
    frame = random_frame(27).assign(settings=[{"k": k} for k in range(len(random_frame(27)))])
    assert ledger_of(frame).measures == ledger_of(random_frame(27)).measures
    with pytest.raises(FlatminimaError, match="column 'settings' cannot tell settings apart: row 1 has a dict"):
        ledger_of(frame, hyper_parameters=["settings"])
    with pytest.raises(FlatminimaError, match=r"column 'settings' holds something else .*: row 1 has {'k': 0}"):
        ledger_of(frame, measures=["settings"])


def test_copies_of_a_row_are_counted_and_said() -> None:
    frame = random_frame(26, seeds=3)
    with pytest.warns(LedgerWarning, match="row 19: exactly as an earlier row; is a minimum counted twice?"):
        twice = ledger_of(pd.concat([frame, frame[:1]]))
    assert kendall(twice, "x").n == 19
    again = pd.concat([frame, frame[:1].assign(x=99.0)])
    with pytest.warns(LedgerWarning, match="row 19: the setting and the seed of an earlier row"):
        ledger_of(again, seed="seed")


def test_without_its_extra_the_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    monkeypatch.delitem(sys.modules, "flatminima.protocols", raising=False)
    with pytest.raises(ModuleNotFoundError) as refused:
        importlib.import_module("flatminima.protocols")
    assert str(refused.value) == "flatminima.protocols needs pandas: pip install 'flatminima[protocols]'"


def test_a_word_for_missing_beside_numbers_is_a_level_that_is_told(tmp_path: Path) -> None:
    rows = [(decay, seed, 0.1 * seed, seed) for decay in ("1e-4", "1e-3", "NA") for seed in range(4)]
    path = tmp_path / "ledger.csv"
    path.write_text("decay,seed,error,x\n" + "".join(f"{a},{b},{c},{d}\n" for a, b, c, d in rows))
    with pytest.warns(LedgerWarning, match="column 'decay': row 9 has 'NA', which is taken for a level"):
        ledger = Ledger.read(path, error="error", hyper_parameters=["decay"], measures=["x"], seed="seed")
    assert len(ledger.all.error) == 12


def test_columns_of_one_name_that_nobody_asks_for_are_no_matter() -> None:
    frame = pd.DataFrame([[0.1, 1, 1, "a", {}], [0.2, 2, 2, "b", {}]], columns=["error", "lr", "x", "note", "note"])
    ledger = Ledger.of(frame, error="error", hyper_parameters=["lr"], measures=["x"])
    assert len(ledger.all.error) == 2
