from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from flatminima.lab.executors import available_cores, run_all


def square(number: int) -> tuple[int, int, int]:
    time.sleep(0.02 * (3 - number))  # later tasks end first
    return number**2, os.getpid(), torch.get_num_threads()


def fail(number: int) -> int:
    if number == 1:
        raise ValueError("task 1 is broken")
    return number


def test_results_keep_the_tasks_order_and_workers_have_one_thread() -> None:
    results = run_all(square, [0, 1, 2, 3], workers=2, progress=False)
    assert [value for value, _, _ in results] == [0, 1, 4, 9]
    assert os.getpid() not in {pid for _, pid, _ in results}
    assert {threads for _, _, threads in results} == {1}


def test_the_first_failure_is_raised() -> None:
    with pytest.raises(ValueError, match="task 1 is broken"):
        run_all(fail, [0, 1, 2], workers=1, progress=False)


def test_available_cores() -> None:
    assert 1 <= available_cores() <= (os.cpu_count() or 1)


def test_interruption_leaves_no_worker_behind(tmp_path: Path) -> None:
    script = tmp_path / "slow.py"
    script.write_text(
        "import os, sys, time\n"
        "from flatminima.lab.executors import run_all\n"
        "def slow(path):\n"
        "    open(f'{path}.{os.getpid()}', 'w').close()\n"
        "    time.sleep(600)\n"
        "if __name__ == '__main__':\n"
        "    run_all(slow, [sys.argv[1]] * 2, workers=2, progress=False)\n"
    )
    marker = tmp_path / "worker"
    process = subprocess.Popen([sys.executable, script, marker], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(workers := list(tmp_path.glob("worker.*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) != 0
    pids = [int(worker.suffix[1:]) for worker in workers]
    assert len(pids) == 2
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
