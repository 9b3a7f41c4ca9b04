"""Injects faults into real runs repeatedly; writes benchmarks/results/faults.md and jobs.md.

    python -m benchmarks.faults.table --times 5

Requirements: those of the SLURM tests. Every round submits one run per fault to a SLURM of fourteen emulated nodes,
injects the fault at a random step, waits for the end, and compares the samples read, all losses and the last weights
with an undisturbed run of the same engine and ranks.
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
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from launch.launchers import slurm
from tests.support.faults.keys import handed_over
from tests.support.faults.mini_slurm import missing, wait_for
from tests.support.faults.site import STEPS, ZERO, Site, learned, site_at, starts
from tests.support.paths import ROOT

RESULTS = ROOT / "benchmarks" / "results"
END = Path("checkpoints") / f"step_{STEPS:08d}" / "model.safetensors"


@dataclass
class Tally:
    """Results of one fault over all rounds."""

    tried: int = 0
    recovered: int = 0
    bitwise: int = 0
    difference: float = 0.0
    seconds: list[float] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


# Each fault is a generator: its first `next` injects it, the second continues stopped ranks, the third repairs the node


def warn(site: Site, name: str) -> Iterator[None]:
    """Sends the signal that SLURM sends before the time limit."""
    slurm.ask("scancel", "--batch", "--signal=USR1", site.handles[name])
    yield


def strike(site: Site, name: str) -> Iterator[None]:
    """Kills a rank with SIGKILL."""
    site.kill_rank(name, random.choice(site.nodes(name)))
    yield


def displace(site: Site, name: str) -> Iterator[None]:
    """Submits a job of higher priority to one of the run's nodes."""
    node = random.choice(site.nodes(name))
    slurm.ask("sbatch", "--partition=urgent", f"--nodelist={node}", "--output=/dev/null", "--wrap=true")
    yield


def cut_power(site: Site, name: str) -> Iterator[None]:
    """Kills everything on one node."""
    node = random.choice(site.nodes(name))
    site.cluster.power_off(node)
    yield
    yield
    site.cluster.boot(node)


def orphan(site: Site, name: str) -> Iterator[None]:
    """Kills a node's slurmd with SIGKILL; the ranks survive, stopped until SLURM acts."""
    node, pids = site.lose_slurmd(name)
    yield
    site.continue_run(name, pids)
    yield
    site.cluster.boot(node)


def cut_cable(site: Site, name: str) -> Iterator[None]:
    """Cuts the node off; its rank continues while the job has been started elsewhere."""
    node, pids = site.sever(name)
    yield
    site.continue_severed_run(name, pids)
    site.cluster.mend(node)
    yield
    site.cluster.kill_slurmd(node)  # SLURM polls a lost node rarely; a new slurmd registers at once
    site.cluster.boot(node)


SETUPS = {
    "plain torch, 2 nodes × 1 rank": (),
    "plain torch, 1 rank": ("launcher.nodes=1",),
    "DeepSpeed ZeRO-2, 1 node × 2 ranks with a gres each": ZERO,
}
"""Engine and ranks: overrides of a submission."""
PLAIN, ALONE, DEEPSPEED = SETUPS
FAULTS = {
    "time limit (USR1 of SLURM): checkpoint, requeue, resume": (warn, PLAIN),
    "kill -9 of a rank": (strike, PLAIN),
    "kill -9 of one of a node's ranks": (strike, DEEPSPEED),
    "power cut of a node": (cut_power, PLAIN),
    "kill -9 of slurmd": (orphan, PLAIN),
    "cut cable: the rank continues, and the node comes back": (cut_cable, ALONE),
    "preempted by a job of another partition": (displace, PLAIN),
}
"""Fault -> (generator, set-up of the run)."""


def calm(setup: str) -> str:
    """Returns the name of the undisturbed run of a set-up."""
    return f"calm{list(SETUPS).index(setup)}"


