"""Reads planned rows: locates, reads, decodes and crops their audio."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import math
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np

from data_pipeline.audio.augmentation import Augmenter
from data_pipeline.audio.codecs import Wave
from data_pipeline.audio.pcm import from_pcm16
from data_pipeline.audio.samples import open_sample
from data_pipeline.audio.transforms import change_speed
from data_pipeline.core.rng import keyed_rng
from data_pipeline.core.schema import ConfigError, hint
from data_pipeline.core.types import SAMPLE_RATE
from data_pipeline.images.decoding import ENDINGS
from data_pipeline.labels.store import LabelReader
from data_pipeline.loader.open_shards import open_files
from data_pipeline.loader.texts import SegmentTexts
from data_pipeline.sampling.config import DataConfig
from data_pipeline.shards.local import Array, Extent, ShardError, ShardFiles, ShardIndex
from data_pipeline.shards.records import done_records

TAR_BLOCK = 512
WAV_HEADER = 44
SEARCHED_SHARDS, SEARCHED_SAMPLES, SEARCHED_IMAGES = 8, 8, 64
"""Number of shards, and of samples of each, in which an unknown label is searched."""
TEXTS_READ_TOGETHER = 256
SAMPLE_FIELDS = ("corpus", "language", "speaker", "text", "file_id", "start", "split")
"""Labels that any data set may have; samples omit empty ones."""
ORIGIN: Final = ("speaker", "language", "corpus")
"""Columns of the index that every batch has as labels, for monitoring; reading them costs nothing."""
NOT_LABELS = {"key", "offset", "size", "payload_offset", "payload_size", "labels"}
"""Columns and fields about the shard, not the sample."""


@dataclass(frozen=True)
class SegmentRead:
    """A segment to read: `length` samples of row `row` in shard `shard`, for the `repeat`-th time in `epoch`."""

    shard: int
    row: int
    length: int
    repeat: int
    epoch: int
    seed: int

    def key_of_draw(self, key: str, purpose: str) -> tuple[int | str, ...]:
        """Returns the key of a random draw for this row: (seed, epoch, key), and the number of a repeat."""
        return (self.seed, self.epoch, key, purpose, *((self.repeat,) if self.repeat else ()))


@dataclass(frozen=True)
class Fetched:
    """A segment to decode: `source` samples from `start` on, of its n_samples, become `length` samples."""

    wanted: SegmentRead
    key: str
    shard: str
    extent: Extent
    """Bytes to read from the shard."""
    payload: slice
    """Position of the audio in these bytes."""
    start: int
    source: int
    length: int
    n_samples: int
    speed: float
    raw: bool
    """Whether the bytes are just the int16 samples of the crop."""
    data: bytes = b""
    labels: Mapping[str, str] = field(default_factory=dict)
    origin: Mapping[str, str] = field(default_factory=dict)
    """Labels by their names in `ORIGIN`, "" where they are unknown."""
    targets: Mapping[str, Array] = field(default_factory=dict)
    tokens: Mapping[str, Array] = field(default_factory=dict)
    image: bytes = b""
    """An image file; b"" if there is none, or it is not read."""

    def decode(self, out: Wave) -> None:
        """Writes the audio to `out`, (length,), in [-1, 1]. Raises ShardError."""
        if self.speed == 1:
            self._decode(out)
            return
        wave = np.empty(self.source, np.float32)
        self._decode(wave)
        out[:] = change_speed(wave, self.speed, self.length)

    def _decode(self, out: Wave) -> None:
        audio = memoryview(self.data)[self.payload]
        if self.raw:
            from_pcm16(audio, out)
            return
        try:
            with open_sample(audio) as sample:
                header, expected = (sample.rate, sample.channels, sample.frames), (SAMPLE_RATE, 1, self.n_samples)
                if header != expected:
                    raise ValueError(
                        f"cannot be decoded: (Hz, channels, samples) are {header}; its index has {expected}"
                    )
                got = len(sample.read(self.start, self.source, out))
            if got != self.source:
                raise ValueError(f"cannot be decoded: it ends after {self.start + got} of {self.n_samples} samples")
        except ValueError as error:
            raise ShardError(self.shard, f"sample {self.key} {error}") from None


class Fetcher:
    """Reads the bytes of planned rows, with the labels and targets of the config.

    Args:
        files: the shards.
        config: the run's `data`.
        augmenter: draws the speed of each segment.

    Raises:
        ConfigError: settings exclude each other.
    """

    def __init__(self, files: ShardFiles, config: DataConfig, augmenter: Augmenter) -> None:
        self.files, self.augmenter = files, augmenter
        self.texts = SegmentTexts(config)
        self.labels = self.texts.labels
        self.reads_images = config.images.size > 0
        self.targets = {name: LabelReader(root, files.shards.keep) for name, root in config.targets.items()}
        self.grid = math.lcm(*(labels.metadata.hop for labels in self.targets.values()))  # crops start at a label
        if self.targets and config.augment.speeds:
            raise ConfigError("data.augment.speeds would move the audio away from the frame labels of data.targets")

    def fetch(self, wanted: Sequence[SegmentRead]) -> list[Fetched | ShardError]:
        """Returns each segment, or the error of its shard. All reads are one call, so that they can overlap.

        Raises:
            StorageReadError: the storage does not answer.
        """
        located = [self._locate(each) for each in wanted]
        data = iter(self.files.read([found.extent for found in located if isinstance(found, Fetched)]))
        return [self._complete(found, next(data)) if isinstance(found, Fetched) else found for found in located]

    def _locate(self, wanted: SegmentRead) -> Fetched | ShardError:
        try:
            index = self.files.index(wanted.shard)
        except ShardError as error:
            return error
        key, n_samples = index.keys[wanted.row], int(index.n_samples[wanted.row])
        payload, size = int(index.payload_offset[wanted.row]), int(index.payload_size[wanted.row])
        speeds = self.augmenter.config.speeds
        speed = self.augmenter.speed(keyed_rng(*wanted.key_of_draw(key, "speed"))) if speeds else 1.0
        source = min(n_samples, round(wanted.length * speed))
        length, start = min(wanted.length, round(source / speed)), 0
        if source < n_samples:
            start = int(keyed_rng(*wanted.key_of_draw(key, "crop")).integers(0, n_samples - source + 1))
            start -= start % self.grid
        extent, inside, raw = Extent(wanted.shard, payload, size), slice(None), False
        if self.reads_images or _needs_json(index, self.labels):
            offset, whole = (int(index.table.column(name)[wanted.row].as_py()) for name in ("offset", "size"))
            extent, inside = Extent(wanted.shard, offset, whole), slice(payload - offset, payload - offset + size)
        elif index.wav[wanted.row] and size == WAV_HEADER + 2 * n_samples:
            extent, raw = Extent(wanted.shard, payload + WAV_HEADER + 2 * start, 2 * source), True
        return Fetched(
            wanted=wanted,
            key=key,
            shard=self.files.records[wanted.shard].shard,
            extent=extent,
            payload=inside,
            start=start,
            source=source,
            length=length,
            n_samples=n_samples,
            speed=speed,
            raw=raw,
        )

    def _complete(self, found: Fetched, data: bytes | ShardError) -> Fetched | ShardError:
        if isinstance(data, ShardError):
            return data
        wanted = found.wanted
        try:
            index = self.files.index(wanted.shard)
            is_whole = found.source == found.n_samples
            labels = self.texts.of_crop(labels_of(index, wanted.row, data, self.labels), found.key, is_whole)
            image = image_of(data) if self.reads_images and is_whole else b""
            targets = {
                name: targets.of(found.shard, index, wanted.row, found.start, found.length)
                for name, targets in self.targets.items()
            }
        except ShardError as error:
            return error
        except (tarfile.TarError, ValueError) as error:
            return ShardError(found.shard, f"the JSON of sample {found.key} cannot be used: {error}")
        columns = index.table.column_names
        return replace(
            found,
            data=data,
            labels=labels,
            origin={name: index.text(name, wanted.row) if name in columns else "" for name in ORIGIN},
            targets=targets,
            tokens=self.texts.encode(labels) | self.texts.draw_line(wanted.key_of_draw(found.key, "line")),
            image=image,
        )


def _needs_json(index: ShardIndex, labels: Sequence[str]) -> bool:
    return not index.has_all_labels and any(name not in index.table.column_names for name in labels)


def labels_of(index: ShardIndex, row: int, data: bytes, names: Sequence[str]) -> dict[str, str]:
    """Returns labels of one sample: columns of the index, fields of its JSON, or entries of the JSON's `labels`.

    Args:
        index: the shard's index.
        row: the sample's row in it.
        data: the bytes of the sample's members, if its JSON is needed.
        names: the labels to return; "" for labels that the sample lacks.

    Raises:
        ValueError: the JSON is missing or not an object.
        tarfile.TarError: the bytes are not members of a tar.
    """
    document = json_of(data) if names and _needs_json(index, names) else {}
    nested, columns = document.get("labels") or {}, index.table.column_names
    if not isinstance(nested, dict):
        raise ValueError("its field labels is not an object")
    return {
        name: index.text(name, row) if name in columns else _text(document.get(name, nested.get(name)))
        for name in names
    }


def check_labels(files: ShardFiles, names: Sequence[str]) -> None:
    """Raises ConfigError for names in `data.labels` that the data set does not seem to have.

    A name that is neither a column of the index nor a standard field is searched in samples of several shards.
    """
    good = [number for number in range(len(files.records)) if number not in files.bad]
    if not names or not good:
        return
    known = set(SAMPLE_FIELDS)
    if not all(name in known for name in names):
        for number in good[:: -(-len(good) // SEARCHED_SHARDS)]:
            known |= _label_names(files, number)
    for name in names:
        if name not in known:
            raise ConfigError(
                f"data.labels={name}: no sample has such a label{hint(name, known)}; "
                f"there are: {', '.join(sorted(known))}"
            )


def read_texts(shards: str, label: str) -> Iterator[str]:
    """Yields one label of every segment of a data set, "" where a segment has none; shards in order of their names.

    Raises:
        ValueError: shards or their JSON cannot be used.
        StorageReadError: the storage does not answer.
    """
    files = open_files(DataConfig(shards=(shards,)), done_records(shards))
    try:
        for bad in files.check():
            raise bad
        for number in range(len(files.records)):
            yield from texts_of_shard(files, number, label)
    finally:
        files.close()


def texts_of_shard(files: ShardFiles, number: int, label: str) -> Iterator[str]:
    """Yields one label of every segment of a shard, "" where a segment has none. Raises ShardError."""
    index = files.index(number)
    for first in range(0, len(index.keys), TEXTS_READ_TOGETHER):
        rows = range(first, min(first + TEXTS_READ_TOGETHER, len(index.keys)))
        extents = [_json_extent(index, number, row) for row in rows] if _needs_json(index, (label,)) else []
        data = files.read(extents) if extents else [b""] * len(rows)
        for row, content in zip(rows, data, strict=True):
            if isinstance(content, ShardError):
                raise content
            try:
                yield labels_of(index, row, content, (label,))[label]
            except (tarfile.TarError, ValueError) as error:
                shard = files.records[number].shard
                raise ShardError(shard, f"the JSON of sample {index.keys[row]} cannot be used: {error}") from None


def _json_extent(index: ShardIndex, number: int, row: int) -> Extent:
    """Returns the part of a sample after its audio, the JSON in our shards; members begin at multiples of 512."""
    end = int(index.payload_offset[row]) + int(index.payload_size[row])
    first, size = -(-end // TAR_BLOCK) * TAR_BLOCK, int(index.table.column("size")[row].as_py())
    return Extent(number, first, int(index.table.column("offset")[row].as_py()) + size - first)


def check_tokens(texts: SegmentTexts, some: Callable[[str], list[str]], say: Callable[[str], None]) -> None:
    """Compares the texts of some segments with the tokens.

    Args:
        texts: tokenizers of the run.
        some: returns a label of some segments.
        say: is called with a warning if more than a hundredth of the symbols has no token.

    Raises:
        ConfigError: no text has a token: the tokens are of another alphabet or language.
    """
    for name, tokenizer in texts.tokenizers.items():
        found = some(tokenizer.label)
        size = sum(len(text.split() if tokenizer.kind == "phones" else text) for text in found)
        foreign = sum(tokenizer.foreign(text) for text in found)
        if found and not any(tokenizer.encode(text) for text in found):
            raise ConfigError(
                f"data.tokens.{name}: none of {len(found)} texts has a token, such as {found[0][:60]!r}; make tokens "
                "of these shards with `auricle tokens`"
            )
        if foreign > 0.01 * size:
            say(f"data.tokens.{name}: {foreign / size:.1%} of the symbols of {len(found)} texts have no token")


def some_texts(files: ShardFiles, label: str) -> list[str]:
    """Returns a label of some segments of several shards, where they have it."""
    good = [number for number in range(len(files.records)) if number not in files.bad]
    return [text for number in good[:: -(-len(good) // SEARCHED_SHARDS)] for text in _texts_of(files, number, label)]


def _texts_of(files: ShardFiles, number: int, label: str) -> list[str]:
    with contextlib.suppress(ShardError):
        return [text for text in itertools.islice(texts_of_shard(files, number, label), SEARCHED_SAMPLES) if text]
    return []


def _label_names(files: ShardFiles, number: int) -> set[str]:
    """Returns the names of the labels of some samples of one shard, as far as they can be read."""
    found: set[str] = set()
    with contextlib.suppress(ShardError):
        index = files.index(number)
        found |= set(index.table.column_names)
        rows = range(0, len(index.keys), -(-len(index.keys) // SEARCHED_SAMPLES) or 1)
        columns = [index.table.column(name) for name in ("offset", "size")]
        extents = [Extent(number, *(int(column[row].as_py()) for column in columns)) for row in rows]
        for data in files.read([] if index.has_all_labels else extents):
            with contextlib.suppress(tarfile.TarError, ValueError):
                document = json_of(data) if isinstance(data, bytes) else {}
                nested = document.get("labels")
                found |= {*document, *(nested if isinstance(nested, dict) else ())}
    return found - NOT_LABELS


def _text(value: Any) -> str:
    return "" if value is None else str(value)


def image_of(data: bytes) -> bytes:
    """Returns the first image member of one sample's part of a tar; b"" without one. Raises tarfile.TarError."""
    with tarfile.open(fileobj=io.BytesIO(data + bytes(2 * TAR_BLOCK)), mode="r:") as members:
        for member in members:
            ending = member.name.rpartition(".")[2].lower()
            if ending in ENDINGS and member.isreg() and (file := members.extractfile(member)) is not None:
                return file.read()
    return b""


