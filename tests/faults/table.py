"""Faults done to real runs again and again, and what came of it: writes benchmarks/results/faults.md and jobs.md.

    python -m tests.faults.table --times 5

Needs what the SLURM tests need. Every round submits four runs of two ranks to a SLURM of twelve emulated nodes, does
one fault to each of them at a random step, waits for their ends, and compares all losses and the last weights with an
undisturbed run.
"""

from __future__ import annotations

import argparse
import random
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from launch import slurm
from tests.conftest import ROOT
from tests.faults.mini_slurm import missing, wait_for
from tests.faults.site import STEPS, Site, learned, site_at, starts

RESULTS = ROOT / "benchmarks" / "results"
END = Path("checkpoints") / f"step_{STEPS:08d}" / "model.safetensors"


@dataclass
class Tally:
    """How one fault went, over all rounds."""

    tried: int = 0
    recovered: int = 0
    bitwise: int = 0
    difference: float = 0.0
    seconds: list[float] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def warn(site: Site, name: str) -> Callable[[], None]:
    """The signal that SLURM sends before the time limit."""
    slurm.ask("scancel", "--batch", "--signal=USR1", site.handles[name])
    return lambda: None


def strike(site: Site, name: str) -> Callable[[], None]:
    """kill -9 of a rank."""
    site.kill_rank(name, random.choice(site.nodes(name)))
    return lambda: None


def cut_power(site: Site, name: str) -> Callable[[], None]:
    """Everything on one node is gone."""
    node = random.choice(site.nodes(name))
    site.cluster.power_off(node)
    return lambda: site.cluster.boot(node)


def orphan(site: Site, name: str) -> Callable[[], None]:
    """kill -9 of a node's slurmd; the ranks live on, held still until SLURM acts."""
    node, pids = site.lose_slurmd(name)
    site.go_on(name, pids)
    return lambda: site.cluster.boot(node)


FAULTS = {
    "time limit (USR1 of SLURM): checkpoint, requeue, resume": warn,
    "kill -9 of a rank": strike,
    "a node loses its power": cut_power,
    "kill -9 of slurmd": orphan,
}