def one_round(site: Site, number: int, tallies: dict[str, Tally]) -> None:
    """Injects all faults at the same time, each into its own run."""
    states = lambda: slurm.ask("sinfo", "--Node", "--long")  # noqa: E731
    wait_for(lambda: len(site.cluster.idle()) == len(site.cluster.nodes), 300, "idle nodes", states)
    names = {fault: f"round{number}_fault{index}" for index, fault in enumerate(FAULTS)}
    for fault, (_, setup) in FAULTS.items():
        site.submit(names[fault], *SETUPS[setup])
    done = {fault: do(site, names[fault]) for fault, (do, _) in FAULTS.items()}
    waiting = {fault: random.randint(2, STEPS // 2) for fault in FAULTS}

    def all_done() -> bool:
        for fault in [fault for fault, step in waiting.items() if site.step(names[fault]) >= step]:
            next(done[fault])
            del waiting[fault]
        return not waiting

    wait_for(all_done, 240, "the steps of the faults")
    began = time.monotonic()
    for course in done.values():
        next(course, None)
    for fault, name in names.items():
        tally = tallies[fault]
        tally.tried += 1
        try:
            site.finish(name, 240)
        except AssertionError as error:
            tally.notes.append(f"round {number}: {str(error).splitlines()[0][:120]}")
            continue
        tally.seconds.append(time.monotonic() - began)
        compare(site, name, calm(FAULTS[fault][1]), tally)
    for course in done.values():
        next(course, None)


def compare(site: Site, name: str, undisturbed: str, tally: Tally) -> None:
    """Compares a run with the undisturbed one."""
    ours, theirs = learned(site.base / name), learned(site.base / undisturbed)
    if [step for step, _, _ in ours] != list(range(1, STEPS + 1)):
        tally.notes.append(f"{name}: steps are missing or repeated")
        return
    if starts(site.base / name) < 2:
        tally.notes.append(f"{name}: ended before the fault was noticed")
        return
    if handed_over(site.base / name) != handed_over(site.base / undisturbed):
        tally.notes.append(f"{name}: read other samples")
        return
    tally.recovered += 1
    tally.difference = max(tally.difference, *(abs(a[1] - b[1]) for a, b in zip(ours, theirs, strict=True)))
    weights = [(site.base / run / END).read_bytes() for run in (name, undisturbed)]
    tally.bitwise += ours == theirs and weights[0] == weights[1]


def record(site: Site) -> str:
    """Returns a session of `auricle jobs` commands on this SLURM, with their output."""
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
    """Returns a `logs -f`, which ends by itself after a `cancel`, and that `cancel`."""
    command = [sys.executable, "-m", "launch.main", "jobs", "logs", "-f", str(folder)]
    follower = subprocess.Popen(
        command, cwd=site.base, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8"
    )
    before = site.step(folder.name)
    site.reach(folder.name, before + 20)
    cancelled = auricle_jobs(site, f"cancel {folder}")
    said, _ = follower.communicate(timeout=120)
    last = site.step(folder.name)
    assert f"step {last}/" in said, f"it followed to the last step, {last}"
    return [shown(f"logs -f {folder}", said, follower.returncode), cancelled]


def auricle_jobs(site: Site, typed: str) -> str:
    """Runs `auricle jobs …` and returns it with its output."""
    command = [sys.executable, "-m", "launch.main", "jobs", *shlex.split(typed)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=120, cwd=site.base, check=False)
    return shown(typed, done.stdout + done.stderr, done.returncode)


def shown(typed: str, text: str, code: int) -> str:
    """Returns a command, the last lines of its output and its exit code."""
    said = [line for line in text.splitlines() if "accelerator" not in line]
    more = [f"… {len(said) - 12} lines"] if len(said) > 12 else []
    return "\n".join([f"$ auricle jobs {typed}", *more, *said[-12:], f"[exit code {code}]", ""])


def ray_rows(times: int) -> list[str]:
    """Returns the rows of the faults on a Ray cluster of two nodes, from their tests."""
    tests = {
        "a Ray node lost in training: on with half the ranks": ("fewer_ranks and local", PLAIN),
        "a Ray node lost in training, DeepSpeed": ("fewer_ranks and deepspeed", "DeepSpeed ZeRO-1, 2 nodes × 1 rank"),
        "a Ray node lost in preprocessing": ("in_preprocessing", "none"),
    }
    rows = []
    for fault, (word, engine) in tests.items():
        passed, largest = 0, 0.0
        for _ in range(times):
            command = [sys.executable, "-m", "pytest", "-q", "-s", "tests/faults/test_ray_elastic.py", "-k", word]
            done = subprocess.run(command, capture_output=True, encoding="utf-8", cwd=ROOT, timeout=900, check=False)
            passed += done.returncode == 0
            largest = max([largest, *map(float, re.findall(r"difference of a loss: (\S+)", done.stdout))])
        said = f"{largest:.1e}" if "fewer_ranks" in word else "the same bytes"
        rows.append(f"| {fault} | {engine} | {times} | {passed} | {said} | – | |")
    return rows


def main() -> None:
    """Runs the rounds and writes both files."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--ray", type=int, default=0, help="rounds of the faults on Ray")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if reason := missing():
        sys.exit(reason)
    random.seed(given.seed)
    tallies: dict[str, Tally] = defaultdict(Tally)
    with tempfile.TemporaryDirectory(prefix="faults-") as folder, site_at(Path(folder), 14) as site:
        for setup, overrides in SETUPS.items():
            site.submit(calm(setup), *overrides)
        for setup in SETUPS:
            site.finish(calm(setup))
        recording = record(site)
        for number in range(given.times):
            one_round(site, number, tallies)
            write(given, tallies, recording, [])
    write(given, tallies, recording, ray_rows(given.ray) if given.ray else [])


def write(given: argparse.Namespace, tallies: dict[str, Tally], recording: str, more: list[str]) -> None:
    """Writes both files; called after each round, so that an interrupted program leaves results."""
    rows = [
        f"| {fault} | {FAULTS[fault][1]} | {t.tried} | {t.recovered} | "
        f"{t.difference:.1e} ({t.bitwise} of {t.tried} bitwise, weights too) | "
        f"{max(t.seconds, default=0):.0f} s | {'; '.join(t.notes)} |"
        for fault, t in tallies.items()
    ]
    head = f"    python -m benchmarks.faults.table --times {given.times} --ray {given.ray} --seed {given.seed}\n"
    columns = (
        "| fault | engine and ranks | times | recovered | largest difference of a loss | longest recovery | notes |"
    )
    note = (
        "All recovered runs read the samples of the undisturbed one, each step once. Measured on two cores beside "
        "other work, so the times are upper bounds."
    )
    table = "\n".join(["# Faults injected into real runs", "", head, note, "", columns, "|---" * 7 + "|", *rows, *more])
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "faults.md").write_text(f"{table}\n", encoding="utf-8")
    (RESULTS / "jobs.md").write_text(
        f"# `auricle jobs` against a real SLURM\n\nRecorded by\n\n{head}\n```\n{recording}```\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
