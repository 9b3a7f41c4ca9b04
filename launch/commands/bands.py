"""auricle bands: trains a recipe with several seeds and writes the spread of its curves."""

from __future__ import annotations

from data_pipeline.core.schema import ConfigError
from launch.cli import request
from launch.config import PretrainJob
from launch.exit_codes import ExitCode

USAGE = """auricle bands +experiment=NAME data.shards=SHARDS [seeds=0,1,2,3,4] [out=FILE]
              [evaluate.FIELD=VALUE ...] [field=value of `auricle pretrain`] ...

Trains the recipe once per seed (runs NAME_seed_N) and writes mean, standard
deviation and the 95 % band of a further seed for loss, accuracy and use of
codes at each step, and, with evaluate.task=…, for the probes of every
checkpoint. `auricle compare --bands FILE` says whether runs differ by more than
seeds do, `auricle board --bands FILE` shows the band behind each run's curve."""
DEFAULT_SEEDS = (0, 1, 2, 3, 4)


def run(arguments: list[str]) -> int:
    """Runs the command; returns the exit code of the first run that fails, or 0. Raises ConfigError."""
    own = {"seeds": "", "out": ""}
    overrides, evaluation = [], []
    for argument in arguments:
        name, _, value = argument.partition("=")
        if name in own:
            own[name] = value
        elif name.startswith("evaluate."):
            evaluation.append(argument.removeprefix("evaluate."))
        else:
            overrides.append(argument)
    if {"-h", "--help"} & set(overrides):
        request.read("pretrain", PretrainJob, overrides, usage=USAGE)
        return ExitCode.DONE
    from launch.workflows import bands

    parts = [part.strip() for part in own["seeds"].strip("[]").split(",") if part.strip()]
    if not all(part.isdecimal() for part in parts):
        raise ConfigError(f"seeds={own['seeds']}: must be numbers with commas between them, such as seeds=0,1,2")
    seeds = [int(part) for part in parts] or list(DEFAULT_SEEDS)
    if len(set(seeds)) != len(seeds) or len(seeds) < 2:
        raise ConfigError(f"seeds={own['seeds']}: needs two different seeds or more")
    return bands.run(overrides, seeds, own["out"], evaluation)
