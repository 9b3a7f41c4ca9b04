"""SHA-256 of files."""

from __future__ import annotations

import hashlib
from pathlib import Path

from data_pipeline.core.atomic_files import sha256_of


def test_sha256_of_a_path_equals_that_of_an_open_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"abc" * 100_000)
    with path.open("rb") as file:
        assert sha256_of(file) == sha256_of(path) == hashlib.sha256(b"abc" * 100_000).hexdigest()
