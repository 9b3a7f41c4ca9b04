"""Pieces of data to embed: recordings, texts and images of files, folders and shards, one after another."""

from __future__ import annotations

import itertools
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import numpy as np

from data_pipeline.audio import codecs
from data_pipeline.audio.codecs import Wave
from data_pipeline.audio.errors import AudioError
from data_pipeline.core.schema import ConfigError
from data_pipeline.core.storage import FileStore, is_url
from data_pipeline.core.types import SAMPLE_RATE
from data_pipeline.corpora.records import printable
from data_pipeline.images.decoding import ENDINGS, ImageError, read_image
from data_pipeline.loader.fetch import image_of, labels_of
from data_pipeline.loader.open_shards import open_files
from data_pipeline.loader.recordings import Recording, RecordingSource, Unusable, sources
from data_pipeline.sampling.config import DataConfig
from data_pipeline.shards.local import Extent, ShardError, ShardFiles
from data_pipeline.shards.records import DoneRecord, done_records

Kind = Literal["speech", "text", "image"]
LONGEST_SECONDS: Final = 120
"""Longest recording that is one piece."""
IMAGE_FILES: Final = (*ENDINGS, "gif", "bmp", "tif", "tiff", "ppm", "pgm", "pbm", "pnm")


@dataclass(frozen=True)
class Piece:
    """A recording, text or image. One of wave (T,) at 16 kHz, text, and image, the content of a file, is set.

    name: of the file or segment, or the text itself.  place: the file, or the folder of the shards; "" for given texts.
    """

    kind: Kind
    name: str
    place: str = ""
    wave: Wave | None = None
    text: str = ""
    image: bytes = b""


def is_image_file(path: str) -> bool:
    """Returns whether the ending of a file is that of an image."""
    return path.rpartition(".")[2].lower() in IMAGE_FILES


def pieces(places: Sequence[str], texts: Sequence[str] = ()) -> Iterator[Piece | Unusable]:
    """Yields the pieces of some places, and what cannot be read.

    Args:
        places: files of sound or pictures, folders of them, or folders or URLs of shards, whose segments give up to
            three pieces each.
        texts: further texts.

    Raises:
        ConfigError: a place does not exist or holds nothing of use; before anything is read.
        ValueError: shards are damaged.
    """
    read = [_opened(place) for place in places]
    yield from itertools.chain.from_iterable(one() for one in read)
    yield from (Piece("text", text, text=text) for text in texts)


def find_piece(kind: Kind, name: str, place: str) -> Piece | Unusable:
    """Reads one piece again, by kind, name and place of an earlier one."""
    if kind == "text":
        return Piece(kind, name, place, text=name)
    if FileStore(place).names("_done", ".json"):
        records = done_records(place)
        files = open_files(DataConfig(shards=(place,)), records)
        try:
            for number in range(len(records)):
                keys = list(files.index(number).keys)
                if name in keys:
                    found = _of_row(files, number, keys.index(name), place)
                    return next((one for one in found if isinstance(one, Piece) and one.kind == kind), _gone(name))
        except ShardError as error:
            return Unusable(name, "bad_shard", str(error))
        finally:
            files.close()
        return _gone(name)
    try:
        return next(_opened(place)(), _gone(name))
    except ConfigError:
        return _gone(name)


def _gone(name: str) -> Unusable:
    return Unusable(name, "vanished", "is no longer there")


def _opened(place: str) -> Callable[[], Iterator[Piece | Unusable]]:
    """Finds a place; returns what reads its pieces."""
    if FileStore(place).names("_done", ".json"):
        records = done_records(place)
        return lambda: _of_shards(place, records)
    path = Path(place).expanduser()
    if is_image_file(place):
        if not is_url(place) and not path.is_file():
            raise ConfigError(f"files={place}: there is no such file")
        return lambda: iter([image_piece(place, printable(place.rpartition("/")[2]))])
    pictures = sorted(one for one in path.rglob("*") if is_image_file(one.name)) if path.is_dir() else []
    found: list[RecordingSource] = []
    try:
        found = sources([place])
    except ConfigError as error:
        if not pictures:
            raise ConfigError(str(error).replace("holds no sound files", "holds no sound or image files")) from None
    return lambda: _of_files(place, path, pictures, found)


def _of_files(
    place: str, path: Path, pictures: Sequence[Path], found: Sequence[RecordingSource]
) -> Iterator[Piece | Unusable]:
    """Yields the pictures and recordings of a folder, or one recording."""
    yield from (image_piece(str(one), printable(str(one.relative_to(path)))) for one in pictures)
    for source in found:
        for recording in source.recordings():
            yield _recording(recording, str(path / recording.name) if path.is_dir() else place)


def image_piece(path: str, name: str) -> Piece | Unusable:
    """Returns the image of a file or URL, or why it cannot be read."""
    try:
        return Piece("image", name, path, image=read_image(path))
    except ImageError as error:
        return Unusable(name, error.reason, str(error))


def _recording(recording: Recording | Unusable, place: str) -> Piece | Unusable:
    if isinstance(recording, Unusable):
        return recording
    blocks, samples = [], 0
    try:
        for block in recording.blocks():
            blocks.append(block)
            samples += len(block)
            if samples > LONGEST_SECONDS * SAMPLE_RATE:
                remedy = f"is longer than {LONGEST_SECONDS} s; cut it with `auricle preprocess`, and give the shards"
                return Unusable(recording.name, "too_long", remedy)
    except AudioError as error:
        return Unusable(recording.name, error.reason, str(error))
    if not samples:
        return Unusable(recording.name, "no_samples", "holds no samples")
    return Piece("speech", recording.name, place, wave=np.concatenate(blocks))


def _of_shards(root: str, records: Sequence[DoneRecord]) -> Iterator[Piece | Unusable]:
    files = open_files(DataConfig(shards=(root,)), records)
    try:
        for number, record in enumerate(records):
            try:
                rows = range(len(files.index(number).keys))
            except ShardError as error:
                yield Unusable(record.shard, "bad_shard", str(error))
                continue
            for row in rows:
                yield from _of_row(files, number, row, root)
    finally:
        files.close()


def _of_row(files: ShardFiles, number: int, row: int, root: str) -> Iterator[Piece | Unusable]:
    """Yields speech, text and image of one segment, as far as it has them."""
    index = files.index(number)
    key = index.keys[row]
    first, size = (int(index.table.column(name)[row].as_py()) for name in ("offset", "size"))
    [content] = files.read([Extent(number, first, size)])
    if isinstance(content, ShardError):
        yield Unusable(key, "bad_shard", str(content))
        return
    begin = int(index.payload_offset[row]) - first
    audio = content[begin : begin + int(index.payload_size[row])]
    yield _recording(Recording(key, lambda: codecs.decode(audio, SAMPLE_RATE)), root)
    try:
        if text := labels_of(index, row, content, ("text",))["text"]:
            yield Piece("text", text, root, text=text)
        if image := image_of(content):
            yield Piece("image", key, root, image=image)
    except (tarfile.TarError, ValueError) as error:
        yield Unusable(key, "labels", str(error))
