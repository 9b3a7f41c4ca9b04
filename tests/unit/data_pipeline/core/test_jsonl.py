"""JSON Lines files: damaged lines are counted, later ones still read, and appending never joins a partial line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_pipeline.core.jsonl import Tail, append_row, parse, read, read_rows


@pytest.mark.parametrize(
    "bad",
    [
        b'{"step": 2',
        b"[1, 2]",
        b'"text"',
        b"null",
        b"\xff\xfe{}",
        b"[" * 100_000,
        b'{"a": ' * 50_000 + b"1" + b"}" * 50_000,
    ],
)
def test_a_bad_line_is_counted_and_the_other_lines_are_read(bad: bytes) -> None:
    found = parse(b'{"step": 1}\n' + bad + b'\n\n{"step": 3}\n')
    assert found.rows == [{"step": 1}, {"step": 3}]
    assert found.bad_lines == (2,)


def test_only_newlines_end_a_line() -> None:
    row = {"text": "one\u2028two\u0085three"}
    assert parse(json.dumps(row, ensure_ascii=False).encode() + b"\r\n").rows == [row]


def test_append_terminates_a_partial_last_line_first(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2, "lo')
    append_row(path, {"step": 3})
    append_row(path, {"step": 4})
    found = read(path)
    assert [row["step"] for row in found.rows] == [1, 3, 4]
    assert found.bad_lines == (2,)


def test_a_missing_file_has_no_rows(tmp_path: Path) -> None:
    assert read_rows(tmp_path / "none.jsonl") == []
    assert Tail(tmp_path / "none.jsonl").read() == []


def test_tail_waits_for_complete_lines_and_follows_a_replaced_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    tail = Tail(path)
    path.write_text('{"step": 1}\n{"step"')
    assert tail.read() == [{"step": 1}]
    with path.open("a") as file:
        file.write(": 2}\n")
    assert tail.read() == [{"step": 2}]
    other = tmp_path / "other"
    other.write_text('{"step": 7}\n')
    other.replace(path)
    assert tail.read() == tail.rows == [{"step": 7}]
