"""Kills processes of a preprocessing job at random times and restarts the job until it is done."""

from __future__ import annotations

import contextlib
import json
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.support.paths import ROOT

PATIENCE = 240.0


@dataclass
class Job:
    """A running job, and all processes that it has started."""

    process: subprocess.Popen[str]
    family: dict[int, psutil.Process] = field(default_factory=dict)

    def look(self) -> list[psutil.Process]:
        """Returns the living descendants."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self.process.pid).children(recursive=True):
                self.family[child.pid] = child
        return [child for child in self.family.values() if child.is_running()]

    def find(self, kind: str) -> psutil.Process | None:
        """Returns a busy worker, the raylet or the driver; None where there is none."""
        if kind == "driver":
            return psutil.Process(self.process.pid)
        wanted = {"worker": "ray::process_planned", "raylet": "raylet"}[kind]
        for child in self.look():
            with contextlib.suppress(psutil.Error):
                line = child.cmdline()
                if line and (line[0].startswith(wanted) or Path(line[0]).name == wanted):
                    return child
        return None

    def clean_up(self) -> None:
        """Ends the remaining processes of this job."""
        for child in self.look():
            with contextlib.suppress(psutil.Error):
                child.kill()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


def start(config: dict[str, Any], folder: Path) -> Job:
    """Starts a job; its output goes to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    command = [sys.executable, "-m", "tests.support.faults.preprocess_job", str(folder / "config.json")]
    output = (folder / "output.txt").open("a")
    return Job(subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, text=True))


@contextlib.contextmanager
def running(config: dict[str, Any], folder: Path) -> Iterator[Job]:
    """Starts a job and ends its processes when the block ends."""
    job = start(config, folder)
    try:
        yield job
    finally:
        job.clean_up()


def finish(config: dict[str, Any], folder: Path) -> int:
    """Runs a job to its end and returns its exit code."""
    with running(config, folder) as job:
        while job.process.poll() is None:
            job.look()
            time.sleep(0.2)
        return job.process.returncode


def done(out: str) -> int:
    """Returns the number of finished units."""
    return len(list(Path(out, "_done").glob("*.json")))


def survive(config: dict[str, Any], folder: Path, kinds: list[str], seed: int) -> Counter[str]:
    """Kills one process of each kind in turn, at random times while units are being written, and restarts the job
    whenever it ends with work left.

    Returns the number of killed processes by kind. Processes of a dead driver stay until the end.
    """
    draw, killed, waiting = random.Random(seed), Counter[str](), list(kinds)
    with contextlib.ExitStack() as stack:
        for _ in range(len(kinds) + 1):
            job = stack.enter_context(running(config, folder))
            if _kill_until_it_ends(job, waiting, killed, draw) == 0:
                return killed
    raise AssertionError(f"not done after {dict(killed)}: {(folder / 'output.txt').read_text()[-2000:]}")


def _kill_until_it_ends(job: Job, waiting: list[str], killed: Counter[str], draw: random.Random) -> int:
    ends = time.monotonic() + PATIENCE
    while job.process.poll() is None:
        assert time.monotonic() < ends, "the job hangs"
        victim = job.find(waiting[0]) if waiting and job.find("worker") else None
        time.sleep(draw.uniform(0.0, 0.4))
        if victim is not None:
            with contextlib.suppress(psutil.Error):
                victim.kill()
                killed[waiting.pop(0)] += 1
    return job.process.returncode
