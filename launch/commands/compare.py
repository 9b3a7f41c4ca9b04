"""auricle compare: compares two or more runs in a table and a plot."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from launch.cli.parser import Parser
from launch.exit_codes import ExitCode

if TYPE_CHECKING:
    from launch.runs.summary import RunSummary

PLOTTED = ("loss/total", "metric/accuracy", "metric/perplexity", "opt/grad_norm")

FIGURES = (
    ("state", "{0.state}"),
    ("step", "{0.step}/{0.steps}"),
    ("loss", "{0.loss:.4f}"),
    ("accuracy", "{0.accuracy:.3f}"),
    ("hours of audio", "{0.hours:.2f}"),
    ("× real time", "{0.speed:.0f}"),
    ("alarms", "{0.alarms}"),
    ("evaluated", "{0.evaluation}"),
)
"""Rows of the first table: title, and format string for a RunSummary."""


def run(arguments: list[str]) -> int:
    """Prints the tables and writes the plot; returns 0. Raises ConfigError for fewer than two runs."""
    parser = Parser("auricle compare", description="runs side by side, printed and plotted")
    parser.add_argument("runs", type=Path, nargs="+", help="run folders")
    parser.add_argument(
        "--plot", type=Path, default=Path("compare.png"), help="file of the plot (default: compare.png)"
    )
    parser.add_argument(
        "--bands", type=Path, help="file of `auricle bands`: whether differences are larger than seeds'"
    )
    given = parser.parse_args(arguments)

    from data_pipeline.core.schema import ConfigError
    from launch.launchers.status import shown_state
    from launch.runs.summary import find_runs, summarise

    folders = [folder for path in given.runs for folder in find_runs([path])[:1]]
    if len(folders) < 2:
        raise ConfigError("auricle compare needs two run folders or more")
    print_differences(folders, [replace(summarise(folder), state=shown_state(folder)) for folder in folders])
    if given.bands is not None:
        print_verdicts(folders, given.bands)
    plot(folders, given.plot)
    print(f"plotted in {given.plot}")
    return ExitCode.DONE


def print_differences(folders: Sequence[Path], summaries: Sequence[RunSummary]) -> None:
    """Prints key figures side by side, then every config field in which the runs differ."""
    from data_pipeline.core.schema import diff, flatten
    from launch.cli.tables import show, table
    from pretrain.checkpointing.run_folder import read_config

    names = [summary.name for summary in summaries]
    figures = [(title, *(pattern.format(s) for s in summaries)) for title, pattern in FIGURES]
    show(table(("", *names), figures, fold=True))
    configs = [read_config(folder) for folder in folders]
    changed = {path for one, other in itertools.combinations(configs, 2) for path, _, _ in diff(one, other)}
    flat = [flatten(config) for config in configs]
    shown = [
        (path, *(json.dumps(values[path], ensure_ascii=False) if path in values else "–" for values in flat))
        for path in sorted(changed)
    ]
    show(table(("config", *names), shown, fold=True))


def print_verdicts(folders: Sequence[Path], file: Path) -> None:
    """Prints whether each further run differs from the first by more than the seeds of a recipe do."""
    from launch.cli.tables import show, table
    from launch.runs.bands import larger_than_seeds, read

    bands, (first, *others) = read(file), folders
    lines = []
    for name in bands.curves:
        verdicts = [larger_than_seeds(bands, name, (first, other)) for other in others]
        if any(verdicts):
            lines.append((name, *verdicts))
    show(table((f"difference to {first.name}", *(other.name for other in others)), lines, fold=True))


def plot(folders: Sequence[Path], path: Path) -> None:
    """Plots smoothed curves over hours of audio seen, so that runs with different batch sizes are comparable."""
    from matplotlib.figure import Figure

    from data_pipeline.core.text import visible
    from launch.runs.summary import audio_hours, number, rows, smoothed

    figure = Figure(figsize=(11, 7), layout="constrained")
    for axis, name in zip(figure.subplots(2, 2).flat, PLOTTED, strict=True):
        for folder in folders:
            found = [row for row in rows(folder) if name in row]
            hours, values = audio_hours(found), [number(row, name) for row in found]
            label = visible(folder.name).replace("$", r"\$").lstrip("_")  # matplotlib reads $ as maths, _ as "no label"
            (line,) = axis.plot(hours, smoothed(values), label=label)
            axis.plot(hours, values, color=line.get_color(), alpha=0.2, linewidth=0.5)
        axis.set(title=name, xlabel="hours of audio seen")
        axis.grid(alpha=0.3)
    figure.axes[0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
