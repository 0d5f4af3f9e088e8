"""What flatminima refuses, and what it warns of: every message says what, where and what to do.

Errors derive from :class:`FlatminimaError` (itself a ``ValueError``), warnings from :class:`FlatminimaWarning`, so that
a caller can catch or silence them by name.
"""

from __future__ import annotations


class FlatminimaError(ValueError):
    """Bad input or an undefined result. The message says what is wrong, where, and what to do."""


class FlatminimaWarning(UserWarning):
    """A result that is right but may not mean what its reader thinks."""
