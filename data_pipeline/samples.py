"""Planned rows to audio: find, read, decode, crop."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import soundfile

from data_pipeline.keyed_random import keyed_rng
from data_pipeline.shard_files import Extent, ShardError, ShardFiles, ShardIndex
from data_pipeline.types import SAMPLE_RATE

Wave = npt.NDArray[np.float32]
TAR_BLOCK = 512
WAV_HEADER = 44


@dataclass(frozen=True)
class Row:
    """A segment to read: `length` samples of row `row` in shard `shard`, for the `repeat`-th time in `epoch`."""

    shard: int
    row: int
    length: int
    repeat: int
    epoch: int
    seed: int

    def key_of_draw(self, key: str, purpose: str) -> tuple[int | str, ...]:
        """What random draws for this row are keyed by: (seed, epoch, key), and the repeat if it is one."""
        return (self.seed, self.epoch, key, purpose, *((self.repeat,) if self.repeat else ()))


@dataclass(frozen=True)
class Sample:
    """A segment that was read: wave is float32 in [-1, 1]; start: its first sample within the segment."""

    row: Row
    key: str
    wave: Wave
    start: int
    labels: dict[str, str]


@dataclass(frozen=True)
class _Found:
    row: Row
    key: str
    start: int
    length: int
    n_samples: int
    extent: Extent
    payload: slice
    """Where the audio lies in the extent."""
    raw: bool
    """The extent holds only the int16 samples of the crop."""


def read_samples(files: ShardFiles, rows: Sequence[Row], labels: tuple[str, ...] = ()) -> list[Sample | ShardError]:
    """Audio and labels of each row, or what was wrong with it."""
    found: list[_Found | ShardError] = []
    for row in rows:
        try:
            found.append(_find(files, row, labels))
        except ShardError as error:
            found.append(error)
    data = iter(files.read([f.extent for f in found if isinstance(f, _Found)]))
    samples: list[Sample | ShardError] = []
    for f in found:
        got = next(data) if isinstance(f, _Found) else f
        if isinstance(f, ShardError) or isinstance(got, ShardError):
            samples.append(f if isinstance(f, ShardError) else got)  # type: ignore[arg-type]
            continue
        try:
            wave = _decode(f, got)
            samples.append(Sample(f.row, f.key, wave, f.start, _labels(files, f, got, labels)))
        except (soundfile.SoundFileError, ValueError, tarfile.TarError) as error:
            shard = files.records[f.row.shard].shard
            samples.append(ShardError(shard, f"sample {f.key} cannot be decoded: {error}"))
    return samples


def _find(files: ShardFiles, row: Row, labels: tuple[str, ...]) -> _Found:
    index = files.index(row.shard)
    key, n_samples = index.text("key", row.row), int(index.n_samples[row.row])
    payload, size = int(index.payload_offset[row.row]), int(index.payload_size[row.row])
    length = min(row.length, n_samples)
    start = 0
    if length < n_samples:
        start = int(keyed_rng(*row.key_of_draw(key, "crop")).integers(0, n_samples - length + 1))
    if _needs_json(index, labels):
        offset, whole = (int(index.table.column(name)[row.row].as_py()) for name in ("offset", "size"))
        inside = slice(payload - offset, payload - offset + size)
        return _Found(row, key, start, length, n_samples, Extent(row.shard, offset, whole), inside, raw=False)
    if index.text("suffix", row.row) == "wav" and size == WAV_HEADER + 2 * n_samples:
        crop = Extent(row.shard, payload + WAV_HEADER + 2 * start, 2 * length)
        return _Found(row, key, start, length, n_samples, crop, slice(None), raw=True)
    return _Found(row, key, start, length, n_samples, Extent(row.shard, payload, size), slice(None), raw=False)


def _decode(found: _Found, data: bytes) -> Wave:
    if found.raw:
        return np.frombuffer(data, "<i2").astype(np.float32) * np.float32(1 / 32768)
    with soundfile.SoundFile(io.BytesIO(data[found.payload])) as file:
        header, expected = (file.samplerate, file.channels, file.frames), (SAMPLE_RATE, 1, found.n_samples)
        if header != expected:
            raise ValueError(f"it holds (Hz, channels, samples) {header}, its index says {expected}")
        if found.start:
            file.seek(found.start)
        wave: Wave = file.read(found.length, dtype="float32")
    if len(wave) != found.length:
        raise ValueError(f"it ends after {found.start + len(wave)} of {found.n_samples} samples")
    return wave


def _needs_json(index: ShardIndex, labels: tuple[str, ...]) -> bool:
    return any(name not in index.table.column_names for name in labels)


def _labels(files: ShardFiles, found: _Found, data: bytes, names: tuple[str, ...]) -> dict[str, str]:
    """Columns of the index, and whatever else is asked for from the sample's JSON or the `labels` inside it."""
    index = files.index(found.row.shard)
    document: dict[str, Any] = _json_of(data) if _needs_json(index, names) else {}
    nested = document.get("labels") or {}
    columns = index.table.column_names
    return {
        name: index.text(name, found.row.row) if name in columns else str(document.get(name, nested.get(name, "")))
        for name in names
    }


def _json_of(data: bytes) -> dict[str, Any]:
    """The JSON member of one sample's stretch of a tar."""
    with tarfile.open(fileobj=io.BytesIO(data + bytes(2 * TAR_BLOCK)), mode="r:") as members:
        for member in members:
            if member.name.endswith(".json") and (file := members.extractfile(member)) is not None:
                document: dict[str, Any] = json.loads(file.read())
                return document
    raise ValueError("it has no JSON member")
