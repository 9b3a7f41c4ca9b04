"""Measures records, statistics, report and verification of a data set with very many shards, on a disk or on S3.

    python benchmarks/shard_count.py 1000 10000 100000 > benchmarks/results/shard_count.md
    python benchmarks/shard_count.py 1000 --s3      # on a server of moto, which counts requests

Each shard has one segment of a tenth of a second, so that what is measured is the cost of a shard, not of audio. Each
step is a process of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402

from benchmarks.corpus_scale import measured  # noqa: E402
from data_pipeline.audio import codecs  # noqa: E402
from data_pipeline.core.packed_files import write_pack  # noqa: E402
from data_pipeline.core.storage import FileStore  # noqa: E402
from data_pipeline.core.types import SAMPLE_RATE, Segment  # noqa: E402
from data_pipeline.preprocess.html_report import Page, build_report  # noqa: E402
from data_pipeline.preprocess.ledger import balance  # noqa: E402
from data_pipeline.preprocess.verify import verify  # noqa: E402
from data_pipeline.preprocess.work_plan import WorkPlan  # noqa: E402
from data_pipeline.shards.records import DoneRecord, finished_units  # noqa: E402
from data_pipeline.shards.statistics import statistics_of, write_columns  # noqa: E402
from data_pipeline.shards.writer import ShardWriter, commit  # noqa: E402

LENGTH: Final = SAMPLE_RATE // 10
HEAD: Final = ("shards", "step", "result", "seconds", "CPU seconds", "ms CPU per shard", "peak memory, MB")


def write_set(root: str, count: int) -> str:
    """Writes a data set of so many shards, without waiting for the disk."""
    os.fsync = lambda handle: None
    store = FileStore(root)
    noise = (1000 * np.random.default_rng(0).standard_normal(LENGTH)).astype(np.int16)
    audio = codecs.encode(noise, SAMPLE_RATE, "flac")
    with store.scratch() as folder:
        for number in range(count):
            writer = ShardWriter(folder)
            said = {"corpus": "c", "speaker": f"s{number % 1000}", "language": "en"}
            segment = Segment(f"a-{number:08}", f"{number}.flac", 0, LENGTH, SAMPLE_RATE, **said)
            writer.add(segment, "flac", audio, LENGTH, level_dbfs=-20.0, snr_db=20.0)
            blank = DoneRecord(f"{number:016x}", "", "", 0, "", 0, 0, files=1)
            commit(store, writer, blank, b"")
            writer.close()
    return f"{count:,} shards"


def read_records(root: str) -> str:
    """Reads the records of a data set."""
    return f"{len(finished_units(root)):,} records"


def write_summaries(root: str) -> str:
    """Writes the summary files of a data set, as a job does at its end."""
    store = FileStore(root)
    write_pack(store, "_done", ".json")
    write_columns(root, finished_units(root))
    return ", ".join(store.names("_packs", ".parquet"))


def count_segments(root: str) -> str:
    """Computes the statistics of a data set, as `auricle shards stats` does."""
    found = statistics_of([(root, finished_units(root))])
    return f"{len(found.values('n_samples')):,} segments, {len(found.speakers):,} speakers"


def write_report(root: str) -> str:
    """Builds the report of a data set."""
    sets = [(root, finished_units(root))]
    ledger = balance(WorkPlan(), sets[0][1], (), ())
    return f"{len(build_report(Page(root, sets, ledger, (), ()))) / 1e3:,.0f} kB"


def verify_checksums(root: str) -> str:
    """Compares all files with their checksums, as `auricle shards verify --no-decode` does."""
    found = list(verify(root, decode=False))
    return f"{len(found)} faults {found[:1] or ''}"


STEPS: Final[dict[str, Callable[[str], str]]] = {
    "records, file by file": read_records,
    "summary files": write_summaries,
    "records": read_records,
    "statistics": count_segments,
    "report": write_report,
    "verify, checksums": verify_checksums,
}


@contextlib.contextmanager
def s3_server(log: Path) -> Iterator[str]:
    """Starts an S3 server with a bucket, for which the environment is set up; yields a URL in it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    os.environ.update(AWS_ACCESS_KEY_ID="test", AWS_SECRET_ACCESS_KEY="test", AWS_ENDPOINT_URL=url)
    with log.open("w", encoding="utf-8") as said:
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        server = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT)
    try:
        for _ in range(600):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(url, timeout=5).close()
                break
            time.sleep(0.1)
        import s3fs

        s3fs.S3FileSystem().mkdir("shards")
        yield "s3://shards/set"
    finally:
        server.terminate()
        server.wait(timeout=20)


def measure(root: str, count: int, folder: Path, requests: Callable[[], int] | None, steps: Sequence[str]) -> None:
    """Prints the rows of one number of shards."""
    for step in ("writing", *steps):
        before = requests() if requests else 0
        cost = measured([sys.executable, __file__, "--one", step, root, str(count)], folder)
        figures = [f"{cost.seconds:,.1f}", f"{cost.cpu_seconds:,.1f}", f"{1e3 * cost.cpu_seconds / count:,.2f}"]
        figures += [f"{cost.megabytes:,.0f}"] + ([f"{requests() - before:,}"] if requests else [])
        print(f"| {count:,} | {step} | {' '.join(cost.said.split())} | {' | '.join(figures)} |", flush=True)


def main() -> None:
    """Prints one table for the numbers of shards on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("shards", nargs="*", type=int, default=[1_000], help="numbers of shards (default: 1000)")
    parser.add_argument("--s3", action="store_true", help="on an S3 server on this machine, with its requests")
    parser.add_argument("--steps", nargs="*", default=list(STEPS), choices=list(STEPS), help="which steps")
    parser.add_argument("--folder", default="", help="folder for temporary files (default: that of the system)")
    parser.add_argument("--one", nargs=3, metavar=("STEP", "ROOT", "SHARDS"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        step, root, count = given.one
        print(write_set(root, int(count)) if step == "writing" else STEPS[step](root))
        return
    print(f"`python benchmarks/shard_count.py {' '.join(sys.argv[1:])}`")
    print(f"on {os.cpu_count()} cores; load before: {os.getloadavg()[0]:.1f}\n")
    head = (*HEAD, "requests") if given.s3 else HEAD
    print(f"| {' | '.join(head)} |\n|{' --- |' * 3}{' ---: |' * (len(head) - 3)}", flush=True)
    for count in given.shards:
        with tempfile.TemporaryDirectory(dir=given.folder or None) as name, contextlib.ExitStack() as stack:
            folder, requests, root = Path(name), None, f"{name}/set"
            if given.s3:
                log = folder / "requests"
                root = stack.enter_context(s3_server(log))
                requests = lambda log=log: log.read_text(encoding="utf-8").count(" HTTP/1.1")  # noqa: E731
            measure(root, count, folder, requests, given.steps)


if __name__ == "__main__":
    main()
