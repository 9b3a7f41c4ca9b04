"""All segments of a data set as numbers: what planning needs, in memory or memory-mapped."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from data_pipeline.shards.local import ShardError, ShardFiles

Array = npt.NDArray[Any]
LARGE = 5_000_000
"""Segments above which the numbers are kept in files and memory-mapped."""


@dataclass(frozen=True)
class Catalogue:
    """N segments in S shards, of G groups. A segment is known by its shard and its row in that shard."""

    shards: tuple[str, ...]
    """Shard names, sorted."""
    starts_S: Array
    """(S + 1,) int64: segments of shard s are starts_S[s] … starts_S[s + 1] - 1."""
    length_N: Array
    """(N,) uint32 samples."""
    group_N: Array
    """(N,) uint16, an index into groups."""
    groups: tuple[tuple[str, str], ...]
    """(corpus, language)."""
    fingerprint: str
    """Of the shards' contents, from their `_done` records."""

    def blocks(self, size: int = 4_000_000) -> Iterator[tuple[int, int]]:
        """Ranges of shards [a, b) that hold about `size` segments each."""
        a = 0
        while a < len(self.shards):
            b = int(np.searchsorted(self.starts_S, self.starts_S[a] + size, side="right")) - 1
            b = min(max(b, a + 1), len(self.shards))
            yield a, b
            a = b


def load_catalogue(files: ShardFiles, cache: str = "") -> Catalogue:
    """The catalogue of the shards that are not known to be bad. If it is large, it is kept in folder `cache`.

    Bad shards stay in it, as they are part of the plan; only one whose index is lost, too, counts as empty.
    Raises ShardError for an index that cannot be read although its shard is there.
    """
    starts_S = np.concatenate([[0], np.cumsum([record.segments for record in files.records])]).astype(np.int64)
    lost = {number for number in files.bad if not files.has_index(number)}
    digest = hashlib.sha256()
    for number, record in enumerate(files.records):
        digest.update(f"{record.shard}\0{record.sha256}\0{0 if number in lost else record.segments}\n".encode())
    fingerprint = digest.hexdigest()
    if starts_S[-1] <= LARGE:
        length_N, group_N = np.zeros(starts_S[-1], np.uint32), np.zeros(starts_S[-1], np.uint16)
        groups = _read_numbers(files, lost, starts_S, length_N, group_N)
    else:
        length_N, group_N, groups = _mapped(files, lost, starts_S, fingerprint, cache)
    names = tuple(record.shard for record in files.records)
    return Catalogue(names, starts_S, length_N, group_N, groups, fingerprint)


def _read_numbers(
    files: ShardFiles, lost: set[int], starts_S: Array, length_N: Array, group_N: Array
) -> tuple[tuple[str, str], ...]:
    numbers: dict[tuple[str, str], int] = {}
    for s, record in enumerate(files.records):
        if s in lost:
            continue
        try:
            table = files.read_table(s, ["n_samples", "corpus", "language"])
        except (OSError, ValueError, KeyError) as error:
            raise ShardError(record.shard, f"its index cannot be read ({error})") from None
        a, b = int(starts_S[s]), int(starts_S[s + 1])
        length_N[a:b] = table.column("n_samples").to_numpy()
        corpus, language = (_encoded(table.column(name)) for name in ("corpus", "language"))
        pairs, inverse = np.unique(corpus[0] * len(language[1]) + language[0], return_inverse=True)
        names = [(corpus[1][pair // len(language[1])], language[1][pair % len(language[1])]) for pair in pairs.tolist()]
        group_N[a:b] = np.array([numbers.setdefault(name, len(numbers)) for name in names], np.uint16)[inverse]
    return tuple(numbers)


def _encoded(column: pa.ChunkedArray) -> tuple[Array, list[str]]:
    """Numbers and names of a text column."""
    if column.null_count or not pa.types.is_dictionary(column.type):
        column = column.cast(pa.string()).fill_null("").dictionary_encode()
    encoded = column.unify_dictionaries().combine_chunks()
    return encoded.indices.to_numpy().astype(np.int64), encoded.dictionary.to_pylist()


def _mapped(
    files: ShardFiles, lost: set[int], starts_S: Array, fingerprint: str, cache: str
) -> tuple[Array, Array, tuple[tuple[str, str], ...]]:
    """The numbers in files of their own, written once and memory-mapped from then on."""
    folder = Path(cache or Path(tempfile.gettempdir()) / f"auricle-{os.getuid()}") / f"catalogue-{fingerprint[:16]}"
    if not (folder / "groups.json").exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as made:
            length_N = np.memmap(f"{made}/length.u32", np.uint32, "w+", shape=(int(starts_S[-1]),))
            group_N = np.memmap(f"{made}/group.u16", np.uint16, "w+", shape=(int(starts_S[-1]),))
            groups = _read_numbers(files, lost, starts_S, length_N, group_N)
            length_N.flush()
            group_N.flush()
            folder.mkdir(exist_ok=True)
            for name in ("length.u32", "group.u16"):
                Path(made, name).replace(folder / name)
            listed = Path(made, "groups.json")
            listed.write_text(json.dumps(groups))
            listed.replace(folder / "groups.json")  # last: its presence says that all is there
    groups = tuple((corpus, language) for corpus, language in json.loads((folder / "groups.json").read_text()))
    length_N = np.memmap(folder / "length.u32", np.uint32, "r")
    group_N = np.memmap(folder / "group.u16", np.uint16, "r")
    if len(length_N) != starts_S[-1] or len(group_N) != starts_S[-1]:
        raise ValueError(f"the catalogue in {folder} is damaged; delete that folder, it will be made again")
    return length_N, group_N, groups
