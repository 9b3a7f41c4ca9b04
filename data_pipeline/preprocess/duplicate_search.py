"""Who shares what, among more recordings than fit into memory: rows are spread over files by the hash of what they hold
(as LSH spreads bands over buckets), and one file at a time is sorted. Memory is bounded by `ROWS`, whatever the corpus.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Final

import numpy as np
import numpy.typing as npt

from data_pipeline.core.schema import about, config

Array = npt.NDArray[Any]
Table = tuple[npt.NDArray[np.uint32], list[Any]]
"""Owners (numbers of recordings) of some rows, and Arrow columns of as many rows."""
ROWS: Final = 4_000_000
"""Rows of a file on average; sorting one takes about 100 bytes a row."""
FILES: Final = 64
"""So many files at least; more follow from the number of recordings."""
NEIGHBOURS: Final = 8
"""A key of many recordings is compared with that many next ones, and with the first."""
PRINT: Final = np.dtype([("key", "<u8"), ("owner", "<u4"), ("frame", "<u4")])
VOTE: Final = np.dtype([("key", "<u8"), ("shift", "<i4"), ("count", "<u4")])
HASH: Final = np.dtype([("key", "S64"), ("owner", "<u4")])


@config
class DedupConfig:
    """Recordings that are there twice; finding them reads the whole corpus once more, before shards are written."""

    exact: Annotated[bool, about("leave out recordings whose decoded audio is the same, sample by sample")] = False
    near: Annotated[bool, about("leave out recordings of the same sound at another gain, codec or offset")] = False
    min_matches: Annotated[int, about("fingerprints that two recordings must share at one offset", ge=2)] = 4
    min_share: Annotated[
        float, about("and which share of the shorter recording's fingerprints that must be", gt=0, le=1)
    ] = 0.01


class Spread:
    """Rows of one dtype in `files` files; equal hashes meet in one file."""

    def __init__(self, folder: Path, name: str, dtype: np.dtype[Any], files: int) -> None:
        self.paths = [folder / f"{name}{number}" for number in range(files)]
        self.dtype = dtype

    def add(self, rows: Array, hashes: npt.NDArray[np.uint64]) -> None:
        """Appends each row to the file that its hash names."""
        spread = (hashes * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(40)
        bucket = spread % np.uint64(len(self.paths))
        order = np.argsort(bucket, kind="stable")
        edges = np.searchsorted(bucket[order], np.arange(len(self.paths) + 1, dtype=np.uint64))
        for path, start, end in zip(self.paths, edges, edges[1:], strict=False):
            if end > start:
                with path.open("ab") as file:
                    rows[order[start:end]].tofile(file)

    def parts(self) -> Iterator[Array]:
        """The rows of one file after the other; each is removed when it was read."""
        for path in self.paths:
            if path.exists():
                rows = np.fromfile(path, self.dtype)
                path.unlink()
                yield rows


def equal_hashes(tables: Iterable[Table], recordings: int, folder: Path) -> Iterator[tuple[int, int]]:
    """(recording, the first one with the same hash) for each that is not the first."""
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


def shared_prints(
    tables: Iterable[Table], recordings: int, config: DedupConfig, folder: Path
) -> Iterator[tuple[int, int]]:
    """Pairs of recordings, smaller number first, that share enough fingerprints at one offset."""
    counts = np.zeros(recordings, np.uint32)
    files = max(FILES, recordings * 200 // ROWS)
    prints, votes = Spread(folder, "prints", PRINT, files), Spread(folder, "votes", VOTE, files)
    for owners, (keys, frames) in tables:
        lengths = np.diff(keys.offsets.to_numpy())
        counts[owners] = lengths
        rows = np.zeros(int(lengths.sum()), PRINT)
        rows["key"], rows["frame"] = keys.flatten().to_numpy(), frames.flatten().to_numpy()
        rows["owner"] = np.repeat(owners, lengths)
        prints.add(rows, rows["key"])
    for rows in prints.parts():
        rows = rows[np.lexsort((rows["owner"], rows["key"]))]
        for left, right in _neighbours(rows["key"]):
            made = _votes(rows[left], rows[right])
            votes.add(made, made["key"])
    for cast in votes.parts():
        one, other, best = _best_shift(cast)
        enough = best >= np.maximum(config.min_matches, config.min_share * np.minimum(counts[one], counts[other]))
        yield from zip(one[enough].tolist(), other[enough].tolist(), strict=True)


def _first_of_run(values: Array) -> npt.NDArray[np.int64]:
    """For each of the sorted values, where the first equal one stands."""
    starts = np.arange(len(values))
    starts[1:][values[1:] == values[:-1]] = 0
    return np.maximum.accumulate(starts)


def _neighbours(keys: Array) -> Iterator[tuple[Array, Array]]:
    """Pairs of places of equal keys, which are sorted: each with the next ones, and with the first of its run."""
    first, here = _first_of_run(keys), np.arange(len(keys))
    for step in range(1, NEIGHBOURS + 1):
        right = here[step:][first[step:] == first[: len(keys) - step]] if step < len(keys) else here[:0]
        yield right - step, right
    far = here[here - first > NEIGHBOURS]
    yield first[far], far


def _votes(left: Array, right: Array) -> Array:
    """One row for each pair and shift, with its count; `key` holds the smaller owner, then the other."""
    different = left["owner"] != right["owner"]
    left, right = left[different], right[different]
    rows = np.zeros(len(left), VOTE)
    rows["key"] = left["owner"].astype(np.uint64) << np.uint64(32) | right["owner"].astype(np.uint64)
    rows["shift"] = right["frame"].astype(np.int64) - left["frame"].astype(np.int64)
    rows["count"] = 1
    return _summed(rows)


def _summed(rows: Array) -> Array:
    rows = rows[np.lexsort((rows["shift"], rows["key"]))]
    if not len(rows):
        return rows
    new = np.ones(len(rows), bool)
    new[1:] = (rows["key"][1:] != rows["key"][:-1]) | (rows["shift"][1:] != rows["shift"][:-1])
    starts = np.flatnonzero(new)
    kept = rows[starts]
    kept["count"] = np.add.reduceat(rows["count"], starts)
    return kept


def _best_shift(rows: Array) -> tuple[Array, Array, Array]:
    """(one, other, matches at the best offset) of each pair."""
    rows = _summed(rows)
    matches = rows["count"].astype(np.int64)
    # a frame's neighbour offset counts too: copies need not be cut at whole frames
    near = (rows["key"][1:] == rows["key"][:-1]) & (rows["shift"][1:] == rows["shift"][:-1] + 1)
    matches[:-1] += np.where(near, rows["count"][1:], 0)
    starts = np.unique(_first_of_run(rows["key"]))
    best = np.maximum.reduceat(matches, starts) if len(starts) else matches
    key = rows["key"][starts]
    return (key >> np.uint64(32)).astype(np.int64), (key & np.uint64(0xFFFFFFFF)).astype(np.int64), best
