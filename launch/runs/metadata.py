"""The run folder describes itself: resolved config, code, machine. Secrets stay out of it."""

from __future__ import annotations

import dataclasses
import datetime
import os
import platform
import re
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

from data_pipeline.core.atomic_files import write_atomically, write_json
from data_pipeline.core.schema import ConfigError, dump
from launch.cli.compose import to_yaml
from launch.config import PretrainJob
from launch.runs import redaction
from pretrain.checkpointing.locate import latest_checkpoint
from pretrain.config import Config

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "torchaudio", "deepspeed", "ray", "webdataset", "numpy", "hydra-core", "pydantic", "tensorboard")
KEPT_VARIABLES = re.compile(
    r"^(OMP_NUM_THREADS|CUDA_VISIBLE_DEVICES|DS_ACCELERATOR|TORCH_\w+|NCCL_\w+|GLOO_\w+|SLURM_(JOB|NODE|STEP|CLUSTER)\w*)$"
)


class Named(Protocol):
    """A job with a run folder."""

    @property
    def name(self) -> str: ...
    @property
    def runs(self) -> str: ...


def folder_of(job: Named) -> Path:
    """RUNS/NAME. Raises ConfigError for a name that names no folder."""
    if any(sign in job.name for sign in "/\\") or job.name in (".", "..") or not job.name.isprintable():
        raise ConfigError(
            f"name={job.name!r}: it names a folder inside {job.runs}; slashes and control signs cannot be"
        )
    return Path(job.runs) / job.name


def prepare(job: PretrainJob) -> Path:
    """Makes RUNS/NAME and writes config.json, config.yaml, environment.json and git.diff into it.

    Raises ConfigError when the folder holds checkpoints of a run with another config, or a value holds a password.
    """
    folder = folder_of(job)
    launcher = dump(job)["launcher"]
    values = dump(run_config(job))
    redaction.refuse_secrets({**values, "launcher": launcher})
    _require_same_run(folder, run_config(job))
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", values)
    write_atomically(folder / "config.yaml", to_yaml({**values, "launcher": launcher}))
    write_surroundings(folder, launcher)
    return folder


def write_surroundings(folder: Path, launcher: dict[str, Any]) -> None:
    """environment.json and git.diff: on what, and by which code."""
    sha, diff = _git("rev-parse", "HEAD"), _git("diff", "HEAD")
    write_atomically(folder / "git.diff", "\n".join(redaction.without_secrets(diff.splitlines())))
    write_json(folder / "environment.json", _environment(launcher, sha))


def run_config(job: PretrainJob) -> Config:
    """The run alone, without where it runs."""
    return Config(**{field.name: getattr(job, field.name) for field in dataclasses.fields(Config)})


def _require_same_run(folder: Path, config: Config) -> None:
    """Raises ConfigError unless the checkpoints of `folder` are of this config and data; prints what changes."""
    newest = latest_checkpoint(folder / "checkpoints")
    if newest is None:
        return
    from pretrain.checkpointing import checkpoint, resume  # imports torch and the engines

    state = checkpoint.read_state(newest)
    resume.require_same_config(state["config"], config, newest)
    resume.require_same_data(state, config, newest)
    found = resume.prolongation(state["config"], config, state["step"], state.get("prolonged"))
    if note := resume.prolongation_notice(state["config"], config, state["step"], found):
        print(note, file=sys.stderr, flush=True)


def _environment(launcher: dict[str, Any], sha: str) -> dict[str, Any]:
    installed = {package: metadata.version(package) for package in PACKAGES if _is_installed(package)}
    return {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": redaction.without_secrets(sys.argv),
        "directory": str(Path.cwd()),
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "packages": installed,
        "git_sha": sha.strip(),
        "launcher": launcher,
        "variables": {
            name: value
            for name, value in sorted(os.environ.items())
            if KEPT_VARIABLES.match(name) and not redaction.NAME.search(name)
        },
    }


def _is_installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def _git(*arguments: str) -> str:
    """Output of git in the code's own checkout; empty where there is none."""
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""
