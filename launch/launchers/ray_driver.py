"""Drives the ranks of a run on a Ray cluster through Ray Train; continues with fewer ranks when the cluster shrinks.

    python -m launch.launchers.ray_driver RUN_FOLDER --address auto --workers 8

Ray Train places the ranks, monitors workers and nodes, and ends all ranks when one is lost. Each attempt is one `fit()`
with a fixed number of workers. This module decides what follows an attempt, since Ray Train's own policies cannot
express it: ScalingConfig(num_workers=(min, max)) takes as many workers as fit, also where fewer need no more rounds
for the micro-batches of a step; FailureConfig counts all failures, whereas launch/launchers/retry.py considers exit
codes and counts failures in a row without a new checkpoint. Checkpoints have the run's own format and are not reported
to Ray Train. The step plan does not depend on the number of ranks, so every number gives the same run.
"""

from __future__ import annotations

import argparse
import os
import secrets
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.core import plugins
from data_pipeline.core.ray_tasks import RayClusterConfig, cluster, cluster_contents, process_capacity
from data_pipeline.core.schema import ConfigError
from data_pipeline.sampling.plan import useful_worlds
from launch.exit_codes import NEVER_RETRY, ExitCode
from launch.launchers.retry import RetryPolicy
from launch.launchers.waiting import report_waiting
from launch.workers.stop_request import START_ID, STOP_FILE, request_stop, stop_requested
from pretrain.checkpointing.locate import steps_done
from pretrain.checkpointing.run_folder import read_config

NO_PLACE = -1
"""Result of an attempt whose ranks could not be placed."""
POLL_SECONDS = 2.0
"""Seconds between queries of a changing cluster."""
PLACEMENT_SECONDS = 30
"""Seconds that an attempt waits for the placement of its ranks before the cluster is queried again."""


class ImpossibleRequestError(RuntimeError):
    """The cluster cannot hold the ranks."""


@dataclass(frozen=True)
class ClusterRequest:
    """Resources that a run requests from a cluster, and its retry policy."""

    folder: Path
    workers: int
    """Most ranks; 0 for no limit."""
    min_workers: int
    gpus: int
    """GPUs per rank."""
    cpus: int
    """Cores per rank."""
    retries: int
    wait_minutes: float
    """Minutes to wait until the cluster can hold the ranks."""
    grace: float
    """Seconds to save a checkpoint after a stop request; 0: derived from the duration of updates."""
    fixed: bool
    """Whether the cluster was started for this run and therefore cannot grow."""


