"""JSON Lines files: damaged lines are counted, later ones still read, and appending never joins a partial line."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from data_pipeline.core.jsonl import Tail, append_row, append_rows, parse, read, read_rows


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


@pytest.mark.parametrize("torn", [False, True])
def test_a_full_disk_leaves_no_part_of_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, torn: bool) -> None:
    path, real, space = tmp_path / "rows.jsonl", os.write, [20]
    path.write_text('{"a": 1}\n' + '{"torn' * torn)
    before = path.read_bytes()

    def write(handle: int, content: bytes) -> int:
        if not space[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        count = real(handle, content[: space[0]])
        space[0] -= count
        return count

    monkeypatch.setattr(os, "write", write)
    with pytest.raises(OSError, match="No space left"):
        append_rows(path, [{"b": 2}, {"c": "x" * 40}])
    assert path.read_bytes() == before
    space[0] = 1_000
    append_rows(path, [{"b": 2}, {"c": 3}])
    assert read(path).rows == [{"a": 1}, {"b": 2}, {"c": 3}]
    assert read(path).bad_lines == ((2,) if torn else ())
