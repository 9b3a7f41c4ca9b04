"""Measures memory and open files over 20,000 recordings of preprocessing and 3,000 updates of a tiny recipe.

    python -m benchmarks.faults.soak            # about ten minutes of two cores

Writes benchmarks/results/soak.md: resident memory (the sum of all processes' proportional shares), and open files, for
every 1,000 recordings and every 500 updates. Exit code 1 where the last figure exceeds that at a third of the work by
more than 10 % and 20 MB of memory, or by more than 8 open files.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import psutil
import soundfile

from benchmarks.prove.common import RESULTS, ROOT, markdown_table

RATE: Final = 16_000
PER_FOLDER: Final = 500
MOST_GROWTH, MOST_MEGABYTES, MOST_FILES = 0.1, 20.0, 8
POLL: Final = 0.5
"""Seconds between measurements."""


@dataclass(frozen=True)
class Sample:
    """Use of resources when some part of the work was done."""

    done: int
    megabytes: float
    files: int
    processes: int


def write_recordings(folder: Path, count: int) -> None:
    """Writes recordings of 0.6 to 1.6 s of noise bursts by 200 speakers."""
    rng = np.random.default_rng(0)
    noise = (3000 * rng.standard_normal(4 * RATE)).clip(-32768, 32767).astype(np.int16)
    for number in range(count):
        part = folder / f"s{number // PER_FOLDER:04}"
        part.mkdir(parents=True, exist_ok=True)
        start, length = int(rng.integers(2 * RATE)), int(rng.integers(6 * RATE // 10, 16 * RATE // 10))
        soundfile.write(part / f"{number:06}.wav", noise[start : start + length], RATE)


def watch(command: Iterable[str], done: Callable[[], int], every: int) -> list[Sample]:
    """Runs a command of auricle, and samples it and its descendants each time that `every` more is done.

    Raises:
        RuntimeError: the command fails.
    """
    with tempfile.TemporaryFile("w+", encoding="utf-8") as said:
        process = psutil.Popen(
            [sys.executable, "-m", "launch.main", *command], cwd=ROOT, stdout=said, stderr=subprocess.STDOUT
        )
        samples: list[Sample] = []
        while process.poll() is None:
            now = done()
            if now >= every * (len(samples) + 1):
                samples.append(sample(process, now))
                print(samples[-1], flush=True)
            time.sleep(POLL)
        if process.returncode:
            said.seek(0)
            raise RuntimeError(f"{' '.join(command)}: exit code {process.returncode}: {said.read()[-3000:]}")
    return samples


def sample(process: psutil.Process, done: int) -> Sample:
    """Returns the resources of a process and its descendants."""
    memory, files, processes = 0.0, 0, 0
    for one in [process, *process.children(recursive=True)]:
        with contextlib.suppress(psutil.Error):
            memory += one.memory_full_info().pss / 1e6
            files += one.num_fds()
            processes += 1
    return Sample(done, memory, files, processes)


def growth(samples: list[Sample]) -> str:
    """Returns what grew from a third of the work to its end; "" if all is flat."""
    if len(samples) < 3:
        return "too few samples"
    early, late = samples[len(samples) // 3], samples[-1]
    found = []
    if late.megabytes - early.megabytes > max(MOST_GROWTH * early.megabytes, MOST_MEGABYTES):
        found.append(f"memory {early.megabytes:.0f} to {late.megabytes:.0f} MB")
    if late.files - early.files > MOST_FILES:
        found.append(f"open files {early.files} to {late.files}")
    return ", ".join(found)


def recordings_done(out: Path) -> int:
    """Returns the number of recordings in finished units."""
    found = 0
    for record in out.glob("_done/*.json"):
        with contextlib.suppress(ValueError, OSError):
            found += json.loads(record.read_bytes())["files"]
    return found


def updates_done(run: Path) -> int:
    """Returns the last logged update of a run."""
    try:
        with (run / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - 20_000))
            rows = file.read().split(b"\n")[1:-1]
        return max((int(json.loads(row).get("step", 0)) for row in rows), default=0)
    except (OSError, ValueError):
        return 0


def main() -> int:
    """Runs both jobs; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--recordings", type=int, default=20_000)
    parser.add_argument("--updates", type=int, default=3_000)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "soak", help="folder for audio, shards and runs")
    parser.add_argument("--out", type=Path, default=RESULTS / "soak.md")
    given = parser.parse_args()
    shutil.rmtree(given.work, ignore_errors=True)
    shards, runs = given.work / "shards", given.work / "runs"
    write_recordings(given.work / "audio", given.recordings)
    preprocess = [
        "preprocess", "corpus=path", f"corpus.path={given.work}/audio", "corpus.pattern=(?P<speaker>s[0-9]+)/",
        f"out={shards}", "min_shards=200", "shard_mb=4", f"runs={runs}", "ray.num_cpus=2",
    ]  # fmt: skip
    pretrain = [
        "pretrain", "+experiment=best_rq_tiny", f"data.shards={shards}", f"train.steps={given.updates}",
        "data.batch_seconds=4", "data.micro_batches=1", "data.min_seconds=0.5", "data.max_seconds=2", "data.workers=1",
        "encoder.layers=1", "encoder.dim=32", "engine.name=torch", "health.on_collapse=warn", "train.log_every=10",
        f"runs={runs}",
    ]  # fmt: skip
    jobs = {
        "recordings": watch(preprocess, lambda: recordings_done(shards), 1_000),
        "updates": watch(pretrain, lambda: updates_done(runs / "best_rq_tiny"), 500),
    }
    lines = ["# Memory and open files over long jobs", "", f"`python -m benchmarks.faults.soak`, {given.recordings:,} "]
    lines[-1] += f"recordings and {given.updates:,} updates; sums over all processes of a job, Ray's included"
    grown = {name: growth(samples) for name, samples in jobs.items()}
    for name, samples in jobs.items():
        rows = [(f"{s.done:,}", f"{s.megabytes:,.0f}", str(s.files), str(s.processes)) for s in samples]
        lines += ["", *markdown_table((name, "MB", "open files", "processes"), rows)]
        lines += ["", f"From a third of the {name} on: {grown[name] or 'flat'}."]
    given.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))
    shutil.rmtree(given.work, ignore_errors=True)
    return int(any(grown.values()))


if __name__ == "__main__":
    sys.exit(main())
