"""Compares audio-to-shards conversion: auricle on Ray, lhotse's Shar export, and the bare cost, on the same files.

    python benchmarks/preprocess.py --hours 20 --long-hours 10 --json benchmarks/results/preprocess_cpu.json

Half of the files are 16 kHz FLAC, half 44.1 kHz FLAC that has to be resampled; all of them become 16 kHz FLAC. The bare
cost decodes, resamples and encodes with the same libraries in a pool of processes and writes nothing. auricle's time
includes the start of Ray, planning, measuring, hashing and syncing to disk. It copies 16 kHz FLAC without encoding; the
second row (copy_flac=false) encodes it. Hours per core-hour are of processor time, since the machine may be shared;
elapsed times are given as well.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import soundfile
import soxr

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data_pipeline.corpora.local_speech import speech_folder  # noqa: E402
from pretrain.profiling.processor import model_name  # noqa: E402

RATE = 16_000


def make_corpus(folder: Path, hours: float) -> float:
    """Writes clips of AURICLE_SPEECH, or noise where it is unset, under many names; returns seconds of audio."""
    folder.mkdir()
    speech = speech_folder()
    files = sorted(speech.rglob("*.flac")) if speech else []
    clips = [soundfile.read(path, dtype="int16")[0] for path in files if is_clip(path)][:60]
    if not clips:
        rng = np.random.default_rng(0)
        clips = [(rng.standard_normal(RATE * 14) * 1000).astype(np.int16) for _ in range(20)]
    total, number = 0.0, 0
    while total < hours * 3600:
        clip = clips[number % len(clips)]
        path = folder / f"clip{number:06d}.flac"
        if number >= 2 * len(clips):
            os.link(folder / f"clip{number - 2 * len(clips):06d}.flac", path)
        elif number < len(clips):
            soundfile.write(path, clip, RATE)
        else:
            soundfile.write(path, soxr.resample(clip, RATE, 44_100), 44_100)
        total += len(clip) / RATE
        number += 1
    return total


def _bare_one(path: str) -> int:
    wave, rate = soundfile.read(path, dtype="float32")
    if rate != RATE:
        wave = soxr.resample(wave, rate, RATE, quality="HQ")
    buffer = io.BytesIO()
    soundfile.write(buffer, np.clip(np.rint(wave * 32768), -32768, 32767).astype(np.int16), RATE, format="FLAC")
    return len(wave)


def bare(corpus: Path, out: Path, cores: int) -> None:
    """Decodes, resamples and encodes, without further processing."""
    with multiprocessing.Pool(cores) as pool:
        for _ in pool.imap_unordered(_bare_one, map(str, sorted(corpus.iterdir())), chunksize=32):
            pass


def ours(corpus: Path, out: Path, cores: int, copy_flac: bool = True) -> None:
    """Runs `auricle preprocess` in a separate process, like the command."""
    values: dict[str, object] = {
        "out": str(out),
        "corpus": {"name": "path", "path": str(corpus)},
        "ray": {"num_cpus": cores},
    }
    values["copy_flac"] = copy_flac
    code = (
        "import json, sys\n"
        "from data_pipeline.preprocess.config import PreprocessConfig\n"
        "from data_pipeline.preprocess.job import preprocess\n"
        "from data_pipeline.core.schema import load\n"
        "sys.exit(preprocess(load(PreprocessConfig, json.loads(sys.argv[1])), progress=False).exit_code)\n"
    )
    subprocess.run([sys.executable, "-c", code, json.dumps(values)], check=True, cwd=ROOT)


def ours_encoding_all(corpus: Path, out: Path, cores: int) -> None:
    """Runs the same without copying 16 kHz FLAC."""
    ours(corpus, out, cores, copy_flac=False)


def is_clip(path: Path) -> bool:
    """Returns whether a file is mono, at 16 kHz, and lasts 6 s to 20 s."""
    found = soundfile.info(path)
    return found.samplerate == RATE and found.channels == 1 and 6 <= found.duration <= 20


def lhotse_shar(corpus: Path, out: Path, cores: int) -> None:
    """Converts with lhotse: recordings to cuts to Shar with FLAC fields."""
    from lhotse import CutSet, Recording, RecordingSet

    recordings = RecordingSet.from_recordings(Recording.from_file(path) for path in sorted(corpus.iterdir()))
    cuts = CutSet.from_manifests(recordings=recordings).resample(RATE)
    out.mkdir()
    cuts.to_shar(str(out), fields={"recording": "flac"}, shard_size=1000, num_jobs=cores)


class CpuMeter:
    """Measures the processor time of all descendants of this process, by polling the process tree every 50 ms.

    On a shared machine, processor time is steadier than elapsed time.
    """

    def __enter__(self) -> CpuMeter:
        self._seen: dict[tuple[int, float], float] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        me = psutil.Process()
        while not self._stop.wait(0.05):
            for child in me.children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    times = child.cpu_times()
                    self._seen[child.pid, child.create_time()] = times.user + times.system

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def seconds(self) -> float:
        """Of the children alone: the work is theirs in all contestants."""
        return sum(self._seen.values())


def long_file(hours: float, folder: Path) -> dict[str, float]:
    """Measures the peak memory of one worker process for a recording of this many hours."""
    corpus = folder / "long"
    corpus.mkdir()
    noise = (np.random.default_rng(0).standard_normal(RATE * 60) * 500).astype(np.int16)
    with soundfile.SoundFile(corpus / "long.flac", "w", RATE, 1) as sound:
        for _ in range(round(hours * 60)):
            sound.write(noise)
    code = (
        "import re, sys, json\n"
        "from pathlib import Path\n"
        "from data_pipeline.preprocess.config import PreprocessConfig\n"
        "from data_pipeline.corpora.discovery import discover\n"
        "from data_pipeline.preprocess.unit_worker import process_unit\n"
        "from data_pipeline.core.schema import load\n"
        "from data_pipeline.preprocess.plan_file import WorkUnit\n"
        # ru_maxrss would count what the parent held before exec
        "def peak(): return int(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1])\n"
        "before = peak()\n"
        "config = load(PreprocessConfig, json.loads(sys.argv[1]))\n"
        "result = process_unit(WorkUnit('long', tuple(discover(config.corpus, in_parts=True).files)), config)\n"
        "after = peak()\n"
        "print(json.dumps({'before_mb': before / 1024, 'peak_mb': after / 1024,\n"
        "                  'hours': result.record.samples / 16000 / 3600}))\n"
    )
    values = {"out": str(folder / "long-out"), "corpus": {"name": "path", "path": str(corpus)}}
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(values)], check=True, cwd=ROOT, capture_output=True, encoding="utf-8"
    )
    measured: dict[str, float] = json.loads(done.stdout)
    return measured


def main() -> None:
    """Prints a table; `--json` keeps it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hours", type=float, default=2.0, help="of audio (default: 2; the published table used 60)")
    parser.add_argument("--cores", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--long-hours", type=float, default=0.0, help="also measure memory for one such recording")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    contestants: dict[str, Callable[[Path, Path, int], None]] = {
        "bare cost": bare,
        "auricle": ours,
        "auricle copy_flac=false": ours_encoding_all,
    }
    try:
        import lhotse

        contestants[f"lhotse {lhotse.__version__} Shar"] = lhotse_shar
    except ImportError:
        print("lhotse is not installed: left out")
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory(prefix="auricle-bench-") as name:
        folder = Path(name)
        seconds = make_corpus(folder / "corpus", given.hours)
        walls: dict[str, list[float]] = {contestant: [] for contestant in contestants}
        spent: dict[str, list[float]] = {contestant: [] for contestant in contestants}
        for _ in range(given.rounds):
            for contestant, work in contestants.items():
                began = time.perf_counter()
                with CpuMeter() as meter:
                    worker = multiprocessing.get_context("spawn").Process(
                        target=work, args=(folder / "corpus", folder / "out", given.cores)
                    )
                    worker.start()
                    worker.join()
                if worker.exitcode:
                    raise SystemExit(f"{contestant} failed")
                walls[contestant].append(time.perf_counter() - began)
                spent[contestant].append(meter.seconds)
                shutil.rmtree(folder / "out", ignore_errors=True)
        speeds = {key: seconds / statistics.median(cpu) for key, cpu in spent.items()}
        memory = long_file(given.long_hours, folder) if given.long_hours else None
    print(f"{seconds / 3600:.1f} h of audio, {given.cores} cores, medians of {given.rounds} rounds")
    for contestant, speed in speeds.items():
        times = ", ".join(f"{wall:.1f}" for wall in walls[contestant])
        print(
            f"{contestant:24} {speed:8.0f} h per core-hour   {speed / speeds['bare cost']:5.2f} of bare   ({times} s)"
        )
    if memory:
        print(
            f"a recording of {memory['hours']:.1f} h: peak {memory['peak_mb']:.0f} MB, "
            f"of which {memory['before_mb']:.0f} MB before it was opened"
        )
    if given.json:
        host = {"machine": model_name(), "cores": given.cores, "load": os.getloadavg()}
        result = {
            "hours": seconds / 3600,
            "walls": walls,
            "processor": spent,
            "hours_per_core_hour": speeds,
            "long": memory,
            **host,
        }
        given.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
