"""auricle recipes: every shipped experiment with its parameters, audio per update and operations."""

from __future__ import annotations

from data_pipeline.core.schema import load
from launch.cli.compose import CONF, compose
from launch.cli.parser import Parser
from launch.config import PretrainJob
from launch.runs.metadata import run_config


def run(arguments: list[str]) -> int:
    """Prints the table; exit code 0."""
    parser = Parser("auricle recipes", description="what each shipped experiment amounts to")
    known = sorted(file.stem for file in (CONF / "experiment").glob("*.yaml"))
    parser.add_argument("names", nargs="*", choices=[[], *known], help="only these (default: all)")
    names = parser.parse_args(arguments).names or known

    from rich.console import Console
    from rich.table import Table

    from pretrain.profiling.recipe_table import summarize

    columns = (
        "recipe",
        "parameters",
        "published",
        "frames/s",
        "min/update",
        "published",
        "updates",
        "GFLOP/s of audio",
        "worked out",
    )
    table = Table(*columns, "source", box=None, pad_edge=False)
    for name in names:
        values = compose("pretrain", [f"experiment={name}", "data.shards=none"])
        row = summarize(run_config(load(PretrainJob, values)))
        table.add_row(
            row.name,
            f"{row.parameters / 1e6:.2f} M",
            f"{row.published.millions:.1f} M" if row.published.millions else "none",
            f"{row.frames_hz:g}",
            f"{row.minutes_per_update:.1f}",
            f"{row.published.minutes:.1f}" if row.published.minutes else "none",
            f"{row.updates:,}",
            f"{row.gflop_per_audio_second:.1f}",
            f"{row.published.gflop:.1f}" if row.published.gflop else "",
            row.published.source,
        )
    console = Console(width=None if Console().is_terminal else 200)
    console.print(table)
    console.print(
        "parameters: all that are trained. Operations: one forward pass of front end and encoder, crops of 15 s, as "
        "counted and as the project's design worked them out; training takes about thrice, times the passes that the "
        "objective makes (teachers, several masks or views)"
    )
    return 0
