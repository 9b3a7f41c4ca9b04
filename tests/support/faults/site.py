"""A SLURM cluster with shards and tiny runs, and faults to inject into them; for tests and the fault table."""

from __future__ import annotations

import contextlib
import os
import random
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from data_pipeline.core.jsonl import read_rows
from launch import main
from launch.launchers import slurm
from launch.runs.job_record import read_record
from tests.support.faults.mini_slurm import MiniSlurm, wait_for
from tests.support.tiny_shards import sounds, write_shards

STEPS = 60
TOY = (
    *("objective=best_rq", "frontend=log_mel", "encoder=transformer_tiny", "engine.name=torch"),
    *("objective.n_codes=64", "encoder.dim=64", "encoder.layers=2", "encoder.ffn_dim=128", "encoder.heads=2"),
    *("data.batch_seconds=8", "data.micro_batches=2", "data.min_seconds=0.5", "data.max_seconds=2", "data.workers=1"),
    *(f"train.steps={STEPS}", "train.checkpoint_every=10", "schedule.warmup_steps=4", "schedule.name=constant"),
    "engine.timeout_minutes=2",
)
ZERO = ("engine.name=deepspeed", "engine.zero_stage=2", "device=cpu", "launcher.nodes=1", "launcher.gpus_per_node=2")
"""Two ranks on one node under DeepSpeed, one for each GPU that the emulated node declares."""
ON_SLURM = (
    "launcher=slurm", "launcher.nodes=2", "launcher.minutes=10", "launcher.warn_seconds=60", "launcher.cpus_per_task=1",
)  # fmt: skip


@dataclass
class Site:
    """A cluster, shards, and runs on them. Jobs do not share nodes."""

    cluster: MiniSlurm
    base: Path
    handles: dict[str, str] = field(default_factory=dict)

    def submit(self, name: str, *overrides: str) -> Path:
        """Submits a tiny model on two nodes, which records the keys of its samples; returns the run folder."""
        keys = self.base / name / "keys"
        paths = (f"name={name}", f"runs={self.base}", f"data.shards={self.base / 'shards'}", f"data.keys_log={keys}")
        assert main.main(["pretrain", *TOY, *ON_SLURM, *paths, *overrides]) == 0
        folder = self.base / name
        self.handles[name] = read_record(folder).handle
        return folder

    def step(self, name: str) -> int:
        """Returns the last step that a run has logged."""
        rows = read_rows(self.base / name / "metrics.jsonl")
        return int(rows[-1]["step"]) if rows else 0

    def reach(self, name: str, step: int, seconds: float = 120) -> None:
        """Waits until a run has logged a step."""
        wait_for(lambda: self.step(name) >= step, seconds, f"step {step} of {name}", lambda: self.log(name))

    def nodes(self, name: str) -> list[str]:
        """Returns the nodes of a run, that of the batch script first."""
        listed = slurm.ask("squeue", "-h", "-o", "%N", "-j", self.handles[name]).strip()
        return slurm.ask("scontrol", "show", "hostnames", listed).split()

    def state(self, name: str) -> str:
        """Returns SLURM's name for the state of a run."""
        return slurm.job_state(self.handles[name])

    def finish(self, name: str, seconds: float = 180) -> None:
        """Waits until SLURM reports the job as completed."""

        def ended() -> bool:
            state = self.state(name)
            assert slurm.STATES.get(state, "failed") in ("waiting", "running", "done"), f"{state}: {self.log(name)}"
            return state == "COMPLETED"

        wait_for(ended, seconds, f"the end of {name}", lambda: self.log(name))

    def log(self, name: str) -> str:
        """Returns the ends of the logs of the batch script and the ranks."""
        files = sorted((self.base / name / "logs").glob("*.log"))
        return "\n".join(f"--- {file.name}\n{file.read_text(errors='replace')[-2500:]}" for file in files)

    def ranks(self, name: str, *nodes: str) -> list[int]:
        """Returns the process ids of a run's ranks on some nodes."""
        found = [
            pid for node in nodes for pid in self.cluster.processes(node, f"launch.workers.rank {self.base / name}")
        ]
        return [pid for pid in found if Path(f"/proc/{pid}/comm").read_text().startswith("python")]

    def kill_rank(self, name: str, node: str) -> None:
        """Kills one of the run's ranks on a node with SIGKILL."""
        pids = [pid for pid in self.ranks(name, node) if variable(pid, "SLURM_LOCALID") == "0"]
        assert pids
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def lose_slurmd(self, name: str) -> tuple[str, list[int]]:
        """Kills slurmd on the run's second node and stops the ranks: a tiny run would end before SLURM notices.

        Returns the node and the ranks, which `continue_run` continues.
        """
        nodes = self.nodes(name)
        self.cluster.kill_slurmd(nodes[1])
        pids = self.ranks(name, *nodes)
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        return nodes[1], pids

    def sever(self, name: str) -> tuple[str, list[int]]:
        """Cuts off the node of a run's only rank and stops the rank: a tiny run would end before SLURM notices.

        Returns the node and the rank's processes, which `continue_severed_run` continues.
        """
        (node,) = self.nodes(name)
        pids = self.ranks(name, node)
        assert pids
        self.cluster.cut(node)
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        return node, pids

    def continue_severed_run(self, name: str, pids: list[int]) -> None:
        """Continues the rank once the job runs elsewhere, and waits until the old start's script has ended."""
        self.reach_start(name, 2)
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
        ended = "start 0: superseded by a newer start"
        log = self.base / name / "logs" / "slurm.log"
        wait_for(lambda: ended in log.read_text(), 120, "the end of the old start", lambda: self.log(name))

    def reach_start(self, name: str, number: int) -> None:
        """Waits until a run has been started `number` times."""
        folder = self.base / name
        wait_for(lambda: starts(folder) >= number, 180, f"start {number} of {name}", lambda: self.log(name))

    def continue_run(self, name: str, pids: list[int]) -> None:
        """Continues the ranks once SLURM has taken the job from its dead node."""
        wait_for(lambda: self.state(name) != "RUNNING", 120, "SLURM's notice", lambda: self.log(name))
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def variable(pid: int, name: str) -> str:
    """Returns a variable of a process's environment, or "" where it is unset."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0"):
            if line.startswith(f"{name}="):
                return line.partition("=")[2]
    return ""


def learned(folder: Path) -> list[tuple[int, float, float]]:
    """Returns (step, loss, gradient norm) of every row of metrics.jsonl."""
    return [(row["step"], row["loss/total"], row["opt/grad_norm"]) for row in read_rows(folder / "metrics.jsonl")]


def starts(folder: Path) -> int:
    """Returns how often a run was started."""
    return len(list((folder / "incarnations").glob("*")))


@contextlib.contextmanager
def site_at(base: Path, nodes: int) -> Iterator[Site]:
    """Starts a cluster with shards, with `base` as the working directory; removes it at the end."""
    rng = random.Random(0)
    write_shards(base / "shards", [sounds([rng.uniform(0.6, 2.5) for _ in range(60)])])
    cluster = MiniSlurm(base / "c", nodes)
    patch = pytest.MonkeyPatch()
    for name, value in cluster.environment.items():
        patch.setenv(name, value)
    patch.chdir(base)
    try:
        cluster.start()
        yield Site(cluster, base)
    finally:
        cluster.stop()
        patch.undo()
