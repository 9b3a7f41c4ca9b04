"""Tables of unit vectors, on disk and searched by cosine."""

from __future__ import annotations

import importlib.util
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.core.atomic_files import write_atomically
from data_pipeline.core.schema import ConfigError

Vectors = npt.NDArray[np.float32]
MODEL: Final = b"auricle.model"
"""Key of the Parquet metadata with the sha256 of the weights, and the head."""
COLUMNS: Final = ("kind", "name", "place")
BLOCK: Final = 65_536
"""Rows that are compared at once."""


@dataclass(frozen=True)
class VectorTable:
    """N vectors. model: sha256 of the weights and name of the head that made them."""

    model: str
    kinds: tuple[str, ...]
    names: tuple[str, ...]
    places: tuple[str, ...]
    vectors_NE: Vectors

    def __len__(self) -> int:
        return len(self.kinds)

    def write(self, path: Path) -> None:
        """Writes NAME.parquet, or NAME.npy with NAME.jsonl. Raises OSError."""
        path.parent.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        if path.suffix == ".npy":
            np.save(buffer, self.vectors_NE, allow_pickle=False)
            rows = zip(self.kinds, self.names, self.places, strict=True)
            lines = [json.dumps(dict(zip(COLUMNS, row, strict=True)), ensure_ascii=False) for row in rows]
            write_atomically(path.with_suffix(".jsonl"), "".join(f"{line}\n" for line in lines))
        else:
            pq.write_table(self._table(), buffer, compression="zstd")
        write_atomically(path, buffer.getvalue())

    def _table(self) -> pa.Table:
        values = pa.array(np.ascontiguousarray(self.vectors_NE).reshape(-1), pa.float32())
        vectors = pa.FixedSizeListArray.from_arrays(values, self.vectors_NE.shape[1])
        texts = [pa.array(column, pa.string()) for column in (self.kinds, self.names, self.places)]
        return pa.table([*texts, vectors], names=[*COLUMNS, "vector"]).replace_schema_metadata(
            {MODEL: self.model.encode()}
        )

    def search(self, query_E: Vectors, top: int, kinds: Sequence[str] = ()) -> list[tuple[int, float]]:
        """Returns (row, cosine) of the vectors nearest to a unit vector, the nearest first.

        Args:
            query_E: the vector.
            top: number of results.
            kinds: of the results; empty: all.
        """
        rows = np.array([row for row, kind in enumerate(self.kinds) if not kinds or kind in kinds], np.int64)
        if not len(rows):
            return []
        found = _nearest(self.vectors_NE[rows], query_E, min(top, len(rows)))
        return [(int(rows[row]), float(cosine)) for row, cosine in found]


def _nearest(vectors_NE: Vectors, query_E: Vectors, top: int) -> list[tuple[int, float]]:
    if importlib.util.find_spec("faiss") is not None:
        import faiss

        index = faiss.IndexFlatIP(vectors_NE.shape[1])
        index.add(np.ascontiguousarray(vectors_NE))
        cosines, rows = index.search(query_E[None], top)
        return list(zip(rows[0].tolist(), cosines[0].tolist(), strict=True))
    cosine_N = np.concatenate(
        [vectors_NE[first : first + BLOCK] @ query_E for first in range(0, len(vectors_NE), BLOCK)]
    )
    best = np.argsort(-cosine_N, kind="stable")[:top]
    return [(int(row), float(cosine_N[row])) for row in best]


def read_vectors(path: Path) -> VectorTable:
    """Reads a table that `VectorTable.write` made.

    Raises:
        ConfigError: the file is not such a table; NPY files have no names.
    """
    try:
        table = pq.ParquetFile(path).read(use_threads=False)
        columns: dict[str, Any] = {name: tuple(table.column(name).to_pylist()) for name in COLUMNS}
        vector = table.column("vector").combine_chunks()
        flat = vector.flatten().to_numpy(zero_copy_only=False)
        vectors_NE = np.ascontiguousarray(flat.reshape(len(table), -1), np.float32)
        model = (table.schema.metadata or {})[MODEL].decode()
    except (OSError, ValueError, KeyError, AttributeError, TypeError, pa.ArrowException) as error:
        raise ConfigError(
            f"index={path}: not a table of `auricle embed out=NAME.parquet` ({type(error).__name__}: {error})"
        ) from None
    if not np.isfinite(vectors_NE).all():
        raise ConfigError(f"index={path}: holds vectors that are not finite; make it again with `auricle embed`")
    return VectorTable(model, columns["kind"], columns["name"], columns["place"], vectors_NE)
