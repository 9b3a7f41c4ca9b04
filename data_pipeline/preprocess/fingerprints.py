"""Finds duplicate recordings: the same samples, or the same audio with another gain, codec or offset.

Near-duplicates are found by spectral fingerprints after Haitsma & Kalker (2002): each bit is the sign of the change of
the energy difference of two neighbouring bands, which gain and codecs hardly affect. A key combines the bits of two
frames a quarter of a second apart to 40 bits, so that unrelated recordings share almost none in corpora of any size.
Only keys with a hash below a bound are kept, which are the same in every copy; duplicate_search.py finds recordings
that share keys.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import soxr

from data_pipeline.audio import codecs
from data_pipeline.audio.time_ranges import decode_part
from data_pipeline.core.storage import FileStore
from data_pipeline.core.types import SAMPLE_RATE, AudioFile
from data_pipeline.corpora.recordings import Recordings, file_of
from data_pipeline.corpora.records import RecordingId
from data_pipeline.preprocess.duplicate_search import DedupConfig, equal_hashes, shared_prints
from data_pipeline.preprocess.plan_file import Dropped
from data_pipeline.preprocess.scans import rank, short_hash

Keys = npt.NDArray[np.uint64]
Frames = npt.NDArray[np.uint32]
RATE: Final = 4_000
FRAME: Final = 1_024
HOP: Final = 64
BITS: Final = 20
APART: Final = 16
"""Frames between the two halves of a key."""
KEEP: Final = 2
"""Inverse share of the keys that are kept."""
SCAN_SCHEMA: Final = pa.schema(
    [
        *((name, pa.string()) for name in ("corpus", "file_id", "mtime", "pcm")),
        ("size", pa.int64()),
        ("samples", pa.int64()),
        ("prints", pa.list_(pa.uint64())),
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
        self._bits = np.zeros(0, np.uint64)
        self._loud = np.zeros(0, bool)
        self._keys: list[Keys] = []
        self._frames: list[Frames] = []
        edges = np.geomspace(300, 1_900, BITS + 2) * FRAME / RATE
        self._edges = np.round(edges).astype(int)
        self._window = np.hanning(FRAME).astype(np.float32)

    def feed(self, block: codecs.Wave) -> None:
        """Adds a block of samples at 16 kHz."""
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
        words = (bits[:, :BITS] << np.arange(BITS)).sum(axis=1).astype(np.uint64)
        self._bits = np.concatenate([self._bits, words])
        self._loud = np.concatenate([self._loud, bands.sum(axis=1)[-len(words) :] > 1e-6]) if len(words) else self._loud
        self._join()
        self._before = slope[-1:]
        self._held = self._held[count * HOP :]

    def _join(self) -> None:
        """Computes the keys of all frames whose second frame is available."""
        count = len(self._bits) - APART
        if count <= 0:
            return
        keys = self._bits[:count] | self._bits[APART:] << np.uint64(BITS)
        # the multiplicative hash (Knuth) spreads neighbouring values
        chosen = (keys * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(32) < (1 << 32) // KEEP
        chosen &= self._loud[:count] & self._loud[APART:]
        self._keys.append(keys[chosen])
        self._frames.append(np.arange(self._number, self._number + count, dtype=np.uint32)[chosen])
        self._number += count
        self._bits, self._loud = self._bits[count:], self._loud[count:]

    def finish(self) -> tuple[Keys, Frames]:
        """Returns the keys and the frames at which they begin."""
        if not self._keys:
            return np.zeros(0, np.uint64), np.zeros(0, np.uint32)
        return np.concatenate(self._keys), np.concatenate(self._frames)


def scan(files: Sequence[AudioFile], near: bool, out: str) -> str:
    """Writes hashes and fingerprints of recordings to `_scan/`, if they are missing; returns the file's name.

    Unreadable recordings are skipped; the unit that processes them rejects them.
    """
    store = FileStore(out)
    name = scan_name(files, near)
    if before := store.names("_scan", ".parquet", prefix=name):
        return before[0]
    rows = []
    for file in files:
        digest, prints, samples = hashlib.sha256(), Fingerprinter(), 0
        try:
            with codecs.local_copy(file.path) as path:
                for block in decode_part(path, file.part):
                    digest.update(codecs.to_int16(block).data)
                    samples += len(block)
                    if near:
                        prints.feed(block)
        except codecs.AudioError:
            continue
        values, frames = prints.finish()
        row = {"corpus": file.corpus, "file_id": file.file_id, "mtime": file.mtime, "size": file.size}
        rows.append({**row, "pcm": digest.hexdigest(), "samples": samples, "prints": values, "frames": frames})
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=SCAN_SCHEMA), buffer, compression="zstd")
    whole = f"{name}-{short_hash(buffer.getvalue())}.parquet"
    store.create(f"_scan/{whole}", buffer.getvalue())
    return whole


def scan_name(files: Iterable[AudioFile], near: bool) -> str:
    """Returns the prefix of the name of the scan of these files, which the hash of its content follows."""
    sources = [f"{file.corpus}\x1f{file.file_id}\x1f{file.size}\x1f{file.mtime}" for file in files]
    text = "\x1e".join([f"near={near}", *sources]).encode("utf-8", "surrogateescape")
    return hashlib.sha256(text).hexdigest()[:16]


def find_duplicates(out: str, config: DedupConfig, fresh: Recordings, older: Iterable[RecordingId]) -> list[Dropped]:
    """Finds the duplicates among new recordings. Of each group an older recording or else the first by name is kept.

    Names, fingerprints and hashes are sorted on disk; found duplicates, and a few numbers of each recording, are in
    memory.

    Args:
        out: the data set, with the fingerprints of all recordings in `_scan`.
        config: kinds of duplicates and thresholds.
        fresh: the new recordings.
        older: the recordings that are already in a unit.

    Returns:
        The duplicates.

    Raises:
        OSError: a scan is damaged.
    """
    store, found = FileStore(out), dict[int, _Duplicate]()
    scans = rank(store, fresh, older)
    with store.scratch() as folder:
        if config.exact:
            for other, one in equal_hashes(scans.tables(["pcm"]), scans.recordings, folder):
                found[other] = _Duplicate("exact", one)
        if config.near:
            matches = shared_prints(scans.tables(["prints", "frames"]), scans.recordings, config, folder)
            for match in sorted(matches, key=lambda match: (match.one, match.other)):
                if match.other not in found and match.one not in found:
                    offset = -match.shift * HOP / RATE
                    found[match.other] = _Duplicate("near", match.one, match.share, offset)
    names = scans.names({*found, *(duplicate.kept for duplicate in found.values())})
    lengths = scans.lengths(found.keys())
    wanted = {names[number] for number in found}
    files = {key: file_of(row) for row in fresh if (key := (row.corpus, row.file_id)) in wanted}
    return [
        Dropped(
            file=files[names[number]],
            reason=duplicate.reason,
            same_as="/".join(names[duplicate.kept]),
            share=duplicate.share,
            offset_seconds=duplicate.offset_seconds,
            samples=lengths.get(number, 0),
        )
        for number, duplicate in sorted(found.items())
        if names[number] in files
    ]


@dataclass(frozen=True)
class _Duplicate:
    reason: str
    kept: int
    """Number of the recording that is kept."""
    share: float = 1.0
    offset_seconds: float = 0.0
