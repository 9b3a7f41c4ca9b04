"""auricle recipes: lists the shipped experiments with their parameters, audio per update and operations."""

from __future__ import annotations

from typing import Any

from launch.cli.groups import CONF
from launch.cli.parser import Parser
from launch.exit_codes import ExitCode

COLUMNS = (
    "recipe",
    "parameters",
    "published",
    "frames/s",
    "min/update",
    "published",
    "updates",
    "GFLOP/s of audio",
    "published",
    "source",
)
LEGEND = (
    "parameters: trained ones only. GFLOP/s of audio: one forward pass of front end and encoder on crops of 15 s, "
    "counted and derived; training takes about three times that, times the objective's passes (teachers, several masks "
    "or views)"
)


def run(arguments: list[str]) -> int:
    """Prints the table; returns 0."""
    parser = Parser("auricle recipes", description="size and cost of each shipped experiment")
    known = sorted(file.stem for file in (CONF / "experiment").glob("*.yaml"))
    parser.add_argument("names", nargs="*", choices=[[], *known], help="only these (default: all)")
    names = parser.parse_args(arguments).names or known

    from data_pipeline.core.schema import load
    from launch.cli.compose import compose
    from launch.cli.tables import show, table
    from launch.config import PretrainJob
    from launch.runs.metadata import run_config
    from pretrain.profiling.recipe_table import summarize

    configs = (compose("pretrain", [f"experiment={name}", "data.shards=none"]) for name in names)
    show(table(COLUMNS, [_cells(summarize(run_config(load(PretrainJob, values)))) for values in configs]))
    print(LEGEND)
    return ExitCode.DONE


def _cells(row: Any) -> tuple[str, ...]:
    published = row.published
    return (
        row.name,
        f"{row.parameters / 1e6:.2f} M",
        f"{published.millions:.1f} M" if published.millions else "none",
        f"{row.frames_hz:g}",
        f"{row.minutes_per_update:.1f}",
        f"{published.minutes:.1f}" if published.minutes else "none",
        f"{row.updates:,}",
        f"{row.gflop_per_audio_second:.1f}",
        f"{published.gflop:.1f}" if published.gflop else "",
        published.source,
    )
