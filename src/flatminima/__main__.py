"""``python -m flatminima``, and ``torchrun -m flatminima``: the command line."""

import sys

from flatminima.cli import main

if __name__ == "__main__":
    sys.exit(main())
