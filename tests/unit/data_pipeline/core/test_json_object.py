"""JSON objects in files: whatever else a file holds is an error with a reason, and never another exception."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_pipeline.core.json_object import read_object


def test_an_object_is_read(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text('{"ä": [1, null]}', encoding="utf-8")
    assert read_object(file) == {"ä": [1, None]}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"[1, 2]", r"must contain a JSON object, not \[1, 2\]"),
        (b"", "Expecting value"),
        (b"\xff\xfe{", "."),
        (b'{"a":' * 200_000, "nested too deeply"),
    ],
)
def test_anything_else_is_a_value_error(content: bytes, said: str, tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=said):
        read_object(file)


def test_a_missing_file_is_known_as_such(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_object(tmp_path / "a.json")
