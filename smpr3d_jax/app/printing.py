"""What commands print on stdout: files described, tables, findings."""

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from ..inverse.design import Finding
from .plan_tables import Rows


def describe_file(known: dict[str, Any]) -> None:
    """What `readers.describe` says, a line each."""
    for name, value in known.items():
        lines = value.items() if isinstance(value, dict) else [(None, value)]
        for key, part in lines:
            label = name if key is None else f"the file says: {key}"
            print(f"{label.replace('_', ' ')}: {_readable(part)}")


def _readable(value: Any) -> str:
    """Numbers with few digits."""
    if isinstance(value, tuple) and value and all(isinstance(v, int | float) for v in value):
        return ", ".join(_readable(v) for v in value)
    if isinstance(value, tuple):
        return "; ".join(str(v) for v in value) or "none"
    if isinstance(value, float):
        return f"{value:,.6g}" if abs(value) < 1e6 else f"{value:,.0f}"
    return str(value)


def plain(value: Any) -> Any:
    """What JSON does not know, as lists and words."""
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else str(value)


def show_tables(tables: list[tuple[str, tuple[str, ...], Rows]]) -> None:
    """Tables on stdout, as wide as they need."""
    out = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    for title, heads, rows in tables:
        table = Table(title=title, title_justify="left", title_style="bold", box=None)
        for head in heads:
            table.add_column(head, overflow="fold")
        for row in rows:
            table.add_row(*row)
        out.print(table)
        out.print()


def tell_findings(findings: Sequence[Finding]) -> None:
    """Errors and warnings, a line each."""
    for finding in findings:
        print(f"{finding.severity}: {finding.key}: {finding.message}")
