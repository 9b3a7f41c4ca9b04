"""Planned rows to audio: find, read, decode, crop."""

from __future__ import annotations

import io
import json
import math
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import soundfile

from data_pipeline.audio.augmentation import Augmenter
from data_pipeline.audio.codecs import Wave
from data_pipeline.audio.transforms import change_speed
from data_pipeline.core.rng import keyed_rng
from data_pipeline.core.schema import ConfigError
from data_pipeline.core.types import SAMPLE_RATE
from data_pipeline.labels.store import FrameLabels
from data_pipeline.sampling.config import DataConfig
from data_pipeline.shards.local import Array, Extent, ShardError, ShardFiles, ShardIndex

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
    """The bytes of a segment, not yet decoded: `source` of its n_samples from `start` on become `length` samples."""

    row: Row
    key: str
    start: int
    source: int
    length: int
    n_samples: int
    speed: float
    raw: bool
    """`data` is nothing but the crop's int16 samples."""
    data: memoryview
    shard: str
    labels: Mapping[str, str]
    targets: Mapping[str, Array]

    def decode(self, out: Wave) -> None:
        """Writes the audio to `out`, (length,), in [-1, 1]. Raises ShardError."""
        if self.speed == 1:
            self._decode(out)
            return
        wave = np.empty(self.source, np.float32)
        self._decode(wave)
        out[:] = change_speed(wave, self.speed, self.length)

    def _decode(self, out: Wave) -> None:
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
                got = len(file.read(self.source, dtype="float32", out=out))
            if got != self.source:
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
    source: int
    length: int
    n_samples: int
    speed: float
    raw: bool


class Fetcher:
    """Rows to bytes, with what else the config asks for. Raises ConfigError for wishes that exclude each other."""

    def __init__(self, files: ShardFiles, config: DataConfig, augmenter: Augmenter) -> None:
        self.files, self.labels, self.augmenter = files, config.labels, augmenter
        self.targets = {name: FrameLabels(root, files.keep) for name, root in config.targets.items()}
        self.grid = math.lcm(*(labels.set.hop for labels in self.targets.values()))  # crops start on a label
        if self.targets and config.augment.speeds:
            raise ConfigError("data.augment.speeds would move the audio away from the frame labels of data.targets")

    def fetch(self, rows: Sequence[Row]) -> list[Fetched | ShardError]:
        """Bytes of each row, or what was wrong with it. All is read in one call, so that it can overlap."""
        places: list[_Place | ShardError] = []
        for row in rows:
            try:
                places.append(self._locate(row))
            except ShardError as error:
                places.append(error)
        found = iter(self.files.read([place.extent for place in places if isinstance(place, _Place)]))
        fetched: list[Fetched | ShardError] = []
        for row, place in zip(rows, places, strict=True):
            data = next(found) if isinstance(place, _Place) else place
            if isinstance(place, ShardError) or isinstance(data, ShardError):
                fetched.append(place if isinstance(place, ShardError) else data)  # type: ignore[arg-type]
                continue
            try:
                fetched.append(self._with_labels(row, place, data))
            except ShardError as error:
                fetched.append(error)
        return fetched

    def _with_labels(self, row: Row, place: _Place, data: bytes) -> Fetched:
        shard, index = self.files.records[row.shard].shard, self.files.index(row.shard)
        try:
            named = _labels(index, row.row, data, self.labels)
        except (tarfile.TarError, ValueError) as error:
            raise ShardError(shard, f"the JSON of sample {place.key} cannot be read: {error}") from None
        targets = {
            name: labels.of(shard, index, row.row, place.start, place.length) for name, labels in self.targets.items()
        }
        return Fetched(
            row, place.key, place.start, place.source, place.length, place.n_samples, place.speed, place.raw,
            memoryview(data)[place.payload], shard, named, targets,
        )  # fmt: skip

    def _locate(self, row: Row) -> _Place:
        index = self.files.index(row.shard)
        key, n_samples = index.keys[row.row], int(index.n_samples[row.row])
        payload, size = int(index.payload_offset[row.row]), int(index.payload_size[row.row])
        speed = self.augmenter.speed(keyed_rng(*row.key_of_draw(key, "speed"))) if self.augmenter.config.speeds else 1.0
        source = min(n_samples, round(row.length * speed))
        length, start = min(row.length, round(source / speed)), 0
        if source < n_samples:
            start = int(keyed_rng(*row.key_of_draw(key, "crop")).integers(0, n_samples - source + 1))
            start -= start % self.grid
        extent, inside, raw = Extent(row.shard, payload, size), slice(None), False
        if _needs_json(index, self.labels):
            offset, whole = (int(index.table.column(name)[row.row].as_py()) for name in ("offset", "size"))
            extent, inside = Extent(row.shard, offset, whole), slice(payload - offset, payload - offset + size)
        elif index.wav[row.row] and size == WAV_HEADER + 2 * n_samples:
            extent, raw = Extent(row.shard, payload + WAV_HEADER + 2 * start, 2 * source), True
        return _Place(extent, inside, key, start, source, length, n_samples, speed, raw)


def _needs_json(index: ShardIndex, labels: tuple[str, ...]) -> bool:
    return any(name not in index.table.column_names for name in labels)


def _labels(index: ShardIndex, row: int, data: bytes, names: tuple[str, ...]) -> dict[str, str]:
    """Columns of the index, and whatever else is asked for from the sample's JSON or the `labels` inside it."""
    if not names:
        return {}
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
