from __future__ import annotations

import platform
import resource
import sys
from multiprocessing import get_context

import pytest
import torch

from flatminima.cli import main
from flatminima.lab.heap import keep_freed_memory
from flatminima.lab.jobs import WorkerPool, run_all

pytestmark = [
    pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="freed memory is kept with glibc alone"),
    pytest.mark.xdist_group("commands"),
]
ROUNDS, TENSORS, PAGES = 10, 8, 4096
"""Tensors of 16 MiB, in pages of 4 KiB; to fault for no more than one of the tensors in each round is to keep them."""


def faults(_: object = None) -> int:
    """Page faults of tensors that are made and freed again and again, after the first time."""

    def make() -> None:
        for tensor in [torch.ones(PAGES * 1024) for _ in range(TENSORS)]:
            assert tensor[-1] == 1

    make()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(ROUNDS):
        make()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def faults_where_kept(_: object) -> int:
    keep_freed_memory()
    return faults()


def faults_of_command(_: object) -> int:
    sys.argv = ["flatminima", "--version"]
    assert main() == 0
    return faults()


def faults_of_caller(_: object) -> int:
    assert main(["--version"]) == 0
    return faults()


def in_fresh_process(function: object) -> int:
    with get_context("spawn").Pool(1) as pool:
        return int(pool.map(function, [None])[0])  # type: ignore[arg-type]


@pytest.mark.parametrize("function", [faults_where_kept, faults_of_command])
def test_freed_memory_is_kept(function: object) -> None:
    assert in_fresh_process(function) < ROUNDS * PAGES


@pytest.mark.parametrize("function", [faults, faults_of_caller])
def test_the_heap_of_a_caller_is_left_alone(function: object) -> None:
    assert in_fresh_process(function) > ROUNDS * PAGES


def test_workers_keep_freed_memory() -> None:
    (found,) = run_all(faults, [None], WorkerPool(1), progress=False)
    assert isinstance(found, int)
    assert found < ROUNDS * PAGES
