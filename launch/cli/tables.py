"""Tables for terminals and for files."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.table import Table

WIDE = 200


def show(table: Table) -> None:
    """Prints `table`; what is no terminal gets it wide, so that nothing is cut."""
    Console(width=None if sys.stdout.isatty() else WIDE, highlight=False).print(table)
