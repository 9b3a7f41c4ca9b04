"""Runs a job on this machine: N ranks under the `deepspeed` launcher, watched by process_guard."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from data_pipeline.core.schema import ConfigError
from launch.config import LocalConfig
from launch.launchers.processes import ChildProcesses
from launch.workers.environment import RANK_LOGS


def threads_per_rank(threads: int, processes: int) -> int:
    """Returns `threads` unless 0, else OMP_NUM_THREADS where it is a positive number, else a share of the cores.

    More threads than free cores wait for each other in every operation, several times as long as one alone.
    """
    given = os.environ.get("OMP_NUM_THREADS", "")
    return threads or (int(given) if given.isdecimal() else 0) or max(1, (os.cpu_count() or 1) // processes)


class LocalSubmitter(ChildProcesses):
    """Starts N ranks under the `deepspeed` launcher, or one rank of the torch engine without it.

    Args:
        config: number of ranks, threads and grace period.
        engine: engine.name of the run.
        device: device of the run.
        module: Python module that each rank runs.

    Raises:
        ConfigError: this machine lacks the GPUs, or CUDA_VISIBLE_DEVICES names them in an unsupported way.
    """

    def __init__(self, config: LocalConfig, engine: str, device: str, module: str = "launch.workers.rank") -> None:
        gpus = 0 if device == "cpu" else gpu_count()
        if device == "cuda" and not gpus:
            raise ConfigError("device=cuda: torch sees no GPU here; see `auricle doctor`, or take device=cpu")
        processes = config.processes or (1 if engine == "federated" else max(1, gpus))
        named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        if gpus and (engine == "deepspeed" or processes > 1) and not all(name.isdigit() for name in named):
            raise ConfigError(
                f"CUDA_VISIBLE_DEVICES={','.join(named)}: the deepspeed launcher knows GPUs by number only; "
                "`nvidia-smi -L` lists both. One MIG slice: engine.name=torch launcher.processes=1"
            )
        if gpus and processes > gpus:
            raise ConfigError(f"launcher.processes={processes}: one GPU per rank, and this machine has {gpus}")
        self._gpus = gpus
        self._launcher = engine == "deepspeed" or processes > 1
        self._module, self._devices = module, config.devices
        variables = {
            "OMP_NUM_THREADS": str(threads_per_rank(config.threads, processes)),
            "PYTHONSAFEPATH": "1",  # a folder named `launch` or `conf` in the working directory must not be imported
            "PYTHONUNBUFFERED": "1",
            RANK_LOGS: "1",
        }
        # the ranks of one machine communicate over the loopback, which other machines cannot reach
        variables |= {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
        if not gpus:
            variables |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        if not self._launcher:
            variables |= {
                "RANK": "0",
                "LOCAL_RANK": "0",
                "WORLD_SIZE": "1",
            }  # overrides those of a surrounding SLURM job
        super().__init__(processes, variables, config.grace_seconds)

    def command(self, folder: Path, port: int) -> list[str]:
        """Returns the command line of the launcher, or of the only rank."""
        if self._devices:
            return [sys.executable, "-u", "-m", "launch.workers.device", str(folder), "--all", str(self._devices)]
        worker = [self._module, str(folder)]
        if not self._launcher:
            return [sys.executable, "-u", "-m", *worker]
        visible = [number for number in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if number]
        devices = ["--num_gpus", str(self.processes)]
        if self._gpus and visible:  # --num_gpus would ignore CUDA_VISIBLE_DEVICES
            devices = ["--include", f"localhost:{','.join(visible[: self.processes])}"]
        rendezvous = ["--master_addr", "127.0.0.1", "--master_port", str(port)]
        quiet = ["--hostfile", os.devnull + ".none", "--log_level", "warning"]
        launcher = [sys.executable, "-m", "deepspeed.launcher.runner", *devices, *rendezvous, *quiet]
        return [*launcher, "--module", "--no_local_rank", *worker]


def gpu_count() -> int:
    """Returns the number of GPUs that torch can use here."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def failure_report(folder: Path, lines: int = 12) -> str:
    """Returns the last log lines of the failed ranks, or those of the launcher if no rank reports an error."""
    logs = sorted((folder / "logs").glob("rank_*.log"))
    texts = {log: log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:] for log in logs}
    failed = [log for log, tail in texts.items() if any(_is_error(line) for line in tail)]
    if not failed:
        failed = [folder / "logs" / "launcher.log"]
        texts[failed[0]] = failed[0].read_text(encoding="utf-8", errors="replace").splitlines()[-lines:]
    parts: list[str] = []
    seen: set[str] = set()
    for log in failed[:2]:
        new = [line for line in texts[log] if line.split(": ", 1)[-1] not in seen]
        seen |= {line.split(": ", 1)[-1] for line in new}
        if new:
            parts.append("\n".join([f"--- {log}", *new]))
    return "\n".join(parts)


def _is_error(line: str) -> bool:
    return any(word in line for word in ("Error", "Traceback", "Fatal", "Killed"))
