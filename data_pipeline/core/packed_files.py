"""Reads folders of many small files, such as `_done`, mostly from one file with copies of them: `_packs/_done.parquet`.

A copy counts while size and version (modification time, or ETag) of its file are those in the listing of the folder;
other files are read themselves, several at a time from remote storage. A pack may therefore be missing, old or damaged.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Final

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.core.storage import FileStore, Stamp

FEWEST: Final = 100
"""Smaller folders have no pack."""
AT_A_TIME: Final = 256
"""Files that are read from remote storage, and copies that are read from a pack, at a time."""
UNUSABLE: Final = (OSError, ValueError, KeyError, TypeError)
"""Errors of packs that are missing or damaged."""
PACK_SCHEMA: Final = pa.schema(
    [("name", pa.string()), ("size", pa.int64()), ("version", pa.string()), ("content", pa.binary())]
)
"""Rows are sorted by name."""


def pack_name(folder: str) -> str:
    """Returns the name of the pack of a folder."""
    return f"_packs/{folder}.parquet"


def read_folder(store: FileStore, folder: str, suffix: str) -> Iterator[tuple[str, bytes]]:
    """Yields (name, content) of the files in a folder, sorted by name.

    Args:
        store: the data set.
        folder: name of the folder.
        suffix: ending of the files.
    """
    for name, _, content in _current(store, folder, store.stamps(folder, suffix)):
        yield name, content


def read_files(store: FileStore, folder: str, names: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    """Yields (name, content) of some files of a folder, which are read themselves."""
    for start in range(0, len(names), AT_A_TIME):
        chunk = names[start : start + AT_A_TIME]
        yield from zip(chunk, store.read_several([f"{folder}/{name}" for name in chunk]), strict=True)


def write_pack(store: FileStore, folder: str, suffix: str) -> None:
    """Writes the pack of a folder, unless it is up to date or the folder is small."""
    stamps = store.stamps(folder, suffix)
    if len(stamps) < FEWEST or _packed_stamps(store, folder) == stamps:
        return
    with store.scratch() as scratch:
        with pq.ParquetWriter(scratch / "pack", PACK_SCHEMA, compression="zstd", write_page_checksum=True) as writer:
            rows = ((name, *stamp, content) for name, stamp, content in _current(store, folder, stamps))
            while chunk := list(itertools.islice(rows, AT_A_TIME)):
                writer.write_table(pa.table(list(map(list, zip(*chunk, strict=True))), schema=PACK_SCHEMA))
        store.put(scratch / "pack", pack_name(folder))


def _current(store: FileStore, folder: str, stamps: dict[str, Stamp]) -> Iterator[tuple[str, Stamp, bytes]]:
    """Yields (name, stamp, content) of the files of a listing, in its order."""
    packed = _packed(store, folder) if len(stamps) >= FEWEST else iter(())
    copy = next(packed, None)
    names = iter(stamps)
    while chunk := list(itertools.islice(names, AT_A_TIME)):
        copies: dict[str, bytes] = {}
        for name in chunk:
            while copy is not None and copy[0] < name:
                copy = next(packed, None)
            if copy is not None and copy[:2] == (name, stamps[name]):
                copies[name] = copy[2]
        rest = [name for name in chunk if name not in copies]
        copies |= read_files(store, folder, rest)
        yield from ((name, stamps[name], copies[name]) for name in chunk)


def _packed(store: FileStore, folder: str) -> Iterator[tuple[str, Stamp, bytes]]:
    """Yields the copies of a pack, up to where it is damaged."""
    with contextlib.suppress(*UNUSABLE), store.open(pack_name(folder)) as file:
        for batch in pq.ParquetFile(file, page_checksum_verification=True).iter_batches(AT_A_TIME, use_threads=False):
            for row in batch.to_pylist():
                yield row["name"], (row["size"], row["version"]), row["content"]


def _packed_stamps(store: FileStore, folder: str) -> dict[str, Stamp]:
    found: dict[str, Stamp] = {}
    with contextlib.suppress(*UNUSABLE), store.open(pack_name(folder)) as file:
        for row in pq.ParquetFile(file).read(["name", "size", "version"], use_threads=False).to_pylist():
            found[row["name"]] = row["size"], row["version"]
    return found
