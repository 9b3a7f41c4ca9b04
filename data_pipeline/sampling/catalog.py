"""The catalogue of a data set: lengths and groups of all segments, in memory or memory-mapped."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from data_pipeline.core.atomic_files import write_json
from data_pipeline.core.storage import private_folder
from data_pipeline.shards.local import ShardError, ShardFiles

Array = npt.NDArray[Any]
LARGE = 5_000_000
"""Number of segments above which the arrays are stored in files and memory-mapped."""

MOST_GROUPS = 1 << 16
"""Largest number of groups of a data set; their numbers are stored in 16 bits."""


class Group(NamedTuple):
    """Properties that segments share.  text: whether they have a text; False where texts were not looked for."""

    corpus: str
    language: str
    text: bool = False


class TextSearch(Protocol):
    """Finds the segments with a text in the index of a shard."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of the index that it reads."""
        ...

    @property
    def identity(self) -> str:
        """Names all that decides which segments have a text, besides the shards."""
        ...

    def found(self, table: pa.Table) -> Array:
        """Returns whether each segment has a text, (n,). Raises ConfigError where the index does not show it."""
        ...


@dataclass(frozen=True)
class Catalogue:
    """N segments in S shards, of G groups. A segment is identified by its shard and its row in that shard."""

    shards: tuple[str, ...]
    """Shard names, sorted."""
    starts_S: Array
    """(S + 1,) int64: segments of shard s are starts_S[s] … starts_S[s + 1] - 1."""
    length_N: Array
    """(N,) uint32 samples."""
    group_N: Array
    """(N,) uint16, an index into groups."""
    groups: tuple[Group, ...]
    fingerprint: str
    """Hash of the shards' contents, from their `_done` records."""

    @property
    def text_G(self) -> Array:
        """(G,) whether the segments of each group have a text."""
        return np.array([group.text for group in self.groups], bool)

    def blocks(self, size: int = 4_000_000) -> Iterator[tuple[int, int]]:
        """Yields ranges of shards [a, b) with about `size` segments each."""
        a = 0
        while a < len(self.shards):
            b = int(np.searchsorted(self.starts_S, self.starts_S[a] + size, side="right")) - 1
            b = min(max(b, a + 1), len(self.shards))
            yield a, b
            a = b


def load_catalogue(
    files: ShardFiles, cache: str = "", skip_bad: bool = False, texts: TextSearch | None = None
) -> Catalogue:
    """Returns the catalogue of the shards of `files`.

    Bad shards are included, since they are part of the plan; those without a usable index count as empty.

    Args:
        files: the shards; `files.bad` are the known bad ones.
        cache: folder for the arrays of a large catalogue; empty: a private temporary one.
        skip_bad: count shards without a usable index as empty instead of raising.
        texts: divides groups into segments with and without a text; None: they are not divided.

    Raises:
        ConfigError: an index does not show which segments have a text.
        ShardError: the index of a shard cannot be used.
        StorageReadError: the storage does not answer.
    """
    lost = {number for number in list(files.bad) if not _has_lengths(files, number)}
    segments = [0 if number in lost else record.segments for number, record in enumerate(files.records)]
    starts_S = np.concatenate([[0], np.cumsum(segments)]).astype(np.int64)
    reading = _Reading(files, starts_S, lost, skip_bad, texts)
    if starts_S[-1] <= LARGE:
        length_N, group_N = np.zeros(starts_S[-1], np.uint32), np.zeros(starts_S[-1], np.uint16)
        groups = reading.fill(length_N, group_N)
    else:
        length_N, group_N, groups = _mapped(reading, cache)
    names = tuple(record.shard for record in files.records)
    return Catalogue(
        shards=names,
        starts_S=starts_S,
        length_N=length_N,
        group_N=group_N,
        groups=groups,
        fingerprint=reading.fingerprint(),
    )


def _has_lengths(files: ShardFiles, number: int) -> bool:
    """Returns whether the index of a bad shard can be used."""
    try:
        files.read_lengths(number)
    except ShardError:
        return False
    return True


