"""auricle bench: speed, memory and size of exported graphs on this machine."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from data_pipeline.core.schema import ConfigError
from launch.cli.parser import Parser
from launch.exit_codes import ExitCode

COLUMNS = ("graph", "RTF p50", "RTF p95", "speed-up", "CPU RTF", "first output ms", "peak RSS MB", "above bare", "MB")


def run(arguments: list[str]) -> int:
    """Prints the figures; returns 0."""
    parser = Parser("auricle bench", description="speed, memory and size of exported graphs, measured in turn")
    parser.add_argument("folders", nargs="*", type=Path, help="folders of auricle export; the first is the baseline")
    parser.add_argument("--table", metavar="RUN", help="instead: latency of single blocks of a run's encoder, as JSON")
    parser.add_argument("--heads", type=numbers, help="table: numbers of heads, with commas")
    parser.add_argument("--ffn", type=numbers, help="table: numbers of inner channels, with commas")
    parser.add_argument(
        "--subnets",
        type=int,
        default=0,
        help="table: also measure this many whole subnets of a supernet, such as 40, for auricle search-architecture",
    )
    parser.add_argument("--threads", type=int, default=1, help="intra-op threads (default: 1)")
    parser.add_argument("--seconds", type=float, default=10.0, help="audio of one run (default: 10)")
    parser.add_argument("--runs", type=int, default=30, help="runs of each graph (default: 30)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    given = parser.parse_args(arguments)
    for name, least in (("threads", 1), ("runs", 1), ("seconds", 1.0)):
        if not getattr(given, name) >= least:
            parser.error(f"--{name} {getattr(given, name)}: must be at least {least:g}")

    if bool(given.table) == bool(given.folders) or (given.table and bool(given.heads) != bool(given.ffn)):
        parser.error("give folders, or --table RUN, with --heads and --ffn where it is no supernet")
    if given.folders and (given.heads or given.ffn or given.subnets):
        parser.error("--heads, --ffn and --subnets belong to --table")
    if given.table:
        print(json.dumps(_table(given), indent=2))
        return ExitCode.DONE

    from launch.cli.tables import show, table
    from pretrain.profiling.graph_timing import measure_graphs

    found = measure_graphs(given.folders, given.seconds, given.runs, given.threads)
    if given.json:
        print(json.dumps(dataclasses.asdict(found), indent=2))
        return ExitCode.DONE
    base = found.graphs[0].rtf_p50
    rows = [
        [
            graph.name, f"{graph.rtf_p50:.5f}", f"{graph.rtf_p95:.5f}", f"{base / graph.rtf_p50:.2f}",
            f"{graph.cpu_rtf:.5f}", f"{graph.first_output_ms:.0f}", f"{graph.peak_rss_mb:.0f}",
            f"{graph.peak_rss_mb - graph.bare_rss_mb:.0f}", f"{graph.file_mb:.1f}",
        ]
        for graph in found.graphs
    ]  # fmt: skip
    show(table(COLUMNS, rows))
    noisy = f"; noisy: {found.noisy}" if found.noisy else ""
    print(f"{found.threads} thread(s), {found.seconds:g} s of audio per run{noisy}")
    return ExitCode.DONE


def numbers(text: str) -> list[int]:
    """Reads whole numbers with commas."""
    return [int(part) for part in text.split(",")]


def _table(given: argparse.Namespace) -> dict[str, Any]:
    """Measures single blocks of a run's encoder, by default of a supernet's widths, and whole subnets if asked."""
    from pretrain.checkpointing.locate import find_checkpoint
    from pretrain.checkpointing.weights import load_checkpoint
    from pretrain.compression.latency import measured_subnets, subnet_timings
    from pretrain.nn.stack_config import StackConfig
    from pretrain.profiling.block_table import block_table

    found = load_checkpoint(find_checkpoint(given.table))
    encoder = found.config.encoder
    if not isinstance(encoder, StackConfig):
        raise ConfigError(f"encoder.name={encoder.name}: only stacks of blocks have a table")
    space = found.module.objective.space()
    if space is None and (given.subnets or not given.heads):
        raise ConfigError(f"--table {given.table}: is no supernet (objective.elastic); give --heads and --ffn alone")
    options = {"seconds": given.seconds, "runs": given.runs, "threads": given.threads}
    made = block_table(
        encoder,
        found.module.model.shape.rate_hz,
        heads=given.heads or (space.heads if space else ()),
        ffn_dims=given.ffn or (space.ffn if space else ()),
        **options,
    )
    if space is not None and given.subnets:
        made |= subnet_timings(found, measured_subnets(space, given.subnets), **options)
    return made
