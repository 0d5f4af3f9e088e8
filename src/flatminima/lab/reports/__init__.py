"""What experiments show, as tables, figures, pages and a live view."""

from flatminima.lab.reports.figures import Picture, Table, picture
from flatminima.lab.reports.live import watch
from flatminima.lab.reports.pages import counted, duration, failed, line_of, progress, tables, write_reports

__all__ = [
    "Picture",
    "Table",
    "counted",
    "duration",
    "failed",
    "line_of",
    "picture",
    "progress",
    "tables",
    "watch",
    "write_reports",
]
