"""Tables for terminals and for files."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

WIDE = 200


def show(table: Table) -> None:
    """Prints `table`; what is no terminal gets it wide, so that nothing is cut."""
    Console(width=None if sys.stdout.isatty() else WIDE, highlight=False).print(table)


def show_rows(rows: Sequence[tuple[str, str]]) -> None:
    """Prints a table of names and values."""
    table = Table(box=None, show_header=False, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    Console(soft_wrap=True, highlight=False).print(table)
