"""Files that are replaced as a whole, and what killed writers leave beside them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from flatminima.errors import FlatminimaError
from flatminima.files import beside, require_writable, write_file, write_whole

NAME = "table [1].json"  # brackets mean something to a pattern


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / NAME


def half_written(path: Path, writer: str, *, hours: float = 0.0) -> Path:
    left = path.with_name(f".{path.name}.{writer}.tmp")
    left.write_text("{")
    os.utime(left, (left.stat().st_atime, left.stat().st_mtime - 3600 * hours))
    return left


def names(path: Path) -> set[str]:
    return {other.name for other in path.parent.iterdir()}


def test_what_a_killed_process_left_half_written_is_gone_once_the_file_is_written_again(path: Path) -> None:
    killed = "import os, signal, sys; from pathlib import Path; from flatminima import files\n"
    killed += "os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)\n"
    killed += "files.write_whole(Path(sys.argv[1]), 'half')"
    subprocess.run([sys.executable, "-c", killed, path], check=False)
    assert len(names(path)) == 1
    assert NAME not in names(path)
    write_whole(path, "whole")
    assert names(path) == {NAME}
    assert path.read_text() == "whole"


@pytest.mark.parametrize(
    "writer",
    [f"{2**22 + 1}@{{here}}", f"{2**22 + 1}-7@{{here}}", f"{10**30}@{{here}}", f"{os.getpid()}@{{here}}"],
    ids=["no such process", "a thread of it", "no process number", "an earlier process of this one's number"],
)
def test_a_dead_writers_file_is_deleted(path: Path, writer: str) -> None:
    half_written(path, writer.format(here=socket.gethostname()))
    write_whole(path, "whole")
    assert names(path) == {NAME}


@pytest.mark.parametrize(
    "writer",
    [f"{os.getppid()}@{{here}}", "1@elsewhere", "notes"],
    ids=["living process", "another machine", "not ours"],
)
def test_what_may_still_be_written_is_left_alone(path: Path, writer: str) -> None:
    left = half_written(path, writer.format(here=socket.gethostname()))
    write_whole(path, "whole")
    assert names(path) == {NAME, left.name}


def test_another_machines_file_is_deleted_when_it_is_hours_old(path: Path) -> None:
    half_written(path, "1@elsewhere", hours=2)
    write_whole(path, "whole")
    assert names(path) == {NAME}


def test_a_link_stays_one_to_the_file_that_is_replaced(path: Path) -> None:
    (path.parent / "elsewhere").mkdir()
    target = path.parent / "elsewhere" / "target.json"
    path.symlink_to(target)
    for content in ("new", "newer"):
        require_writable(path)
        write_whole(path, content)
        assert path.is_symlink()
        assert target.read_text() == content
    assert names(target) == {target.name}


def test_a_file_keeps_its_permissions(path: Path) -> None:
    path.write_text("old")
    path.chmod(0o600)
    write_whole(path, "new")
    assert (path.read_text(), path.stat().st_mode & 0o777) == ("new", 0o600)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
def test_a_pipe_is_written_to_and_no_file_takes_its_place(path: Path) -> None:
    os.mkfifo(path)
    with ThreadPoolExecutor(1) as pool:
        read = pool.submit(path.read_text)
        require_writable(path)
        write_file(path, "content")
        assert read.result() == "content"
    assert path.is_fifo()
    assert names(path) == {NAME}


def test_an_interrupted_writer_leaves_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.write_text("old")

    def interrupted(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_whole(path, "new")
    assert names(path) == {NAME}
    assert path.read_text() == "old"


def test_a_folder_is_no_file(path: Path) -> None:
    for write in (write_whole, write_file):
        with pytest.raises(FlatminimaError, match="it is a folder; name a file"):
            write(path.parent, "content")


def test_threads_that_write_one_file_do_not_take_each_others_away(path: Path) -> None:
    def write(content: str) -> None:
        for _ in range(50):
            write_whole(path, content)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(write, "abcd"))
    assert names(path) == {NAME}


def test_of_a_thread_that_ended_nothing_is_left(path: Path) -> None:
    thread = threading.Thread(target=lambda: beside(path).write_text("{"))
    thread.start()
    thread.join()
    assert NAME not in names(path)
    write_whole(path, "whole")
    assert names(path) == {NAME}
