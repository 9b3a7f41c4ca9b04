"""auricle recipes: lists the shipped experiments with their parameters, audio per update and operations."""

from __future__ import annotations

from typing import Any

from data_pipeline.core.schema import ConfigError, hint
from launch.cli.groups import CONF
from launch.cli.parser import Parser
from launch.exit_codes import ExitCode

COLUMNS = ("recipe", "M weights", "Hz", "min/update", "updates", "GFLOP", "HF")
LEGEND = """In brackets: the published figure.
M weights: millions of trained weights; Hz: frames per second of audio;
min/update: minutes of audio per update; GFLOP: one forward pass of front end
and encoder per second of audio, on crops of 15 s, counted and derived. Training
takes about three times that, times the objective's passes (teachers, several
masks or views). HF: exports to Hugging Face; transformers has no class for the
other models, which export to ONNX and TorchScript."""


def run(arguments: list[str]) -> int:
    """Prints the table; returns 0. Raises ConfigError for an unknown name."""
    parser = Parser("auricle recipes", description="size and cost of each shipped experiment")
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these (default: all)")
    known = sorted(file.stem for file in (CONF / "experiment").glob("*.yaml"))
    names = parser.parse_args(arguments).names or known
    for name in names:
        if name not in known:
            raise ConfigError(f"there is no recipe {name!r}{hint(name, known)}; there are: {', '.join(known)}")

    from data_pipeline.core.progress import stages
    from data_pipeline.core.schema import load
    from launch.cli.compose import compose
    from launch.cli.tables import show, table
    from launch.config import PretrainJob
    from launch.runs.metadata import run_config
    from pretrain.profiling.recipe_table import OURS, recipe_row

    rows = []
    with stages() as begin:
        advance = begin("building models", len(names))
        for name in names:
            values = compose("pretrain", [f"experiment={name}", "data.shards=none"])
            rows.append(recipe_row(run_config(load(PretrainJob, values))))
            advance(name)
    show(table(COLUMNS, map(_cells, rows)))
    print(LEGEND)
    if sources := [(row.name, row.published.source) for row in rows if not row.published.source.startswith(OURS)]:
        show(table(("", "published by"), sources, fold=True))
    return ExitCode.DONE


def _cells(row: Any) -> tuple[str, ...]:
    published = row.published
    return (
        row.name,
        _figure(row.parameters / 1e6, published.millions),
        f"{row.frames_hz:g}",
        _figure(row.minutes_per_update, published.minutes),
        f"{row.updates:,}",
        _figure(row.gflop_per_audio_second, published.gflop),
        "yes" if row.hugging_face else "no",
    )


def _figure(own: float, published: float | None) -> str:
    return f"{own:.1f} ({'none' if published is None else f'{published:.1f}'})"
