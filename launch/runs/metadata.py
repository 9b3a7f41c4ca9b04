"""Writes the files that describe a run into its folder: resolved config, code, machine. Secrets are removed."""

from __future__ import annotations

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

from data_pipeline.core.atomic_files import sha256_of, write_atomically, write_json
from data_pipeline.core.json_object import read_object
from data_pipeline.core.schema import ConfigError, base_part, dump
from launch.cli.compose import to_yaml
from launch.config import PretrainJob
from launch.runs import redaction
from pretrain import registry
from pretrain.checkpointing.locate import latest_checkpoint
from pretrain.config import Config

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "torchaudio", "deepspeed", "ray", "webdataset", "numpy", "hydra-core", "pydantic", "tensorboard")
KEPT_VARIABLES = re.compile(
    r"^(OMP_NUM_THREADS|CUDA_VISIBLE_DEVICES|DS_ACCELERATOR|TORCH_\w+|NCCL_\w+|GLOO_\w+|SLURM_(JOB|NODE|STEP|CLUSTER)\w*)$"
)


LONGEST_NAME = 200
"""Longest name of a run in bytes; file systems allow 255, and file names are derived from it."""


class Named(Protocol):
    """A job with a run folder."""

    @property
    def name(self) -> str: ...
    @property
    def runs(self) -> str: ...


def folder_of(job: Named) -> Path:
    """Returns RUNS/NAME. Raises ConfigError if the name is not a valid folder name."""
    too_long = len(job.name.encode("utf-8", "surrogateescape")) > LONGEST_NAME
    if any(sign in job.name for sign in "/\\") or job.name in (".", "..") or not job.name.isprintable() or too_long:
        raise ConfigError(
            f"name={job.name[:80]!r}: must be the name of a folder inside {job.runs}: no slashes, no control "
            f"characters, at most {LONGEST_NAME} bytes"
        )
    return Path(job.runs) / job.name


def prepare(job: PretrainJob) -> Path:
    """Creates RUNS/NAME and writes config.json, config.yaml, environment.json and git.diff into it.

    Raises:
        ConfigError: the folder has checkpoints of a run with another config or data, or a value contains a credential.
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
    """Writes environment.json (machine, packages, command) and git.diff (changes of the code since its commit)."""
    sha, diff = _git("rev-parse", "HEAD"), _git("diff", "HEAD")
    write_atomically(folder / "git.diff", "\n".join(redaction.without_secrets(diff.split("\n"))))
    write_json(folder / "environment.json", _environment(launcher, sha) | {"plugins": _plugins()})


def _plugins() -> list[dict[str, str]]:
    """Returns the plug-ins from outside auricle that this process may use, each with the checksum of its file."""
    return [
        {"kind": kind, "name": name, "file": str(place.file), "sha256": sha256_of(place.file)}
        for kind in registry.PACKAGES
        for name, place in registry.places(kind).items()
        if place.outside
    ]


def require_plugins(folder: Path) -> None:
    """Checks, before a job is queued again, that this process has the plug-ins that it was submitted with.

    Raises:
        ConfigError: one is missing; the message names its folder. It is not imported because the run names it.
    """
    try:
        listed = read_object(folder / "environment.json")["plugins"]
        needed = [(Path(row["file"]), str(row["kind"]), str(row["name"])) for row in listed]
    except (OSError, ValueError, KeyError, TypeError):
        return  # of an earlier version, or damaged; the ranks report the missing fields
    for file, kind, name in needed:
        if kind in registry.PACKAGES and name not in registry.names(kind):
            raise ConfigError(
                f"{folder} was submitted with the plug-in {file}: add plugins={file.parent.parent} if you trust the "
                "code there"
            )


def submitted_from(folder: Path) -> Path | None:
    """Returns the working directory that the run was submitted from; None if environment.json does not have it.

    Raises:
        ValueError: the directory no longer exists.
    """
    file = folder / "environment.json"
    try:
        directory = read_object(file).get("directory")
    except (OSError, ValueError):
        return None
    if not isinstance(directory, str):
        return None
    if not Path(directory).is_dir():
        raise ValueError(f"{file}: directory={directory} no longer exists; relative paths of the run refer to it")
    return Path(directory)


def run_config(job: PretrainJob) -> Config:
    """Returns the config of the run without that of the launcher."""
    return base_part(Config, job)


def _require_same_run(folder: Path, config: Config) -> None:
    """Raises ConfigError unless the checkpoints of `folder` are of this config and data; prints permitted changes."""
    newest = latest_checkpoint(folder / "checkpoints")
    if newest is None:
        return
    from pretrain.checkpointing import resume, stored  # imports torch

    state = stored.read_state(newest)
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
        "version": metadata.version("auricle"),
        "git_sha": sha.strip(),
        "launcher": launcher,
        "variables": {
            name: value
            for name, value in sorted(os.environ.items())
            if KEPT_VARIABLES.match(name) and not redaction.is_secret_name(name) and not redaction.holds_secret(value)
        },
    }


def _is_installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def _git(*arguments: str) -> str:
    """Returns the output of git in the checkout of this code; "" if there is none.

    Installed packages may be below the user's own repository, whose commit and changes are not those of this code.
    """
    if not (ROOT / ".git").exists():
        return ""
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.decode("utf-8", errors="backslashreplace") if done.returncode == 0 else ""
