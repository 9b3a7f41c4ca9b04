"""Whole recordings, one after another: of files, folders, shards and standard input."""

from __future__ import annotations

import io
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

from data_pipeline.audio import codecs
from data_pipeline.audio.byte_source import ByteSource
from data_pipeline.audio.codecs import Wave
from data_pipeline.audio.containers import sniff
from data_pipeline.audio.errors import AudioError
from data_pipeline.audio.pcm import GUESSED, HEADER_BYTES, PcmStream, refuse_other_than_pcm, refuse_text
from data_pipeline.core.schema import ConfigError, did_you_mean, suggest
from data_pipeline.core.storage import FileStore, is_url
from data_pipeline.core.types import SAMPLE_RATE
from data_pipeline.corpora.config import PathCorpus
from data_pipeline.corpora.discovery import discover
from data_pipeline.corpora.records import printable
from data_pipeline.loader.open_shards import open_files
from data_pipeline.sampling.config import DataConfig
from data_pipeline.shards.local import Extent, ShardError, ShardFiles
from data_pipeline.shards.records import DoneRecord, done_records

STDIN: Final = "-"
BLOCK_BYTES: Final = 1 << 17
LIVE_BYTES: Final = 4_096


@dataclass(frozen=True)
class Recording:
    """One recording.

    name: its path below the given folder, its file name, its key in a shard, or "stdin".
    blocks: yields (T,) mono audio at 16 kHz in [-1, 1]. Raises AudioError, after which earlier blocks do not count.
    is_stdin: whether it is standard input; a file may be called "stdin" too.
    """

    name: str
    blocks: Callable[[], Iterator[Wave]]
    is_stdin: bool = False


@dataclass(frozen=True)
class Unusable:
    """A recording that cannot be read; `reason` is a short code for counts."""

    name: str
    reason: str
    error: str


@dataclass(frozen=True)
class RecordingSource:
    """Recordings of one of the given places, and how many they are, unusable ones included."""

    count: int
    recordings: Callable[[], Iterator[Recording | Unusable]]


def sources(given: Sequence[str], pcm_rate: int = SAMPLE_RATE, stdin: IO[bytes] | None = None) -> list[RecordingSource]:
    """Finds recordings; nothing is decoded yet.

    Args:
        given: files, folders of sound files, folders or URLs of shards, or "-" for standard input.
        pcm_rate: Hz of raw 16-bit little-endian mono PCM on standard input.
        stdin: what "-" reads; by default this process's standard input.

    Raises:
        ConfigError: A place does not exist or holds no sound; the message has the nearest name. Standard input is
            closed.
        ValueError: Shards are damaged.
    """
    if list(given).count(STDIN) > 1:
        raise ConfigError("files=-: standard input can be read once only")
    if STDIN in given and stdin is None and sys.stdin is None:  # Python has no object for a closed one
        raise ConfigError("files=-: standard input is closed; give it audio by a pipe or < FILE")
    return [_source(place, pcm_rate, stdin) for place in given]


def _source(place: str, pcm_rate: int, stdin: IO[bytes] | None) -> RecordingSource:
    if place == STDIN:
        return RecordingSource(
            1, lambda: iter([Recording("stdin", lambda: _from_stdin(stdin, pcm_rate), is_stdin=True)])
        )
    if FileStore(place).names("_done", ".json"):
        records = done_records(place)
        return RecordingSource(sum(record.segments for record in records), lambda: _from_shards(place, records))
    path = Path(place).expanduser()
    if is_url(place) or path.is_file():
        name = place.rpartition("/")[2] if is_url(place) else printable(path.name)
        where = place if is_url(place) else str(path)
        return RecordingSource(1, lambda: iter([Recording(name, lambda: _from_file(where))]))
    if path.is_dir():
        return _folder(str(path))
    near = suggest(path.name, [entry.name for entry in path.parent.iterdir()]) if path.parent.is_dir() else ""
    raise ConfigError(
        f"files={place}: there is no such file or folder{did_you_mean(str(path.parent / near) if near else '')}"
    )


