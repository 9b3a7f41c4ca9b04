"""One rank of a pretraining run: `python -m launch.workers.rank RUN_FOLDER`, started by a launcher.

The process ends with an `ExitCode`: DONE, STOPPED (on request, with a checkpoint; the same command continues), USAGE
for a config that cannot work, UNHEALTHY or SUPERSEDED (no launcher restarts the run after these three), or FAILED for
all other errors: damaged data, lost storage, lost peers, bugs.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from launch.exit_codes import ExitCode
from launch.workers.environment import adopt_slurm_ranks, keep_compiled_code, log_to_folder
from launch.workers.stop_request import StopRequest

if TYPE_CHECKING:
    from pretrain.checkpointing.run_folder import RunFolder
    from pretrain.config import EngineConfig

HANG_SLACK_SECONDS = 30.0
"""Seconds beyond the timeout of a collective after which a rank stuck in native code ends; the other ranks name it."""
HANG_WARNING_SHARE = 0.75
"""Share of a collective's timeout after which a rank without progress reports where it hangs."""


def main(run_folder: str) -> ExitCode:
    """Runs this rank to its end; prints one paragraph on failure.

    Args:
        run_folder: a prepared run folder, with config.json.

    Returns:
        The exit code of the process.
    """
    path = Path(run_folder)
    stop = StopRequest(path)  # before the slow imports: a signal must not kill a rank that is still starting
    adopt_slurm_ranks()
    keep_compiled_code()
    log_to_folder(path)
    faulthandler.enable()
    from data_pipeline.core.schema import load
    from data_pipeline.loader.reader import PlanReader
    from launch.runs import data_record
    from launch.workers.build import build
    from pretrain.checkpointing.run_folder import RunFolder, read_config
    from pretrain.config import Config
    from pretrain.engines import distributed
    from pretrain.monitoring.heartbeat import Heartbeat
    from pretrain.train import Ending, train

    reader, folder = None, RunFolder(path)
    try:
        config = load(Config, read_config(path))
        world = distributed.join(config.device, config.engine.timeout_minutes)
        run = build(config, world, folder)
        reader = run.reader
        if world.rank == 0:
            folder.claim()
            folder.unhealthy.unlink(missing_ok=True)
            if isinstance(reader, PlanReader):
                data_record.write(path, reader.records)
        folder.incarnation = int(world.from_first(str(folder.incarnation)))
        limit = longest_phase(config.engine)
        with Heartbeat(
            path,
            world.rank,
            patience_seconds=limit + HANG_SLACK_SECONDS,
            warn_seconds=HANG_WARNING_SHARE * limit,
            start=folder.incarnation,
            superseded=folder.superseded,
        ) as heartbeat:
            ending = train(
                config=config,
                engine=run.engine,
                reader=reader,
                run=folder,
                heartbeat=heartbeat,
                stop_requested=stop,
                say=_print,
                held_out=run.held_out,
            )
        return ExitCode.STOPPED if ending is Ending.STOPPED else ExitCode.DONE
    except (ValueError, OSError, RuntimeError, FloatingPointError) as error:
        return _report_failure(error, folder)
    finally:
        if reader is not None:
            reader.close()
        distributed.leave()


def longest_phase(engine: EngineConfig) -> float:
    """Returns the seconds after which a phase of an update hangs: a collective, or a round of devices, lasts less."""
    collective = engine.timeout_minutes * 60
    return max(collective, engine.federated.longest_seconds) if engine.name == "federated" else collective


def _report_failure(error: Exception, folder: RunFolder) -> ExitCode:
    """Prints the error that ended this rank and returns its exit code; USAGE only for a config that cannot work."""
    from data_pipeline.core.schema import ConfigError
    from pretrain.checkpointing.run_folder import StaleIncarnationError
    from pretrain.monitoring.health_monitor import UnhealthyError
    from pretrain.monitoring.heartbeat import slowest

    if os.environ.get("AURICLE_DEBUG"):
        traceback.print_exc()
    rank = int(os.environ.get("RANK", "0"))
    explained = isinstance(error, UnhealthyError | StaleIncarnationError)
    # a failed collective raises a RuntimeError on the ranks that waited for the rank that caused it
    hint = f"\n{slowest(folder.path, folder.incarnation)}" if isinstance(error, RuntimeError) and not explained else ""
    print(f"rank {rank}: {type(error).__name__}: {error}{hint}", file=sys.stderr, flush=True)
    if folder.superseded():  # checked for every error, since on most ranks a collective fails first
        return ExitCode.SUPERSEDED
    if isinstance(error, UnhealthyError):
        if rank == 0 or not folder.unhealthy.exists():  # the reason that rank 0 found takes precedence
            folder.unhealthy.write_text(f"{error}\n", encoding="utf-8")
        return ExitCode.UNHEALTHY
    return ExitCode.USAGE if isinstance(error, ConfigError) else ExitCode.FAILED


def _print(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    if len(arguments) != 1:
        print("usage: python -m launch.workers.rank RUN_FOLDER", file=sys.stderr)
        sys.exit(ExitCode.USAGE)
    try:
        code = main(arguments[0])
    except BaseException:  # a bug: print the whole traceback
        traceback.print_exc()
        code = ExitCode.FAILED
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # the threads of a collective must not keep a failed rank alive
