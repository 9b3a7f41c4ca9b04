"""Drives the ranks of a run on a Ray cluster; goes on with fewer when the cluster shrinks.

    python -m launch.launchers.ray_driver RUN_FOLDER --address auto --workers 8

Each rank is `python -m launch.workers.rank` below an actor, so that a dead node, actor or rank ends the gang, and the
next one starts from the newest checkpoint on what is left. Any number of ranks that divides `data.micro_batches` gives
the same run: the step plan does not know it. (Ray Train is not used, since it restarts a fixed number of workers and
wants to own checkpoints.)
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from data_pipeline.core.ray_tasks import RayConfig, cluster
from data_pipeline.sampling.plan import allowed_worlds
from launch.exit_codes import NEVER_RETRY, ExitCode
from launch.launchers import process_guard
from launch.launchers.processes import STOP_FILE
from launch.workers.environment import RANK_LOGS, free_port
from pretrain.checkpointing.locate import steps_done

LOST = 70
"""Exit code of a rank whose actor or node is gone."""
SETTLE = 2.0
"""Seconds between looks at a changing cluster."""


def main(arguments: list[str]) -> int:
    """Exit code of the run."""
    parser = argparse.ArgumentParser("launch.launchers.ray_driver")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--address", default="")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--min-workers", type=int, default=1)
    parser.add_argument("--gpus", type=int, default=0)
    parser.add_argument("--cpus", type=int, default=1)
    parser.add_argument("--retries", type=int, default=3)
    given = parser.parse_args(arguments)
    with cluster(RayConfig(address=given.address)):  # nobody else can reach a Ray started here
        return _persist(given)


def _persist(given: argparse.Namespace) -> int:
    """Starts gangs until the run is done, cannot work, or fails too often without a new checkpoint."""
    config = json.loads((given.folder / "config.json").read_text(encoding="utf-8"))
    (given.folder / STOP_FILE).unlink(missing_ok=True)
    failures, micro_batches = 0, config["data"]["micro_batches"]
    while True:
        before = steps_done(given.folder)
        world = _wait_for_room(micro_batches, given)
        _say(f"{world} ranks, from step {before}")
        code = _run_gang(given, world)
        if code is None:
            continue
        if (
            code in NEVER_RETRY
            or code == ExitCode.DONE
            or (code == ExitCode.STOPPED and (given.folder / STOP_FILE).exists())
        ):
            return code  # a rank that stopped without being asked to lost its node
        if steps_done(given.folder) >= config["train"]["steps"]:
            return ExitCode.DONE  # what was lost had nothing left to do
        failures = 0 if steps_done(given.folder) > before else failures + 1
        _say(f"the gang ended with exit code {code}; {failures} failures without a new checkpoint")
        if failures > given.retries:
            return code
        time.sleep(SETTLE)


def choose_world(micro_batches: int, room: int, largest: int) -> int:
    """The most ranks that fit, divide the micro-batches and are not more than `largest` (0: no limit); 0 for none."""
    limit = min(room, largest) if largest else room
    return max((world for world in allowed_worlds(micro_batches) if world <= limit), default=0)


def _wait_for_room(micro_batches: int, given: argparse.Namespace) -> int:
    """Waits for a cluster that has at least --min-workers places."""
    told = False
    while True:
        world = choose_world(micro_batches, _room(given.cpus, given.gpus), given.workers)
        if world >= given.min_workers:
            return world
        if not told:
            _say(f"waiting: the cluster has room for {world} ranks, --min-workers is {given.min_workers}")
            told = True
        time.sleep(SETTLE)


def _room(cpus: int, gpus: int) -> int:
    """How many ranks the living nodes can hold."""
    import ray

    room = 0
    for node in ray.nodes():
        if node["Alive"]:
            resources = node["Resources"]
            room += int(min(resources.get("CPU", 0) // cpus, resources.get("GPU", 0) // gpus if gpus else 1 << 30))
    return room


class Rank:
    """One rank's process, on whatever node Ray puts it."""

    def meeting_point(self) -> tuple[str, int]:
        """This node's address and a free port of it."""
        import ray

        return ray.util.get_node_ip_address(), free_port()

    def run(self, folder: str, directory: str, variables: dict[str, str]) -> int:
        """Runs the rank to its end; guard.py ends it when this actor dies."""
        command = [sys.executable, process_guard.__file__, sys.executable, "-u", "-m", "launch.workers.rank", folder]
        log = Path(folder) / "logs" / "launcher.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as said:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=said,
                stderr=subprocess.STDOUT,
                cwd=directory,
                env=os.environ | variables,
            )
            return process.wait()


def _run_gang(given: argparse.Namespace, world: int) -> int | None:
    """One gang to its end: 0, or the exit code of the first rank that failed; None where it has no place any more."""
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    bundle = {"CPU": given.cpus} | ({"GPU": given.gpus} if given.gpus else {})
    group = placement_group([bundle] * world, strategy="PACK")
    try:
        told = False
        while not group.wait(30):  # others keep the cluster busy, or Ray still counts on a node that has just died
            if _room(given.cpus, given.gpus) < world:
                return None
            if not told:
                _say(f"waiting: the cluster is busy, {world} ranks have no place yet")
                told = True
        strategies = [
            PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank) for rank in range(world)
        ]
        actor = ray.remote(Rank)
        ranks = [
            actor.options(num_cpus=given.cpus, num_gpus=given.gpus, scheduling_strategy=strategy).remote()
            for strategy in strategies
        ]
        return _attend(ranks, given, world)
    except ray.exceptions.RayError as error:
        _say(f"lost the gang: {type(error).__name__}")
        return LOST
    finally:
        remove_placement_group(group)  # ends its actors, and so its ranks
        time.sleep(SETTLE)


def _attend(ranks: list[Any], given: argparse.Namespace, world: int) -> int:
    import ray

    address, port = ray.get(ranks[0].meeting_point.remote(), timeout=120)
    shared = {
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": "0",  # Ray shows each actor its own GPU only
        "OMP_NUM_THREADS": str(given.cpus),
        "PYTHONSAFEPATH": "1",
        RANK_LOGS: "1",
    }
    shared |= {} if given.gpus else {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    shared |= {"GLOO_SOCKET_IFNAME": "lo"} if address == "127.0.0.1" else {}
    folder, directory = str(given.folder.absolute()), str(Path.cwd())
    running = [rank.run.remote(folder, directory, shared | {"RANK": str(number)}) for number, rank in enumerate(ranks)]
    while running:
        ready, running = ray.wait(running, num_returns=1)
        code: int = ray.get(ready[0])
        if code != ExitCode.DONE:
            ray.wait(running, num_returns=len(running), timeout=10)  # let the others say what they saw
            return code
    return ExitCode.DONE


def _say(text: str) -> None:
    print(f"{time.strftime('%F %T')} {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
