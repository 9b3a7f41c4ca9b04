"""Indexes WebDataset tars of other writers, without changing them, so that they are read like auricle's own shards.

Every 16 kHz mono audio member (FLAC, WAV, Opus, Vorbis or MP3) becomes a segment. Its labels are the fields of the JSON
member and the text of the .txt member of its sample. They become columns of the index, so that reading does not parse
them again. Unusable members are listed in `_rejects/<tar>.jsonl` with a reason.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import io
import json
import multiprocessing
import os
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import IO, Annotated, Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.audio.errors import AudioError
from data_pipeline.audio.samples import open_sample
from data_pipeline.core.retries import retry
from data_pipeline.core.schema import ConfigError, about, config
from data_pipeline.core.storage import FileStore, is_plain_name
from data_pipeline.core.tar_samples import MOST_LABEL_BYTES, UnusableError, member_labels
from data_pipeline.core.types import SAMPLE_RATE
from data_pipeline.shards.index_rows import MOST_NAMES, MOST_SAMPLES, validate_index
from data_pipeline.shards.local import LABELS_IN_COLUMNS
from data_pipeline.shards.places import remember
from data_pipeline.shards.records import INDEX_SCHEMA, DoneRecord, index_name, rejects_name

READABLE: Final = ("flac", "wav", "opus", "ogg", "mp3")
"""Endings of audio members."""
MOST_AUDIO_BYTES: Final = 1 << 31
WAV_HEADER: Final = 44
CHUNK: Final = 1 << 20


@config
class IndexConfig:
    """Configuration of the indexing of existing tars."""

    tars: Annotated[str, about("folder or fsspec URL of the tars", min_length=1)]
    index_out: Annotated[str, about("folder or URL for the index; empty: the folder of the tars")] = ""
    corpus: Annotated[str, about("corpus of samples without one in their JSON; empty: the folder's name")] = ""
    language: Annotated[str, about("language of samples without one in their JSON")] = ""
    decode: Annotated[bool, about("decode every member to its end; false: trust the headers")] = True
    workers: Annotated[int, about("number of processes; 0: one per core", ge=0)] = 0


@dataclass
class IndexSummary:
    """Result of `index_tars`."""

    tars: int = 0
    """Number of indexed tars."""
    already: int = 0
    """Number of these that were indexed before."""
    segments: int = 0
    samples: int = 0
    rejects: Counter[str] = field(default_factory=Counter)
    """Number of rejected members and samples, by reason."""

    def add(self, record: DoneRecord, already: bool) -> None:
        """Adds one tar."""
        self.tars += 1
        self.already += already
        self.segments += record.segments
        self.samples += record.samples
        self.rejects.update(record.rejects)


def index_tars(config: IndexConfig, advance: Callable[[], None] = lambda: None) -> IndexSummary:
    """Indexes the tars of a folder; skips tars that were indexed before and have the same size.

    Args:
        config: folders of the tars and of the index.
        advance: called after each tar.

    Returns:
        Counts over all tars.

    Raises:
        ConfigError: there are no tars, or other files are in the place of the index.
        StorageError: the tars cannot be read, or the index cannot be written.
    """
    source = FileStore(config.tars)
    names = source.names("", ".tar")
    if not names:
        raise ConfigError(f"{config.tars}: holds no .tar files; give the folder that holds them")
    if location := _location(config):
        remember(location)
    summary, todo = IndexSummary(), []
    for name in names:
        record = _finished(config, source, name)
        if record is None:
            todo.append(name)
        else:
            summary.add(record, already=True)
            advance()
    for record in _each(config, todo):
        summary.add(record, already=False)
        advance()
    return summary


def _each(config: IndexConfig, names: Sequence[str]) -> Iterator[DoneRecord]:
    workers = min(config.workers or os.cpu_count() or 1, len(names))
    if workers < 2:
        yield from (index_tar(config, name) for name in names)
        return
    context = multiprocessing.get_context("spawn")  # connections and their threads do not survive a fork
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        for done in concurrent.futures.as_completed([pool.submit(index_tar, config, name) for name in names]):
            yield done.result()


def _finished(config: IndexConfig, source: FileStore, name: str) -> DoneRecord | None:
    """Returns the record of an indexed tar, else None. Raises ConfigError for files that are not an index of it."""
    out, unit = FileStore(config.index_out or config.tars), name.removesuffix(".tar")
    if not is_plain_name(unit):
        raise ConfigError(f"{config.tars}/{name}: its name is not usable for files of the index; rename the tar")
    done = f"_done/{unit}.json"
    if not out.exists(done):
        if out.exists(index_name(name)):
            raise ConfigError(
                f"{out.root}/{index_name(name)} exists and is not an index made by auricle; set index_out= to "
                "another folder"
            )
        return None
    record = DoneRecord.from_json(out.read(done), f"{out.root}/{done}")
    if record.location != _location(config):
        raise ConfigError(f"{out.root}/{done} is the record of another data set; set index_out= to another folder")
    if record.bytes == source.size(name):
        return record
    out.remove(done)
    return None


def _location(config: IndexConfig) -> str:
    """Returns the location of the tars for the records: "" if the index is in the same folder."""
    tars = FileStore(config.tars).root
    return "" if not config.index_out or FileStore(config.index_out).root == tars else tars


def index_tar(config: IndexConfig, name: str) -> DoneRecord:
    """Indexes one tar and returns its record; see `index_tars`."""
    source, out = FileStore(config.tars), FileStore(config.index_out or config.tars)
    found = retry(lambda: _Scan(config, source, name), f"{source.root}/{name}", source.patience)
    unit = name.removesuffix(".tar")
    record = DoneRecord(
        unit=unit,
        shard=name if found.rows else "",
        sha256=found.sha256,
        bytes=found.size,
        index_sha256="",
        segments=len(found.rows),
        samples=sum(row["n_samples"] for row in found.rows),
        rejects=dict(sorted(Counter(f"{row['stage']}/{row['reason']}" for row in found.rejects).items())),
        files=len(found.rows) + len(found.rejects),
        flow=_flow(found),
        location=_location(config),
    )
    if found.rows:
        table = _table(found.rows, found.labels)
        validate_index(table, found.size)
        buffer = io.BytesIO()
        pq.write_table(table, buffer, compression="zstd")
        out.replace(index_name(name), buffer.getvalue())
        record = dataclasses.replace(record, index_sha256=hashlib.sha256(buffer.getvalue()).hexdigest())
    if found.rejects:
        lines = "".join(json.dumps(row, sort_keys=True) + "\n" for row in found.rejects).encode()
        out.replace(rejects_name(unit), lines)
        record = dataclasses.replace(record, rejects_sha256=hashlib.sha256(lines).hexdigest())
    if not out.create(f"_done/{unit}.json", record.to_json()):
        return DoneRecord.from_json(out.read(f"_done/{unit}.json"), f"_done/{unit}.json")
    return record


@dataclass
class _Member:
    """An audio member, whose labels may follow later."""

    name: str
    payload_offset: int
    payload_size: int
    suffix: str
    n_samples: int


@dataclass
class _Sample:
    """Members of one sample, which are adjacent in a WebDataset."""

    key: str
    offset: int
    end: int = 0
    audio: list[_Member] = field(default_factory=list)
    documents: dict[str, bytes] = field(default_factory=dict)
    """JSON and text members by name."""


class _Hashing(io.RawIOBase):
    """Passes a file through and hashes it."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._digest, self.size = file, hashlib.sha256(), 0

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        data = self._file.read(size)
        self._digest.update(data)
        self.size += len(data)
        return data

    def drain(self) -> str:
        """Reads to the end; returns the sha256 of the whole file."""
        while self.read(CHUNK):
            pass
        return self._digest.hexdigest()


