"""auricle compress: cuts a run to a smaller one, which trains on, exports and is evaluated like any other."""

from __future__ import annotations

from pathlib import Path

from launch.cli.parser import Parser
from launch.exit_codes import ExitCode


def run(arguments: list[str]) -> int:
    """Writes the smaller run; returns 0. Raises ConfigError where the run cannot be cut this way."""
    parser = Parser(
        "auricle compress",
        description="cuts a run to a smaller run: the first blocks, narrower blocks, or what pruning left",
    )
    parser.add_argument("run", help="run folder, or a run's name below runs/")
    parser.add_argument("out", type=Path, help="run folder to write; must not exist")
    parser.add_argument("--blocks", type=int, help="number of blocks to keep, counted from the first")
    parser.add_argument(
        "--widths",
        type=Path,
        help="JSON file with [[heads, ffn_dim], …], a pair per block: keep the heads and inner channels with the "
        "largest weights. Without --blocks and --widths: remove what structured pruning has closed",
    )
    given = parser.parse_args(arguments)

    from launch.workflows.compressing import compress

    found = compress(given.run, given.out, given.blocks, given.widths)
    kept = f"{found.after / 1e6:.2f} of {found.before / 1e6:.2f} million"
    print(f"{given.out}: {kept} weights of front end and encoder are kept")
    print(f"to train on from these weights: init={given.out} {found.overrides}")
    if found.new:
        print(f"new, with random values: {', '.join(found.new[:4])}{' …' if len(found.new) > 4 else ''}")
    return ExitCode.DONE
