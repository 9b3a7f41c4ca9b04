"""auricle data: the step plan that a pretraining config makes of its shards, and the micro-batches that fit."""

from __future__ import annotations

from data_pipeline.core.schema import ConfigError
from launch.cli import request as job
from launch.config import PretrainJob

USAGE = """auricle data plan       one epoch before it runs: steps, hours, padding, shapes, memory
auricle data find-caps  the largest micro-batches that this device can train on [--memory=GB]

both take the same overrides as `auricle pretrain`"""


def run(arguments: list[str]) -> int:
    """Answers for one of the two."""
    verbs = {"plan": plan, "find-caps": find_caps}
    if arguments[:1] and arguments[0] in verbs:
        return verbs[arguments[0]](arguments[1:])
    print(USAGE)
    return 0 if arguments[:1] in (["--help"], ["-h"]) else 2


def plan(arguments: list[str]) -> int:
    """Prints what one epoch looks like."""
    request = job.read("pretrain", PretrainJob, arguments)
    if request is None:
        return 0
    from data_pipeline.loader.reader import open_reader
    from data_pipeline.sampling.summary import describe, to_text

    config = request.config
    reader = open_reader(config.data, config.seed, 0, 1)
    try:
        report = describe(reader.plan, config.data)
    finally:
        reader.close()
    print(to_text(report))
    print(f"\ntrain.steps={config.train.steps:,} are {config.train.steps / report.steps:,.2f} epochs")
    return 0


def find_caps(arguments: list[str]) -> int:
    """Bisects on the real model and device; prints the overrides to use."""
    limits = [argument.removeprefix("--memory=") for argument in arguments if argument.startswith("--memory=")]
    rest = [argument for argument in arguments if not argument.startswith("--memory=")]
    try:
        memory_gb = float(limits[-1]) if limits else 0.0
    except ValueError:
        raise ConfigError(f"--memory={limits[-1]}: must be a number of gigabytes, such as --memory=70") from None
    request = job.read("pretrain", PretrainJob, rest)
    if request is None:
        return 0
    from pretrain.engines import distributed as ranks
    from pretrain.profiling.memory_caps import measure_caps

    config = request.config
    world = ranks.join(config.device, config.engine.timeout_minutes)
    try:
        caps = measure_caps(config, world, memory_gb)
    finally:
        ranks.leave()
    for seconds, rows in caps.rows:
        print(f"{rows:5} segments of {seconds:6.2f} s = {rows * seconds:8.1f} s")
    print(f"\ndata.cap_seconds={caps.cap_seconds:.4g} data.cap_quadratic={caps.cap_quadratic:.4g}")
    return 0