def main(arguments: list[str]) -> int:
    """Drives the run to its end; returns its exit code."""
    parser = argparse.ArgumentParser("launch.launchers.ray_driver")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--address", default="")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--min-workers", type=int, default=1)
    parser.add_argument("--gpus", type=int, default=0)
    parser.add_argument("--cpus", type=int, default=1)
    parser.add_argument("--retries", type=int, default=3)
    parser.add_argument("--wait-minutes", type=float, default=30.0)
    parser.add_argument("--answer-seconds", type=float, default=20.0)
    parser.add_argument("--grace", type=float, default=0.0)
    given = vars(parser.parse_args(arguments))
    address, answer_seconds = given.pop("address"), given.pop("answer_seconds")
    os.environ.setdefault(START_ID, secrets.token_hex(8))  # set by launchers, not in a Ray Job
    request = ClusterRequest(**given, fixed=not address)
    try:
        # a Ray started here listens on the loopback only
        with cluster(RayClusterConfig(address=address, answer_seconds=answer_seconds), field="launcher.address"):
            for number in (signal.SIGTERM, signal.SIGHUP):  # ending this process at once would kill the ranks
                signal.signal(number, lambda *_: request_stop(request.folder, os.environ[START_ID]))
            return drive(request)
    except ConfigError as error:
        print(f"ConfigError: {error}", file=sys.stderr, flush=True)
        return ExitCode.USAGE
    except (OSError, ValueError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return ExitCode.FAILED


def drive(request: ClusterRequest) -> int:
    """Starts attempts until the run is done, cannot work, or fails too often without a new checkpoint.

    Returns:
        The exit code of the run.
    """
    config = read_config(request.folder)
    policy, first, waiting_since = RetryPolicy(request.folder, request.retries), True, None
    if not os.environ.get(START_ID) or not stop_requested(request.folder):
        (request.folder / STOP_FILE).unlink(missing_ok=True)  # of an earlier start
    while True:
        if not first and stop_requested(request.folder):
            return ExitCode.STOPPED
        since, first = policy.begin(first), False
        try:
            waiting_since = waiting_since or time.monotonic()
            world = wait_for_places(config["data"]["micro_batches"], request, waiting_since)
            if not world:
                return ExitCode.STOPPED
            report_waiting(request.folder, "")
            _log(f"{world} ranks, from step {since.checkpoint}")
            code = run_attempt(request, world)
        except ImpossibleRequestError as error:
            _log(str(error))
            report_waiting(request.folder, "")
            return ExitCode.USAGE if request.fixed else ExitCode.FAILED
        if code == NO_PLACE:
            report_waiting(request.folder, f"the cluster is busy, {world} ranks have no place yet")
            continue
        waiting_since = None
        if code == ExitCode.STOPPED and stop_requested(request.folder):
            return code  # without a request the rank stopped because its node was taken away
        if code not in NEVER_RETRY and steps_done(request.folder) >= config["train"]["steps"]:
            return ExitCode.DONE  # the run was complete when the worker was lost
        decision = policy.end(code, since)
        _log(decision.reason)
        if not decision.again:
            return decision.code
        time.sleep(POLL_SECONDS)


def choose_world(micro_batches: int, places: int, largest: int) -> int:
    """Returns the number of ranks for a cluster.

    Args:
        micro_batches: micro-batches of a step.
        places: ranks that the cluster can hold.
        largest: most ranks requested; 0 for no limit.

    Returns:
        The fewest ranks that need no more rounds than the most that fit; 0 if none fits.
    """
    limit = min(places, largest) if largest else places
    return max((world for world in useful_worlds(micro_batches) if world <= limit), default=0)


def wait_for_places(micro_batches: int, request: ClusterRequest, since: float) -> int:
    """Waits for a cluster that can hold at least `min_workers` ranks.

    Args:
        micro_batches: micro-batches of a step.
        request: the requested resources.
        since: time.monotonic() when waiting began.

    Returns:
        The number of ranks; 0 if a stop was requested.

    Raises:
        ImpossibleRequestError: the cluster cannot hold the ranks; raised at once if it cannot grow, else after
            `wait_minutes`.
    """
    while not stop_requested(request.folder):
        world = choose_world(micro_batches, process_capacity(request.cpus, request.gpus), request.workers)
        if world >= request.min_workers and time.monotonic() - since < 60 * request.wait_minutes:
            return world
        needs = f"{request.cpus} cores" + f" and {request.gpus} GPU" * bool(request.gpus)
        reason = (
            f"launcher.min_workers={request.min_workers}: the cluster can hold {world} ranks of {needs} each"
            f" (data.micro_batches={micro_batches}, launcher.workers={request.workers}); {cluster_contents()}"
        )
        if request.fixed or time.monotonic() - since >= 60 * request.wait_minutes:
            waited = "" if request.fixed else f"; waited launcher.wait_minutes={request.wait_minutes:g}"
            raise ImpossibleRequestError(f"{reason}{waited}. Ask for fewer or smaller ranks, or add nodes")
        report_waiting(request.folder, reason)
        time.sleep(POLL_SECONDS)
    return 0


def run_attempt(request: ClusterRequest, world: int) -> int:
    """Runs `world` ranks until all have ended or one was lost.

    Returns:
        DONE, the exit code of a failed rank (preferably one that forbids a retry), LOST after the loss of a worker or
        node, or NO_PLACE.
    """
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(PLACEMENT_SECONDS)
    os.environ["RAY_TRAIN_METRICS_ENABLED"] = "0"
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
    from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError, WorkerGroupError

    from launch.launchers.ray_worker import RankEndedError, run_rank

    folder = request.folder.absolute()
    resources = {"CPU": request.cpus} | ({"GPU": request.gpus} if request.gpus else {})
    shared: dict[str, Any] = {"folder": str(folder), "directory": str(Path.cwd())}
    shared |= {"cpus": request.cpus, "gpus": request.gpus, "grace": request.grace}
    shared["start_id"] = os.environ.get(START_ID, "")
    shared["plugins"] = os.environ.get(plugins.VARIABLE, "")
    trainer = DataParallelTrainer(
        run_rank,
        train_loop_config=shared,
        scaling_config=ScalingConfig(
            num_workers=world, use_gpu=bool(request.gpus), resources_per_worker=resources, placement_strategy="PACK"
        ),
        # Ray Train requires a folder that all nodes share; it writes only its own small state there
        run_config=RunConfig(
            name="ray_train",
            storage_path=str(folder / "logs"),
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),
        ),
    )
    try:
        trainer.fit()
    except WorkerGroupError as error:
        codes = [RankEndedError.code_of(failure) for failure in error.worker_failures.values()]
        known = [code for code in codes if code is not None]
        final = [code for code in known if code in NEVER_RETRY]
        return next(iter(final or known), ExitCode.LOST)
    except ControllerError as error:
        _log(f"no ranks were started: {error.controller_failure}")
        return NO_PLACE
    except (TrainingFailedError, ray.exceptions.RayError) as error:
        _log(f"the ranks were lost: {type(error).__name__}")
        return ExitCode.LOST
    return ExitCode.DONE


def _log(text: str) -> None:
    print(f"{time.strftime('%F %T')} {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
