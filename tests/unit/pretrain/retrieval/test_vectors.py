"""Tables of vectors: what was written is read, the nearest are found, and other files are refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from data_pipeline.core.schema import ConfigError
from pretrain.retrieval import vectors
from pretrain.retrieval.vectors import VectorTable, read_vectors

RNG = np.random.default_rng(3)


def table(count: int = 50, dim: int = 8) -> VectorTable:
    """Returns unit vectors of random directions, with names that are hard to store."""
    found_NE = RNG.normal(size=(count, dim)).astype(np.float32)
    found_NE /= np.linalg.norm(found_NE, axis=1, keepdims=True)
    names = tuple(f'{number}\n"\t,é\u2028' for number in range(count))
    kinds = tuple(("speech", "text")[number % 2] for number in range(count))
    return VectorTable("weights/head", kinds, names, ("",) * count, found_NE)


def test_a_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    written = table()
    written.write(tmp_path / "folder" / "index.parquet")
    found = read_vectors(tmp_path / "folder" / "index.parquet")
    assert (found.model, found.kinds, found.names, found.places) == (
        written.model,
        written.kinds,
        written.names,
        written.places,
    )
    assert np.array_equal(found.vectors_NE, written.vectors_NE)


def test_npy_has_a_line_for_each_vector(tmp_path: Path) -> None:
    written = table(3)
    written.write(tmp_path / "index.npy")
    assert np.array_equal(np.load(tmp_path / "index.npy"), written.vectors_NE)
    lines = (tmp_path / "index.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    assert [json.loads(line)["name"] for line in lines] == list(written.names)


@pytest.mark.parametrize("with_faiss", [True, False])
def test_a_search_equals_a_sort_by_cosine(with_faiss: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if with_faiss:
        pytest.importorskip("faiss")
    else:
        monkeypatch.setattr(vectors.importlib.util, "find_spec", lambda name: None)
        monkeypatch.setattr(vectors, "BLOCK", 7)
    searched, query_E = table(), table(1).vectors_NE[0]
    cosine_N = searched.vectors_NE @ query_E
    found = searched.search(query_E, 9)
    assert [row for row, _ in found] == np.argsort(-cosine_N, kind="stable")[:9].tolist()
    np.testing.assert_allclose([cosine for _, cosine in found], np.sort(cosine_N)[::-1][:9], rtol=1e-5)
    texts = searched.search(query_E, 99, ["text"])
    assert sorted(row for row, _ in texts) == list(range(1, 50, 2))
    assert searched.search(query_E, 5, ["image"]) == []


def test_other_files_are_refused(tmp_path: Path) -> None:
    plain, cut, infinite = (tmp_path / name for name in ("plain.parquet", "cut.parquet", "infinite.parquet"))
    pq.write_table(pq.read_table(_written(tmp_path, table(2))).drop(["vector"]), plain)
    cut.write_bytes(_written(tmp_path, table(2)).read_bytes()[:-20])
    broken = table(2)
    broken.vectors_NE[1, 0] = np.inf
    _written(tmp_path, broken).rename(infinite)
    for file in (plain, cut, tmp_path / "missing.parquet"):
        with pytest.raises(ConfigError, match=rf"index=.*{file.name}: not a table of `auricle embed"):
            read_vectors(file)
    with pytest.raises(ConfigError, match="not finite"):
        read_vectors(infinite)


def _written(folder: Path, made: VectorTable) -> Path:
    made.write(folder / "made.parquet")
    return folder / "made.parquet"
