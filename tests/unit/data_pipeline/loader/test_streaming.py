"""Tars without an index, streamed through webdataset: the plan reader's batch type without its guarantees."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.core.schema import ConfigError
from data_pipeline.core.types import Cursor, Step, StepReader
from data_pipeline.loader.reader import open_reader
from data_pipeline.loader.streaming import StreamReader
from data_pipeline.loader.tar_urls import shard_urls
from data_pipeline.sampling.config import DataConfig
from data_pipeline.shards.local import ShardError
from data_pipeline.text.tokenizer import write_tokens
from tests.support.foreign_tars import encoded, wave, write_foreign, write_tar
from tests.support.processes import live_workers

BATCH: dict[str, Any] = {
    "reader": "webdataset", "batch_seconds": 6.0, "micro_batches": 2, "min_seconds": 0.1, "max_seconds": 0.5,
    "shuffle_buffer": 20,
}  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_foreign(tmp_path_factory.mktemp("tars"), tars=4, per_tar=15)


def reader_of(shards: object, rank: int = 0, world: int = 1, **values: Any) -> StepReader:
    config = DataConfig(**{"shards": str(shards), "workers": 0, **BATCH, **values})
    return StreamReader(config, 3, rank, world)


def take(reader: StepReader, count: int, cursor: Cursor | None = None) -> list[Step]:
    try:
        return list(itertools.islice(reader.steps(cursor), count))
    finally:
        reader.close()


def keys(steps: list[Step]) -> set[str]:
    return {key for step in steps for batch in step.batches for key in batch.keys}


def test_batches_hold_crops_of_the_members_with_their_labels(root: Path) -> None:
    steps = take(reader_of(root, labels=("text", "mood")), 20)
    assert keys(steps) == {f"utt{n:04d}" for n in range(60)}
    for step in steps:
        assert [batch.micro_batch for batch in step.batches] == [0, 1]
        assert step.samples == sum(int(batch.lengths_B.sum()) for batch in step.batches)
        for batch in step.batches:
            assert batch.lengths_B.max() == 8_000
            for row, key in enumerate(batch.keys):
                n = int(key.removeprefix("utt"))
                text = f"words {n}" if batch.lengths_B[row] < 8_000 else ""  # crops lose their text
                assert (batch.labels["text"][row], batch.labels["mood"][row]) == (text, "calm")
                if n % 15 % 5 < 2:  # lossless
                    crop, whole = batch.wave_BT[row].numpy(), wave(n) / np.float32(32768)
                    assert any(np.array_equal(whole[at : at + 8_000], crop) for at in range(len(whole) - 8_000 + 1))
    seconds = np.mean([step.samples for step in steps]) / 16_000
    assert seconds == pytest.approx(BATCH["batch_seconds"], rel=0.1)


def test_ranks_and_workers_share_the_shards(root: Path) -> None:
    ranks = [take(reader_of(root, rank, 2, workers=2), 6) for rank in range(2)]
    assert not keys(ranks[0]) & keys(ranks[1])
    assert [batch.micro_batch for rank in ranks for batch in rank[0].batches] == [0, 1]
    assert not live_workers()


def test_a_resume_warns_that_it_is_inexact_and_continues_the_step_count(root: Path) -> None:
    said: list[str] = []
    config = DataConfig(shards=str(root), workers=0, **BATCH)
    first = take(StreamReader(config, 3, 0, 1, say=said.append), 3)
    assert not said
    again = take(StreamReader(config, 3, 0, 1, say=said.append), 3, first[-1].after)
    assert len(said) == 1
    assert "not exactly resumable" in said[0]
    assert [step.after.step for step in again] == [4, 5, 6]
    assert [step.batches[0].keys for step in again] != [step.batches[0].keys for step in first]
    with pytest.raises(ConfigError, match=r"set data\.reader=plan"):
        take(reader_of(root), 1, Cursor("0123456789abcdef", 0, 5))


@pytest.mark.parametrize(
    "url", ["pipe:cat x.tar", "pipe:rm -rf /|.tar", "gopen:x.tar", "ssh://h/x.tar", "a::s3://x.tar"]
)
def test_urls_that_run_commands_are_rejected(url: str) -> None:
    with pytest.raises(ConfigError, match="refused"):
        shard_urls([url])


def test_shards_are_given_by_braces_lists_or_folders(root: Path) -> None:
    assert shard_urls(["s3://b/a-{000..002}.tar /x/b.tar"]) == [
        "s3://b/a-000.tar", "s3://b/a-001.tar", "s3://b/a-002.tar", "/x/b.tar",
    ]  # fmt: skip
    assert [Path(url).name for url in shard_urls([str(root)])] == [f"part-{n:03d}.tar" for n in range(4)]
    pattern = f"{root}/part-{{000..001}}.tar"
    assert keys(take(reader_of(pattern), 12)) == {f"utt{n:04d}" for n in range(30)}


def test_settings_that_need_an_index_are_rejected(root: Path) -> None:
    for values in ({"targets": {"u": "x"}}, {"mix_alpha": 0.5}):
        with pytest.raises(ConfigError, match="auricle shards index"):
            reader_of(root, **values)
    with pytest.raises(ConfigError, match=r"set data\.reader=plan"):
        open_reader(DataConfig(shards=str(root), **BATCH), 3, 0, 1)


def test_texts_are_compared_with_tokens_and_symbols_before_the_first_step(root: Path, tmp_path: Path) -> None:
    reader = reader_of(root)
    assert isinstance(reader, StreamReader)
    assert set(reader.some_texts("text")) <= {f"words {n}" for n in range(60)}
    assert len({int(text.split()[1]) // 15 for text in reader.some_texts("text")}) == 4, "of all tars"
    assert reader.some_texts("missing") == []
    tokens = {"kind": "characters", "label": "text", "case": "lower"}
    write_tokens(str(tmp_path / "greek"), tokens | {"symbols": ["α", "β"]})
    with pytest.raises(ConfigError, match=r"data\.tokens\.text: none of \d+ texts has a token, such as 'words"):
        reader_of(root, tokens={"text": str(tmp_path / "greek")})
    (tmp_path / "broken.tar").write_bytes(b"nothing")
    assert len(StreamReader(reader.config, 0, 0, 1).some_texts("text")) == len(reader.some_texts("text"))
    broken = StreamReader(DataConfig(shards=str(tmp_path / "broken.tar"), workers=0, **BATCH), 0, 0, 1)
    assert broken.some_texts("text") == []


def test_bad_shards_and_members_end_the_run_or_are_counted(tmp_path: Path) -> None:
    root = write_foreign(tmp_path, tars=2, per_tar=15)
    stereo = encoded(np.stack([wave(1), wave(2)], axis=1))
    write_tar(root / "part-002.tar", [("s.flac", stereo), ("b.flac", b"noise"), ("good.flac", encoded(wave(70)))])
    whole = (root / "part-001.tar").read_bytes()
    (root / "part-001.tar").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ShardError, match=r"part-00\d\.tar"):
        take(reader_of(root), 20)
    steps = take(reader_of(f"{root}/part-{{000..003}}.tar", on_bad_shard="skip"), 20)
    assert {"good", "utt0000", "utt0014"} <= keys(steps)
    assert "s" not in keys(steps)
    assert sum(step.skipped for step in steps) > 0


def test_shards_without_any_sample_end_the_run(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("readme", b"x")])
    with pytest.raises(ShardError, match="holds samples"):
        take(reader_of(tmp_path, on_bad_shard="skip"), 1)
