"""Commands that tests start as processes of their own, to kill or to interrupt them."""

from __future__ import annotations

import os
import sys
from pathlib import Path

LEAN = Path(__file__).parent / "lean"


def environment(*folders: Path) -> dict[str, str]:
    """The variables of a command that finds the modules in ``folders`` and has the packages of the extra ``lab``."""
    paths = [str(LEAN), *map(str, folders), *filter(None, sys.path)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
