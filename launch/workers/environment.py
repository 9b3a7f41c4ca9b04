"""Environment variables for rank and rendezvous, and the log file of each rank."""

from __future__ import annotations

import os
import sys
from pathlib import Path

RANK_LOGS = "AURICLE_RANK_LOGS"
"""Set by the launchers: each rank then writes to RUN/logs/rank_N.log instead of the terminal."""


def adopt_slurm_ranks() -> None:
    """Sets RANK, WORLD_SIZE and LOCAL_RANK from SLURM's variables under `srun`, unless another launcher has set them.

    MASTER_ADDR and MASTER_PORT come from the batch script, since all tasks must agree on them.
    """
    if "RANK" in os.environ or "SLURM_PROCID" not in os.environ:
        return
    for name, source in (("RANK", "PROCID"), ("WORLD_SIZE", "NTASKS"), ("LOCAL_RANK", "LOCALID")):
        os.environ[name] = os.environ[f"SLURM_{source}"]


def keep_compiled_code() -> None:
    """Keeps code that torch compiles in the user's cache folder, unless TORCHINDUCTOR_CACHE_DIR names another one.

    torch's default is a folder below /tmp, which many clusters empty after each job.
    """
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(base) / "auricle" / "torchinductor"))


def log_to_folder(run_folder: Path) -> None:
    """Redirects stdout and stderr of this rank to its log file if the launcher has set RANK_LOGS."""
    if os.environ.get(RANK_LOGS) == "1":
        log_to(run_folder / "logs" / f"rank_{os.environ.get('RANK', '0')}.log")


def log_to(path: Path) -> None:
    """Redirects stdout and stderr of this process to a file in append mode, including the output of native code."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.close(handle)
