"""Recordings that are there twice: the same samples, or the same sound at another gain, codec or offset.

Near-duplicates are found by spectral fingerprints after Haitsma & Kalker (2002): each bit says whether the energy
difference of two neighbouring bands grew or fell, which neither gain nor a codec changes much. Of the fingerprints only
those are kept whose hash falls below a bound, the same ones in every copy; recordings that share several of them at one
offset are compared no further.
"""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import soxr

from data_pipeline import audio
from data_pipeline.files import FileStore
from data_pipeline.preprocess_config import DedupConfig
from data_pipeline.types import SAMPLE_RATE, AudioFile
from data_pipeline.units import Dropped

Prints = npt.NDArray[np.uint32]
RATE: Final = 4_000
FRAME: Final = 1_024
HOP: Final = 64
BITS: Final = 20
KEEP: Final = 4
"""One fingerprint in so many is kept."""
MOST_COMMON: Final = 200
"""A fingerprint of more recordings than this says nothing about them."""
SCAN_SCHEMA: Final = pa.schema(
    [
        *((name, pa.string()) for name in ("corpus", "file_id", "mtime", "pcm")),
        ("size", pa.int64()),
        ("prints", pa.list_(pa.uint32())),
        ("frames", pa.list_(pa.uint32())),
    ]
)


class Fingerprinter:
    """Collects the fingerprints of one recording block by block."""

    def __init__(self) -> None:
        self._down = soxr.ResampleStream(SAMPLE_RATE, RATE, 1, dtype="float32", quality="MQ")
        self._held = np.zeros(0, np.float32)
        self._before: npt.NDArray[np.float32] | None = None
        self._number = 0
        self._prints: list[Prints] = []
        self._frames: list[Prints] = []
        edges = np.geomspace(300, 1_900, BITS + 2) * FRAME / RATE
        self._edges = np.round(edges).astype(int)
        self._window = np.hanning(FRAME).astype(np.float32)

    def feed(self, block: audio.Wave) -> None:
        """A block at 16 kHz."""
        self._held = np.concatenate([self._held, self._down.resample_chunk(block)])
        count = (len(self._held) - FRAME) // HOP + 1
        if count <= 0:
            return
        frames = np.lib.stride_tricks.sliding_window_view(self._held, FRAME)[: count * HOP : HOP]
        power = np.abs(np.fft.rfft(frames * self._window, axis=1)).astype(np.float32) ** 2
        bands = np.add.reduceat(power, self._edges, axis=1)[:, :-1]
        slope = np.diff(bands, axis=1)
        slope = slope if self._before is None else np.concatenate([self._before, slope])
        bits = np.diff(slope, axis=0) > 0
        prints = (bits[:, :BITS] << np.arange(BITS)).sum(axis=1).astype(np.uint32)
        loud = bands.sum(axis=1)[-len(prints) :] > 1e-6 if len(prints) else np.zeros(0, bool)
        numbers = np.arange(self._number, self._number + len(prints), dtype=np.uint32)
        # Knuth's multiplicative hash spreads neighbouring values
        chosen = loud & ((prints * np.uint32(2654435761)) >> np.uint32(32 - 8) < 256 // KEEP)
        self._prints.append(prints[chosen])
        self._frames.append(numbers[chosen])
        self._number += len(prints)
        self._before = slope[-1:]
        self._held = self._held[count * HOP :]

    def finish(self) -> tuple[Prints, Prints]:
        """(fingerprints, the frames that they stand at)."""
        if not self._prints:
            return np.zeros(0, np.uint32), np.zeros(0, np.uint32)
        return np.concatenate(self._prints), np.concatenate(self._frames)


def scan(files: Sequence[AudioFile], near: bool, out: str) -> str:
    """Writes hash and fingerprints of the files to `_scan/<name>.parquet` once; the name. Files that fail are left to
    the unit that will process them.
    """
    store = FileStore(out)
    name = scan_name(files, near)
    if store.exists(f"_scan/{name}"):
        return name
    rows = []
    for file in files:
        digest, prints = hashlib.sha256(), Fingerprinter()
        try:
            with audio.local_copy(file.path) as path:
                for block in audio.decode(path, SAMPLE_RATE):
                    digest.update(audio.to_int16(block).tobytes())
                    if near:
                        prints.feed(block)
        except audio.AudioError:
            continue
        values, frames = prints.finish()
        row = {"corpus": file.corpus, "file_id": file.file_id, "mtime": file.mtime, "size": file.size}
        rows.append({**row, "pcm": digest.hexdigest(), "prints": values, "frames": frames})
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=SCAN_SCHEMA), buffer, compression="zstd")
    store.create(f"_scan/{name}", buffer.getvalue())
    return name