@dataclass
class _Reading:
    """Reads the lengths and groups of all segments."""

    files: ShardFiles
    starts_S: Array
    lost: set[int]
    """Shards that count as empty."""
    skip_bad: bool
    texts: TextSearch | None

    def fingerprint(self) -> str:
        """Returns the hash of the shards' contents, in which shards without a usable index are empty."""
        digest = hashlib.sha256()
        for number, record in enumerate(self.files.records):
            segments = 0 if number in self.lost else record.segments
            digest.update(f"{record.shard}\0{record.sha256}\0{segments}\n".encode())
        return digest.hexdigest()

    @property
    def folder(self) -> str:
        """Name of the folder for the arrays of a large catalogue."""
        divided = f"-{hashlib.sha256(self.texts.identity.encode()).hexdigest()[:8]}" if self.texts else ""
        return f"catalogue-{self.fingerprint()[:16]}{divided}"

    def fill(self, length_N: Array, group_N: Array) -> tuple[Group, ...]:
        """Fills the zero-initialised arrays and returns the groups."""
        numbers: dict[Group, int] = {}
        more = self.texts.columns if self.texts else ()
        for s in range(len(self.files.records)):
            if s in self.lost:
                continue
            try:
                table = self.files.read_lengths(s, more)
                names, inverse = self._grouped(table)
                if len(numbers.keys() | set(names)) > MOST_GROUPS:
                    reason = f"with its {len(names):,} corpora and languages the data set has more than {MOST_GROUPS:,}"
                    raise self.files.mark_bad(s, f"{reason}; leave it out of data.shards, or name fewer corpora")
            except ShardError:
                if not self.skip_bad:
                    raise
                self.lost.add(s)
                continue
            a, b = int(self.starts_S[s]), int(self.starts_S[s + 1])
            length_N[a:b] = table.column("n_samples").to_numpy()
            group_N[a:b] = np.array([numbers.setdefault(name, len(numbers)) for name in names], np.uint16)[inverse]
        return tuple(numbers)

    def _grouped(self, table: pa.Table) -> tuple[list[Group], Array]:
        """Returns the groups of the segments of a shard, and the position of each segment's group among them."""
        corpus, language = (_encoded(table.column(name)) for name in ("corpus", "language"))
        text = self.texts.found(table) if self.texts else np.zeros(table.num_rows, bool)
        width = len(language[1])
        codes, inverse = np.unique(2 * (corpus[0] * width + language[0]) + text, return_inverse=True)
        pairs = [(*divmod(code // 2, width), bool(code % 2)) for code in codes.tolist()]
        return [Group(corpus[1][one], language[1][other], has_text) for one, other, has_text in pairs], inverse


def _encoded(column: pa.ChunkedArray) -> tuple[Array, list[str]]:
    """Returns the codes and the names of a text column."""
    if column.null_count or not pa.types.is_dictionary(column.type):
        column = column.cast(pa.string()).fill_null("").dictionary_encode()
    encoded = column.unify_dictionaries().combine_chunks()
    return encoded.indices.to_numpy().astype(np.int64), encoded.dictionary.to_pylist()


def _mapped(reading: _Reading, cache: str) -> tuple[Array, Array, tuple[Group, ...]]:
    """Returns the arrays memory-mapped from files, which are written once."""
    count = int(reading.starts_S[-1])
    folder = Path(cache or private_folder()).expanduser() / reading.folder
    if not (folder / "groups.json").exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as made:
            length_N = np.memmap(f"{made}/length.u32", np.uint32, "w+", shape=(count,))
            group_N = np.memmap(f"{made}/group.u16", np.uint16, "w+", shape=(count,))
            before = set(reading.lost)
            groups = reading.fill(length_N, group_N)
            length_N.flush()
            group_N.flush()
            folder.mkdir(exist_ok=True)
            for name in ("length.u32", "group.u16"):
                Path(made, name).replace(folder / name)
            write_json(folder / "lost.json", sorted(reading.lost - before))
            write_json(folder / "groups.json", groups)  # written last, to mark the folder as complete
    try:
        groups = tuple(Group(*values) for values in json.loads((folder / "groups.json").read_bytes()))
        lost = folder / "lost.json"
        reading.lost |= set(json.loads(lost.read_bytes())) if lost.exists() else set()
        length_N = np.memmap(folder / "length.u32", np.uint32, "r")
        group_N = np.memmap(folder / "group.u16", np.uint16, "r")
        if len(length_N) != count or len(group_N) != count:
            raise ValueError(f"{len(length_N)} lengths and {len(group_N)} groups of {count} segments")
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(
            f"the catalogue in {folder} is damaged ({error}); delete the folder, it will be created again"
        ) from None
    return length_N, group_N, groups
