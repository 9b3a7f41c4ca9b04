"""SHA-256 of files, and secret files."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from data_pipeline.core.atomic_files import sha256_of, write_secret


def test_sha256_of_a_path_equals_that_of_an_open_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"abc" * 100_000)
    with path.open("rb") as file:
        assert sha256_of(file) == sha256_of(path) == hashlib.sha256(b"abc" * 100_000).hexdigest()


def test_a_secret_is_read_by_its_owner_alone_and_never_replaced(tmp_path: Path) -> None:
    secrets = [tmp_path / "one", tmp_path / "other"]
    for path in secrets:
        write_secret(path)
    texts = [path.read_text() for path in secrets]
    assert texts[0] != texts[1]
    assert len(bytes.fromhex(texts[0])) == 32
    assert secrets[0].stat().st_mode & 0o777 == 0o600
    with pytest.raises(FileExistsError):
        write_secret(secrets[0])
    assert secrets[0].read_text() == texts[0]
