"""Planned rows to audio: find, read, decode, crop."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
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
class Fetched:
    """The bytes of a segment, not yet decoded. length, start: what is wanted of its n_samples."""

    row: Row
    key: str
    start: int
    length: int
    n_samples: int
    labels: Mapping[str, str]
    data: memoryview
    raw: bool
    """`data` is nothing but the crop's int16 samples."""
    shard: str

    def decode(self, out: Wave) -> None:
        """Writes the audio to `out`, (length,), in [-1, 1]. Raises ShardError."""
        if self.raw:
            np.multiply(np.frombuffer(self.data, "<i2"), np.float32(1 / 32768), out=out)
            return
        try:
            with soundfile.SoundFile(io.BytesIO(self.data)) as file:
                header, expected = (file.samplerate, file.channels, file.frames), (SAMPLE_RATE, 1, self.n_samples)
                if header != expected:
                    raise ValueError(f"it holds (Hz, channels, samples) {header}, its index says {expected}")
                if self.start:
                    file.seek(self.start)
                got = len(file.read(self.length, dtype="float32", out=out))
            if got != self.length:
                raise ValueError(f"it ends after {self.start + got} of {self.n_samples} samples")
        except (soundfile.SoundFileError, ValueError) as error:
            raise ShardError(self.shard, f"sample {self.key} cannot be decoded: {error}") from None


@dataclass(frozen=True)
class _Place:
    extent: Extent
    payload: slice
    """Where the audio lies in the extent."""
    key: str
    start: int
    length: int
    n_samples: int
    raw: bool


def fetch(files: ShardFiles, rows: Sequence[Row], labels: tuple[str, ...] = ()) -> list[Fetched | ShardError]:
    """Bytes and labels of each row, or what was wrong with it. All is read in one call, so that it can overlap."""
    places: list[_Place | ShardError] = []
    for row in rows:
        try:
            places.append(_locate(files, row, labels))
        except ShardError as error:
            places.append(error)
    found = iter(files.read([place.extent for place in places if isinstance(place, _Place)]))
    fetched: list[Fetched | ShardError] = []
    for row, place in zip(rows, places, strict=True):
        data = next(found) if isinstance(place, _Place) else place
        if isinstance(place, ShardError) or isinstance(data, ShardError):
            fetched.append(place if isinstance(place, ShardError) else data)  # type: ignore[arg-type]
            continue
        shard = files.records[row.shard].shard
        try:
            named = _labels(files.index(row.shard), row.row, data, labels)
        except (tarfile.TarError, ValueError) as error:
            fetched.append(ShardError(shard, f"the JSON of sample {place.key} cannot be read: {error}"))
            continue
        payload = memoryview(data)[place.payload]
        numbers = (place.start, place.length, place.n_samples)
        fetched.append(Fetched(row, place.key, *numbers, named, payload, place.raw, shard))
    return fetched


def _locate(files: ShardFiles, row: Row, labels: tuple[str, ...]) -> _Place:
    index = files.index(row.shard)
    key, n_samples = index.text("key", row.row), int(index.n_samples[row.row])
    payload, size = int(index.payload_offset[row.row]), int(index.payload_size[row.row])
    length, start = min(row.length, n_samples), 0
    if length < n_samples:
        start = int(keyed_rng(*row.key_of_draw(key, "crop")).integers(0, n_samples - length + 1))
    extent, inside, raw = Extent(row.shard, payload, size), slice(None), False
    if _needs_json(index, labels):
        offset, whole = (int(index.table.column(name)[row.row].as_py()) for name in ("offset", "size"))
        extent, inside = Extent(row.shard, offset, whole), slice(payload - offset, payload - offset + size)
    elif index.text("suffix", row.row) == "wav" and size == WAV_HEADER + 2 * n_samples:
        extent, raw = Extent(row.shard, payload + WAV_HEADER + 2 * start, 2 * length), True
    return _Place(extent, inside, key, start, length, n_samples, raw)


def _needs_json(index: ShardIndex, labels: tuple[str, ...]) -> bool:
    return any(name not in index.table.column_names for name in labels)


def _labels(index: ShardIndex, row: int, data: bytes, names: tuple[str, ...]) -> dict[str, str]:
    """Columns of the index, and whatever else is asked for from the sample's JSON or the `labels` inside it."""
    document: dict[str, Any] = _json_of(data) if _needs_json(index, names) else {}
    nested, columns = document.get("labels") or {}, index.table.column_names
    return {
        name: index.text(name, row) if name in columns else str(document.get(name, nested.get(name, "")))
        for name in names
    }


def _json_of(data: bytes) -> dict[str, Any]:
    """The JSON member of one sample's stretch of a tar."""
    with tarfile.open(fileobj=io.BytesIO(data + bytes(2 * TAR_BLOCK)), mode="r:") as members:
        for member in members:
            if member.name.endswith(".json") and (file := members.extractfile(member)) is not None:
                document: dict[str, Any] = json.loads(file.read())
                return document
    raise ValueError("there is none")
