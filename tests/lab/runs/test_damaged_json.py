"""What run folders hold as JSON: as earlier versions wrote it, and damaged in many ways."""

from __future__ import annotations

import copy
import json
import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flatminima.errors import FlatminimaError, FlatminimaWarning
from flatminima.lab.errors import DamagedFileError, DamagedRunWarning
from flatminima.lab.runs.folder import RunFolder
from flatminima.lab.runs.measuring import Measuring, kept_measures, measure_run, read_kept
from flatminima.lab.runs.records import RunResult
from flatminima.lab.runs.spec import RegularizerSpec, RunSpec
from flatminima.lab.runs.training import train
from flatminima.lab.storage import digest_of, write_tensors
from flatminima.measures import Characterization

FOLDERS = Path(__file__).parents[2] / "support" / "run_folders"
"""As version 0.1.0 wrote them before specs and records were pydantic's; the checkpoint is left out."""


@pytest.fixture
def finished(tmp_path: Path) -> RunFolder:
    shutil.copytree(FOLDERS / "finished", tmp_path / "run")
    write_tensors(tmp_path / "run" / "checkpoint.safetensors", {"weight": torch.ones(2)}, {})
    return RunFolder(tmp_path / "run")


def test_a_folder_of_an_earlier_version_is_read(finished: RunFolder) -> None:
    spec = finished.read_spec()
    assert (spec.key, spec.regularizer) == ("c6b16c7f2b8c", RegularizerSpec(1e-4, 1.0, 2, start_epoch=38))
    assert finished.read_result() == RunResult(
        finished.path,
        40,
        160,
        0.9501370103454351,
        0.675,
        0.33,
        json.loads((finished.path / "result.json").read_text())["seconds"],
        "87ad69560db8ae9c0b0a5130e7fd7794a5f61ba1d47c617cb3ece48e4e2d74d1",
        {"flatminima": "0.1.0", "torch": "2.13.0+cpu", "device": "cpu x86_64 AVX2", "threads": 1},
        0.26666666666666666,
    )
    history = finished.read_history()
    assert [(record.epoch, record.fisher_trace, record.test_error) for record in history] == [
        (1, None, None),
        (2, None, None),
        (3, 12.507, 0.33),
    ]
    progress = finished.read_progress()
    assert progress is not None
    assert (progress.fraction, progress.loss) == (84 / 160, 1.5833702087402344)


def test_measures_of_an_earlier_version_are_read(finished: RunFolder) -> None:
    (entry,) = read_kept(finished)
    assert entry.asked["subset_size"] == 10
    assert kept_measures(finished.path, KEPT, device="cpu") is None  # of another checkpoint
    assert [category for category, _ in entry.warnings] == ["NotAMinimumWarning"]
    assert Characterization.from_json(json.dumps(entry.characterization)).log_det_fisher.mean == 32.609478853624374


def test_a_failure_of_an_earlier_version_is_told_again() -> None:
    with pytest.raises(FlatminimaError, match="this run failed before: training failed in epoch 1, iteration 2: the"):
        RunFolder(FOLDERS / "failed").read_result()


# ---------------------------------------------------------------------------------------------------------------------
# Damage
# ---------------------------------------------------------------------------------------------------------------------

DEEP = "@deep@"  # stands for brackets nested deeper than Python's stack
LONG = "@long@"  # for an integer of more digits than Python converts
VALUES = [
    *(None, True, False, 0, -1, 3.5, 10**30, 10**400, float("inf"), float("nan"), "", "1", "x\n[/]", "\ud800"),
    *([], {}, [1], {"a": 1}, [[[]]], DEEP, LONG),
]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something is in a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


def edited(value: Any, path: tuple[Any, ...], new: Any, how: str) -> Any:
    """The value with another one in a place, or without it, or with one more beside it."""
    if not path:
        return new
    value = copy.deepcopy(value)
    holder = value
    for key in path[:-1]:
        holder = holder[key]
    if how == "replace":
        holder[path[-1]] = new
    elif how == "remove":
        del holder[path[-1]]
    elif isinstance(holder, dict):
        holder["un\nknown"] = new
    else:
        holder.append(new)
    return value


def written(value: Any) -> str:
    text = json.dumps(value)
    return text.replace(f'"{DEEP}"', "[" * 100_000 + "]" * 100_000).replace(f'"{LONG}"', "9" * 5000)


@st.composite
def damaged_texts(draw: st.DrawFn, text: str) -> bytes:
    """An edit of a value, or of the bytes."""
    if draw(st.booleans()):
        value = json.loads(text)
        path = draw(st.sampled_from(list(places(value))))
        how = draw(st.sampled_from(["replace", "replace", "replace", "remove", "add"]))
        return written(edited(value, path, draw(st.sampled_from(VALUES)), how)).encode()
    content = text.encode()
    start = draw(st.integers(0, len(content)))
    end = draw(st.integers(start, len(content)))
    return content[:start] + draw(st.binary(max_size=4)) + content[end:]


KEPT = Measuring(subset_size=10, trials=3, double=True)
"""How the measures were taken that the folder of an earlier version keeps."""


def whole(name: str) -> str:
    kind = "failed" if name == "failure.json" else "finished"
    text = (FOLDERS / kind / name).read_text()
    return text.splitlines()[0] if name == "history.jsonl" else text


