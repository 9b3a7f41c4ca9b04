"""auricle runs: all runs with their key figures."""

from __future__ import annotations

from pathlib import Path

from launch.cli.parser import Parser
from launch.runs.summary import find_runs, summarise


def run(arguments: list[str]) -> int:
    """Exit code 0 where there is at least one run. Raises ValueError where there is none."""
    parser = Parser("auricle runs", description="all runs with their key figures, from their folders")
    parser.add_argument("folders", type=Path, nargs="*", default=[Path("runs")], help="where to look (default: runs)")
    from rich.table import Table

    from launch.cli.tables import show

    table = Table(
        "run", "objective", "state", "step", "loss", "accuracy", "hours", "audio-s/s", "alarms", "evaluated", box=None
    )
    for folder in find_runs(parser.parse_args(arguments).folders):
        s = summarise(folder)
        step, loss, accuracy = f"{s.step}/{s.steps}", f"{s.loss:.4f}", f"{s.accuracy:.3f}"
        row = (s.name, s.objective, s.state, step, loss, accuracy, f"{s.hours:.1f}", f"{s.speed:.0f}", str(s.alarms))
        table.add_row(*row, s.evaluation)
    show(table)
    return 0
