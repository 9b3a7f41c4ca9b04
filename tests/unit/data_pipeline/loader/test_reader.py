"""The reader on real tars: the same batches for any workers and ranks, exact resume, faults, no leftover processes."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from data_pipeline.core.schema import ConfigError
from data_pipeline.core.types import Batch, Cursor, Step
from data_pipeline.loader.reader import PlanReader, open_reader
from data_pipeline.sampling.config import DataConfig
from data_pipeline.shards.local import Extent, ShardError, ShardFiles
from tests.support.processes import live_workers
from tests.support.tiny_shards import Sound, sounds, wave_of, write_shards

BATCH = {"batch_seconds": 8.0, "micro_batches": 4, "min_seconds": 0.3, "max_seconds": 1.6, "shuffle_window": 3}


@pytest.fixture(scope="module")
def written() -> list[list[Sound]]:
    lengths = np.random.default_rng(0).uniform(0.2, 2.0, 240).tolist()
    everything = sounds(lengths)
    return [everything[i::6] for i in range(6)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, written: list[list[Sound]]) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards"), written)


def reader_of(root: Path, rank: int = 0, world: int = 1, **values: object) -> PlanReader:
    config = DataConfig(**{"shards": str(root), "workers": 0, **BATCH, **values})  # type: ignore[arg-type]
    return open_reader(config, 7, rank, world)


def take(reader: PlanReader, count: int, cursor: Cursor | None = None) -> list[Step]:
    steps = list(itertools.islice(reader.steps(cursor), count))
    reader.close()
    return steps


def same(a: Batch, b: Batch) -> bool:
    return a.keys == b.keys and a.micro_batch == b.micro_batch and torch.equal(a.wave_BT, b.wave_BT)


def test_audio_equals_what_was_written(corpus: Path, written: list[list[Sound]]) -> None:
    known = {sound.key: sound for shard in written for sound in shard}
    steps = take(reader_of(corpus), 6)
    for step in steps:
        assert step.samples == sum(int(batch.lengths_B.sum()) for batch in step.batches)
        assert step.padded_samples == sum(batch.wave_BT.numel() for batch in step.batches)
        for batch in step.batches:
            for wave, length, key in zip(batch.wave_BT, batch.lengths_B.tolist(), batch.keys, strict=True):
                original = wave_of(known[key]).astype(np.float32) / 32768
                assert not wave[length:].any()
                where = np.flatnonzero(np.all(
                    np.lib.stride_tricks.sliding_window_view(original, length)[:, :8] == wave[:8].numpy(), axis=1
                ))  # fmt: skip
                assert any(np.array_equal(original[at : at + length], wave[:length].numpy()) for at in where)
                assert length == min(known[key].length, 25600)


def test_several_folders_give_the_batches_of_one(tmp_path: Path, corpus: Path, written: list[list[Sound]]) -> None:
    """A list, a pattern and one folder with all shards are one plan, whatever the order of the folders."""
    whole = reader_of(corpus)
    steps = take(whole, 4)
    for number, path in enumerate(sorted(corpus.glob("*.tar"))):
        part = tmp_path / f"part-{number % 3}"
        (part / "_done").mkdir(parents=True, exist_ok=True)
        for name in (path.name, f"{path.name}.idx", f"{path.stem}.parquet", f"_done/{path.stem}.json"):
            shutil.copy(corpus / name, part / name)
    (tmp_path / "part-of-nothing").mkdir()
    folders = [str(tmp_path / f"part-{number}") for number in (2, 0, 1)]
    for given in (folders, str(tmp_path / "part-*")):
        reader = reader_of(corpus, shards=given)
        assert reader.plan_hash == whole.plan_hash
        for found, expected in zip(take(reader, 4), steps, strict=True):
            assert all(same(a, b) for a, b in zip(found.batches, expected.batches, strict=True))
    with pytest.raises(ConfigError, match="no folder with finished shards matches"):
        reader_of(corpus, shards=str(tmp_path / "none-*"))
    with pytest.raises(ConfigError, match="would be read twice"):
        reader_of(corpus, shards=[str(corpus), folders[0]])


def test_wav_crops_read_by_byte_range_give_the_same_batches(
    tmp_path: Path, corpus: Path, written: list[list[Sound]], monkeypatch: pytest.MonkeyPatch
) -> None:
    flac = take(reader_of(corpus), 6)
    sizes: list[int] = []
    read = ShardFiles.read

    def spy(self: ShardFiles, wanted: Sequence[Extent]) -> list[bytes | ShardError]:
        sizes.extend(extent.size for extent in wanted)
        return read(self, wanted)

    monkeypatch.setattr(ShardFiles, "read", spy)
    wav = take(reader_of(write_shards(tmp_path, written, "wav")), 6)
    assert all(same(a, b) for x, y in zip(flac, wav, strict=True) for a, b in zip(x.batches, y.batches, strict=True))
    lengths = [length for step in wav for batch in step.batches for length in batch.lengths_B.tolist()]
    assert sizes[: len(lengths)] == [2 * length for length in lengths]


def test_steps_do_not_depend_on_world_size_or_workers(corpus: Path) -> None:
    alone = take(reader_of(corpus), 5)
    for world, workers in ((1, 2), (2, 0), (2, 3), (4, 1)):
        ranks = [take(reader_of(corpus, rank, world, workers=workers), 5) for rank in range(world)]
        for g, whole in enumerate(alone):
            for j, batch in enumerate(whole.batches):
                assert same(ranks[j % world][g].batches[j // world], batch)
            for steps in ranks:
                got = steps[g]
                assert (got.samples, got.padded_samples, got.after) == (
                    whole.samples,
                    whole.padded_samples,
                    whole.after,
                )


def test_resume_from_any_step_gives_the_remaining_steps(corpus: Path) -> None:
    reader = reader_of(corpus)
    length = reader.plan.layout(0).steps
    whole = take(reader, length + 3)
    assert whole[length - 1].after == Cursor(reader.plan_hash, 1, 0)
    for at in (0, 1, length - 2, length - 1, length, length + 1):
        rest = take(reader_of(corpus), 2, whole[at].after)
        for a, b in zip(whole[at + 1 :], rest, strict=False):
            assert all(same(x, y) for x, y in zip(a.batches, b.batches, strict=True))
    start = time.perf_counter()
    take(reader_of(corpus), 1, Cursor(reader.plan_hash, 10_000, 0))
    assert time.perf_counter() - start < 5


def test_state_dict_continues_where_it_was_taken(corpus: Path) -> None:
    whole = take(reader_of(corpus), 6)
    reader = reader_of(corpus, workers=2)
    steps = reader.steps()
    for _ in range(3):
        next(steps)
    state = reader.state_dict()
    reader.close()
    assert state == {"plan_hash": reader.plan_hash, "epoch": 0, "step": 3}
    other = reader_of(corpus)
    other.load_state_dict(state)
    for a, b in zip(whole[3:], other.steps(), strict=False):
        assert all(same(x, y) for x, y in zip(a.batches, b.batches, strict=True))


def test_the_state_of_another_plan_is_rejected(corpus: Path) -> None:
    cursor = take(reader_of(corpus), 1)[0].after
    with pytest.raises(ConfigError, match="the checkpoint was made with data plan"):
        reader_of(corpus, bucket_ratio=1.2).steps(cursor)
    assert reader_of(corpus, workers=1, prefetch=5, on_bad_shard="skip").plan_hash == cursor.plan_hash


def test_crops_depend_on_seed_epoch_and_key(corpus: Path) -> None:
    first, again = take(reader_of(corpus), 2), take(reader_of(corpus), 2)
    assert all(same(a, b) for x, y in zip(first, again, strict=True) for a, b in zip(x.batches, y.batches, strict=True))
    reader = reader_of(corpus)
    crops = []
    for epoch in (0, 1):
        steps = take(reader, reader.plan.layout(epoch).steps, Cursor(reader.plan_hash, epoch, 0))
        crops.append({k: w[:100] for s in steps for b in s.batches for k, w in zip(b.keys, b.wave_BT, strict=True)})
    assert crops[0].keys() == crops[1].keys()
    assert any(not torch.equal(crops[0][key], crops[1][key]) for key in crops[0])


def test_labels_come_from_index_and_json(corpus: Path) -> None:
    batch = take(reader_of(corpus, labels=("speaker", "corpus", "text", "mood")), 1)[0].batches[0]
    assert batch.labels["text"] == tuple(f"words of {key}" for key in batch.keys)
    assert set(batch.labels["corpus"]) == {"a"}
    assert set(batch.labels["mood"]) == {"calm"}
    assert len(batch.labels["speaker"]) == len(batch.keys)


def test_batches_have_speaker_and_corpus_without_labels_in_the_config(corpus: Path) -> None:
    plain = take(reader_of(corpus), 1)[0].batches[0]
    asked = take(reader_of(corpus, labels=("text", "corpus", "speaker", "language")), 1)[0].batches[0]
    assert list(asked.labels) == ["text", "corpus", "speaker", "language"], "in the order of data.labels"
    known = {name: asked.labels[name] for name in ("speaker", "language", "corpus") if any(asked.labels[name])}
    assert "speaker" in known
    assert dict(plain.labels) == known


def test_an_unknown_label_is_rejected_with_the_nearest_name(corpus: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.labels=speakers: .*did you mean speaker\?"):
        reader_of(corpus, labels=("speakers",))
    with pytest.raises(ConfigError, match=r"data\.labels=moods: .*did you mean mood\?"):
        reader_of(corpus, labels=("text", "moods"))


def test_ranks_that_do_not_divide_the_micro_batches_fill_their_last_round_with_empty_ones(corpus: Path) -> None:
    alone = take(reader_of(corpus), 5)
    ranks = [take(reader_of(corpus, rank, 3), 5) for rank in range(3)]
    for g, whole in enumerate(alone):
        rounds = [batch for number in range(2) for batch in (steps[g].batches[number] for steps in ranks)]
        assert [batch.is_empty for batch in rounds] == [False] * 4 + [True] * 2
        assert all(same(got, batch) for got, batch in zip(rounds, whole.batches, strict=False))
        assert {steps[g].after for steps in ranks} == {whole.after}


def test_an_empty_micro_batch_has_one_row_of_everything(corpus: Path) -> None:
    batch = take(reader_of(corpus), 1)[0].batches[0]
    labelled = dataclasses.replace(
        batch, targets={"units": torch.zeros(len(batch.keys), 7)}, labels={"text": batch.keys}
    )
    empty = labelled.emptied(5)
    assert (empty.wave_BT.shape, empty.lengths_B.tolist(), empty.micro_batch) == ((1, 0), [0], 5)
    rows = [getattr(empty, field.name) for field in dataclasses.fields(empty) if field.name != "micro_batch"]
    parts = [part for row in rows for part in (row.values() if isinstance(row, dict) else [row]) if part is not None]
    assert {len(part) for part in parts} == {1}


def test_more_ranks_than_micro_batches_are_rejected(corpus: Path) -> None:
    with pytest.raises(ConfigError, match="run on at most 4"):
        reader_of(corpus, 0, 5)


def test_an_empty_folder_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no finished shards"):
        reader_of(tmp_path)


@pytest.fixture
def damaged(tmp_path: Path, written: list[list[Sound]]) -> Path:
    return write_shards(tmp_path / "damaged", written)


def break_shard(root: Path, how: str) -> None:
    shard = root / "shard-0002.tar"
    data = bytearray(shard.read_bytes())
    if how == "missing":
        shard.unlink()
    elif how == "truncated":
        shard.write_bytes(data[: len(data) // 2])
    else:
        for at in range(600, len(data), 50):
            data[at] ^= 0xFF
        shard.write_bytes(data)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("how", "says"), [("missing", "is missing"), ("truncated", "its record says")])
def test_bad_shards_are_an_error_on_every_rank_at_the_start(damaged: Path, how: str, says: str, workers: int) -> None:
    break_shard(damaged, how)
    for rank in range(2):
        with pytest.raises(ValueError, match=rf"shard-0002\.tar: .*{says}") as refused:
            reader_of(damaged, rank, 2, workers=workers)
        assert not isinstance(refused.value, ConfigError)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("verify", [True, False])
def test_a_modified_shard_is_an_error(damaged: Path, workers: int, verify: bool) -> None:
    break_shard(damaged, "altered")
    reader = reader_of(damaged, workers=workers, verify=verify)
    says = "sha256 is not the recorded one" if verify else "cannot be decoded"
    with pytest.raises(ShardError, match=rf"shard-0002\.tar: .*{says}"):
        take(reader, 30)
    assert not live_workers()


@pytest.mark.parametrize("how", ["missing", "truncated", "altered"])
def test_bad_shards_are_skipped_and_counted(damaged: Path, corpus: Path, how: str) -> None:
    break_shard(damaged, how)
    steps = reader_of(corpus).plan.layout(0).steps
    whole = take(reader_of(corpus), steps)
    ranks = [take(reader_of(damaged, rank, 2, on_bad_shard="skip", verify=True), steps) for rank in range(2)]
    kept = {key for rank in ranks for step in rank for batch in step.batches for key in batch.keys}
    lost = {key for step in whole for batch in step.batches for key in batch.keys} - kept
    bad = {sound.key for sound in sounds([0.0] * 240)[2::6]}
    assert lost
    assert lost <= bad
    skipped = sum(step.skipped for rank in ranks for step in rank)
    assert skipped >= len(lost)
    for rank in ranks:
        assert len(rank) == steps
        assert all(len(step.batches) == 2 and all(len(batch.keys) for batch in step.batches) for step in rank)
    for a, b, c in zip(whole, *ranks, strict=True):
        assert a.after == b.after == c.after


def test_closed_and_abandoned_iterators_leave_no_process(corpus: Path) -> None:
    reader = reader_of(corpus, workers=2)
    first = reader.steps()
    next(first)
    assert len(live_workers()) == 2
    second = reader.steps()  # stops the first iterator's workers
    next(second)
    assert len(live_workers()) == 2
    del second
    assert not live_workers()
    next(reader.steps())
    reader.close()
    assert not live_workers()


PROGRAM = """
import sys
from data_pipeline.sampling.config import DataConfig
from data_pipeline.loader.reader import open_reader
reader = open_reader(DataConfig(shards=sys.argv[1], workers=2, **{batch}), 7, 0, 1)
for step in reader.steps():
    if step.after.epoch == 0 and step.after.step == 1:  # nobody reads on: a full pipe would hold it at its exit
        print("reading", flush=True)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_workers_exit_with_their_parent(corpus: Path, how: signal.Signals) -> None:
    command = [sys.executable, "-c", PROGRAM.format(batch=BATCH), str(corpus)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as program:
        assert program.stdout is not None
        program.stdout.readline()
        workers = psutil.Process(program.pid).children(recursive=True)
        assert len(workers) == 2
        program.send_signal(how)
        _, alive = psutil.wait_procs(workers, timeout=30)
        for process in alive:
            process.kill()
        program.kill()
    assert not alive


def test_a_killed_worker_is_a_clear_error(corpus: Path) -> None:
    reader = reader_of(corpus, workers=2)
    steps = reader.steps()
    next(steps)
    live_workers()[0].kill()
    with pytest.raises(RuntimeError, match="worker"):
        list(itertools.islice(steps, 50))
    reader.close()
    assert not live_workers()


def test_workers_ignore_signals_sent_to_the_whole_job(corpus: Path) -> None:
    reader = reader_of(corpus, workers=2)
    steps = reader.steps()
    next(steps)
    for worker in live_workers():
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            worker.send_signal(number)
    assert len(list(itertools.islice(steps, 40))) == 40
    reader.close()
    assert not live_workers()


def test_a_shard_missing_with_its_index_is_left_out_of_the_plan(damaged: Path, corpus: Path) -> None:
    for path in damaged.glob("shard-0002.*"):
        path.unlink()
    with pytest.raises(ValueError, match=r"shard-0002\.tar: is missing"):
        reader_of(damaged)
    reader = reader_of(damaged, on_bad_shard="skip")
    assert reader.plan_hash != reader_of(corpus).plan_hash
    assert sum(step.skipped for step in take(reader, 10)) == 0


@pytest.mark.parametrize("workers", [1, 2])
def test_unresponsive_storage_is_an_error(corpus: Path, monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    monkeypatch.setattr(ShardFiles, "read", lambda self, wanted: time.sleep(300))
    reader = reader_of(corpus, workers=workers, timeout_seconds=1.0)
    begin = time.perf_counter()
    with pytest.raises(RuntimeError, match=r"no data for data\.timeout_seconds=1"):
        next(reader.steps())
    assert time.perf_counter() - begin < 60
    reader.close()
    assert not live_workers()
