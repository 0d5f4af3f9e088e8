"""What experiments show, as tables, figures, pages and a live view."""

from flatminima.lab.reports.figures import Picture, Table, Theme, lines, picture, scatter, write_page, write_text
from flatminima.lab.reports.live import watch
from flatminima.lab.reports.pages import counted, duration, failed, progress, tables, write_reports

__all__ = [
    "Picture",
    "Table",
    "Theme",
    "counted",
    "duration",
    "failed",
    "lines",
    "picture",
    "progress",
    "scatter",
    "tables",
    "watch",
    "write_page",
    "write_reports",
    "write_text",
]
