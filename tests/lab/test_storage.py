"""Locks of files and folders, which are the same in all rooms of the lab."""

from __future__ import annotations

import errno
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest

from flatminima.errors import FlatminimaError
from flatminima.lab.experiments.search import Case
from flatminima.lab.runs.folder import RunFolder
from flatminima.lab.storage import locked


def test_a_lock_excludes_others_and_is_freed(tmp_path: Path) -> None:
    lock = tmp_path / "folder" / "lock"
    for _ in range(2):
        with (
            locked(lock),
            pytest.raises(FlatminimaError, match="it is busy: wait"),
            locked(lock, busy="it is busy: wait"),
        ):
            pass


LOCKS: dict[str, Callable[[Path], AbstractContextManager[object]]] = {
    "a run that waits": lambda folder: RunFolder(folder).lock(wait=True),
    "a run that does not": lambda folder: RunFolder(folder).lock(),
    "a study": lambda folder: nullcontext(Case("digits", (), folder).create()),
    "a record": lambda folder: locked(folder / ".epochs.jsonl.lock"),
}


@pytest.mark.parametrize("name", LOCKS)
@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_a_lock_file_that_cannot_be_made_is_said_and_not_waited_for(
    name: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(path: Path) -> None:
        raise OSError(code, "no")

    monkeypatch.setattr(Path, "touch", refuses)
    message = rf"cannot write {tmp_path}.*lock: no; .*choose another folder"
    with pytest.raises(FlatminimaError, match=message), LOCKS[name](tmp_path):
        pass
