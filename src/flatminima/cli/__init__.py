"""The command line: ``flatminima demo | train | measure | compare | reproduce``: parse, call, print."""

import sys

try:
    from flatminima.cli.main import main
except ModuleNotFoundError as missing:  # the library alone is installed
    sys.exit(f"flatminima: error: the command line needs {missing.name}: pip install 'flatminima[lab]'")

__all__ = ["main"]
