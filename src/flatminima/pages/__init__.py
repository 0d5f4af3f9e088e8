"""Self-contained HTML pages: no script, no font, no picture is loaded from elsewhere.

:func:`~flatminima.pages.comparison.report` is there without the extra ``report``, and says so; the other files need it.
"""
