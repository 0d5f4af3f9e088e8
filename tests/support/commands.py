"""Processes of their own that tests kill or interrupt: programs from their start on, and forked commands."""

from __future__ import annotations

import atexit
import multiprocessing.forkserver
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from flatminima.lab.jobs import PRELOADED

LEAN = Path(__file__).parent / "lean"
METHOD = "forkserver" if sys.platform == "linux" else "spawn"
"""How processes start: where that is safe, forked from a server that has imported torch once for all tests."""


def environment(*folders: Path) -> dict[str, str]:
    """The variables of a command that finds the modules in ``folders`` and has the packages of the extra ``lab``."""
    paths = [str(LEAN), *map(str, folders), *filter(None, sys.path)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def server() -> Any:
    """The context of processes that share one server, with what every run needs, and FSDP."""
    context = torch.multiprocessing.get_context(METHOD)
    context.set_forkserver_preload([*PRELOADED, "torch.distributed.fsdp"])
    return context


class Command:
    """A function in a process of its own, used as a ``subprocess.Popen`` is, but started within moments.

    Workers that it starts are of the same server; what it says goes to files in ``folder``.
    """

    def __init__(self, folder: Path, function: Callable[..., object], *args: Any) -> None:
        self._said = [Path(tempfile.mkstemp(prefix="said-", dir=folder)[1]) for _ in range(2)]
        self._process = server().Process(target=_perform, args=(self._said, function, args))
        self._process.start()
        atexit.register(self._process.kill)  # a test that fails may leave it, and Python waits for it at the end
        self.pid: int = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode  # type: ignore[no-any-return]

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()

    def wait(self, timeout: float | None = None) -> None:
        self._process.join(timeout)

    def communicate(self, timeout: float = 240) -> tuple[str, str]:
        """Wait for its end; what it has written to stdout and to stderr."""
        self.wait(timeout)
        assert self.returncode is not None, "it has not ended"
        out, error = (path.read_text() for path in self._said)
        return out, error


def _perform(said: list[Path], function: Callable[..., object], args: tuple[Any, ...]) -> None:
    from flatminima import progress

    progress.LINE_SECONDS = (1e9, 1e9, 1e9)  # what it says must not depend on how long it takes
    for descriptor, path in enumerate(said, start=1):
        opened = os.open(path, os.O_WRONLY)
        os.dup2(opened, descriptor)
        os.close(opened)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever the server made of it
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    if METHOD == "forkserver":  # else a second server would start, and import all once more
        multiprocessing.forkserver.ForkServer.ensure_running = lambda self: None  # type: ignore[method-assign]
        multiprocessing.forkserver.ensure_running = lambda: None
    function(*args)
