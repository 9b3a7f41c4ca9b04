"""Compares readers of training data: auricle's and those of other libraries, on the same audio in one run.

    python benchmarks/reader.py --audio SPEECH/librispeech SPEECH/speechocean762      # default: AURICLE_SPEECH

Every reader gets the same FLAC bytes in its own container and the same number of worker processes, and delivers padded
float32 batches to the parent process. The bare loop only reads and decodes, in as many processes, and delivers nothing.
Rounds alternate between readers, since the machine may be shared; the table has medians over rounds. Libraries that are
not installed are named and left out.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import soundfile
import torch
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_pipeline.core.storage import FileStore
from data_pipeline.core.types import SAMPLE_RATE, Cursor, Segment
from data_pipeline.corpora.local_speech import speech_folder
from data_pipeline.loader.reader import PlanReader, open_reader
from data_pipeline.sampling.config import DataConfig
from data_pipeline.shards.records import DoneRecord
from data_pipeline.shards.writer import ShardWriter, commit
from launch.demo_corpus import synthesise
from pretrain.profiling.processor import model_name

BATCH_SECONDS = 100.0
MICRO_BATCHES = 8
Sound = tuple[str, bytes, int]
"""Key, FLAC bytes, samples."""


@dataclass
class Delivered:
    """A batch that reached the parent process: segments, samples without and with padding."""

    segments: int
    samples: int
    padded: int


@dataclass
class Result:
    """Medians over rounds of one reader."""

    name: str
    audio_per_second: list[float] = field(default_factory=list)
    audio_per_cpu_second: list[float] = field(default_factory=list)
    segments_per_second: list[float] = field(default_factory=list)
    padding: list[float] = field(default_factory=list)
    first_batch_s: list[float] = field(default_factory=list)
    resume_s: list[float] = field(default_factory=list)


def collect(folders: list[Path], copies: int) -> list[Sound]:
    """Returns all audio of 2 s to 15.6 s below the folders as FLAC, each file `copies` times."""
    found: list[Sound] = []
    for path in sorted(p for folder in folders for p in folder.rglob("*") if p.suffix in (".flac", ".opus", ".wav")):
        wave, rate = soundfile.read(path, dtype="int16", always_2d=True)
        if rate != SAMPLE_RATE or len(wave) < 2 * rate or len(wave) > 15.6 * rate:
            continue
        buffer = io.BytesIO()
        soundfile.write(buffer, wave[:, 0], rate, format="FLAC", subtype="PCM_16")
        found.append((f"{len(found):06d}", buffer.getvalue(), len(wave)))
    return [(f"{key}-{copy}", data, n) for copy in range(copies) for key, data, n in found]


def speech(folders: list[Path] | None, copies: int) -> list[Sound]:
    """Returns the audio of the given folders, else of AURICLE_SPEECH, else synthetic speech."""
    own = speech_folder()
    if folders or own:
        return collect(folders or [own], copies)
    with tempfile.TemporaryDirectory() as scratch:
        synthesise(Path(scratch))
        return collect([Path(scratch)], copies)


def write_ours(root: Path, sounds: list[Sound], shards: int) -> None:
    """Writes shards with auricle's writer; webdataset reads the same files."""
    store = FileStore(str(root))
    for number in range(shards):
        with tempfile.TemporaryDirectory(dir=root) as scratch:
            writer = ShardWriter(Path(scratch))
            for key, data, n in sounds[number::shards]:
                writer.add(
                    Segment(key, key, 0, length=n, sample_rate=SAMPLE_RATE, corpus="bench", language="en"),
                    "flac",
                    data,
                    n,
                )
            commit(
                store,
                writer,
                DoneRecord(f"unit{number:04d}", "", sha256="", bytes=0, index_sha256="", segments=0, samples=0),
            )


