"""Rows that are sorted on disk come in the same order as in memory."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from data_pipeline.core import external_sort
from data_pipeline.core.external_sort import ExternalSort


@pytest.mark.parametrize("count", [0, 1, 9, 10, 11, 997])
def test_rows_come_in_the_order_of_keys_and_of_addition(
    count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(external_sort, "ROWS", 10)
    monkeypatch.setattr(external_sort, "BLOCK", 3)
    draw, rows = random.Random(count), ExternalSort(tmp_path)
    given = [((draw.randrange(40), "é\udcff"), (number, None, b"x", 0.5, [1])) for number in range(count)]
    for key, row in given:
        rows.add(key, row)
    expected = sorted(given, key=lambda pair: pair[0])  # stable
    assert [list(rows), list(rows)] == [expected, expected], "it can be read repeatedly"
    assert len(rows) == count
    assert not list(tmp_path.iterdir()), "its file has no name"


def test_rows_in_order_are_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(external_sort, "ROWS", 10)
    monkeypatch.setattr("heapq.merge", lambda *runs: pytest.fail("rows in order need no merging"))
    rows = ExternalSort(tmp_path)
    for number in range(95):
        rows.add(number, number)
    assert list(rows) == [(number, number) for number in range(95)]
