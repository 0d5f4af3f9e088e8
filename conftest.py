"""What holds for all tests: one thread each, and no doctests of modules whose framework is not installed.

And how many run at once (``pytest -n logical``): three for two cores, as tests that start or kill processes wait.
"""

import os
from importlib.util import find_spec

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported: tests run side by side, one for each core

FRAMEWORKS = {"accelerate": "accelerate", "lightning": "lightning", "transformers": "transformers"}

collect_ignore = [
    f"src/flatminima/integrations/{module}.py" for module, package in FRAMEWORKS.items() if find_spec(package) is None
]
collect_ignore += ["tests/support"]  # helpers hold no tests, and some are not to be imported here


def pytest_xdist_auto_num_workers() -> int:
    """Workers of ``-n logical``; a core that others keep busy too is one of the machine's all the same."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, cores + cores // 2)
