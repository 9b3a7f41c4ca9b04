"""One rank of a pretraining run: `python -m launch.workers.rank RUN_DIR`, started by a launcher.

Exit codes: 0 finished, 85 stopped on request with a checkpoint (start again to continue), 1 failed, 2 bad config,
3 stopped by the health watch (to start again would end the same way; RUN/UNHEALTHY says why), 4 superseded by a newer
start of the run (to start again would depose that one).
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
import traceback
from pathlib import Path
from types import FrameType

from launch.workers.environment import adopt_slurm_ranks, log_to_folder

UNHEALTHY, STALE = 3, 4
SLACK = 30.0
"""Seconds that a rank in which Python is stuck lives longer than a collective, so that the others can name it."""
WARN = 0.75
"""Share of a collective's time after which a rank that hangs says so."""


class StopRequest:
    """True once SIGTERM, SIGINT or SIGUSR1 came, or somebody created RUN_DIR/STOP (watched by rank 0)."""

    def __init__(self, run_dir: Path) -> None:
        self._file = run_dir / "STOP"
        self._signalled = False
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True

    def __call__(self) -> bool:
        watches = os.environ.get("RANK", "0") == "0"
        return self._signalled or (watches and self._file.exists())


def main(run_dir: str) -> int:
    """Runs this rank to its end and says in one paragraph what went wrong, if anything did."""
    path = Path(run_dir)
    stop = StopRequest(path)  # before the heavy imports: a signal must not kill a rank that is still starting
    adopt_slurm_ranks()
    log_to_folder(path)
    faulthandler.enable()
    from data_pipeline.core.schema import ConfigError, load
    from launch.workers.build import build
    from pretrain.checkpointing.run_folder import RunFolder, StaleIncarnationError
    from pretrain.config import Config
    from pretrain.engines import distributed as ranks
    from pretrain.monitoring.health_monitor import UnhealthyError
    from pretrain.monitoring.heartbeat import Heartbeat, slowest
    from pretrain.train import train

    rank = int(os.environ.get("RANK", "0"))
    reader, folder = None, RunFolder(path)
    try:
        config = load(Config, json.loads((path / "config.json").read_text(encoding="utf-8")))
        world = ranks.join(config.device, config.engine.timeout_minutes)
        run = build(config, world, folder)
        reader = run.reader
        if world.rank == 0:
            folder.claim()
            folder.unhealthy.unlink(missing_ok=True)
        folder.incarnation = _of_rank_0(folder.incarnation, world.size)
        limit = config.engine.timeout_minutes * 60
        with Heartbeat(path, world.rank, limit + SLACK, WARN * limit, folder.incarnation) as heart:
            return train(config, run.engine, reader, folder, heart, stop, _say).value
    except (ConfigError, ValueError, OSError, RuntimeError, FloatingPointError) as error:
        if os.environ.get("AURICLE_DEBUG"):
            traceback.print_exc()
        told = isinstance(error, UnhealthyError | StaleIncarnationError)
        hint = f"\n{slowest(path, folder.incarnation)}" if isinstance(error, RuntimeError) and not told else ""
        print(f"rank {rank}: {type(error).__name__}: {error}{hint}", file=sys.stderr, flush=True)
        if folder.superseded():  # not only where that is the error: the other ranks see a collective end
            return STALE
        if isinstance(error, UnhealthyError):
            if rank == 0 or not folder.unhealthy.exists():  # rank 0 knows what it saw
                folder.unhealthy.write_text(f"{error}\n", encoding="utf-8")
            return UNHEALTHY
        return 2 if isinstance(error, ValueError) else 1
    finally:
        if reader is not None:
            reader.close()
        ranks.leave()


def _of_rank_0(number: int, size: int) -> int:
    """Rank 0's number, on every rank; a collective."""
    from torch import distributed as dist

    numbers = [number]
    if size > 1:
        dist.broadcast_object_list(numbers)
    return numbers[0]


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    arguments = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    if len(arguments) != 1:
        sys.exit("usage: python -m launch.workers.rank RUN_DIR")
    try:
        code = main(arguments[0])
    except BaseException:  # a defect: its whole traceback
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a collective's threads must not keep a failed rank alive
