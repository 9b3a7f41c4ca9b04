"""Tables and messages on the terminal. Text from outside, such as names, is never read as markup or control codes."""

from __future__ import annotations

import sys
from collections.abc import Container, Iterable, Sequence
from typing import TextIO

from rich.console import Console, OverflowMethod
from rich.table import Table
from rich.text import Text

from data_pipeline.core.text import visible

NARROW = 100
"""Width below which columns are one space apart instead of two."""
UNBROKEN = 40
"""Cells of the first column of up to this length stay on one line."""
PIPED_WIDTH = 200
"""Width if the output is not a terminal, regardless of COLUMNS."""


def console(stream: TextIO | None = None) -> Console:
    """Returns a console that prints strings unchanged: no markup, emoji codes or highlighting.

    Args:
        stream: sys.stdout (default) or sys.stderr; has a fixed width if it is not a terminal.
    """
    stream = stream or sys.stdout
    width = None if stream.isatty() else PIPED_WIDTH
    return Console(file=stream, width=width, markup=False, emoji=False, highlight=False)


def cell(value: object, style: str = "") -> Text:
    """Returns a table cell with plain text."""
    return Text(visible(str(value)), style=style)


def table(
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    title: str = "",
    bold: Iterable[int] = (),
    fold: bool = False,
    keep: Container[int] = (),
) -> Table:
    """Returns a table of any values.

    Args:
        columns: column titles. The first column, which users copy from, is never truncated.
        rows: cells by row; a `Text` keeps its style, other values are shown as text.
        title: line above the table.
        bold: indices of emphasised rows; -1 is the last.
        fold: wrap all columns instead of truncating them.
        keep: indices of further columns that users copy from, which are wrapped as the first.
    """
    listed = list(rows)
    longest = max((len(str(row[0])) for row in listed if row), default=0)
    made = Table(title=cell(title) if title else None, title_justify="left", box=None, pad_edge=False)
    made.collapse_padding = console().width < NARROW
    for number, column in enumerate(columns):
        whole = min(longest, UNBROKEN) if number == 0 else None
        overflow: OverflowMethod = "fold" if fold or number == 0 or number in keep else "ellipsis"
        made.add_column(cell(column), overflow=overflow, no_wrap=False, min_width=whole)
    emphasised = {number % len(listed) for number in bold} if listed else set()
    for number, row in enumerate(listed):
        cells = [value if isinstance(value, Text) else cell(value) for value in row]
        made.add_row(*cells, style="bold" if number in emphasised else None)
    return made


def show(made: Table) -> None:
    """Prints a table."""
    console().print(made)


def show_rows(rows: Sequence[tuple[str, str]]) -> None:
    """Prints names and values, one pair a line; long values continue on the next line."""
    made = Table(box=None, show_header=False, pad_edge=False)
    for name, value in rows:
        made.add_row(cell(name), cell(value))
    Console(file=sys.stdout, soft_wrap=True, markup=False, emoji=False, highlight=False).print(made)


def warn(message: str) -> None:
    """Prints a line on stderr."""
    print(visible(message, keep="\n"), file=sys.stderr, flush=True)
