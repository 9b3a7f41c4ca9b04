"""The width of help."""

from __future__ import annotations

import shutil
import sys

WIDTH = 100
"""Most columns of help, and those of piped help."""


def columns() -> int:
    """Returns the columns of help: those of the terminal, at most WIDTH; WIDTH where the output is no terminal."""
    return min(WIDTH, shutil.get_terminal_size((WIDTH, 24)).columns) if sys.stdout.isatty() else WIDTH
