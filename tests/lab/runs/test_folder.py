from __future__ import annotations

import os
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flatminima.errors import FlatminimaError
from flatminima.lab.errors import DamagedFileError
from flatminima.lab.runs.folder import RunFolder
from flatminima.lab.runs.records import EpochRecord, EpochSums, ResumePoint, RunProgress, RunResult
from flatminima.lab.runs.sets import load_run
from flatminima.lab.runs.spec import RunSpec
from flatminima.lab.runs.training import train
from support.messages import one_line

SPEC = RunSpec(
    model="mlp", data="digits", train_size=200, confusion=40, augmentation="no-aug", batch_size=40, epochs=2, seed=3
)


RECORDS = [
    EpochRecord(1, 6, 0.1, 2.25, 0.5, None, 0.1, 0.3),
    EpochRecord(2, 12, 0.1 + 0.2, 1 / 3, 0.75, 12.5, 0.05, 0.3),
]


def resume_point() -> ResumePoint:
    return ResumePoint(
        tensors={"weights/a": torch.randn(3, 2), "weights/count": torch.tensor(7), "momentum/a": torch.randn(3, 2)},
        regularizer={"step": 3, "clipped": 1},
        iteration=14,
        sums=EpochSums(loss=0.1 + 0.2, correct=5, trace=1e-17, seconds=0.25),
        history=tuple(RECORDS),
        data_digest="d",
        environment={"torch": "2", "threads": 1},
    )


def result(folder: Path) -> RunResult:
    return RunResult(folder, 2, 12, 1 / 3, 0.9, 0.1, 0.6, "d", {"torch": "2"})


def test_a_folder_is_named_by_its_spec(tmp_path: Path) -> None:
    folder = RunFolder.of(tmp_path, SPEC)
    assert folder.path == tmp_path / f"mlp-{SPEC.key}"
    assert folder.path != RunFolder.of(tmp_path, replace(SPEC, seed=4)).path
    assert not folder.path.exists()
    assert folder.status == "new"


