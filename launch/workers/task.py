"""Jobs that are one program rather than ranks: preprocess, targets, evaluate. Their run folder, and what runs it.

    python -m launch.workers.task RUN_FOLDER [--ray ADDRESS]

The folder holds task.json (the verb and its config), and result.json once it is done, with fingerprints of what went in
and what came out: a later start, or `auricle pipeline`, can tell whether the result still stands.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from data_pipeline.core.atomic_files import write_json
from data_pipeline.core.schema import ConfigError, dump, load
from launch.config import RayConfig
from launch.exit_codes import ExitCode
from launch.runs import metadata, redaction
from launch.workers.environment import RANK_LOGS, log_to

TASK = "task.json"
RESULT = "result.json"
LOG = "task.log"
PATIENCE = 120.0
"""Seconds for a Ray cluster to come up."""


class Verb(Protocol):
    """A module of launch.commands that is such a job."""

    KIND: type[Any]
    """Its config, without where it runs."""

    def work(self, config: Any) -> None:
        """Does it, and prints what came out. Raises ConfigError, ValueError or OSError."""
        ...

    def made_from(self, config: Any) -> Mapping[str, str]:
        """Fingerprints of what goes in, besides the config."""
        ...

    def made(self, config: Any) -> Mapping[str, str]:
        """Fingerprints of what came out, made by reading it again; empty where it is not whole."""
        ...


def verb_of(name: str) -> Verb:
    """The module of a verb."""
    module: Any = importlib.import_module(f"launch.commands.{name}")
    return module  # type: ignore[no-any-return]


def folder_of(verb: str, job: Any) -> Path:
    """RUNS/NAME; without a name the verb and the last part of what the job makes."""
    if job.name:
        return metadata.folder_of(job)
    made = str(job.checkpoint if verb == "evaluate" else job.out).rstrip("/")
    return Path(job.runs) / f"{verb}_{re.sub(r'[^0-9A-Za-z_-]+', '_', made.rpartition('/')[2])}"


def prepare(verb: str, job: Any) -> Path:
    """Makes the run folder and writes task.json, environment.json and git.diff into it."""
    folder, launcher = folder_of(verb, job), dump(job.launcher)
    kind = verb_of(verb).KIND
    config = dump(kind(**{field.name: getattr(job, field.name) for field in dataclasses.fields(kind)}))
    redaction.refuse_secrets({**config, "launcher": launcher})
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    write_json(folder / TASK, {"verb": verb, "config": config})
    metadata.write_surroundings(folder, launcher)
    return folder


def read(folder: Path) -> tuple[str, Any]:
    """The verb and config of a prepared folder. Raises ValueError where it is none."""
    try:
        values = json.loads((folder / TASK).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{folder} is no run folder: it holds no readable {TASK} ({error})") from None
    return values["verb"], load(verb_of(values["verb"]).KIND, values["config"])


def perform(folder: Path, address: str = "") -> None:
    """Does the job of a prepared folder in this process. Raises what its verb raises.

    address: of a Ray cluster to work on, where the verb uses Ray.
    """
    verb, config = read(folder)
    (folder / RESULT).unlink(missing_ok=True)
    module, where = verb_of(verb), config
    if address and hasattr(config, "ray"):
        where = dataclasses.replace(config, ray=dataclasses.replace(config.ray, address=address))
    came_from = dict(module.made_from(config))
    module.work(where)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    result = {"ended": now, "config": dump(config), "made_from": came_from, "made": dict(module.made(config))}
    write_json(folder / RESULT, result)


def perform_on_cluster(folder: Path, launcher: RayConfig) -> None:
    """`perform`, on a Ray cluster: what does not use Ray itself becomes a task of it. Raises OSError if it fails."""
    verb, config = read(folder)
    if hasattr(config, "ray") or not launcher.address:
        perform(folder, launcher.address)
        return
    import ray

    from data_pipeline.core.ray_tasks import RayConfig as Cluster
    from data_pipeline.core.ray_tasks import cluster

    with cluster(Cluster(address=launcher.address)):
        task = ray.remote(_start).options(
            num_cpus=launcher.cpus_per_worker, num_gpus=launcher.gpus_per_worker, max_retries=launcher.retries
        )
        code = ray.get(task.remote(str(folder.absolute()), str(Path.cwd())))
    if code:
        raise OSError(f"{verb} on the cluster ended with exit code {code}; its log is {folder / 'logs' / LOG}")


def _start(folder: str, directory: str) -> int:
    """Inside the cluster."""
    command = [sys.executable, "-m", "launch.workers.task", folder]
    return subprocess.run(command, cwd=directory, env=os.environ | {RANK_LOGS: "1"}, check=False).returncode


def stands(verb: str, job: Any) -> str:
    """Why the job has to be done (again); empty where its result stands: same config and input, and output as it was.

    Everything that was made is read again to say so.
    """
    folder = folder_of(verb, job)
    if not (folder / RESULT).is_file():
        return "was not finished before"
    module = verb_of(verb)
    fields = dataclasses.fields(module.KIND)
    config = module.KIND(**{field.name: getattr(job, field.name) for field in fields})
    result = json.loads((folder / RESULT).read_text(encoding="utf-8"))
    if result["config"] != dump(config):
        return "was finished with another config"
    try:
        if result["made_from"] != dict(module.made_from(config)):
            return "was made from something else"
        made = dict(module.made(config))
    except (ConfigError, ValueError, OSError) as error:
        return f"cannot be read any more ({error})"
    return "" if made and made == result["made"] else "is not any more as it was made"


def _connect(address: str) -> None:
    """Joins a Ray cluster that may still be starting. Raises OSError, since a later start may find it."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
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
