"""auricle plan-run: estimates memory, time and communication of a run on a cluster."""

from __future__ import annotations

from data_pipeline.core.schema import ConfigError
from launch.cli import request
from launch.config import PretrainJob
from launch.exit_codes import ExitCode

USAGE = """auricle plan-run [the overrides of `auricle pretrain`] cluster=NODESxGPUSxKIND
                  [mfu=0.09-0.11 | measured=FILE.json]
       auricle plan-run [the overrides of a federated run] [devices=NUMBER]

Memory per GPU for each ZeRO stage, operations, communication, and days to the
end on 1 to 1,024 GPUs. mfu is the share of the GPU's peak that is reached, one
figure or LOW-HIGH; published speech pretraining reaches 9 to 11 % on an H100,
and perf/mfu of a run on your GPUs is the better figure. measured=FILE.json
takes it from the recipe's row in the output of benchmarks/gpu.sh or
benchmarks/train_step.py --out on such a GPU.

Of a federated run (engine.name=federated): rounds, audio and bytes of the
server and of each device."""


def run(arguments: list[str]) -> int:
    """Prints the estimate; returns 0."""
    pairs = [line.partition("=") for line in arguments]
    own = {name: value for name, _, value in pairs if name in ("cluster", "mfu", "measured", "devices")}
    rest = [line for line in arguments if line.partition("=")[0] not in own]
    if not any(line.startswith("data.shards=") for line in rest):
        rest.append("data.shards=none")  # nothing is read
    given = request.read("pretrain", PretrainJob, rest, usage=USAGE)
    if given is None:
        return ExitCode.DONE
    from launch.workflows import run_estimate

    if given.config.engine.name == "federated":
        run_estimate.show_federated(given.config, **_only(own, "devices"))
    else:
        run_estimate.show(given.config, **_only(own, "cluster", "mfu", "measured"))
    return ExitCode.DONE


def _only(given: dict[str, str], *known: str) -> dict[str, str]:
    """Returns the fields. Raises ConfigError for one that this kind of run has not."""
    if unknown := sorted(set(given) - set(known)):
        raise ConfigError(f"{unknown[0]}={given[unknown[0]]}: this run has {', '.join(f'{name}=' for name in known)}")
    return given
