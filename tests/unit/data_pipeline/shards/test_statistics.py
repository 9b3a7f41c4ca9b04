"""SegmentStatistics of segments come from one file for all indexes that it has, and from the other indexes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data_pipeline.core.storage import FileStore
from data_pipeline.shards import statistics
from data_pipeline.shards.records import done_records, read_index
from data_pipeline.shards.statistics import PACK, SegmentAmount, SpeakerKey, statistics_of, write_columns
from tests.support.tiny_shards import sounds, write_shards


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Writes five shards of three segments; row groups of the pack have two shards."""
    monkeypatch.setattr(statistics, "FEWEST", 2)
    monkeypatch.setattr(statistics, "GROUP_ROWS", 5)
    monkeypatch.setattr(statistics, "MOST_PARTS", 2)
    return str(write_shards(tmp_path, [sounds([2.0, 3.0, 4.0 + n], corpus=f"c{n % 2}") for n in range(5)]))


def counted(root: str) -> tuple[dict[SpeakerKey, SegmentAmount], list[int]]:
    found = statistics_of([(root, done_records(root))])
    return found.speakers, sorted(found.values("n_samples").tolist())


def test_columns_in_the_pack_are_not_read_again(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tables = [read_index(root, record) for record in done_records(root)]
    before = counted(root)
    assert before[1] == sorted(np.concatenate([table["n_samples"].to_numpy() for table in tables]).tolist())
    assert sum(amount.samples for amount in before[0].values()) == sum(before[1])
    write_columns(root, done_records(root))
    monkeypatch.setattr(statistics, "read_index", lambda *_: pytest.fail("an index was read"))
    assert counted(root) == before
    write_columns(root, done_records(root))


@pytest.mark.parametrize("damage", ["flipped", "truncated", "stale"])
def test_a_damaged_or_old_pack_changes_no_figure(root: str, damage: str) -> None:
    before = counted(root)
    write_columns(root, done_records(root)[: 3 if damage == "stale" else 5])
    pack = Path(FileStore(root).path(PACK))
    content = bytearray(pack.read_bytes())
    if damage == "flipped":
        content[len(content) // 5] ^= 255
    pack.write_bytes(content[: len(content) // 2] if damage == "truncated" else content)
    assert counted(root) == before


def test_a_missing_tar_is_an_error_although_its_columns_are_packed(root: str) -> None:
    write_columns(root, done_records(root))
    records = done_records(root)
    next(Path(root).glob("*.tar")).unlink()
    with pytest.raises(ValueError, match="missing"):
        statistics_of([(root, records)])
