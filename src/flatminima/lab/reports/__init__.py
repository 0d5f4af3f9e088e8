"""What experiments show, as tables, figures, pages and a live view."""

from flatminima.lab.reports.evidence import evidence_table, write_evaluation
from flatminima.lab.reports.live import watch
from flatminima.lab.reports.pages import (
    counted,
    duration,
    failure_lines,
    figures,
    line_of,
    progress_line,
    tables,
    write_json,
    write_reports,
)
from flatminima.lab.reports.tracked import tracked_table, write_tracked_picture

__all__ = [
    "counted",
    "duration",
    "evidence_table",
    "failure_lines",
    "figures",
    "line_of",
    "progress_line",
    "tables",
    "tracked_table",
    "watch",
    "write_evaluation",
    "write_json",
    "write_reports",
    "write_tracked_picture",
]
