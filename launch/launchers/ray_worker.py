"""The training function of Ray Train: runs one rank of a run as a child process of a Ray worker."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from data_pipeline.core import plugins
from data_pipeline.core.loopback import free_port
from launch.exit_codes import ExitCode
from launch.launchers import process_guard
from launch.workers.environment import RANK_LOGS
from launch.workers.stop_request import START_ID


class RankEndedError(RuntimeError):
    """A rank ended with an exit code other than DONE; the message is that code."""

    @staticmethod
    def code_of(error: BaseException) -> int | None:
        """Returns the exit code that an exception of Ray Train reports; None for a lost worker."""
        if isinstance(error, RankEndedError):
            return int(str(error))
        # some versions of Ray Train wrap it in an exception that prints the original traceback
        name = re.escape(f"{__name__}.{RankEndedError.__name__}")
        found = re.search(rf"^{name}: (\d+)\s*\Z", str(error), re.MULTILINE)
        return int(found[1]) if found else None


def run_rank(config: dict[str, Any]) -> None:
    """Runs `python -m launch.workers.rank FOLDER` to its end, on every worker of a `ray.train` run.

    A rank is a separate process, so that it has its own exit code, a crash in native code does not end the Ray worker,
    and ranks are the same under every launcher. process_guard ends it when the worker dies.

    Args:
        config: folder (run folder), directory (working directory), cpus (cores per rank), gpus (GPUs per rank),
            grace (seconds to save a checkpoint; 0: derived from the duration of updates), start_id (AURICLE_START),
            plugins (AURICLE_PLUGINS).

    Raises:
        RankEndedError: the rank did not end with DONE.
    """
    import ray
    from ray.train import get_context
    from ray.train.collective import broadcast_from_rank_zero

    context = get_context()
    here = (ray.util.get_node_ip_address(), free_port()) if context.get_world_rank() == 0 else None
    address, port = broadcast_from_rank_zero(here)
    variables = {
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        "RANK": str(context.get_world_rank()),
        "WORLD_SIZE": str(context.get_world_size()),
        "LOCAL_RANK": str(context.get_local_rank()),  # Ray Train shows each rank all GPUs that the run has on its node
        "OMP_NUM_THREADS": str(config["cpus"]),
        "PYTHONSAFEPATH": "1",
        "PYTHONUNBUFFERED": "1",
        RANK_LOGS: "1",
        START_ID: config["start_id"],
        plugins.VARIABLE: config["plugins"],
    }
    if not config["gpus"]:
        variables |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    if address == "127.0.0.1":
        variables["GLOO_SOCKET_IFNAME"] = "lo"
    guard = [sys.executable, process_guard.__file__, "--run", config["folder"], "--signal"]
    command = [
        *guard,
        "--grace",
        str(config["grace"]),
        "--",
        sys.executable,
        "-m",
        "launch.workers.rank",
        config["folder"],
    ]
    log = Path(config["folder"]) / "logs" / "launcher.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,  # process_guard ends the rank when this pipe closes
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=config["directory"],
            env=os.environ | variables,
        )
        code = process.wait()
    if code != ExitCode.DONE:
        raise RankEndedError(code)
