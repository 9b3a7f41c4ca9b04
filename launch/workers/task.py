"""Runs a job that is one program rather than ranks (launch.workers.programs) from its run folder.

    python -m launch.workers.task RUN_FOLDER [--ray ADDRESS]

The folder contains task.json (the command and its config) and, once the job is done, result.json with fingerprints of
input and output, from which a later start or `auricle pipeline` decides whether the result is up to date.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import os
import re
import subprocess
import sys
import time
from pathlib import Path

from data_pipeline.core.atomic_files import write_json
from data_pipeline.core.json_object import read_object
from data_pipeline.core.schema import ConfigError, base_part, dump, load
from data_pipeline.labels.config import TargetsConfig
from data_pipeline.preprocess.config import PreprocessConfig
from launch.config import ProgramConfig, ProgramJob, RayConfig
from launch.exit_codes import ExitCode
from launch.runs import metadata, redaction
from launch.workers.environment import RANK_LOGS, log_to
from launch.workers.programs import NAMES, program

TASK = "task.json"
RESULT = "result.json"
LOG = "task.log"
USES_RAY = PreprocessConfig | TargetsConfig
"""Configs of the programs that spread their work over Ray themselves."""
PATIENCE = 120.0
"""Seconds to wait for a Ray cluster to start."""


def folder_of(command: str, job: ProgramJob) -> Path:
    """Returns RUNS/NAME; the default name is the command, the last part of its main path, and its distinction."""
    if job.name:
        return metadata.folder_of(job)
    last = job.main_path.rstrip("/").rpartition("/")[2]
    name = "_".join(part for part in (command, re.sub(r"[^0-9A-Za-z_-]+", "_", last), job.distinction) if part)
    return Path(job.runs) / name


def prepare(command: str, job: ProgramJob) -> Path:
    """Creates the run folder and writes task.json, environment.json and git.diff into it."""
    folder, launcher = folder_of(command, job), dump(job.launcher)
    config = dump(base_part(program(command).CONFIG, job))
    redaction.refuse_secrets({**config, "launcher": launcher})
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    write_json(folder / TASK, {"command": command, "config": config})
    metadata.write_surroundings(folder, launcher)
    return folder


def read(folder: Path) -> tuple[str, ProgramConfig]:
    """Reads task.json of a prepared folder: the command and its config.

    Raises:
        ValueError: The file is missing or is not a valid task.json.
        ConfigError: A field of the config is invalid.
    """
    file = folder / TASK
    try:
        values = read_object(file)
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder}: not the run folder of a job: {TASK} cannot be read ({error})") from None
    command = values.get("command", values.get("verb"))  # "verb" until format 1
    if not isinstance(command, str) or command not in NAMES or not isinstance(values.get("config"), dict):
        raise ValueError(
            f"{file}: must have a command, one of {', '.join(NAMES)}, and its config; give the command again"
        )
    return command, load(program(command).CONFIG, values["config"])


def perform(folder: Path, address: str = "") -> None:
    """Runs the job of a prepared folder in this process; exceptions of the program are passed on.

    Args:
        folder: The prepared run folder.
        address: Address of a Ray cluster to work on, for programs that use Ray.
    """
    command, config = read(folder)
    (folder / RESULT).unlink(missing_ok=True)
    module, where = program(command), config
    if address and isinstance(config, USES_RAY):
        where = dataclasses.replace(config, ray=dataclasses.replace(config.ray, address=address))
    came_from = dict(module.made_from(config))
    module.work(where)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    result = {"ended": now, "config": dump(config), "made_from": came_from, "made": dict(module.made(config))}
    write_json(folder / RESULT, result)


def perform_on_cluster(folder: Path, launcher: RayConfig) -> None:
    """Runs the job of a prepared folder on a Ray cluster; a program that does not use Ray itself runs as one Ray task.

    Raises:
        OSError: the job failed on the cluster; the message names its log.
    """
    command, config = read(folder)
    if not launcher.address:
        perform(folder)
        return
    import ray

    from data_pipeline.core.ray_tasks import RayClusterConfig, cluster

    there = RayClusterConfig(address=launcher.address, answer_seconds=launcher.answer_seconds)
    with cluster(there, field="launcher.address"):
        if isinstance(config, USES_RAY):
            perform(folder, launcher.address)
            return
        _wait_for_a_place(launcher)
        task = ray.remote(_start).options(
            num_cpus=launcher.cpus_per_worker, num_gpus=launcher.gpus_per_worker, max_retries=launcher.retries
        )
        code = ray.get(task.remote(str(folder.absolute()), str(Path.cwd())))
    if code:
        raise OSError(f"{command} on the cluster ended with exit code {code}; its log is {folder / 'logs' / LOG}")


def _wait_for_a_place(launcher: RayConfig) -> None:
    """Waits until the cluster can hold the task. Raises OSError after launcher.wait_minutes; Ray would wait forever."""
    from data_pipeline.core.ray_tasks import cluster_contents, process_capacity

    deadline, reported = time.monotonic() + 60 * launcher.wait_minutes, ""
    while not process_capacity(launcher.cpus_per_worker, launcher.gpus_per_worker):
        reason = (
            f"no node of the cluster has launcher.cpus_per_worker={launcher.cpus_per_worker} cores and "
            f"launcher.gpus_per_worker={launcher.gpus_per_worker} GPUs; {cluster_contents()}"
        )
        if time.monotonic() > deadline:
            raise OSError(f"{reason}; waited launcher.wait_minutes={launcher.wait_minutes:g}")
        if reason != reported:
            print(f"waiting: {reason}", file=sys.stderr, flush=True)
            reported = reason
        time.sleep(1.0)


def _start(folder: str, directory: str) -> int:
    """Runs the job on a node of the cluster; returns its exit code."""
    line = [sys.executable, "-m", "launch.workers.task", folder]
    return subprocess.run(line, cwd=directory, env=os.environ | {RANK_LOGS: "1"}, check=False).returncode


def why_outdated(command: str, job: ProgramJob) -> str:
    """Returns the reason why the job must run (again); "" if its result is up to date.

    It is up to date if config and input are unchanged and the output, which is read again, matches its fingerprint.
    """
    folder = folder_of(command, job)
    if not (folder / RESULT).is_file():
        return "was not finished before"
    module = program(command)
    config = base_part(module.CONFIG, job)
    try:
        result = read_object(folder / RESULT)
        before, came_from, made_before = (result[name] for name in ("config", "made_from", "made"))
    except (OSError, ValueError, KeyError) as error:
        return f"has an unreadable {RESULT} ({type(error).__name__})"
    if before != dump(config):
        return "was finished with another config"
    try:
        if came_from != dict(module.made_from(config)):
            return "was computed from other input"
        made = dict(module.made(config))
    except (ConfigError, ValueError, OSError) as error:
        return f"can no longer be read ({error})"
    return "" if made and made == made_before else "has output that changed since"


def _connect(address: str) -> None:
    """Connects to a Ray cluster that may still be starting. Raises OSError after PATIENCE seconds."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    from data_pipeline.core.ray_tasks import refuse_foreign_address

    refuse_foreign_address("--ray", address)
    import ray

    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            ray.init(address=address, log_to_driver=False, logging_level="ERROR")
            return
        except (ConnectionError, RuntimeError) as error:
            if time.monotonic() > deadline:
                raise OSError(f"no Ray cluster answers at {address} ({error})") from None
            time.sleep(1.0)


def main(arguments: list[str]) -> int:
    """Runs the job of a folder; returns DONE, FAILED, or USAGE for a config that cannot work."""
    parser = argparse.ArgumentParser("launch.workers.task")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--ray", default="", help="address of the Ray cluster to work on")
    given = parser.parse_args(arguments)
    if os.environ.get(RANK_LOGS) == "1":
        log_to(given.folder / "logs" / LOG)
    try:
        if given.ray:
            _connect(given.ray)
        perform(given.folder, given.ray)
    except ConfigError as error:
        print(f"ConfigError: {error}", file=sys.stderr, flush=True)
        return ExitCode.USAGE
    except (ValueError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return ExitCode.FAILED
    return ExitCode.DONE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