def check_images(files: ShardFiles, size: int) -> None:
    """Raises ConfigError if images are to be read (size > 0) and none of some samples has one."""
    good = [number for number in range(len(files.records)) if number not in files.bad]
    if not size or not good:
        return
    seen = 0
    for number in good[:: -(-len(good) // SEARCHED_SHARDS)]:
        with contextlib.suppress(ShardError, tarfile.TarError):
            index = files.index(number)
            columns = [index.table.column(name) for name in ("offset", "size")]
            rows = range(0, len(index.keys), -(-len(index.keys) // SEARCHED_IMAGES) or 1)
            for data in files.read([Extent(number, *(int(column[row].as_py()) for column in columns)) for row in rows]):
                seen += 1
                if isinstance(data, bytes) and image_of(data):
                    return
    if seen:
        raise ConfigError(
            f"data.images.size={size}: none of {seen} segments has an image; name images in the column image of the "
            "manifest that is preprocessed, or set data.images.size=0"
        )


def json_of(data: bytes) -> dict[str, Any]:
    """Returns the JSON member of one sample's part of a tar. Raises ValueError or tarfile.TarError."""
    with tarfile.open(fileobj=io.BytesIO(data + bytes(2 * TAR_BLOCK)), mode="r:") as members:
        for member in members:
            if member.name.endswith(".json") and member.isreg() and (file := members.extractfile(member)) is not None:
                try:
                    document = json.loads(file.read())
                except RecursionError:
                    raise ValueError("it is nested too deeply") from None
                if not isinstance(document, dict):
                    raise ValueError(f"it is a {type(document).__name__}, not an object")
                return document
    raise ValueError("the sample has none")
