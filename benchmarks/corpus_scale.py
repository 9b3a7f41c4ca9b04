"""Measures planning for large corpora: `auricle preprocess --dry-run`, the frozen plan, and a corpus that grew by 1 %.

    python benchmarks/corpus_scale.py 1e5 1e6 1e7 > benchmarks/results/corpus_scale.md
    python benchmarks/corpus_scale.py 1e7 --steps 1 2 4     # without the dry run of the corpus that grew
    python benchmarks/corpus_scale.py 1e6 --layout mls      # a dry run of files and transcripts in a known layout

The recordings are 10,000 sparse files, which links name under as many paths as there are rows; all paths are looked up.
Each step is a process of its own; memory is its largest resident set. `--folder` is for manifests, plans and temporary
files: about 1.5 GB per million rows.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import platform
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[1]
FILES: Final = 10_000
HEAD: Final = ("rows", "step", "result", "seconds", "CPU seconds", "µs CPU per row", "peak memory, MB")


@dataclass(frozen=True)
class Cost:
    """The cost of one process."""

    seconds: float
    cpu_seconds: float
    megabytes: float
    said: str


def write_corpus(folder: Path, rows: int) -> Path:
    """Writes the files that are missing and a manifest; returns its path."""
    audio = folder / "audio"
    if not audio.exists():
        audio.mkdir(parents=True)
        for number in range(FILES):
            with (audio / f"f{number:05}.flac").open("wb") as file:
                file.truncate(60_000 + number * 7919 % 200_000)
    for number in range(-(-rows // FILES)):
        link = folder / f"d{number:05}"
        if not link.is_symlink():
            link.symlink_to("audio")
    manifest = folder / f"corpus_{rows}.tsv"
    with manifest.open("w", encoding="utf-8") as out:
        out.write("path\tspeaker\tlanguage\ttext\tduration\n")
        for row in range(rows):
            out.write(
                f"d{row // FILES:05}/f{row % FILES:05}.flac\tspeaker{row % 5003}\ten\tthis is the text of recording "
                f"number {row}\t{3 + row * 31 % 150 / 10}\n"
            )
    return manifest


def write_layout(folder: Path, rows: int) -> Path:
    """Writes a corpus in the layout of Multilingual LibriSpeech, 100 recordings to a book; returns its folder."""
    train = folder / "mls_english" / "train"
    for book in range(-(-rows // 100)):
        chapter = train / "audio" / str(book // 10) / str(book)
        chapter.mkdir(parents=True)
        for number in range(min(100, rows - 100 * book)):
            with (chapter / f"{book // 10}_{book}_{number:06}.flac").open("wb") as file:
                file.truncate(60_000 + number * 7919 % 200_000)
    with (train / "transcripts.txt").open("w", encoding="utf-8") as out:
        for row in range(rows):
            book = row // 100
            out.write(f"{book // 10}_{book}_{row % 100:06}\tthis is the text of recording number {row}\n")
    return train.parent


def measured(command: Sequence[str], temporary: Path) -> Cost:
    """Runs a command and returns its cost. Raises RuntimeError if it fails."""
    with tempfile.TemporaryFile("w+", encoding="utf-8") as said:
        began, pid = time.monotonic(), os.fork()
        if not pid:
            os.dup2(said.fileno(), 1)
            os.execve(command[0], [*command], {**os.environ, "TMPDIR": str(temporary), "PYTHONPATH": str(ROOT)})
        _, status, usage = os.wait4(pid, 0)
        seconds = time.monotonic() - began
        said.seek(0)
        text = said.read()
    if status:
        raise RuntimeError(f"{shlex.join(command)}: status {status}: {text}")
    return Cost(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1e3, text)


def freeze(manifest: str, out: str) -> None:
    """Freezes the plan of a manifest, as `auricle preprocess` does before it processes recordings."""
    sys.path.insert(0, str(ROOT))
    from data_pipeline.core.storage import FileStore
    from data_pipeline.corpora.config import ManifestCorpus
    from data_pipeline.corpora.discovery import discover
    from data_pipeline.preprocess.config import PreprocessConfig
    from data_pipeline.preprocess.work_plan import freeze_plan

    config = PreprocessConfig(out=out, corpus=ManifestCorpus(path=manifest, corpus="speech"))
    store = FileStore(out)
    found = discover(config.corpus, store.temporary_place(), in_parts=True)
    plan = freeze_plan(store, found.recordings, config)
    print(f"{sum(unit.files for unit in plan.units):,} recordings in {len(plan.units):,} units")


def main() -> None:
    """Prints one table for the numbers of rows on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("rows", nargs="*", type=float, default=[1e5], help="numbers of rows (default: 1e5)")
    parser.add_argument("--folder", default="", help="folder for temporary files (default: that of the system)")
    parser.add_argument("--steps", nargs="*", type=int, default=[1, 2, 3, 4], choices=[1, 2, 3, 4], help="which steps")
    parser.add_argument("--layout", default="manifest", choices=["manifest", "mls"], help="what lists the recordings")
    parser.add_argument("--freeze", nargs=2, metavar=("MANIFEST", "OUT"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.freeze:
        freeze(*given.freeze)
        return
    chosen = f" --steps {' '.join(map(str, given.steps))}" * (len(given.steps) < 4)
    chosen += " --layout mls" * (given.layout == "mls")
    print(f"`python benchmarks/corpus_scale.py {' '.join(f'{rows:g}' for rows in given.rows)}{chosen}`")
    print(f"on {os.cpu_count()} cores ({platform.machine()}); load before: {os.getloadavg()[0]:.1f}\n")
    print(f"| {' | '.join(HEAD)} |\n|{' --- |' * 2}{' --- |'}{' ---: |' * 4}", flush=True)
    for rows in map(int, given.rows):
        with tempfile.TemporaryDirectory(dir=given.folder or None) as name:
            if given.layout == "mls":
                show(rows, "dry run, mls", dry_run(Path(name), "mls", write_layout(Path(name), rows)))
            else:
                measure(Path(name), rows, given.steps)


def measure(folder: Path, rows: int, chosen: Sequence[int]) -> None:
    """Prints the chosen steps of a manifest."""
    first = write_corpus(folder, rows)
    grown = write_corpus(folder, rows + rows // 100) if {3, 4} & set(chosen) else Path()
    steps = (("dry run", first), ("frozen plan", first), ("dry run", grown), ("frozen plan", grown))
    for step, manifest in (steps[number - 1] for number in chosen):
        if step == "dry run":
            cost = dry_run(folder, "manifest", manifest, "corpus.corpus=speech")
        else:
            cost = measured([sys.executable, __file__, "--freeze", str(manifest), f"{folder}/out"], folder)
        show(rows, step, cost, " + 1 %" * (manifest == grown))


def dry_run(folder: Path, corpus: str, path: Path, *overrides: str) -> Cost:
    """Measures `auricle preprocess --dry-run`."""
    command = [sys.executable, "-m", "launch.main", "preprocess", f"corpus={corpus}", f"corpus.path={path}"]
    cost = measured([*command, *overrides, f"out={folder}/out", "--dry-run"], folder)
    return dataclasses.replace(cost, said=_units_of(cost.said))


def show(rows: int, step: str, cost: Cost, more: str = "") -> None:
    """Prints a row of the table."""
    figures = (cost.seconds, cost.cpu_seconds, 1e6 * cost.cpu_seconds / rows, cost.megabytes)
    shown = " | ".join(f"{figure:,.0f}" for figure in figures)
    print(f"| {rows:,}{more} | {step} | {' '.join(cost.said.split())} | {shown} |", flush=True)


def _units_of(said: str) -> str:
    """Returns the units and recordings that a dry run announces."""
    lines = {line.split()[0]: line for line in said.splitlines() if line.strip()}
    return " ".join(lines.get("units", "?").split())


if __name__ == "__main__":
    main()