class _Scan:
    """Reads one tar sequentially.

    rows, labels: the index row and the further labels of each segment.  rejects: rows of `_rejects`.
    """

    def __init__(self, config: IndexConfig, store: FileStore, name: str) -> None:
        self._config, self._store, self._name = config, store, name
        self.rows: list[dict[str, Any]] = []
        self.labels: list[dict[str, str]] = []
        self.rejects: list[dict[str, Any]] = []
        self._keys: set[str] = set()
        with store.fs.open(store.path(name), "rb") as file:
            stream = _Hashing(file)
            try:
                with tarfile.open(fileobj=stream, mode="r|", bufsize=CHUNK) as tar:
                    self._read(tar)
            except tarfile.TarError as error:
                self._reject("", UnusableError("damaged_tar", f"ends at byte {stream.size:,}: {error}"))
            self.sha256, self.size = stream.drain(), stream.size
        self._require_few("corpus", "many_corpora")
        self._require_few("language", "many_languages")

    def _require_few(self, column: str, reason: str) -> None:
        """Rejects all rows where a field of the samples' JSON has another value for nearly each of them."""
        count = len({row[column] for row in self.rows})
        if count > MOST_NAMES:
            error = UnusableError(
                reason,
                f"the tar has {count:,} values of {column}, more than {MOST_NAMES:,}; it must name data sets: rename "
                "the field in the samples' JSON",
            )
            for row in self.rows:
                self._reject(f"{row['key']}.{row['suffix']}", error, row["n_samples"])
            self.rows, self.labels = [], []

    def _read(self, tar: tarfile.TarFile) -> None:
        from webdataset.tariterators import base_plus_ext

        sample: _Sample | None = None
        for info in tar:
            tar.members = []  # type: ignore[attr-defined]  # tarfile would keep every header
            key, _ = base_plus_ext(info.name)
            if sample is not None and key != sample.key:
                self._finish(sample)
                sample = None
            if info.isdir():
                continue
            if key is None or not info.isreg():
                self._reject(info.name, UnusableError("no_file", "is a link or has no ending"))
                continue
            sample = sample or _Sample(key, info.offset)
            sample.end = info.offset_data + -(-info.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
            try:
                self._take(sample, info, tar)
            except UnusableError as error:
                self._reject(info.name, error)
        if sample is not None:
            self._finish(sample)

    def _take(self, sample: _Sample, info: tarfile.TarInfo, tar: tarfile.TarFile) -> None:
        """Adds a member to its sample. Raises UnusableError."""
        suffix = info.name.rpartition(".")[2].lower()
        if suffix not in (*READABLE, "json", "txt"):
            return
        most = MOST_AUDIO_BYTES if suffix in READABLE else MOST_LABEL_BYTES
        if info.size > most:
            raise UnusableError("too_large", f"has {info.size:,} bytes; at most {most:,} are read")
        content = tar.extractfile(info)
        data = content.read() if content is not None else b""
        if suffix in READABLE:
            n_samples, suffix = examine_member(data, suffix, self._config.decode)
            sample.audio.append(_Member(info.name, info.offset_data, info.size, suffix, n_samples))
        else:
            sample.documents[info.name] = data

    def _finish(self, sample: _Sample) -> None:
        """Adds a row for each audio member of a complete sample."""
        for member in sample.audio:
            stem = member.name.rpartition(".")[0]
            key = sample.key if len(sample.audio) == 1 and stem == sample.key else stem
            try:
                labels = member_labels(sample.documents, sample.key, stem)
                if key in self._keys:
                    raise UnusableError("listed_twice", "the tar holds this name twice")
            except UnusableError as error:
                self._reject(member.name, error, member.n_samples)
                continue
            self._keys.add(key)
            start = labels.pop("start", "")
            self.rows.append({
                "key": key,
                "offset": sample.offset,
                "size": sample.end - sample.offset,
                "payload_offset": member.payload_offset,
                "payload_size": member.payload_size,
                "suffix": member.suffix,
                "n_samples": member.n_samples,
                "corpus": labels.pop("corpus", "") or self._corpus,
                "language": labels.pop("language", "") or self._config.language,
                "speaker": labels.pop("speaker", ""),
                "file_id": labels.pop("file_id", "") or key,
                "start": int(start) if start.isdecimal() and len(start) < 19 else 0,
                "weight": 1.0,
            })  # fmt: skip
            self.labels.append(labels)

    @property
    def _corpus(self) -> str:
        return self._config.corpus or PurePosixPath(self._store.base).name

    def _reject(self, member: str, error: UnusableError, samples: int = 0) -> None:
        self.rejects.append({
            "path": f"{self._store.root}/{self._name}",
            "file_id": member,
            "corpus": self._corpus,
            "language": self._config.language,
            "stage": "index",
            "reason": error.reason,
            "error": str(error),
            "start": 0,
            "samples": samples,
        })  # fmt: skip


def examine_member(data: bytes, suffix: str, decode: bool = True) -> tuple[int, str]:
    """Returns the number of samples of encoded audio, and the suffix for the index.

    Args:
        data: the whole member.
        suffix: its ending in lower case.
        decode: decode it to its end instead of trusting its header.

    Raises:
        UnusableError: it is not 16 kHz mono audio, is damaged, or its length differs from its header.
    """
    try:
        with open_sample(data) as sound:
            if sound.rate != SAMPLE_RATE:
                raise UnusableError(
                    "sample_rate", f"{sound.rate} Hz instead of {SAMPLE_RATE}; convert it with corpus=webdataset"
                )
            if sound.channels != 1:
                raise UnusableError("channels", f"{sound.channels} channels; convert it with corpus=webdataset")
            frames = sound.frames
            if not 0 < frames < MOST_SAMPLES:
                raise UnusableError("length", f"its header says {frames} samples; allowed are 1 to {MOST_SAMPLES - 1}")
            if decode and (decoded := sound.count()) != frames:
                raise UnusableError("length", f"its header says {frames:,} samples, but it decodes to {decoded:,}")
    except AudioError as error:
        raise UnusableError("corrupt", str(error)) from None
    # only WAV files of this format are cropped by bytes
    plain = data[:4] == b"RIFF" and data[12:22] == b"fmt \x10\0\0\0\1\0" and data[34:40] == b"\x10\0data"
    return frames, suffix if suffix != "wav" or (plain and len(data) == WAV_HEADER + 2 * frames) else "riff"


def _table(rows: Sequence[Mapping[str, Any]], labels: Sequence[Mapping[str, str]]) -> pa.Table:
    """Returns the index table: the columns of auricle's shards, and one for each further label."""
    columns = {
        column.name: pa.array([row.get(column.name) for row in rows], type=column.type) for column in INDEX_SCHEMA
    }
    names = sorted({name for row in labels for name in row} - columns.keys())
    columns |= {name: pa.array([row.get(name) for row in labels], type=pa.string()) for name in names}
    return pa.table(columns).replace_schema_metadata({LABELS_IN_COLUMNS: b"1"})


def _flow(found: _Scan) -> tuple[tuple[str, str, str, str, int, int], ...]:
    """Returns input and output by corpus and language, in the format of preprocessing."""
    count, samples = Counter[tuple[str, str, str, str]](), Counter[tuple[str, str, str, str]]()
    for row in found.rows:
        for stage in ("in", "out"):
            count[row["corpus"], row["language"], stage, ""] += 1
            samples[row["corpus"], row["language"], stage, ""] += row["n_samples"]
    for row in found.rejects:
        for stage, reason in (("in", ""), (row["stage"], row["reason"])):
            count[row["corpus"], row["language"], stage, reason] += 1
            samples[row["corpus"], row["language"], stage, reason] += row["samples"]
    return tuple((*key, count[key], samples[key]) for key in sorted(count))
