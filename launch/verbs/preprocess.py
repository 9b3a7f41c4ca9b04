"""auricle preprocess: raw audio in, shards out."""

from __future__ import annotations

from collections.abc import Sequence

from data_pipeline.preprocess_config import PreprocessConfig
from launch import job

DRY_RUN = "--dry-run"


def run(arguments: list[str]) -> int:
    """Exit code 0 where all is written, 1 where something could not be, 2 for a bad config."""
    request = job.read("preprocess", PreprocessConfig, arguments, switches=(DRY_RUN,))
    if request is None:
        return 0
    from data_pipeline.ray_jobs import plan_units, preprocess

    if DRY_RUN in request.switches:
        show(plan_units(request.config).rows())
        return 0
    summary = preprocess(request.config)
    show(summary.rows())
    if summary.problem:
        raise OSError(summary.problem)
    return 0


def show(rows: Sequence[tuple[str, str]]) -> None:
    """A table of names and values."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    Console(soft_wrap=True, highlight=False).print(table)
