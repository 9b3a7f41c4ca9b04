"""auricle compare: two runs (or more) against each other, in numbers and in a picture."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.cli.parser import Parser
from launch.runs.summary import audio_hours, differences, find_runs, rows, smoothed, summarise

PLOTTED = ("loss/total", "metric/accuracy", "metric/perplexity", "opt/grad_norm")

FIGURES = (
    ("state", "{0.state}"),
    ("step", "{0.step}/{0.steps}"),
    ("loss", "{0.loss:.4f}"),
    ("accuracy", "{0.accuracy:.3f}"),
    ("hours of audio", "{0.hours:.2f}"),
    ("audio-s/s", "{0.speed:.0f}"),
    ("alarms", "{0.alarms}"),
    ("evaluated", "{0.evaluation}"),
)
"""What is printed of a RunSummary."""


def run(arguments: list[str]) -> int:
    """Exit code 0 once compared. Raises ValueError for fewer than two runs."""
    parser = Parser("auricle compare", description="runs against each other, printed and plotted")
    parser.add_argument("runs", type=Path, nargs="+", help="run folders")
    parser.add_argument("--plot", type=Path, default=Path("compare.png"), help="the picture (default: compare.png)")
    given = parser.parse_args(arguments)
    folders = [folder for path in given.runs for folder in find_runs([path])[:1]]
    if len(folders) < 2:
        raise ValueError("auricle compare needs two run folders or more")
    print_differences(folders)
    plot(folders, given.plot)
    print(f"plotted in {given.plot}")
    return 0


def print_differences(folders: Sequence[Path]) -> None:
    """Key figures side by side, then every config field in which the runs differ."""
    from rich.table import Table

    from launch.cli.tables import show

    summaries = [summarise(folder) for folder in folders]
    figures = Table("", *(s.name for s in summaries), box=None)
    for label, pattern in FIGURES:
        figures.add_row(label, *(pattern.format(s) for s in summaries))
    show(figures)
    configs = [json.loads((folder / "config.json").read_text(encoding="utf-8")) for folder in folders]
    changed: dict[str, None] = {}
    for one, other in itertools.combinations(configs, 2):
        changed |= {path: None for path, _, _ in differences(one, other)}
    fields = Table("config", *(s.name for s in summaries), box=None)
    for path in sorted(changed):
        fields.add_row(path, *(json.dumps(_at(config, path)) for config in configs))
    show(fields)


def _at(config: Any, path: str) -> Any:
    for key in path.split("."):
        config = config.get(key, "–") if isinstance(config, dict) else "–"
    return config


def plot(folders: Sequence[Path], path: Path) -> None:
    """Smoothed curves over hours of audio seen, so that runs of other batch sizes compare."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    for axis, name in zip(figure.subplots(2, 2).flat, PLOTTED, strict=True):
        for folder in folders:
            found = [row for row in rows(folder) if name in row]
            hours = audio_hours(found)
            (line,) = axis.plot(hours, smoothed([row[name] for row in found]), label=folder.name)
            axis.plot(hours, [row[name] for row in found], color=line.get_color(), alpha=0.2, linewidth=0.5)
        axis.set(title=name, xlabel="hours of audio seen")
        axis.grid(alpha=0.3)
    figure.axes[0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
