"""Measures how planning scales: synthetic shards of 10 M or 300 M segments, read by the real reader in its own process.

    python benchmarks/plan_scale.py --segments 10e6

A few distinct shards are written and linked under as many names as needed. Their tars are sparse files of silence, as
int16 WAV, so that batches are really read; their indexes and records are real. Printed: time to the first batch without
and with an existing catalog, time to a batch after a resume in mid-epoch, the cost of planning one window and one step,
and the peak resident memory (memory-mapped pages included).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_pipeline.core.types import SAMPLE_RATE
from data_pipeline.shards.records import INDEX_SCHEMA, DoneRecord

PER_SHARD = 5_500
DISTINCT = 64
HEADER = 44


def write_shard(root: Path, number: int) -> DoneRecord:
    """Writes a shard of segments of 3 to 30 s of 4 corpora, about a GB as FLAC (here: sparse WAV)."""
    rng = np.random.default_rng(number)
    n = (np.clip(rng.gamma(4.0, 3.2, PER_SHARD), 3, 30) * SAMPLE_RATE).astype(np.int64)
    size = 1024 + (HEADER + 2 * n + 511) // 512 * 512
    offset = np.concatenate([[0], np.cumsum(size)])
    columns = {
        "key": [f"{number:05d}{i:06d}" for i in range(PER_SHARD)],
        "offset": offset[:-1],
        "size": size,
        "payload_offset": offset[:-1] + 512,
        "payload_size": HEADER + 2 * n,
        "suffix": ["wav"] * PER_SHARD,
        "n_samples": n,
        "corpus": [f"corpus{c}" for c in rng.choice(4, PER_SHARD, p=[0.7, 0.2, 0.08, 0.02])],
        "language": ["en"] * PER_SHARD,
        "speaker": [f"s{i % 997}" for i in range(PER_SHARD)],
        "file_id": [f"file{i // 9}" for i in range(PER_SHARD)],
        "start": np.zeros(PER_SHARD, np.int64),
        "level_dbfs": np.full(PER_SHARD, -20, np.float32),
        "snr_db": np.full(PER_SHARD, 20, np.float32),
        "weight": np.ones(PER_SHARD, np.float32),
    }
    name = f"distinct-{number:04d}"
    pq.write_table(pa.table(columns, schema=INDEX_SCHEMA), root / f"{name}.parquet", compression="zstd")
    with (root / f"{name}.tar").open("wb") as tar:
        tar.truncate(int(offset[-1]) + 1024)
    return DoneRecord(
        name,
        f"{name}.tar",
        sha256="0" * 64,
        bytes=int(offset[-1]) + 1024,
        index_sha256="0" * 64,
        segments=PER_SHARD,
        samples=int(n.sum()),
    )


def write_corpus(root: Path, segments: int) -> None:
    """Writes shards with this number of segments, most of them links."""
    (root / "_done").mkdir()
    distinct = [write_shard(root, i) for i in range(DISTINCT)]
    for i in range(-(-segments // PER_SHARD)):
        record, name = distinct[i % DISTINCT], f"unit-{i:06d}"
        for suffix in ("tar", "parquet"):
            os.link(root / f"{record.unit}.{suffix}", root / f"{name}.{suffix}")
        made = dataclasses.replace(record, unit=name, shard=f"{name}.tar", sha256=f"{i:064d}")
        (root / "_done" / f"{name}.json").write_bytes(made.to_json())


PROBE = """
import json, resource, sys, time
start = time.perf_counter()
from data_pipeline.sampling.config import DataConfig
from data_pipeline.loader.reader import open_reader
from data_pipeline.core.types import Cursor
imported = time.perf_counter()
root, cache, fraction, alpha = sys.argv[1], sys.argv[2], float(sys.argv[3]), float(sys.argv[4])
reader = open_reader(DataConfig(shards=root, workers=0, cache=cache, mix_alpha=alpha), 0, 0, 64)
opened = time.perf_counter()
steps = reader.plan.layout(0).steps
next(reader.steps(Cursor(reader.plan_hash, 0, int(steps * fraction))))
first, cpu = time.perf_counter(), time.process_time()
layout = reader.plan.layout(0)
windows = len(layout.step_W1) - 1
at = time.perf_counter()
reader.plan.window(0, windows // 3)
window = time.perf_counter() - at
per_step = window / max(1, int(layout.step_W1[windows // 3 + 1] - layout.step_W1[windows // 3]))
print(json.dumps({
    "cpu_s": cpu,
    "import_s": imported - start, "open_s": opened - imported, "first_batch_s": first - start, "steps": steps,
    "windows": windows, "hours": layout.samples / 16000 / 3600, "window_s": window, "plan_ms_per_step": per_step * 1e3,
    "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
}))
"""


def probe(root: Path, cache: Path, fraction: float, alpha: float = 1.0) -> dict[str, float]:
    """Opens the reader in a new process on one core and returns its measurements."""
    command = [sys.executable, "-c", PROBE, str(root), str(cache), str(fraction), str(alpha)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    one_core = {min(os.sched_getaffinity(0))}
    done = subprocess.run(
        command,
        env=environment,
        capture_output=True,
        encoding="utf-8",
        preexec_fn=lambda: os.sched_setaffinity(0, one_core),
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Prints one line per situation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--segments", type=float, default=10e6)
    parser.add_argument("--folder", help="where to write the synthetic shards; default: a temporary folder")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    rows = {}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        root, cache = Path(scratch) / "shards", Path(scratch) / "cache"
        root.mkdir()
        begin = time.perf_counter()
        write_corpus(root, int(arguments.segments))
        print(f"wrote {arguments.segments:,.0f} segments in {time.perf_counter() - begin:.0f} s", flush=True)
        for name, fraction, alpha in (
            ("first open", 0.0, 1.0), ("open again", 0.0, 1.0), ("resume in mid-epoch", 0.5, 1.0),
            ("mix_alpha 0.5", 0.3, 0.5),
        ):  # fmt: skip
            rows[name] = probe(root, cache, fraction, alpha)
            shown = "  ".join(f"{key} {value:,.2f}" for key, value in rows[name].items())
            print(f"{name:20}  {shown}", flush=True)
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"segments": arguments.segments, "date": time.strftime("%F")} | rows, indent=1),
            encoding="utf-8",
        )


if __name__ == "__main__":
    main()