def test_spec_history_and_measures_round_trip(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write_spec(SPEC)
    folder.write_history(RECORDS)
    assert folder.read_measures() is None
    folder.write_measures('{"γ̂": 1}')
    assert (folder.read_spec(), folder.read_history(), folder.read_measures()) == (SPEC, RECORDS, '{"γ̂": 1}')
    assert folder.status == "unfinished"


def test_a_resume_point_round_trips_to_the_same_bits(tmp_path: Path) -> None:
    folder, point = RunFolder(tmp_path), resume_point()
    assert folder.read_resume_point() is None
    folder.write_resume_point(point)
    again = folder.read_resume_point()
    assert again is not None
    assert again.tensors.keys() == point.tensors.keys()
    assert all(torch.equal(again.tensors[name], tensor) for name, tensor in point.tensors.items())
    assert replace(again, tensors={}) == replace(point, tensors={})
    assert folder.read_history() == RECORDS


def test_finishing_removes_the_resume_point(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write_resume_point(resume_point())
    folder.write_result(result(tmp_path), {"a": torch.ones(2)}, RECORDS)
    assert folder.status == "finished"
    assert folder.read_result() == result(tmp_path)
    assert folder.read_resume_point() is None
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint.safetensors",
        "history.jsonl",
        "result.json",
    ]


def test_files_have_the_same_bytes_every_time(tmp_path: Path) -> None:
    folder, point = RunFolder(tmp_path), resume_point()
    folder.write_resume_point(point)
    first = (tmp_path / "state.safetensors").read_bytes()
    folder.write_resume_point(point)
    assert (tmp_path / "state.safetensors").read_bytes() == first


def test_a_failed_run_says_why(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write_resume_point(resume_point())
    folder.write_failure("the loss is nan", RECORDS)
    assert folder.status == "failed"
    assert folder.read_resume_point() is None
    with pytest.raises(FlatminimaError, match="this run failed before: the loss is nan"):
        folder.read_result()


@pytest.mark.parametrize("name", ["state.safetensors", "checkpoint.safetensors"])
@pytest.mark.parametrize("size", [0, 7, 100, -1])
def test_truncated_tensors_are_noticed(tmp_path: Path, name: str, size: int) -> None:
    folder = RunFolder(tmp_path)
    folder.write_result(result(tmp_path), {"a": torch.ones(2)}, RECORDS)
    folder.write_resume_point(resume_point())
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(DamagedFileError) as caught:
        folder.read_resume_point() if name == "state.safetensors" else folder.read_result()
    assert str(path) in one_line(caught)


def test_one_flipped_bit_is_noticed(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write_result(result(tmp_path), {"a": torch.ones(2)}, RECORDS)
    path = tmp_path / "checkpoint.safetensors"
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    with pytest.raises(DamagedFileError, match="its digest does not match"):
        folder.read_checkpoint()


def test_one_altered_counter_is_noticed(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write_resume_point(resume_point())
    path = tmp_path / "state.safetensors"
    content = path.read_bytes()
    assert content.count(b'iteration\\\\\\": 14') == 1
    path.write_bytes(content.replace(b'iteration\\\\\\": 14', b'iteration\\\\\\": 15'))
    with pytest.raises(DamagedFileError, match="its digest does not match"):
        folder.read_resume_point()


def test_a_result_without_its_checkpoint_is_damaged(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write_result(result(tmp_path), {"a": torch.ones(2)}, RECORDS)
    (tmp_path / "checkpoint.safetensors").unlink()
    with pytest.raises(DamagedFileError, match=r"checkpoint\.safetensors is damaged"):
        folder.read_result()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"epochs": 3}', "\x00\xff"])
def test_a_result_that_is_none_is_damaged(tmp_path: Path, text: str) -> None:
    folder = RunFolder(tmp_path)
    folder.write_result(result(tmp_path), {"a": torch.ones(2)}, RECORDS)
    (tmp_path / "result.json").write_text(text, encoding="latin-1")
    with pytest.raises(DamagedFileError) as caught:
        folder.read_result()
    assert "result.json is damaged" in one_line(caught)


@pytest.mark.parametrize(
    ("edit", "line"),
    [
        (lambda lines: [*lines, lines[-1][:20]], 3),  # half a line
        (lambda lines: [lines[0], lines[0]], 2),  # an epoch twice
        (lambda lines: lines[1:], 1),  # an epoch missing
    ],
)
def test_a_damaged_history_is_noticed(tmp_path: Path, edit: object, line: int) -> None:
    folder = RunFolder(tmp_path)
    folder.write_history(RECORDS)
    path = tmp_path / "history.jsonl"
    path.write_text("\n".join(edit(path.read_text().splitlines())))  # type: ignore[operator]
    with pytest.raises(DamagedFileError) as caught:
        folder.read_history()
    assert f"line {line} is not the record of epoch {line}" in one_line(caught)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FlatminimaError, match=r"is not a run folder: it has no spec\.json"):
        load_run(tmp_path)


def test_a_file_is_never_seen_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = RunFolder(tmp_path)
    folder.write_measures("old")

    def disk_full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(FlatminimaError) as caught:
        folder.write_measures("new")
    assert "No space left on device" in one_line(caught)
    assert folder.read_measures() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["measures.json"]


def leftovers(folder: RunFolder, writer: int | str) -> list[str]:
    """What a process has left that was killed at several moments."""
    here = socket.gethostname()
    names = [f".{name}.{writer}@{here}.tmp" for name in ("measures.json", "progress.json")]
    names += [f".spec.json.{writer}-7@{here}.tmp"]
    for name in names:
        (folder.path / name).write_text("{")
    (folder.path / "progress.json").write_text("{}")
    return names


@pytest.mark.parametrize("ending", ["result", "failure"])
def test_what_a_killed_process_left_is_deleted_by_the_next(ending: str, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    if ending == "result":
        folder.write_result(result(tmp_path), {"a": torch.ones(2)}, RECORDS)
    else:
        folder.write_failure("no luck", RECORDS)
    whole = {path.name for path in tmp_path.iterdir()}
    for writer in (2**22 + 1, os.getpid(), 10**30):  # no process has the first; an earlier one of this number is gone
        leftovers(folder, writer)
    folder.write_resume_point(resume_point())  # killed between the result and the end of the resume point
    (tmp_path / ".notes.tmp").write_text("nobody's")
    folder.tidy()
    assert {path.name for path in tmp_path.iterdir()} == whole | {"lock", ".notes.tmp"}


def test_what_a_living_process_writes_is_left_alone(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    names = leftovers(folder, os.getppid())
    with folder.lock():
        pass
    assert {path.name for path in tmp_path.iterdir()} == {*names, "lock"}


def test_the_resume_point_of_an_unfinished_run_is_no_leftover(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write_spec(SPEC)
    folder.write_resume_point(resume_point())
    folder.tidy()
    assert folder.read_resume_point() is not None


def test_a_folder_in_use_is_not_tidied(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with folder.lock():
        leftovers(folder, 2**22 + 1)
        RunFolder(tmp_path).tidy()
        assert (tmp_path / "progress.json").exists()


def test_a_planted_link_is_not_followed(tmp_path: Path) -> None:
    target = tmp_path / "target" / "tensorboard"
    target.mkdir(parents=True)
    (tmp_path / "runs").mkdir()
    folder = RunFolder.of(tmp_path / "runs", SPEC)
    folder.path.symlink_to(tmp_path / "target")
    with pytest.raises(FlatminimaError, match="is a symbolic link, which is not followed") as caught:
        train(SPEC, tmp_path / "runs", progress=False)
    one_line(caught)
    assert list((tmp_path / "target").iterdir()) == [target]
    (tmp_path / "elsewhere").symlink_to(tmp_path / "runs")  # of the root that was named one may make what one likes
    RunFolder.of(tmp_path / "elsewhere", replace(SPEC, model="cnn")).refuse_link()


@pytest.mark.parametrize("name", ["state.safetensors", "checkpoint.safetensors"])
def test_tensors_that_another_program_wrote_are_not_believed(name: str, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.write_result(result(tmp_path), {"a": torch.ones(2)}, RECORDS)
    folder.write_resume_point(resume_point())
    save_file(load_file(tmp_path / name), tmp_path / name)
    with pytest.raises(DamagedFileError, match="it has no digest of ours"):
        folder.read_resume_point() if name == "state.safetensors" else folder.read_result()


def test_the_lock_excludes_others_and_is_freed(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    with (
        folder.lock(),
        pytest.raises(FlatminimaError, match="another process is training"),
        RunFolder(folder.path).lock(),
    ):
        pass
    with RunFolder(folder.path).lock():
        pass


@pytest.mark.parametrize(("seconds", "seen"), [(0.0, 4), (1e9, 2)])
def test_who_watches_reads_how_far_the_run_is(seconds: float, seen: int, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert (folder.read_progress(), folder.progress_written()) == (None, None)
    with folder.watched(seconds=seconds) as note:
        for iteration in (2, 4):
            note(RunProgress("training", iteration=iteration, iterations=8, epoch=1, epochs=2))
        progress = folder.read_progress()
    assert progress == RunProgress("training", iteration=seen, iterations=8, epoch=1, epochs=2)
    assert progress.fraction == seen / 8
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["", "{", '{"doing": 3, "what": 4}', "7"])
def test_a_note_of_progress_that_is_none_is_nobodys_concern(text: str, tmp_path: Path) -> None:
    (tmp_path / "progress.json").write_text(text)
    assert RunFolder(tmp_path).read_progress() is None


def test_a_note_of_progress_that_cannot_be_written_is_nobodys_concern(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "missing").watched() as note:
        note(RunProgress("measuring"))


def test_a_root_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    with pytest.raises(FlatminimaError) as caught, RunFolder(tmp_path / "runs" / "run").lock():
        pass
    assert "is no folder; choose another one" in one_line(caught)
