"""Licences of a data set of which one file is damaged."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_pipeline.shards.licences import FOLDER, read_licences, record_licences


@pytest.mark.parametrize("content", [b"", b'{"corpus": "o', b"\xff", b"[]", b"[" * 10**5])
def test_a_damaged_licence_hides_no_other(tmp_path: Path, content: bytes) -> None:
    record_licences(str(tmp_path), {"one": "MIT", "two": "CC0-1.0"})
    (tmp_path / FOLDER / "0.json").write_bytes(content)
    assert read_licences(str(tmp_path)) == {"one": "MIT", "two": "CC0-1.0"}