def _folder(path: str) -> RecordingSource:
    try:
        found = discover(PathCorpus(path=path))
    except ConfigError as error:
        raise ConfigError(str(error).replace("corpus.path=", "files=").replace("corpus.extensions and ", "")) from None
    files = found.files

    def recordings() -> Iterator[Recording | Unusable]:
        for reject in found.rejects:
            yield Unusable(reject.file_id, reject.reason, reject.error)
        for file in files:
            yield Recording(file.file_id, lambda where=file.path: _from_file(where))  # type: ignore[misc]

    return RecordingSource(len(files) + len(found.rejects), recordings)


def _from_file(path: str) -> Iterator[Wave]:
    with codecs.local_copy(path) as local:
        yield from codecs.decode(local, SAMPLE_RATE)


def _from_shards(root: str, records: Sequence[DoneRecord]) -> Iterator[Recording | Unusable]:
    files = open_files(DataConfig(shards=(root,)), records)
    try:
        for number in range(len(records)):
            yield from _from_shard(files, number)
    finally:
        files.close()


def _from_shard(files: ShardFiles, number: int) -> Iterator[Recording | Unusable]:
    try:
        index = files.index(number)
    except ShardError as error:
        record = files.records[number]
        yield from (Unusable(record.shard, "bad_shard", str(error)) for _ in range(record.segments))
        return
    for row, key in enumerate(index.keys):
        extent = Extent(number, int(index.payload_offset[row]), int(index.payload_size[row]))
        [content] = files.read([extent])
        if isinstance(content, ShardError):
            yield Unusable(key, "bad_shard", str(content))
        else:
            yield Recording(key, lambda content=content: codecs.decode(content, SAMPLE_RATE))  # type: ignore[misc]


def _from_stdin(stdin: IO[bytes] | None, pcm_rate: int) -> Iterator[Wave]:
    stream = stdin or sys.stdin.buffer
    head = _read(stream, BLOCK_BYTES)
    if not head:
        raise AudioError("empty", "standard input is empty")
    if sniff(ByteSource(head)) in GUESSED and not head.startswith(b"ID3"):
        refuse_text(head, "standard input")
        yield from _pcm(stream, head, pcm_rate)
        return
    with tempfile.NamedTemporaryFile(prefix="auricle-") as copy:  # decoders seek
        while head:
            copy.write(head)
            head = _read(stream, BLOCK_BYTES)
        copy.flush()
        yield from codecs.decode(copy.name, SAMPLE_RATE)


def live_pcm(stream: IO[bytes], rate: int) -> Iterator[Wave]:
    """Yields raw 16-bit little-endian mono PCM as it arrives, as (T,) audio at 16 kHz in [-1, 1].

    Args:
        stream: a pipe; an odd byte waits for the next one, and is dropped at the end.
        rate: its samples per second.

    Raises:
        AudioError: there is no byte, or they begin like a sound file.
    """
    # BufferedReader.read waits for all bytes, read1 returns what a pipe has
    read = stream.read1 if isinstance(stream, io.BufferedReader) else stream.read
    pcm, head = PcmStream(rate), b""
    while len(head) < HEADER_BYTES and (block := read(LIVE_BYTES)):
        head += block
    if len(head) < 2:
        raise AudioError("empty", "standard input is empty")
    refuse_other_than_pcm(head, "standard input")
    yield pcm.push(head)
    while block := read(LIVE_BYTES):
        yield pcm.push(block)
    yield pcm.finish()


def _pcm(stream: IO[bytes], block: bytes, rate: int) -> Iterator[Wave]:
    pcm = PcmStream(rate)
    while block:
        if len(block) % 2:
            raise AudioError("not_pcm", "standard input is neither a sound file nor 16-bit PCM: its bytes are odd")
        yield pcm.push(block)
        block = _read(stream, BLOCK_BYTES)
    yield pcm.finish()


def _read(stream: IO[bytes], size: int) -> bytes:
    """Reads `size` bytes, fewer only at the end; a pipe gives them in parts."""
    parts, missing = [], size
    while missing and (part := stream.read(missing)):
        parts.append(part)
        missing -= len(part)
    return b"".join(parts)
