"""``python -m flatminima``, and ``torchrun -m flatminima``: the command line."""

import sys

from flatminima.cli import main

sys.exit(main())
