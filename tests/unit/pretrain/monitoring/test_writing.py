"""Metrics, events and alarms on a full disk: training continues, and rows are written once there is space."""

from __future__ import annotations

import errno
import itertools
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from data_pipeline.core.jsonl import read_rows
from pretrain.checkpointing.run_folder import RunFolder, StaleIncarnationError
from pretrain.interfaces.frames import StepContext
from pretrain.monitoring import board as boards
from pretrain.monitoring.append_log import AppendLog, drop_rows_after
from pretrain.monitoring.batch_dump import save_batches
from pretrain.monitoring.board import Board, add_counts
from pretrain.train import Ending
from tests.support.synthetic_reader import synthetic_batch
from tests.support.training import config, run


class FullDisk:
    """Makes writes to files whose name contains `part` fail while `full` is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, part: str, half: bool = False) -> None:
        self.full, self._half = True, half
        real_open, real_write, self._handles = os.open, os.write, set[int]()

        def opened(path: Any, *rest: Any, **more: Any) -> int:
            handle = real_open(path, *rest, **more)
            (self._handles.add if part in str(path) else self._handles.discard)(handle)
            return handle

        def write(handle: int, content: bytes) -> int:
            if not self.full or handle not in self._handles:
                return real_write(handle, content)
            if self._half:
                real_write(handle, content[: len(content) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "open", opened)
        monkeypatch.setattr(os, "write", write)


def folder(path: Path) -> RunFolder:
    made = RunFolder(path)
    made.claim()
    return made


@pytest.mark.parametrize("half", [False, True], ids=["nothing written", "half a row written"])
def test_rows_are_written_once_a_full_disk_has_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, half: bool
) -> None:
    said: list[str] = []
    log = AppendLog(folder(tmp_path), tmp_path / "metrics.jsonl", said.append)
    log.append({"step": 1})
    disk = FullDisk(monkeypatch, "metrics.jsonl", half)
    log.append({"step": 2})
    log.append({"step": 3})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n', "no partial row remains"
    disk.full = False
    log.append({"step": 4})
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    assert len(said) == 2
    assert "metrics.jsonl cannot be written" in said[0]
    assert "No space left" in said[0]


def test_no_row_is_lost_while_the_folder_is_unavailable(tmp_path: Path) -> None:
    log = AppendLog(folder(tmp_path), tmp_path / "away" / "health.jsonl", lambda line: None)
    (tmp_path / "away").write_text("a file where a folder should be")
    log.append({"step": 1})
    (tmp_path / "away").unlink()
    log.append({"step": 2})
    assert [row["step"] for row in read_rows(tmp_path / "away" / "health.jsonl")] == [1, 2]


def test_a_row_after_a_partial_row_of_a_killed_start_begins_a_new_line(tmp_path: Path) -> None:
    path = tmp_path / "health.jsonl"
    path.write_text('{"step": 1}\n{"st')
    AppendLog(folder(tmp_path), path).append({"step": 2})
    assert [row["step"] for row in read_rows(path)] == [1, 2]


@pytest.mark.parametrize(
    ("content", "kept"),
    [
        ("", ""),
        ('{"step": 1}\n{"step": 2}\n', '{"step": 1}\n{"step": 2}\n'),
        ('{"step": 1}\n{"step": 3}\n{"step": 4}\n', '{"step": 1}\n'),
        ('{"step": 1}\n{"step": 3}\n{"ste', '{"step": 1}\n'),
        ('{"step": 5}\n', ""),
        ("half", ""),
        ('{"step": 1}\n[]\n"text"\n', '{"step": 1}\n'),
    ],
)
def test_rows_of_later_steps_are_truncated(tmp_path: Path, content: str, kept: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(content)
    inode = path.stat().st_ino
    drop_rows_after(path, 2)
    assert path.read_text() == kept
    assert path.stat().st_ino == inode, "truncated in place, not rewritten"


def test_training_continues_when_tensorboard_writes_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: SummaryWriter, *rest: Any, **more: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(SummaryWriter, "add_scalar", full)
    assert run(tmp_path, config(4))[0] is Ending.FINISHED
    assert len(read_rows(tmp_path / "metrics.jsonl")) == 4


def test_training_continues_when_no_row_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FullDisk(monkeypatch, "metrics.jsonl")
    assert run(tmp_path, config(4))[0] is Ending.FINISHED
    assert read_rows(tmp_path / "metrics.jsonl") == []
    assert (tmp_path / "checkpoints" / "step_00000004" / "state.json").exists()


def test_event_writing_resumes_once_the_disk_has_space(tmp_path: Path) -> None:
    said: list[str] = []
    events = tmp_path / "tb"
    events.write_text("a file where the folder should be")
    board = Board(events, 1, said.append, retry_seconds=0.0)
    for step in (1, 2):
        board.write(lambda writer, step=step: writer.add_scalar("loss", 1.0, step))  # type: ignore[misc]
    events.unlink()
    for step in (3, 4):
        board.write(lambda writer, step=step: writer.add_scalar("loss", 1.0, step))  # type: ignore[misc]
    board.close()
    assert [event.step for event in EventAccumulator(str(events)).Reload().Scalars("loss")] == [3, 4]
    assert len(said) == 2, "one warning, one line about the recovery"
    assert "2 were dropped" in said[1]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_error_in_the_event_writer_thread_drops_events_only(tmp_path: Path) -> None:
    said: list[str] = []
    board = Board(tmp_path, 1, said.append, retry_seconds=0.0)
    writers: list[SummaryWriter] = []
    board.write(writers.append)
    record = writers[0]._get_file_writer().event_writer._async_writer._writer  # type: ignore[no-untyped-call]

    def full(data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    record.write = full
    for step in range(2, 30):
        board.write(lambda writer, step=step: writer.add_scalar("loss", 1.0, step))  # type: ignore[misc]
    board.close()
    assert any("No space left" in line for line in said)


def test_the_size_of_a_histogram_does_not_grow_with_the_codebook(tmp_path: Path) -> None:
    """At 16 bytes per bin, a bin per code would take 131 kB per update for 8,192 codes."""
    counts = np.random.default_rng(0).integers(0, 50, 8_192).astype(np.float64)
    with SummaryWriter(str(tmp_path)) as writer:
        for step in range(10):
            add_counts(writer, "hist/codes", counts, step)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 10 * 5_000
    shown = EventAccumulator(str(tmp_path), {"histograms": 0}).Reload().Histograms("hist/codes")[0].histogram_value
    assert sum(shown.bucket) == counts.sum()
    assert len(shown.bucket) <= boards.MAX_BINS


@pytest.mark.parametrize("codes", [1, 2, 255, 256, 257, 1000])
def test_histogram_bins_count_every_code_once(codes: int) -> None:
    made: dict[str, Any] = {}

    class Writer:
        def add_histogram_raw(self, name: str, **values: Any) -> None:
            made.update(values)

    counts = np.arange(1.0, codes + 1.0)
    add_counts(Writer(), "hist/codes", counts, 1)  # type: ignore[arg-type]
    edges = [0, *(int(limit) for limit in made["bucket_limits"])]
    assert edges[-1] == codes
    assert made["bucket_counts"] == [counts[a:b].sum() for a, b in itertools.pairwise(edges)]


def test_histograms_have_their_own_logging_interval(tmp_path: Path) -> None:
    settings = {"steps": 7, "checkpoint_every": 7, "histograms_every": 3, "media_every": 0}
    run(tmp_path, config(7, train=settings))
    events = EventAccumulator(str(tmp_path / "tb"), {"histograms": 0}).Reload()
    assert [event.step for event in events.Histograms("hist/codes")] == [1, 3, 6], (
        "the first update and every third one"
    )


def test_a_superseded_start_writes_no_rows_and_saves_no_batches(tmp_path: Path) -> None:
    old = folder(tmp_path)
    log = AppendLog(old, tmp_path / "health.jsonl")
    log.append({"step": 1})
    folder(tmp_path)
    with pytest.raises(StaleIncarnationError):
        log.append({"step": 2})
    with pytest.raises(StaleIncarnationError):
        save_batches(old, 0, StepContext(0, 3), [synthetic_batch(0, 0)], "a spike")
    assert read_rows(tmp_path / "health.jsonl") == [{"step": 1}]
    assert not (tmp_path / "health").exists()


def test_a_batch_that_cannot_be_saved_raises_no_error(tmp_path: Path) -> None:
    run_folder = folder(tmp_path)
    (tmp_path / "health").write_text("a file where the folder should be")
    assert save_batches(run_folder, 0, StepContext(0, 3), [synthetic_batch(0, 0)], "a spike") is None
    (tmp_path / "health").unlink()
    kept = save_batches(run_folder, 0, StepContext(0, 3), [synthetic_batch(0, 0)], "a spike")
    assert kept is not None
    assert json.loads((kept / "rank_0.json").read_text())["why"] == "a spike"
