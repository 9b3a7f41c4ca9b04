"""Parts that the proofs share: the command line, real speech, commands of auricle, tables."""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from data_pipeline.core.jsonl import read_rows
from data_pipeline.corpora.local_speech import MANIFEST_NAME, SPEECH_VARIABLE, speech_manifest

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def parser_of(description: str | None, work: str = "") -> argparse.ArgumentParser:
    """Returns a parser with `--out`, and `--work` for proofs that write runs.

    Args:
        description: the program's docstring, of which the first line is shown.
        work: name of the folder below runs/ for shards and runs; empty: the proof writes none.
    """
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for tables and figures")
    if work:
        parser.add_argument("--work", type=Path, default=ROOT / "runs" / work, help="folder for shards and runs")
    return parser


def real_speech() -> Path | None:
    """Returns the manifest of real speech; None, after a message, where there is none."""
    manifest = speech_manifest()
    if manifest is None:
        print(f"skipped: needs real speech; set {SPEECH_VARIABLE} to a folder with {MANIFEST_NAME}")
    return manifest


def auricle(*arguments: str) -> None:
    """Runs a command of auricle; raises CalledProcessError when it fails."""
    subprocess.run([sys.executable, "-m", "launch.main", *arguments], check=True, cwd=ROOT)


def quiet_auricle(*arguments: str) -> None:
    """Runs a command of auricle; ends the program with the command's output when it fails."""
    command = [sys.executable, "-m", "launch.main", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", check=False)
    if done.returncode:
        print(done.stdout[-2000:], done.stderr[-4000:], file=sys.stderr)
        raise SystemExit(f"auricle {' '.join(arguments)} ended with exit code {done.returncode}")


def succeeds(*arguments: str) -> bool:
    """Runs a command of auricle; returns whether it succeeded."""
    return subprocess.run([sys.executable, "-m", "launch.main", *arguments], check=False, cwd=ROOT).returncode == 0


def step_seconds(run: Path, skip: int = 0) -> float:
    """Returns the median duration of a run's logged steps, without the first `skip` rows."""
    return statistics.median(row["perf/step_seconds"] for row in read_rows(run / "metrics.jsonl")[skip:])


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Returns the lines of a table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]
