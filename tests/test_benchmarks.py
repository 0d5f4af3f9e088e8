"""Benchmarks write their records as they go, so that an interruption keeps what was measured before it."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def harness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Writes to a folder of the test's own."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    found = importlib.import_module("harness")
    monkeypatch.setattr(found, "RESULTS", tmp_path)
    return found


@pytest.mark.parametrize(
    ("name", "measuring", "found", "where"),
    [
        ("heap", "compared", {"error": "died"}, ("networks", "resnet8-wide", "training")),
        ("shares", "harness.in_own_process", {"error": "died"}, ("networks", "cnn")),
        ("training", "harness.in_own_process", {"error": "died"}, ("results", "resnet20")),
        ("finite_differences", "sweep", [{"alpha": 1.0}], ("stages", "at initialization", "ReLU")),
    ],
)
def test_an_interrupted_benchmark_keeps_what_it_has_measured(
    name: str,
    measuring: str,
    found: Any,
    where: tuple[str, ...],
    harness: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if name == "heap" and sys.platform != "linux":
        pytest.skip("there is nothing to compare")
    benchmark = importlib.import_module(name)
    monkeypatch.setattr(sys, "argv", [f"{name}.py"])
    calls = 0

    def interrupted(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr(harness if "." in measuring else benchmark, measuring.rpartition(".")[2], interrupted)
    with pytest.raises(KeyboardInterrupt):
        benchmark.main()
    kept = json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8"))
    for key in where:
        kept = kept[key]
    assert kept == found


@pytest.mark.usefixtures("harness")
def test_the_record_of_comparisons_says_of_what_and_on_how_many_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    benchmark = importlib.import_module("compare")
    monkeypatch.setattr(sys, "argv", ["compare.py", "--networks", "cnn", "--models", "2", "--threads", "3"])
    monkeypatch.setattr(benchmark, "gains_of", lambda network, options: {})
    benchmark.main()
    record = json.loads((tmp_path / "compare.json").read_text(encoding="utf-8"))
    assert record["models"] == ["seed 0", "seed 1"]
    assert (record["cores"], record["images"], record["trials"]) == (3, 300, 4)
    assert list(record["networks"]) == ["cnn"]