def bare_loop(root: Path, workers: int, seconds: float) -> tuple[int, int, float, float]:
    """Returns segments, samples, elapsed and CPU seconds of processes that read and decode and deliver nothing."""
    reader = open_ours(root, 0)
    files, catalogue = reader._files, reader.plan.catalogue
    places = [
        (str(root / catalogue.shards[s]), int(offset), int(size))
        for s in range(len(catalogue.shards))
        for offset, size in zip(files.index(s).payload_offset, files.index(s).payload_size, strict=True)
    ]
    reader.close()
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    begin = context.Barrier(workers + 1)

    def work(mine: list[tuple[str, int, int]]) -> None:
        torch.set_num_threads(1)
        handles = {path: os.open(path, os.O_RDONLY) for path, _, _ in mine}
        begin.wait()
        start, cpu, segments, samples = time.perf_counter(), time.process_time(), 0, 0
        for path, offset, size in itertools.cycle(mine):
            wave, _ = soundfile.read(io.BytesIO(os.pread(handles[path], size, offset)), dtype="float32")
            segments, samples = segments + 1, samples + len(wave)
            if time.perf_counter() - start > seconds:
                break
        results.put((segments, samples, time.perf_counter() - start, time.process_time() - cpu))

    processes = [context.Process(target=work, args=(places[i::workers],)) for i in range(workers)]
    for process in processes:
        process.start()
    begin.wait()
    parts = [results.get() for _ in processes]
    for process in processes:
        process.join()
    return sum(p[0] for p in parts), sum(p[1] for p in parts), max(p[2] for p in parts), sum(p[3] for p in parts)


def open_ours(root: Path, workers: int) -> PlanReader:
    """Opens auricle's reader with default settings, except for the batch size."""
    config = DataConfig(
        shards=str(root), batch_seconds=BATCH_SECONDS * MICRO_BATCHES, micro_batches=MICRO_BATCHES, workers=workers
    )
    return open_reader(config, 0, 0, 1)


