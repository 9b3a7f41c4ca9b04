"""Finds pairs of recordings that share fingerprints, with more fingerprints than fit into memory.

Rows are distributed to files by the hash of their content (like bands to buckets in LSH), and sorted one file at a
time. Memory is bounded by `ROWS` for any corpus size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

import numpy as np
import numpy.typing as npt

from data_pipeline.core.schema import about, config

Array = npt.NDArray[Any]
Table = tuple[npt.NDArray[np.uint32], list[Any]]
"""Owners (numbers of recordings) of rows, and Arrow columns with the same rows."""
ROWS: Final = 4_000_000
"""Mean number of rows of a file; sorting takes about 100 bytes per row."""
FILES: Final = 64
"""Least number of files; more for many recordings."""
NEIGHBOURS: Final = 8
"""Number of following recordings with which a shared key is compared, besides the first."""
PRINT: Final = np.dtype([("key", "<u8"), ("owner", "<u4"), ("frame", "<u4")])
VOTE: Final = np.dtype([("key", "<u8"), ("shift", "<i4"), ("bin", "<u4"), ("count", "<u4")])
HASH: Final = np.dtype([("key", "S64"), ("owner", "<u4")])


BIN: Final = 64
"""Frames of the intervals, about a second, in which shared speech is measured."""
FEWEST: Final = 0.01
"""Share of the shorter recording's fingerprints that a pair must share; smaller shares occur by chance."""


@config
class DedupConfig:
    """Removal of duplicate recordings, which reads the whole corpus an additional time before shards are written."""

    exact: Annotated[bool, about("reject recordings whose decoded audio is identical")] = False
    near: Annotated[bool, about("reject recordings of the same audio with another gain, codec or offset")] = False
    min_matches: Annotated[int, about("fingerprints that two duplicates share at one offset, at least", ge=2)] = 4
    min_share: Annotated[
        float,
        about(
            "share of the shorter recording's speech, in seconds, that must be in both; a jingle is less", gt=0, le=1
        ),
    ] = 0.5


@dataclass(frozen=True)
class Match:
    """Two recordings that share speech, the smaller number first."""

    one: int
    other: int
    share: float
    """Shared part of the shorter one's seconds with speech."""
    shift: int
    """Offset in frames: position in `other` minus position in `one`."""


