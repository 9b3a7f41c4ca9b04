"""Missing inputs of a training are found before its ranks are started."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.core.schema import ConfigError, load
from data_pipeline.loader.reader import PlanReader, open_reader
from data_pipeline.shards.records import DoneRecord
from launch import main
from launch.cli.compose import compose
from launch.config import PretrainJob
from launch.exit_codes import ExitCode
from launch.runs.job_record import read_record
from launch.runs.metadata import run_config
from launch.workflows import inputs
from launch.workflows.inputs import require_startable
from pretrain.train_module import build_model
from tests.support.checkpoint_states import write_run
from tests.support.tiny_shards import sounds, write_shards

SMALL = ["+experiment=best_rq_tiny", "encoder.dim=32", "encoder.heads=2", "encoder.ffn_dim=32", "objective.n_codes=8"]


def start(*overrides: str) -> int:
    return main.main(["pretrain", *SMALL, *overrides])


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return write_shards(tmp_path / "shards", [sounds([0.4, 0.5, 1.2])])


def test_a_batch_that_the_corpus_cannot_feed_is_found_before_ranks_start(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = tmp_path / "runs"
    assert start(f"data.shards={shards}", f"runs={runs}", "data.batch_seconds=100") == ExitCode.USAGE
    said = capsys.readouterr().err
    assert "hold 1.2 s of audio" in said
    assert "lower data.batch_seconds" in said
    assert not runs.exists()


@pytest.mark.parametrize(("seconds", "readings"), [(8, [2]), (1_200, [2, 4]), (2_000, [2, 4])])
def test_a_part_of_a_large_corpus_is_planned_and_all_of_it_where_the_part_is_too_small(
    seconds: int, readings: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = write_shards(tmp_path / "shards", [sounds([2.0] * 4, corpus=name) for name in "abcd"])
    monkeypatch.setattr(inputs, "PLANNED_HOURS", 17 / 3600)
    read: list[int] = []

    def counted(*arguments: Any, records: Sequence[DoneRecord], **others: Any) -> PlanReader:
        read.append(len(records))
        return open_reader(*arguments, records=records, **others)

    monkeypatch.setattr("data_pipeline.loader.reader.open_reader", counted)
    given = [*SMALL, f"data.shards={shards}", f"data.batch_seconds={seconds}", "data.micro_batches=1"]
    config = load(PretrainJob, compose("pretrain", given))
    with contextlib.nullcontext() if seconds < 2_000 else pytest.raises(ConfigError, match=r"hold 32\.0 s of audio"):
        require_startable(config, attended=True)
    assert read == readings


def test_initial_weights_of_another_architecture_are_found_before_ranks_start(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = run_config(load(PretrainJob, compose("pretrain", [*SMALL, "data.shards=none", "encoder.layers=1"])))
    write_run(tmp_path / "old", config, build_model(config))
    places = [f"data.shards={shards}", f"runs={tmp_path / 'runs'}", "data.batch_seconds=32"]
    assert start(*places, f"init={tmp_path / 'old'}") == ExitCode.USAGE
    said = capsys.readouterr().err
    assert "encoder.layers=4 here and 1 there" in said
    assert not (tmp_path / "runs").exists()
    assert start(*places, f"init={tmp_path / 'nowhere'}") == ExitCode.USAGE
    assert "nowhere: there is no such file or folder; give a run folder" in capsys.readouterr().err
    same = load(PretrainJob, compose("pretrain", [*SMALL, *places, "encoder.layers=1", f"init={tmp_path / 'old'}"]))
    require_startable(same, attended=True)


def queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Puts an sbatch on the PATH that accepts every job; returns the file with its arguments, which it creates."""
    given, folder = tmp_path / "sbatch.txt", tmp_path / "bin"
    folder.mkdir()
    (folder / "sbatch").write_text(f'#!/bin/sh\necho "$@" >> {given}\necho 17\n')
    (folder / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    return given


@pytest.mark.parametrize("several", [(), ("seed=1,2", "--multirun")])
def test_a_queued_run_is_checked_where_its_shards_can_be_read(
    several: tuple[str, ...],
    shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given, runs = queue(tmp_path, monkeypatch), tmp_path / "runs"
    large = (f"runs={runs}", "data.batch_seconds=100", "launcher=slurm", *several)
    assert start(f"data.shards={shards}", *large) == ExitCode.USAGE
    assert "lower data.batch_seconds" in capsys.readouterr().err
    assert not given.exists()
    assert not runs.exists()
    assert start(f"data.shards={tmp_path / 'elsewhere'}", *large) == ExitCode.DONE
    assert start(f"data.shards={shards}", "name=later", *large, "launcher.after=16") == ExitCode.DONE


@pytest.mark.parametrize("several", [(), ("data.workers=3,5", "--multirun")])
def test_the_record_of_a_slurm_job_has_the_cores_that_were_requested(
    several: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A requeue reads them from the record; the runs of an array share the largest number."""
    given = queue(tmp_path, monkeypatch)
    plain = (f"data.shards={tmp_path / 'elsewhere'}", f"runs={tmp_path / 'runs'}", "name=mine", "launcher=slurm")
    assert start(*plain, *(several or ("data.workers=5",))) == ExitCode.DONE
    assert "--cpus-per-task=6" in given.read_text()
    folders = list((tmp_path / "runs").iterdir())
    assert [read_record(folder).config["cpus_per_task"] for folder in folders] == [6] * len(folders)
    assert len(folders) == (2 if several else 1)
