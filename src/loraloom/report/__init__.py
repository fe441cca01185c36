"""Study results for people: one self-contained HTML page, and tables for Markdown and the terminal."""

from loraloom.report.page import write_report
from loraloom.report.tables import (
    SummaryRow,
    Table,
    base_average,
    interference_table,
    markdown_tables,
    merged_rows,
    merged_table,
    metric_tables,
    single_table,
    summary_rows,
    summary_table,
)
from loraloom.report.verdict import verdict

__all__ = [
    "SummaryRow",
    "Table",
    "base_average",
    "interference_table",
    "markdown_tables",
    "merged_rows",
    "merged_table",
    "metric_tables",
    "single_table",
    "summary_rows",
    "summary_table",
    "verdict",
    "write_report",
]