def one_round(site: Site, number: int, tallies: dict[str, Tally]) -> None:
    """All faults at once, each to a run of its own."""
    names = {fault: f"round{number}_{do.__name__}" for fault, do in FAULTS.items()}
    for name in names.values():
        site.submit(name)
    mend = []
    for fault, do in FAULTS.items():
        site.reach(names[fault], random.randint(2, STEPS // 2))
        mend.append(do(site, names[fault]))
    began = time.monotonic()
    for fault, name in names.items():
        tally = tallies[fault]
        tally.tried += 1
        try:
            site.finish(name, 240)
        except AssertionError as error:
            tally.notes.append(f"round {number}: {str(error).splitlines()[0][:120]}")
            continue
        tally.seconds.append(time.monotonic() - began)
        compare(site, name, tally)
    for back in mend:
        back()
    wait_for(lambda: len(site.cluster.idle()) == len(site.cluster.nodes), 120, "idle nodes")


def compare(site: Site, name: str, tally: Tally) -> None:
    """With the undisturbed run."""
    ours, calm = learned(site.base / name), learned(site.base / "calm")
    if [step for step, _, _ in ours] != list(range(1, STEPS + 1)):
        tally.notes.append(f"{name}: steps are missing or there twice")
        return
    if starts(site.base / name) < 2:
        tally.notes.append(f"{name}: ended before the fault was noticed")
        return
    tally.recovered += 1
    tally.difference = max(tally.difference, *(abs(a[1] - b[1]) for a, b in zip(ours, calm, strict=True)))
    tally.bitwise += ours == calm and (site.base / name / END).read_bytes() == (site.base / "calm" / END).read_bytes()


def record(site: Site) -> str:
    """`auricle jobs` against this SLURM, as it was typed and as it answered."""
    folder = site.submit("watched", "train.steps=3000")
    site.reach("watched", 12)
    lines = []
    for typed in ("list --runs .", "status watched", "logs watched"):
        lines.append(auricle_jobs(site, typed.replace("watched", str(folder))))
    lines += followed(site, folder)
    wait_for(lambda: site.state("watched") == "CANCELLED", 60, "the cancelled state")
    lines.append(auricle_jobs(site, f"status {folder}"))
    lines.append(auricle_jobs(site, f"requeue {folder}"))
    lines.append(auricle_jobs(site, f"status {folder}"))
    lines.append(auricle_jobs(site, f"cancel {folder}"))
    return "\n".join(lines).replace(str(site.base), "/work/runs")


def followed(site: Site, folder: Path) -> list[str]:
    """`logs -f` in one terminal, which ends by itself after `cancel` in another."""
    command = [sys.executable, "-m", "launch.app", "jobs", "logs", "-f", str(folder)]
    follower = subprocess.Popen(command, cwd=site.base, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    before = site.step(folder.name)
    site.reach(folder.name, before + 20)
    cancelled = auricle_jobs(site, f"cancel {folder}")
    said, _ = follower.communicate(timeout=120)
    last = site.step(folder.name)
    assert f"step {last}/" in said, f"it followed to the last step, {last}"
    return [shown(f"logs -f {folder}", said, follower.returncode), cancelled]


def auricle_jobs(site: Site, typed: str) -> str:
    command = [sys.executable, "-m", "launch.app", "jobs", *shlex.split(typed)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=site.base, check=False)
    return shown(typed, done.stdout + done.stderr, done.returncode)


def shown(typed: str, text: str, code: int) -> str:
    """A command and the last lines of its answer."""
    said = [line for line in text.splitlines() if "accelerator" not in line]
    more = [f"… {len(said) - 12} lines"] if len(said) > 12 else []
    return "\n".join([f"$ auricle jobs {typed}", *more, *said[-12:], f"[exit code {code}]", ""])


def ray_rows(times: int) -> list[str]:
    """The two faults on a Ray of two nodes, from their own tests."""
    tests = {
        "a Ray node lost in training: on with half the ranks": "fewer_ranks",
        "a Ray node lost in preprocessing": "in_preprocessing",
    }
    rows = []
    for fault, word in tests.items():
        passed, largest = 0, 0.0
        for _ in range(times):
            command = [sys.executable, "-m", "pytest", "-q", "-s", "tests/faults/test_ray_gang.py", "-k", word]
            done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=900, check=False)
            passed += done.returncode == 0
            largest = max([largest, *map(float, re.findall(r"difference of a loss: (\S+)", done.stdout))])
        said = f"{largest:.1e}" if word == "fewer_ranks" else "the same bytes"
        rows.append(f"| {fault} | {times} | {passed} | {said} | – | |")
    return rows


def main() -> None:
    """Writes both files."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--ray", type=int, default=0, help="how often for the faults on Ray")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if reason := missing():
        sys.exit(reason)
    random.seed(given.seed)
    tallies: dict[str, Tally] = defaultdict(Tally)
    with tempfile.TemporaryDirectory(prefix="faults-") as folder, site_at(Path(folder), 12) as site:
        site.submit("calm")
        site.finish("calm")
        recording = record(site)
        for number in range(given.times):
            one_round(site, number, tallies)
            write(given, tallies, recording, [])
    write(given, tallies, recording, ray_rows(given.ray) if given.ray else [])


def write(given: argparse.Namespace, tallies: dict[str, Tally], recording: str, more: list[str]) -> None:
    """After each round, so that a stopped script has something to show."""
    rows = [
        f"| {fault} | {t.tried} | {t.recovered} | {t.difference:.1e} ({t.bitwise} of {t.tried} bitwise, weights too) | "
        f"{max(t.seconds, default=0):.0f} s | {'; '.join(t.notes)} |"
        for fault, t in tallies.items()
    ]
    head = f"    python -m tests.faults.table --times {given.times} --ray {given.ray} --seed {given.seed}\n"
    columns = "| fault | times | recovered | largest difference of a loss | longest way to the end | notes |"
    table = "\n".join(["# Faults done to real runs", "", head, columns, "|---|---|---|---|---|---|", *rows, *more])
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "faults.md").write_text(f"{table}\n", encoding="utf-8")
    (RESULTS / "jobs.md").write_text(
        f"# `auricle jobs` against a real SLURM\n\nRecorded by\n\n{head}\n```\n{recording}```\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