class Spread:
    """Rows of one dtype in `files` files; equal hashes meet in one file.

    Args:
        folder: for the files.
        name: beginning of their names.
        dtype: of a row.
        files: number of files.
    """

    def __init__(self, folder: Path, name: str, dtype: np.dtype[Any], files: int) -> None:
        self.paths = [folder / f"{name}{number}" for number in range(files)]
        self.dtype = dtype

    def add(self, rows: Array, hashes: npt.NDArray[np.uint64]) -> None:
        """Appends each row to the file that its hash selects."""
        spread = (hashes * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(40)
        bucket = spread % np.uint64(len(self.paths))
        order = np.argsort(bucket, kind="stable")
        edges = np.searchsorted(bucket[order], np.arange(len(self.paths) + 1, dtype=np.uint64))
        for path, start, end in zip(self.paths, edges, edges[1:], strict=False):
            if end > start:
                with path.open("ab") as file:
                    rows[order[start:end]].tofile(file)

    def parts(self) -> Iterator[Array]:
        """Yields the rows of each file and removes it."""
        for path in self.paths:
            if path.exists():
                rows = np.fromfile(path, self.dtype)
                path.unlink()
                yield rows


def equal_hashes(tables: Iterable[Table], recordings: int, folder: Path) -> Iterator[tuple[int, int]]:
    """Yields (recording, first recording with the same hash) for each recording that is not the first."""
    spread = Spread(folder, "hash", HASH, max(1, recordings // ROWS))
    for owners, (column,) in tables:
        rows = np.zeros(len(owners), HASH)
        rows["key"], rows["owner"] = np.array(column.to_pylist(), "S64"), owners
        spread.add(rows, np.array([int(text[:16], 16) for text in column.to_pylist()], np.uint64))
    for rows in spread.parts():
        rows = rows[np.lexsort((rows["owner"], rows["key"]))]
        first = _first_of_run(rows["key"])
        for number in np.flatnonzero(first != np.arange(len(rows))):
            yield int(rows["owner"][number]), int(rows["owner"][first[number]])


def shared_prints(tables: Iterable[Table], recordings: int, config: DedupConfig, folder: Path) -> Iterator[Match]:
    """Finds the pairs of recordings that share enough speech at one offset.

    Args:
        tables: owners, keys and frames of fingerprints; each owner once.
        recordings: number of recordings; owners are below it.
        config: thresholds.
        folder: folder for scratch files.
    """
    counts, seconds = np.zeros(recordings, np.uint32), np.zeros(recordings, np.uint32)
    files = max(FILES, recordings * 200 // ROWS)
    prints, votes = Spread(folder, "prints", PRINT, files), Spread(folder, "votes", VOTE, files)
    for owners, (keys, frames) in tables:
        lengths = np.diff(keys.offsets.to_numpy())
        counts[owners] = lengths
        rows = np.zeros(int(lengths.sum()), PRINT)
        rows["key"], rows["frame"] = keys.flatten().to_numpy(), frames.flatten().to_numpy()
        rows["owner"] = np.repeat(owners, lengths)
        spoken = np.unique(rows["owner"].astype(np.uint64) << np.uint64(32) | (rows["frame"] // BIN))
        np.add.at(seconds, (spoken >> np.uint64(32)).astype(np.int64), 1)
        prints.add(rows, rows["key"])
    for rows in prints.parts():
        rows = rows[np.lexsort((rows["owner"], rows["key"]))]
        for left, right in _neighbours(rows["key"]):
            made = _votes(rows[left], rows[right])
            votes.add(made, made["key"])
    for cast in votes.parts():
        found = _best_shift(cast)
        least = np.minimum(counts[found.one], counts[found.other])
        share = np.minimum(found.bins / np.maximum(np.minimum(seconds[found.one], seconds[found.other]), 1), 1.0)
        enough = (found.matches >= np.maximum(config.min_matches, FEWEST * least)) & (share >= config.min_share)
        columns = (found.one[enough], found.other[enough], share[enough], found.shift[enough])
        yield from (Match(*row) for row in zip(*(column.tolist() for column in columns), strict=True))


def _first_of_run(values: Array) -> npt.NDArray[np.int64]:
    """Returns the index of the first equal value for each of the sorted values."""
    starts = np.arange(len(values))
    starts[1:][values[1:] == values[:-1]] = 0
    return np.maximum.accumulate(starts)


def _neighbours(keys: Array) -> Iterator[tuple[Array, Array]]:
    """Yields pairs of indices of equal keys, which are sorted: each with the next ones and the first of its run."""
    first, here = _first_of_run(keys), np.arange(len(keys))
    for step in range(1, NEIGHBOURS + 1):
        right = here[step:][first[step:] == first[: len(keys) - step]] if step < len(keys) else here[:0]
        yield right - step, right
    far = here[here - first > NEIGHBOURS]
    yield first[far], far


def _votes(left: Array, right: Array) -> Array:
    """Returns a row for each pair, shift and interval of the left one; `key` combines the smaller and larger owner."""
    different = left["owner"] != right["owner"]
    left, right = left[different], right[different]
    rows = np.zeros(len(left), VOTE)
    rows["key"] = left["owner"].astype(np.uint64) << np.uint64(32) | right["owner"].astype(np.uint64)
    rows["shift"] = right["frame"].astype(np.int64) - left["frame"].astype(np.int64)
    rows["bin"] = left["frame"] // BIN
    rows["count"] = 1
    return _summed(rows, ("key", "shift", "bin"))


def _summed(rows: Array, columns: tuple[str, ...]) -> Array:
    """Sorts rows by these columns and adds the counts of equal ones."""
    rows = rows[np.lexsort([rows[column] for column in reversed(columns)])]
    if not len(rows):
        return rows
    new = np.ones(len(rows), bool)
    new[1:] = np.logical_or.reduce([rows[column][1:] != rows[column][:-1] for column in columns])
    starts = np.flatnonzero(new)
    kept = rows[starts]
    kept["count"] = np.add.reduceat(rows["count"], starts)
    return kept


@dataclass(frozen=True)
class _Best:
    """The best offset of each pair; all arrays have one row per pair."""

    one: Array
    other: Array
    shift: Array
    matches: Array
    """Fingerprints in common at that offset."""
    bins: Array
    """Intervals of `one` that contain some of them."""


def _best_shift(rows: Array) -> _Best:
    rows = _summed(rows, ("key", "shift", "bin"))
    totals = _summed(rows, ("key", "shift"))
    matches = totals["count"].astype(np.int64)
    # neighbouring offsets count too, since copies may not be cut at whole frames
    near = (totals["key"][1:] == totals["key"][:-1]) & (totals["shift"][1:] == totals["shift"][:-1] + 1)
    matches[:-1] += np.where(near, totals["count"][1:], 0)
    starts = np.unique(_first_of_run(totals["key"]))
    pairs = len(starts)
    pair_of_total = np.repeat(np.arange(pairs), np.diff([*starts, len(totals)]))
    # the first offset of each pair with the most matches
    order = np.lexsort([np.arange(len(totals)), -matches, pair_of_total])
    best = order[starts] if pairs else order
    key, shift = totals["key"][best], totals["shift"][best].astype(np.int64)
    pair_of_row = np.searchsorted(key, rows["key"])
    apart = rows["shift"] - shift[pair_of_row] if pairs else rows["shift"]
    there = (apart == 0) | (apart == 1)
    covered = np.unique(pair_of_row[there].astype(np.uint64) << np.uint64(32) | rows["bin"][there])
    bins = np.bincount((covered >> np.uint64(32)).astype(np.int64), minlength=pairs)
    one, other = (key >> np.uint64(32)).astype(np.int64), (key & np.uint64(0xFFFFFFFF)).astype(np.int64)
    return _Best(one, other, shift, matches[best], bins)
