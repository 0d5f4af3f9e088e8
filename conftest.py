"""What holds for all tests: one thread each, and no doctests of modules whose framework is not installed."""

import os
from importlib.util import find_spec

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported: tests run side by side, one for each core

FRAMEWORKS = {"accelerate": "accelerate", "lightning": "lightning", "transformers": "transformers"}

collect_ignore = [
    f"src/flatminima/integrations/{module}.py" for module, package in FRAMEWORKS.items() if find_spec(package) is None
]
collect_ignore += ["tests/support"]  # helpers hold no tests, and some are not to be imported here