def ours(root: Path, workers: int, resume: bool) -> Iterator[Delivered]:
    reader = open_ours(root, workers)
    middle = Cursor(reader.plan_hash, 3, reader.plan.layout(3).steps // 2)
    try:
        for step in reader.steps(middle if resume else None):
            for batch in step.batches:
                yield Delivered(len(batch.keys), int(batch.lengths_B.sum()), batch.wave_BT.numel())
    finally:
        reader.close()


def pad(waves: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    """Pads a batch, like a plain collate function."""
    out = torch.zeros(len(waves), max(map(len, waves)))
    for line, wave in zip(out, waves, strict=True):
        line[: len(wave)] = torch.from_numpy(wave)
    return out, torch.tensor([len(wave) for wave in waves])


def decode(data: bytes) -> np.ndarray:
    return soundfile.read(io.BytesIO(data), dtype="float32")[0]


def delivered(batch: tuple[torch.Tensor, torch.Tensor]) -> Delivered:
    return Delivered(len(batch[1]), int(batch[1].sum()), batch[0].numel())


def _decode_flac(key: str, data: bytes) -> np.ndarray | None:
    return decode(data) if key.endswith("flac") else None


def webdataset_stock(root: Path, workers: int, batch_size: int) -> Iterator[Delivered]:
    import webdataset

    tars = sorted(str(path) for path in root.glob("*.tar"))
    data = (
        webdataset.WebDataset(tars, shardshuffle=100, nodesplitter=None)
        .repeat()
        .shuffle(1000)
        .decode(_decode_flac)
        .to_tuple("flac")
        .batched(batch_size, collation_fn=lambda samples: pad([sample[0] for sample in samples]))
    )
    for batch in DataLoader(data, batch_size=None, num_workers=workers, prefetch_factor=4):
        yield delivered(batch)


def write_streaming(root: Path, sounds: list[Sound]) -> None:
    from streaming import MDSWriter

    with MDSWriter(out=str(root), columns={"audio": "bytes"}) as writer:
        for _, data, _ in sounds:
            writer.write({"audio": data})


def _collate_streaming(samples: list[dict[str, bytes]]) -> tuple[torch.Tensor, torch.Tensor]:
    return pad([decode(sample["audio"]) for sample in samples])


def mosaicml_streaming(root: Path, workers: int, batch_size: int, resume: bool) -> Iterator[Delivered]:
    from streaming import StreamingDataLoader, StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    clean_stale_shared_memory()
    data = StreamingDataset(local=str(root), shuffle=True, batch_size=batch_size)
    loader = StreamingDataLoader(
        data, batch_size=batch_size, num_workers=workers, collate_fn=_collate_streaming, prefetch_factor=4
    )
    if resume:
        state = data.state_dict(data.num_samples // 2, from_beginning=True)
        data.load_state_dict(state | {"epoch": 3})
    while True:
        for batch in loader:
            yield delivered(batch)


def write_lhotse(root: Path, sounds: list[Sound], shard_size: int) -> None:
    from lhotse import MonoCut, Recording
    from lhotse.shar import SharWriter

    with SharWriter(str(root), fields={"recording": "flac"}, shard_size=shard_size) as writer:
        for key, data, _ in sounds:
            recording = Recording.from_bytes(data, recording_id=key)
            writer.write(MonoCut(id=key, start=0, duration=recording.duration, channel=0, recording=recording))


class _PaddedCuts(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __getitem__(self, cuts: Any) -> tuple[torch.Tensor, torch.Tensor]:
        from lhotse.dataset.collation import collate_audio

        audio, lengths = collate_audio(cuts)
        return audio, lengths


def lhotse_bucketing(root: Path, workers: int) -> Iterator[Delivered]:
    from lhotse import CutSet
    from lhotse.dataset import DynamicBucketingSampler, IterableDatasetWrapper

    cuts = CutSet.from_shar(in_dir=str(root), shuffle_shards=True, seed=0, split_for_dataloading=True).repeat()
    sampler = DynamicBucketingSampler(
        cuts, max_duration=BATCH_SECONDS, num_buckets=30, shuffle=True, drop_last=False, rank=0, world_size=1,
        num_cuts_for_bins_estimate=3000, buffer_size=5000,
    )  # fmt: skip
    data = IterableDatasetWrapper(_PaddedCuts(), sampler)
    for batch in DataLoader(data, batch_size=None, num_workers=workers, prefetch_factor=4):
        yield delivered(batch)


def measure(make: Callable[[], Iterator[Delivered]], seconds: float) -> tuple[float, Delivered, float, float]:
    """Measures the time to the first batch, then the audio read in some seconds, wall and CPU (all processes)."""
    start = time.perf_counter()
    batches = make()
    next(batches)
    first = time.perf_counter() - start
    for _ in range(3 * MICRO_BATCHES):  # what was prefetched meanwhile
        next(batches)
    total, begin, cpu = Delivered(0, 0, 0), time.perf_counter(), _cpu_seconds()
    while time.perf_counter() - begin < seconds:
        batch = next(batches)
        total.segments += batch.segments
        total.samples += batch.samples
        total.padded += batch.padded
    wall, used = time.perf_counter() - begin, _cpu_seconds() - cpu
    batches.close()  # type: ignore[attr-defined]
    return first, total, wall, used


def _cpu_seconds() -> float:
    me = psutil.Process()
    times = [process.cpu_times() for process in (me, *me.children(recursive=True))]
    return sum(t.user + t.system for t in times)


def prepare(folder: Path, sounds: list[Sound], shards: int, workers: int) -> dict[str, Callable[[bool], Any]]:
    """Writes every container; name to a function (resume?) that opens the reader, or None where it cannot resume."""
    size = max(1, round(BATCH_SECONDS * SAMPLE_RATE / (sum(n for _, _, n in sounds) / len(sounds))))
    (folder / "ours").mkdir()
    write_ours(folder / "ours", sounds, shards)
    readers: dict[str, Callable[[bool], Any]] = {"auricle": lambda resume: ours(folder / "ours", workers, resume)}
    attempts: list[tuple[str, Callable[[], None], Callable[[bool], Any]]] = [
        ("webdataset", lambda: __import__("webdataset") and None,
         lambda resume: None if resume else webdataset_stock(folder / "ours", workers, size)),
        ("lhotse shar + dynamic bucketing", lambda: write_lhotse(folder / "shar", sounds, -(-len(sounds) // shards)),
         lambda resume: None if resume else lhotse_bucketing(folder / "shar", workers)),
        ("mosaicml-streaming", lambda: write_streaming(folder / "mds", sounds),
         lambda resume: mosaicml_streaming(folder / "mds", workers, size, resume)),
    ]  # fmt: skip
    for name, write, make in attempts:
        (folder / "shar").mkdir(exist_ok=True)
        try:
            write()
            readers[name] = make
        except ImportError as error:
            print(f"{name}: left out ({error})")
    return readers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--audio", type=Path, nargs="+", help="folders of speech (default: AURICLE_SPEECH, else synthetic speech)"
    )
    parser.add_argument("--copies", type=int, default=4)
    parser.add_argument("--shards", type=int, default=32)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=6.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the results there, too")
    arguments = parser.parse_args()
    sounds = speech(arguments.audio, arguments.copies)
    hours = sum(n for _, _, n in sounds) / SAMPLE_RATE / 3600
    about = (
        f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} x {model_name()}, load {os.getloadavg()[0]:.1f} at the start, "
        f"torch {torch.__version__}; {len(sounds)} segments, {hours:.1f} h in {arguments.shards} shards, "
        f"{arguments.workers} workers, micro-batches of {BATCH_SECONDS:g} s, {arguments.rounds} rounds of "
        f"{arguments.seconds:g} s"
    )
    print(about)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        readers = prepare(folder, sounds, arguments.shards, arguments.workers)
        results = {name: Result(name) for name in ("bare loop", *readers)}
        for _ in range(arguments.rounds):
            one_round(folder, readers, results, arguments.workers, arguments.seconds)
    print_table(results)
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"about": about, "results": [asdict(r) for r in results.values()]}, indent=1),
            encoding="utf-8",
        )


def one_round(
    folder: Path, readers: dict[str, Callable[[bool], Any]], results: dict[str, Result], workers: int, seconds: float
) -> None:
    segments, samples, wall, cpu = bare_loop(folder / "ours", workers, seconds)
    note(results["bare loop"], Delivered(segments, samples, samples), wall, cpu)
    for name, make in readers.items():
        first, total, wall, cpu = measure(lambda make=make: make(False), seconds)
        note(results[name], total, wall, cpu)
        results[name].first_batch_s.append(first)
        start, again = time.perf_counter(), make(True)
        if again is not None:
            next(again)
            results[name].resume_s.append(time.perf_counter() - start)
            again.close()


def note(result: Result, total: Delivered, wall: float, cpu: float) -> None:
    audio = total.samples / SAMPLE_RATE
    result.audio_per_second.append(audio / wall)
    result.audio_per_cpu_second.append(audio / max(cpu, 1e-9))
    result.segments_per_second.append(total.segments / wall)
    result.padding.append(1 - total.samples / total.padded)


def print_table(results: dict[str, Result]) -> None:
    """Prints medians, and ratios to the bare loop of the same round."""
    bare = results["bare loop"]
    print(
        f"{'reader':34}{'audio-s/s':>11}{'of bare':>9}{'segments/s':>12}{'audio-s/CPU-s':>15}{'of bare':>9}"
        f"{'padding':>9}{'first batch':>13}{'resume':>9}"
    )
    for result in results.values():
        times = [f"{statistics.median(t):.2f} s" if t else "-" for t in (result.first_batch_s, result.resume_s)]
        print(
            f"{result.name:34}{statistics.median(result.audio_per_second):11,.0f}"
            f"{_ratio(result.audio_per_second, bare.audio_per_second):9.2f}"
            f"{statistics.median(result.segments_per_second):12,.0f}"
            f"{statistics.median(result.audio_per_cpu_second):15,.0f}"
            f"{_ratio(result.audio_per_cpu_second, bare.audio_per_cpu_second):9.2f}"
            f"{statistics.median(result.padding):9.1%}{times[0]:>13}{times[1]:>9}"
        )


def _ratio(mine: list[float], base: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(mine, base, strict=True))


if __name__ == "__main__":
    main()
