"""The command line: ``flatminima demo | train | measure | compare | track | evaluate | reproduce``."""

import sys

_LIBRARY_ALONE = """\
usage: flatminima COMMAND [options]

Which minimum generalizes better, and how to train to it.

The library is here: `import flatminima` in Python. Its commands need {package}:
  pip install 'flatminima[lab]'
"""

try:
    from flatminima.cli.main import main
except ModuleNotFoundError as missing:  # the library alone is installed
    package = (missing.name or "").partition(".")[0]
    if sys.argv[1:] in ([], ["-h"], ["--help"], ["help"]):
        sys.stdout.write(_LIBRARY_ALONE.format(package=package))
        sys.exit(0)
    sys.exit(f"flatminima: error: the command line needs {package}: pip install 'flatminima[lab]'")
except KeyboardInterrupt:  # seconds may go by before there is a `main` to handle it
    exec("")  # or Python would end by the signal, if it came inside another `exec`
    sys.stderr.write("flatminima: interrupted: the same command starts again\n")
    sys.exit(130)

__all__ = ["main"]
