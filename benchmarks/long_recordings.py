"""Measures what it costs to process one long recording in parts of half an hour instead of as a whole.

    python benchmarks/long_recordings.py --hours 24 > benchmarks/results/long_recordings.md

The recording is FLAC of noise. All units run in this process, one after another; the longest one is the time that a
cluster with enough workers needs.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import soundfile  # noqa: E402

from data_pipeline.core.storage import FileStore  # noqa: E402
from data_pipeline.core.types import SAMPLE_RATE  # noqa: E402
from data_pipeline.corpora.config import PathCorpus  # noqa: E402
from data_pipeline.corpora.discovery import discover  # noqa: E402
from data_pipeline.preprocess.config import PreprocessConfig  # noqa: E402
from data_pipeline.preprocess.unit_worker import process_unit  # noqa: E402
from data_pipeline.preprocess.work_plan import freeze_plan  # noqa: E402
from data_pipeline.shards.records import read_index  # noqa: E402

HEAD: Final = ("recording", "units", "CPU seconds of all", "CPU seconds of the longest", "segments", "hash of samples")


def write_recording(path: Path, hours: float) -> None:
    """Writes a mono FLAC file at 16 kHz, a minute of noise over and over."""
    minute = (2000 * np.random.default_rng(0).standard_normal(60 * SAMPLE_RATE)).astype(np.int16)
    with soundfile.SoundFile(path, "w", SAMPLE_RATE, 1, subtype="PCM_16") as file:
        for _ in range(round(60 * hours)):
            file.write(minute)


def processed(corpus: Path, out: Path, *, in_parts: bool) -> tuple[str, ...]:
    """Processes a folder and returns the figures of a row."""
    config = PreprocessConfig(out=str(out), corpus=PathCorpus(path=str(corpus)), shard_mb=60.0)
    plan = freeze_plan(FileStore(config.out), discover(config.corpus, in_parts=in_parts).recordings, config)
    seconds, samples = list[float](), dict[str, bytes]()
    for unit in plan.work_units():
        began = time.process_time()
        record = process_unit(unit, config).record
        seconds.append(time.process_time() - began)
        with (out / record.shard).open("rb") as tar:
            for row in read_index(config.out, record).to_pylist():
                tar.seek(row["offset"])
                samples[row["key"]] = tar.read(row["size"])
    digest = hashlib.sha256(b"".join(samples[key] for key in sorted(samples))).hexdigest()
    name = "parts of half an hour" if in_parts else "whole"
    return name, str(len(seconds)), f"{sum(seconds):.1f}", f"{max(seconds):.1f}", str(len(samples)), digest[:12]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--hours", type=float, default=4.0, help="length of the recording (default: 4)")
    parser.add_argument("--folder", default="", help="folder for temporary files (default: that of the system)")
    given = parser.parse_args()
    print("# One long recording, in parts and as a whole\n")
    print(f"`python benchmarks/long_recordings.py --hours {given.hours:g}`")
    print(f"on {os.cpu_count()} cores; load before: {os.getloadavg()[0]:.1f}; one process\n")
    print(f"| {' | '.join(HEAD)} |\n|{' --- |' * len(HEAD)}", flush=True)
    with tempfile.TemporaryDirectory(dir=given.folder or None) as name:
        corpus = Path(name, "corpus")
        corpus.mkdir()
        write_recording(corpus / "day.flac", given.hours)
        for in_parts in (True, False):
            row = processed(corpus, Path(name, f"out_{in_parts}"), in_parts=in_parts)
            print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
