"""What holds for all tests: one thread each, nothing imported that is not needed, no state left behind.

And how many run at once (``pytest -n logical``): three for two cores, as tests that start or kill processes wait.
"""

import functools
import importlib.metadata
import os
import sys
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported: tests run side by side, one for each core
os.environ["MPLBACKEND"] = "agg"  # no windows, wherever the tests run

# Fabric reads those of all installed packages for every run that is trained; they are the same for all tests.
importlib.metadata.entry_points = functools.cache(importlib.metadata.entry_points)

# Whatever is collected is imported by every worker: of our modules those that hold examples, frameworks' own only then.
collect_ignore = [
    str(path) for path in Path(__file__).parent.glob("src/**/*.py") if ">>>" not in path.read_text(encoding="utf-8")
]
collect_ignore += ["tests/support"]  # helpers hold no tests, and some are not to be imported here


@pytest.hookimpl(wrapper=True)
def pytest_collect_file(file_path: Path) -> Generator[None, list[pytest.Collector], list[pytest.Collector]]:
    """Tests hold no examples."""
    found = yield
    return [c for c in found if type(c) is pytest.Module or not file_path.name.startswith("test_")]


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests of one group share what takes long to make: without groups, each worker would make it."""
    if getattr(config.option, "loadgroup", False):
        lost = [item for item in items if item.get_closest_marker("xdist_group") and "@" not in item.nodeid]
        if lost:
            raise pytest.UsageError(
                f"xdist has lost the groups of tests ({lost[0].nodeid}): see pytest in constraints.txt"
            )


def pytest_xdist_auto_num_workers() -> int:
    """Workers of ``-n logical``; a core that others keep busy too is one of the machine's all the same."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, cores + cores // 2)


@pytest.fixture(autouse=True)
def process_state() -> Iterator[None]:
    """What a test leaves of PyTorch's state in this process is reported where it happens, not by some later test."""
    before = _state()
    yield
    after = _state()
    _forget_compiled_graphs()
    _close_figures()
    assert after == before, "the test leaves another state of the process than it has found"


@pytest.fixture(autouse=True, scope="session")
def no_lines_of_progress() -> Iterator[None]:
    """No test, nor what a module's tests share, depends on how long its work takes."""
    from flatminima import progress

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(progress, "LINE_SECONDS", (1e9, 1e9, 1e9))
        yield


def _forget_compiled_graphs() -> None:
    """Dynamo keeps eight graphs for each piece of code, whosever test they are of: a ninth model would run eagerly."""
    if "torch._dynamo" in sys.modules:
        import torch

        torch.compiler.reset()


def _close_figures() -> None:
    """Pyplot keeps every figure that it has made, whosever test drew it."""
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")


def _state() -> dict[str, Any]:
    """All that our calls change for a while; imported here, since conftest must set the number of threads first."""
    import torch

    from flatminima import torch_compat

    return {
        "gradients recorded": torch.is_grad_enabled(),
        "default dtype": torch.get_default_dtype(),
        "checkpoints": torch_compat.checkpoint_variants(),
        "compiler's stance": getattr(torch_compat.compiler_stance(), "stance", "default"),
        "function modes": torch_compat.function_modes(),
        "levels of torch.func": torch_compat.func_levels(),
        "float32": [getattr(holder, name) for holder, name, _, _ in torch_compat.float32_switches()],
    }
