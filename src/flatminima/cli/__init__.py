"""The command line: ``flatminima demo | train | measure | compare | track | evaluate | reproduce``."""

import sys

try:
    from flatminima.cli.main import main
except ModuleNotFoundError as missing:  # the library alone is installed
    package = (missing.name or "").partition(".")[0]
    sys.exit(f"flatminima: error: the command line needs {package}: pip install 'flatminima[lab]'")
except KeyboardInterrupt:  # seconds may go by before there is a `main` to handle it
    exec("")  # or Python would end by the signal, if it came inside another `exec`
    sys.stderr.write("flatminima: interrupted: the same command starts again\n")
    sys.exit(130)

__all__ = ["main"]
