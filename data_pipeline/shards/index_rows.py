"""Validates the index of a shard before its numbers are used to address bytes or to plan steps."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

BLOCK: Final = 512
"""Bytes of a tar block; every member begins at a multiple of it."""
MOST_SAMPLES: Final = 1 << 31
"""Upper bound of the audio samples of a segment (37 hours), since lengths are stored in 32 bits."""
NUMBERS: Final = ("offset", "size", "payload_offset", "payload_size", "n_samples")
MOST_NAMES: Final = 1 << 12
"""Largest number of corpora, and of languages, in one shard: they name data sets, and each is sampled separately."""
TEXTS: Final = ("key", "suffix", "corpus", "language")
INDEX_ERRORS: Final = (OSError, ValueError, KeyError, TypeError, OverflowError, NotImplementedError, pa.ArrowException)
"""Exceptions that pyarrow raises for a damaged Parquet file."""


def numbers(table: pa.Table, column: str) -> Any:
    """Returns an integer column as int64. Raises ValueError if it is missing, of another type, or has nulls."""
    values = _column(table, column)
    if not pa.types.is_integer(values.type):
        raise ValueError(f"column {column} has type {values.type}, not an integer type")
    if values.null_count:
        raise ValueError(f"column {column} has {values.null_count} nulls")
    return values.cast(pa.int64()).to_numpy()


def validate_lengths(table: pa.Table) -> None:
    """Raises ValueError unless lengths and groups are valid for planning.

    0 < n_samples < 2**31; corpora and languages are texts, at most MOST_NAMES.
    """
    n_samples = numbers(table, "n_samples")
    _require(n_samples, (n_samples > 0) & (n_samples < MOST_SAMPLES), "n_samples", f"1 to {MOST_SAMPLES - 1}")
    for name in ("corpus", "language"):
        _text(table, name)
        _few(table.column(name), name)


def validate_index(table: pa.Table, size: int) -> None:
    """Raises ValueError naming the first row and column with an invalid value for a shard of `size` bytes."""
    validate_lengths(table)
    offset, length, payload_offset, payload_size, _ = (numbers(table, name) for name in NUMBERS)
    _require(offset, (offset >= 0) & (offset <= size) & (offset % BLOCK == 0), "offset", f"0 to {size} in blocks")
    _require(length, (length > 0) & (length <= size - offset), "size", "inside the shard")
    inside = (payload_offset >= offset) & (payload_offset <= offset + length)
    _require(payload_offset, inside, "payload_offset", "inside its sample")
    inside = (payload_size > 0) & (payload_size <= offset + length - payload_offset)
    _require(payload_size, inside, "payload_size", "inside its sample")
    for name in TEXTS:
        _text(table, name)
    keys = table.column("key")
    if keys.null_count:
        raise ValueError(f"column key has {keys.null_count} nulls")
    if table.num_rows and pc.count_distinct(keys).as_py() != table.num_rows:
        raise ValueError("column key has the same key twice")


def _require(values: Any, good: Any, column: str, allowed: str) -> None:
    if not good.all():
        row = int(np.flatnonzero(~good)[0])
        raise ValueError(f"row {row}: {column}={int(values[row])} is not {allowed}")


def _text(table: pa.Table, column: str) -> None:
    kind = _column(table, column).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)):
        raise ValueError(f"column {column} has type {kind}, not text")


def _few(values: pa.ChunkedArray, column: str) -> None:
    if pa.types.is_dictionary(values.type):
        chunks = values.unify_dictionaries().chunks
        count = len(chunks[0].dictionary) if chunks else 0
    else:
        count = len(values.unique())
    if count > MOST_NAMES:
        raise ValueError(f"column {column} has {count:,} names, more than {MOST_NAMES:,}; it must name data sets")


def _column(table: pa.Table, column: str) -> pa.ChunkedArray:
    if column not in table.column_names:
        raise ValueError(f"has no column {column}")
    return table.column(column)
