"""Held-out micro-batches: a fixed choice, the same for any number of ranks."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.audio.augmentation import AugmentConfig
from data_pipeline.core.schema import ConfigError
from data_pipeline.core.types import SAMPLE_RATE
from data_pipeline.loader.held_out import HeldOut, read_held_out
from data_pipeline.sampling.config import DataConfig
from tests.support.tiny_shards import sounds, wave_of, write_shards

LENGTHS = [1.5, 2.5, 3, 3.5, 4, 6, 2.1, 9]


def settings(root: Path, **more: object) -> DataConfig:
    shards = [sounds(LENGTHS, corpus="a"), sounds(LENGTHS[::-1], corpus="b")]
    valid = write_shards(root / "valid", shards) if not (root / "valid").exists() else root / "valid"
    given = {"batch_seconds": 40.0, "micro_batches": 4, "max_seconds": 5.0, **more}
    return DataConfig(shards=str(root / "train"), valid=str(valid), **given)  # type: ignore[arg-type]


def counted(held_out: HeldOut) -> list[tuple[str, ...]]:
    return [batch.keys for batch in held_out.batches[: held_out.counted]]


def test_the_micro_batches_do_not_depend_on_the_number_of_ranks(tmp_path: Path) -> None:
    config = settings(tmp_path)
    whole = read_held_out(config, 0, 1)
    assert whole.segments == 14, "the two of 1.5 s are below data.min_seconds"
    assert all(batch.wave_BT.numel() <= 10 * SAMPLE_RATE for batch in whole.batches), "as large as in training"
    for world in (2, 3, 20):
        parts = [read_held_out(config, rank, world) for rank in range(world)]
        assert {len(part.batches) for part in parts} == {-(-len(whole.batches) // world)}, "the ranks stay in lockstep"
        found = [keys for part in parts for keys in counted(part)]
        assert sorted(found) == sorted(counted(whole))
        assert {(part.segments, part.seconds) for part in parts} == {(whole.segments, whole.seconds)}


def test_the_audio_is_that_of_the_shards_without_augmentation(tmp_path: Path) -> None:
    config = settings(tmp_path, augment=AugmentConfig(speeds=(0.9, 1.1)))
    segments = {sound.key: wave_of(sound) for corpus in "ab" for sound in sounds(LENGTHS, corpus=corpus)}
    segments |= {sound.key: wave_of(sound) for sound in sounds(LENGTHS[::-1], corpus="b")}
    for batch in read_held_out(config, 0, 1).batches:
        for wave_T, length, key in zip(batch.wave_BT.numpy(), batch.lengths_B.tolist(), batch.keys, strict=True):
            whole = (segments[key] / 2.0**15).astype(np.float32)
            starts = [0] if length == len(whole) else np.flatnonzero(whole[: len(whole) - length + 1] == wave_T[0])
            assert any(np.array_equal(whole[start : start + length], wave_T[:length]) for start in starts)


def test_so_many_seconds_are_chosen_at_random_and_always_the_same(tmp_path: Path) -> None:
    chosen = read_held_out(settings(tmp_path, valid_seconds=12.0), 0, 1)
    assert 12 <= chosen.seconds < 12 + 5
    keys = {key for keys in counted(chosen) for key in keys}
    assert {key[0] for key in keys} == {"a", "b"}
    assert counted(read_held_out(settings(tmp_path, valid_seconds=12.0), 0, 1)) == counted(chosen)


def test_unusable_held_out_audio_is_a_wrong_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no segment is long enough"):
        read_held_out(settings(tmp_path, min_seconds=20.0, max_seconds=30.0, batch_seconds=400.0), 0, 1)
    with pytest.raises(ConfigError, match="there is no shard folder"):
        read_held_out(DataConfig(shards="a", valid=str(tmp_path / "nowhere")), 0, 1)
    with pytest.raises(ValueError, match=r"is one of data\.shards"):
        DataConfig(shards="a", valid="a")


@pytest.mark.parametrize("valid", ["valid/", "../{}/valid", "./valid"])
def test_held_out_audio_is_not_trained_on_however_it_is_written(
    valid: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = settings(tmp_path)
    monkeypatch.chdir(tmp_path)
    named = valid.format(tmp_path.name).replace("valid", Path(whole.valid[0]).name)
    for shards in (f"{tmp_path}/*", whole.valid[0]):
        with pytest.raises(ConfigError, match=r"data\.valid=.* is also trained on, by data\.shards="):
            read_held_out(dataclasses.replace(whole, shards=(shards,), valid=(named,)), 0, 1)