def read(folder: RunFolder, name: str) -> None:
    """Everything that is made of the file."""
    if name == "spec.json":
        spec = folder.read_spec()
        assert RunSpec.from_json(spec.to_json()) == spec
        assert len(spec.key) == 12
    elif name in ("result.json", "failure.json"):
        result = folder.read_result()
        assert result is not None
        assert f"{result.test_error:.1%} {result.train_loss:.3g} {result.seconds / max(result.epochs, 1):.3g}"
    elif name == "history.jsonl":
        assert all(f"{record.train_loss:.3g}" for record in folder.read_history())
    elif name == "measures.json":
        assert all(str(entry.warnings) for entry in read_kept(folder))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # those that it keeps
            found = kept_measures(folder.path, KEPT, device="cpu")
        if found is not None:
            assert found.log_det_fisher.per_trial is not None
            assert f"{found.train_loss:.6g} {found.log_det_fisher}"
    else:
        progress = folder.read_progress()
        if progress is not None:
            assert f"{progress.fraction:.1f} {progress.loss or 0.0:.3g}"


def refusal(folder: RunFolder, name: str) -> FlatminimaError | None:
    try:
        read(folder, name)
    except FlatminimaError as error:
        return error
    return None


@pytest.mark.parametrize(
    "name", ["spec.json", "result.json", "history.jsonl", "measures.json", "failure.json", "progress.json"]
)
@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_whatever_a_file_holds_is_read_or_refused_in_one_line(
    name: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = RunFolder(tmp_path_factory.mktemp("damaged"))
    write_tensors(folder.path / "checkpoint.safetensors", {"weight": torch.ones(2)}, {})
    weights = digest_of((folder.path / "checkpoint.safetensors").read_bytes())
    text = re.sub('"weights": "[^"]*"', f'"weights": "{weights}"', whole(name))
    (folder.path / name).write_bytes(data.draw(damaged_texts(text)))
    error = refusal(folder, name)
    if error is not None:
        assert str(error)
        assert "\n" not in str(error)
        assert name == "failure.json" or isinstance(error, DamagedFileError)


TINY = RunSpec(model="mlp", data="digits", train_size=20, augmentation="no-aug", batch_size=20, epochs=1)
BROKEN = [
    "",
    "{",
    "{}",
    "null",
    "[]",
    '{"epochs": "3"}',
    '"x"',
    DEEP,
    LONG,
    "NaN",
    '{"error": 3}',
    '[{"asked": 1}]',
    "\x00",
]
"""Never the content of any of the files."""


@pytest.mark.parametrize("text", BROKEN)
@pytest.mark.parametrize("name", ["spec.json", "result.json"])
def test_a_run_with_a_damaged_file_starts_over(name: str, text: str, tmp_path: Path) -> None:
    folder = RunFolder(train(TINY, tmp_path, progress=False).folder)
    result = folder.read_result()
    (folder.path / name).write_text(written(text) if text in (DEEP, LONG) else text)
    with pytest.warns(DamagedRunWarning, match="this run starts over"):
        again = train(TINY, tmp_path, progress=False)
    assert result is not None
    assert (again.train_loss, again.test_error) == (result.train_loss, result.test_error)


@pytest.mark.filterwarnings("ignore::flatminima.errors.NotAMinimumWarning")
def test_damaged_measures_are_measured_again(tmp_path: Path) -> None:
    folder, how = RunFolder(train(TINY, tmp_path, progress=False).folder), Measuring(subset_size=5, trials=2)
    first = measure_run(folder.path, how, progress=False, device="cpu")
    kept = json.loads((folder.path / "measures.json").read_text())
    edits = [
        written(edited(kept, (0, "characterization", *path), new, "replace"))
        for path, new in [
            ((), 3),
            (("train_loss",), "1"),
            (("settings",), []),
            (("shares",), [1]),
            (("log_det_fisher",), DEEP),
            (("log_det_fisher", "per_trial"), "12"),
            (("spectrum",), 3),
            (("spectrum",), ["x"]),
        ]
    ]
    for text in [*edits, written(edited(kept, (0, "warnings"), [1], "replace")), *BROKEN]:
        if text in ("", "[]"):
            continue  # nothing was measured
        (folder.path / "measures.json").write_text(written(text) if text in (DEEP, LONG) else text)
        with pytest.warns(DamagedRunWarning, match="measured again: .* damaged or of another version"):
            again = measure_run(folder.path, how, progress=False, device="cpu")
        assert again == first


def test_a_warning_of_a_category_that_is_none_is_one_of_ours(tmp_path: Path) -> None:
    folder, how = RunFolder(train(TINY, tmp_path, progress=False).folder), Measuring(subset_size=5, trials=2)
    with pytest.warns(FlatminimaWarning):
        measure_run(folder.path, how, progress=False, device="cpu")
    kept = json.loads((folder.path / "measures.json").read_text())
    for name in ("FlatminimaError", "annotations", "warn", ""):
        (folder.path / "measures.json").write_text(json.dumps(edited(kept, (0, "warnings"), [[name, "so"]], "replace")))
        with pytest.warns(FlatminimaWarning, match="^so$"):
            measure_run(folder.path, how, progress=False, device="cpu")
