"""auricle data: reports the step plan of a pretraining config, and measures the largest micro-batches that fit."""

from __future__ import annotations

from data_pipeline.core.schema import ConfigError, hint
from launch.cli import request
from launch.cli.command_table import SUBCOMMANDS
from launch.config import PretrainJob
from launch.exit_codes import ExitCode

USAGE = "\n".join(
    [
        *(f"auricle data {name:<9}  {text}" for name, text in SUBCOMMANDS["data"].items()),
        "",
        "Both take the fields of `auricle pretrain`.",
    ]
)


def run(arguments: list[str]) -> int:
    """Runs a subcommand; returns 0."""
    subcommands = {"plan": plan, "find-caps": find_caps}
    if arguments[:1] and arguments[0] in subcommands:
        return subcommands[arguments[0]](arguments[1:])
    if arguments and arguments[0] not in ("--help", "-h"):
        near, listed = hint(arguments[0], subcommands), ", ".join(subcommands)
        raise ConfigError(f"there is no subcommand {arguments[0]!r}{near}; there are: {listed}")
    if not arguments:
        print(USAGE)
        return ExitCode.USAGE
    request.read("pretrain", PretrainJob, arguments, usage=USAGE)
    return ExitCode.DONE


def plan(arguments: list[str]) -> int:
    """Prints the plan of one epoch."""
    given = request.read("pretrain", PretrainJob, arguments, usage=USAGE)
    if given is None:
        return ExitCode.DONE
    from data_pipeline.sampling.summary import describe_plan, to_text
    from pretrain.train_module import open_run_reader

    config = given.config
    reader = open_run_reader(config)
    try:
        report = describe_plan(reader.plan, config.data)
    finally:
        reader.close()
    print(to_text(report))
    print(f"\ntrain.steps={config.train.steps:,} are {config.train.steps / report.steps:,.2f} epochs")
    return ExitCode.DONE


def find_caps(arguments: list[str]) -> int:
    """Measures the largest micro-batches for this model and device by bisection; prints the overrides to use."""
    limits = [argument.removeprefix("--memory=") for argument in arguments if argument.startswith("--memory=")]
    rest = [argument for argument in arguments if not argument.startswith("--memory=")]
    try:
        memory_gb = float(limits[-1]) if limits else 0.0
    except ValueError:
        raise ConfigError(f"--memory={limits[-1]}: must be a number of gigabytes, such as --memory=70") from None
    given = request.read("pretrain", PretrainJob, rest, usage=USAGE)
    if given is None:
        return ExitCode.DONE
    from pretrain.engines import distributed as ranks
    from pretrain.profiling.memory_caps import measure_caps

    config = given.config
    world = ranks.join(config.device, config.engine.timeout_minutes)
    try:
        caps = measure_caps(config, world, memory_gb)
    finally:
        ranks.leave()
    for seconds, rows in caps.rows:
        print(f"{rows:5} segments of {seconds:6.2f} s = {rows * seconds:8.1f} s")
    print(f"\ndata.cap_seconds={caps.cap_seconds:.4g} data.cap_quadratic={caps.cap_quadratic:.4g}")
    return ExitCode.DONE
