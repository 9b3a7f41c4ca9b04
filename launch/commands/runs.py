"""auricle runs: lists runs with their key figures."""

from __future__ import annotations

import math
from pathlib import Path

from launch.cli.parser import Parser
from launch.exit_codes import ExitCode

COLUMNS = ("run", "objective", "state", "step", "loss", "accuracy", "hours", "× real time", "alarms", "evaluated")

LEGEND = """loss, accuracy: mean of the last rows; hours: audio trained on;
× real time: audio-seconds per second, median of the last rows"""
EVALUATED = """;
evaluated: the newest result of auricle evaluate follow=true"""


def run(arguments: list[str]) -> int:
    """Prints the table; returns 0. Raises ConfigError if no run is found."""
    parser = Parser("auricle runs", description="all runs with their key figures, from their folders")
    parser.add_argument("folders", type=Path, nargs="*", default=[Path("runs")], help="where to look (default: runs)")
    folders = parser.parse_args(arguments).folders

    from launch.cli.tables import show, table, warn
    from launch.launchers.status import shown_state
    from launch.runs.summary import find_runs, summarise

    listed: list[tuple[str, ...]] = []
    for folder in find_runs(folders):
        try:
            s = summarise(folder)
        except ValueError as error:  # one unreadable run must not hide the rest
            listed.append((folder.name, "–", "unreadable", *"–––––––"))
            warn(str(error))
            continue
        measured = [_figure(s.loss, 4), _figure(s.accuracy, 3), _figure(s.hours, 1), _figure(s.speed, 0)]
        figures = (f"{s.step}/{s.steps}", *measured)
        listed.append((s.name, s.objective, shown_state(folder), *figures, str(s.alarms), s.evaluation))
    empty = {
        number for number, name in enumerate(COLUMNS) if name == "evaluated" and not any(r[number] for r in listed)
    }
    shown = [[value for number, value in enumerate(row) if number not in empty] for row in (COLUMNS, *listed)]
    show(table(shown[0], shown[1:]))
    warn(LEGEND if empty else LEGEND + EVALUATED)
    return ExitCode.DONE


def _figure(value: float, digits: int) -> str:
    return "–" if math.isnan(value) else f"{value:.{digits}f}"
