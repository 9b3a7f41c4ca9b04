"""auricle search-architecture: the best subnets of a supernet under limits of latency and size."""

from __future__ import annotations

import sys
from pathlib import Path

from launch.cli.parser import Parser
from launch.exit_codes import ExitCode

COLUMNS = ("run", "heads × inner channels of each block", "score", "distilled on", "RTF", "measured", "MB")


def run(arguments: list[str]) -> int:
    """Searches, and prints the finalists; returns 0, or the code of a failed training.

    Raises:
        ConfigError: the run cannot be searched.
    """
    parser = Parser(
        "auricle search-architecture",
        description="searches the subnets of a supernet (objective.elastic) for the best scores at low latency by "
        "NSGA-II, cuts finalists into runs and distils them on; the same command continues an interrupted search",
    )
    parser.add_argument("run", help="run folder of a supernet, or its name below runs/")
    parser.add_argument("out", type=Path, help="folder for scores, front and runs")
    parser.add_argument(
        "--table", type=Path, required=True, help="JSON of auricle bench --table RUN --subnets 40, made on the device"
    )
    parser.add_argument("--rtf", type=float, help="largest seconds of computing per second of audio")
    parser.add_argument("--mb", type=float, help="largest size of the weights in fp32, in MB")
    parser.add_argument("--trials", type=int, default=200, help="different subnets to score (default: 200)")
    parser.add_argument("--population", type=int, default=20, help="subnets of a generation (default: 20)")
    parser.add_argument("--finalists", type=int, default=3, help="subnets that become runs (default: 3)")
    parser.add_argument("--seed", type=int, default=0, help="keys every draw (default: 0)")
    parser.add_argument("--task", default="phones", help="task of the probe, as of auricle evaluate (default: phones)")
    parser.add_argument("--manifest", default="", help="its manifest, as of auricle evaluate")
    parser.add_argument("--max-utterances", type=int, default=0, help="its utterances per split; 0: all (default: 0)")
    parser.add_argument(
        "--updates", type=int, default=0, help="distil each finalist on for as many updates; 0: none (default: 0)"
    )
    parser.add_argument(
        "--processes", type=int, default=0, help="ranks of that training; 0: one per GPU, or one (default: 0)"
    )
    given = parser.parse_args(arguments)
    limits = {"trials": 1, "population": 2, "finalists": 1, "seed": 0}
    for name, least in (limits | dict.fromkeys(("max_utterances", "updates", "processes"), 0)).items():
        if vars(given)[name] < least:
            parser.error(f"--{name.replace('_', '-')} {vars(given)[name]}: must be at least {least}")
    for name in ("rtf", "mb"):
        if vars(given)[name] is not None and not vars(given)[name] > 0:
            parser.error(f"--{name} {vars(given)[name]}: must be above 0")

    from launch.cli.tables import show, table
    from launch.workflows.searching_architecture import FailedTrainingError, SearchOptions, search_architecture
    from pretrain.compression.architecture_search import Budget, subnet_label

    options = SearchOptions(
        table=given.table,
        budget=Budget(given.rtf, given.mb),
        trials=given.trials,
        population=given.population,
        seed=given.seed,
        task=given.task,
        manifest=given.manifest,
        max_utterances=given.max_utterances,
        finalists=given.finalists,
        updates=given.updates,
        processes=given.processes,
    )
    try:
        result = search_architecture(given.run, given.out, options)
    except FailedTrainingError as failed:
        print(f"auricle search-architecture: {failed}", file=sys.stderr)
        return failed.code
    rows = [
        [
            final.run.name, subnet_label(final.candidate.subnet), f"{final.candidate.score:.1%}",
            f"{final.distilled[1]:.1%}" if final.distilled else "", f"{final.candidate.cost.rtf:.5f}",
            f"{final.measured_rtf:.5f}", f"{final.candidate.cost.megabytes:.1f}",
        ]
        for final in result.finals
    ]  # fmt: skip
    show(table(COLUMNS, rows))
    print(f"{result.scored} subnets scored; error of the predicted latency on left-out subnets {result.error:.1%}")
    for final in result.finals:
        training = f"to train on: init={final.run} {final.overrides}"
        print(f"distilled on: {final.distilled[0]}" if final.distilled else training)
    return ExitCode.DONE