def scan_name(files: Iterable[AudioFile], near: bool) -> str:
    """Of the scan of these files."""
    sources = [f"{file.corpus}\x1f{file.file_id}\x1f{file.size}\x1f{file.mtime}" for file in files]
    text = "\x1e".join([f"near={near}", *sources]).encode("utf-8", "surrogateescape")
    return hashlib.sha256(text).hexdigest()[:16] + ".parquet"


def find_doubles(
    out: str, config: DedupConfig, fresh: Sequence[AudioFile], older: set[tuple[str, str]]
) -> list[Dropped]:
    """Which of the `fresh` recordings, all scanned, to leave out. Of each group one stays: an `older` one (in a unit
    already) if there is one, otherwise the first by name.
    """
    store, new = FileStore(out), {(file.corpus, file.file_id): file for file in fresh}
    tables = [pq.read_table(io.BytesIO(store.read(f"_scan/{name}"))) for name in store.names("_scan", ".parquet")]
    if not tables:
        return []
    table = pa.concat_tables(tables)
    ids = list(zip(table["corpus"].to_pylist(), table["file_id"].to_pylist(), strict=True))
    # scans of earlier jobs may hold recordings that are in no unit, or one recording twice
    wanted = list({name: number for number, name in enumerate(ids) if name in older or name in new}.values())
    table, ids = table.take(wanted), [ids[number] for number in wanted]
    rank = sorted(range(len(ids)), key=lambda number: (ids[number] not in older, ids[number]))
    place = {number: position for position, number in enumerate(rank)}
    doubles: dict[int, tuple[str, int]] = {}
    if config.exact:
        first: dict[str, int] = {}
        pcm = table["pcm"].to_pylist()
        for number in rank:
            if (kept := first.setdefault(pcm[number], number)) != number:
                doubles[number] = ("exact", kept)
    if config.near:
        for pair in sorted(near_pairs(table, config), key=lambda pair: sorted(place[number] for number in pair)):
            kept, left_out = sorted(pair, key=place.__getitem__)
            if left_out not in doubles and kept not in doubles:
                doubles[left_out] = ("near", kept)
    return [
        Dropped(new[ids[number]], reason, "/".join(ids[kept]))
        for number, (reason, kept) in sorted(doubles.items())
        if ids[number] in new
    ]


def near_pairs(table: Any, config: DedupConfig) -> Iterator[tuple[int, int]]:
    """Pairs of rows that share fingerprints at one offset."""
    counts = np.array([len(prints) for prints in table["prints"].to_pylist()])
    if not counts.sum():
        return
    prints = table["prints"].combine_chunks().flatten().to_numpy()
    frames = table["frames"].combine_chunks().flatten().to_numpy().astype(np.int64)
    owner = np.repeat(np.arange(len(counts)), counts)
    order = np.argsort(prints, kind="stable")
    prints, frames, owner = prints[order], frames[order], owner[order]
    starts = np.flatnonzero(np.diff(prints, prepend=prints[0] - 1 if prints[0] else 1))
    ends = np.append(starts[1:], len(prints))
    votes: Counter[tuple[int, int, int]] = Counter()
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        if not 2 <= end - start <= MOST_COMMON:
            continue
        owners, places = owner[start:end], frames[start:end]
        left, right = np.triu_indices(end - start, 1)
        different = owners[left] != owners[right]
        pairs = np.stack([owners[left], owners[right], places[right] - places[left]], axis=1)[different]
        votes.update(map(tuple, pairs.tolist()))
    best: Counter[tuple[int, int]] = Counter()
    for (one, other, shift), count in votes.items():
        # a frame's neighbour offset counts too: copies need not be cut at whole frames
        best[one, other] = max(best[one, other], count + votes.get((one, other, shift + 1), 0))
    for (one, other), count in best.items():
        if count >= config.min_matches and count >= config.min_share * min(counts[one], counts[other]):
            yield one, other
