"""Trains a recipe with several seeds and writes the spread of its curves."""

from __future__ import annotations

import shlex
from pathlib import Path

from data_pipeline.core.schema import ConfigError
from launch.cli import request
from launch.config import PretrainJob
from launch.exit_codes import ExitCode
from launch.runs import bands, metadata
from launch.workflows import pretraining, submit


def run(overrides: list[str], seeds: list[int], out: str, evaluation: list[str]) -> int:
    """Trains one run per seed, NAME_seed_N, and writes the bands; finished runs are not trained again.

    Args:
        overrides: command line of `auricle pretrain`, without seed.
        seeds: the seeds.
        out: file to write; empty: RUNS/NAME_bands.json.
        evaluation: overrides of `auricle evaluate`, which measures every checkpoint; empty: no probe.

    Returns:
        The exit code of the first run that fails, or 0.

    Raises:
        ConfigError: the command line is wrong, or the runs are queued instead of trained here.
    """
    given = request.read("pretrain", PretrainJob, overrides)
    if given is None:
        return ExitCode.DONE
    config = given.config
    if config.launcher.queued:
        raise ConfigError(f"launcher={config.launcher.name}: auricle bands waits for its runs; use launcher=local")
    folders = []
    for seed in seeds:
        line = [*overrides, f"seed={seed}", f"name={config.name}_seed_{seed}"]
        one = request.read("pretrain", PretrainJob, line)
        assert one is not None
        folder = metadata.folder_of(one.config)
        folders.append(folder)
        if code := pretraining.run(line):
            return code
        if evaluation and (code := submit.run("evaluate", [*evaluation, f"checkpoint={folder}", "follow=true"])):
            return code
    file = Path(out) if out else Path(config.runs) / f"{config.name}_bands.json"
    command = shlex.join(["auricle", "bands", *overrides, f"seeds={','.join(map(str, seeds))}"])
    found = bands.measure(config.name, command, seeds, folders)
    bands.write(found, file)
    for name, one_band in found.curves.items():
        last = f"{one_band.mean[-1]:.4g} ± {one_band.deviation[-1]:.2g}"
        print(f"{name}: {last} at step {one_band.step[-1]}, 95 % {one_band.low[-1]:.4g} … {one_band.high[-1]:.4g}")
    print(f"bands of {len(seeds)} seeds: {file}")
    return ExitCode.DONE
