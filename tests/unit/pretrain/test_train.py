"""The training loop with its checkpoints and metrics, in this process on synthetic speech."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data_pipeline.core.jsonl import read_rows
from data_pipeline.core.schema import ConfigError
from data_pipeline.loader.held_out import HeldOut
from pretrain.checkpointing import checkpoint, stored
from pretrain.checkpointing.locate import steps_done
from pretrain.checkpointing.run_folder import RunFolder, StaleIncarnationError
from pretrain.engines import make_engine
from pretrain.engines.base import Engine, StepResult
from pretrain.engines.distributed import DistributedContext
from pretrain.engines.signals import RankSignals
from pretrain.monitoring.heartbeat import Heartbeat
from pretrain.monitoring.metrics_writer import MetricsWriter
from pretrain.monitoring.step_metrics import RANKS_SHOWN, data_waits
from pretrain.train import Ending, train
from pretrain.train_module import build_model
from tests.support.synthetic_reader import SyntheticReader, synthetic_batch
from tests.support.training import config, run


def losses(folder: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss/total"]) for row in read_rows(folder / "metrics.jsonl")]


def weights(engine: Engine) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in engine.tensors()}


def test_a_stopped_run_continues_bit_identically(tmp_path: Path) -> None:
    """Pitfall: a script that ignores its resume flag (torchaudio's HuBERT); here repeating the command resumes."""
    ending, whole = run(tmp_path / "whole", config())
    assert ending is Ending.FINISHED
    ending, _ = run(tmp_path / "parts", config(), stop_after=3)
    assert ending is Ending.STOPPED
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")[:3]
    ending, resumed = run(tmp_path / "parts", config())
    assert ending is Ending.FINISHED
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    expected = weights(whole)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(resumed).items())


def test_metrics_rows_of_repeated_steps_are_dropped(tmp_path: Path) -> None:
    run(tmp_path / "whole", config())
    run(tmp_path / "parts", config(), stop_after=3)
    with (tmp_path / "parts" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "loss/total": 99.0}\n{"step": 5, "loss/to')
    run(tmp_path / "parts", config())
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_starting_a_finished_run_again_does_nothing(tmp_path: Path) -> None:
    run(tmp_path, config())
    before = (tmp_path / "metrics.jsonl").read_text()
    assert run(tmp_path, config())[0] is Ending.FINISHED
    assert (tmp_path / "metrics.jsonl").read_text() == before


def test_only_the_last_checkpoints_are_kept_and_are_complete(tmp_path: Path) -> None:
    run(tmp_path, config())
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "latest",
        "step_00000004",
        "step_00000006",
    ]
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step_00000006\n"


def test_checkpoints_of_keep_every_are_never_removed(tmp_path: Path) -> None:
    train_config = {"steps": 6, "checkpoint_every": 1, "keep_last": 1, "keep_every": 2, "save_behind": False}
    run(tmp_path, config(train=train_config))
    kept = sorted(path.name for path in (tmp_path / "checkpoints").glob("step_*"))
    assert kept == ["step_00000002", "step_00000004", "step_00000006"]


def test_a_background_save_has_the_state_at_the_time_of_its_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = checkpoint.save_tensors

    def slow(*arguments: Any, **options: Any) -> None:
        time.sleep(0.3)  # training continues meanwhile
        real(*arguments, **options)

    monkeypatch.setattr(checkpoint, "save_tensors", slow)
    run(tmp_path / "behind", config(steps=4))
    monkeypatch.undo()
    direct = {"steps": 4, "checkpoint_every": 2, "keep_last": 2, "save_behind": False}
    run(tmp_path / "direct", config(train=direct))
    for step in (2, 4):
        for kind in ("model", "optimizer"):
            name = Path("checkpoints") / f"step_{step:08d}" / f"{kind}.safetensors"
            assert (tmp_path / "behind" / name).read_bytes() == (tmp_path / "direct" / name).read_bytes()


def test_metrics_have_namespaces_and_are_written_to_tensorboard(tmp_path: Path) -> None:
    run(tmp_path, config())
    row = read_rows(tmp_path / "metrics.jsonl")[-1]
    needed = {"loss/total", "loss/objective", "opt/lr", "opt/grad_norm", "perf/audio_seconds_per_second"}
    needed |= {
        "perf/data_wait_share",
        "perf/step_seconds",
        "metric/perplexity",
        "metric/code_usage",
        "data/padding_share",
    }
    assert needed <= row.keys()
    assert all(
        key in ("step", "time") or key.split("/")[0] in {"loss", "opt", "perf", "metric", "data", "health"}
        for key in row
    )
    assert 1 <= row["metric/perplexity"] <= 32
    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    assert needed <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("loss/total")] == [1, 2, 3, 4, 5, 6]
    assert events.Scalars("loss/total")[-1].value == pytest.approx(row["loss/total"], rel=1e-6)


TRANSFORMER = {"name": "transformer", "layers": 2, "dim": 32, "heads": 2, "ffn_dim": 64, "dropout": 0.1}
STATEFUL: dict[str, dict[str, Any]] = {
    "best_rq": {"name": "best_rq", "n_codes": 32, "projection": "pca", "refine": True},
    "hubert": {"name": "hubert", "units": 8, "relabel_step": 3, "relabel_layer": 1},
    "dinosr": {"name": "dinosr", "n_codes": 8, "top_layers": 2},
    "data2vec": {"name": "data2vec"},
    "wav2vec2": {"name": "wav2vec2", "n_codes": 8, "negatives": 5},
}


QUICK = ("best_rq", "dinosr")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in STATEFUL]
)
def test_held_out_audio_changes_no_bit_of_training(tmp_path: Path, name: str) -> None:
    """Whatever an objective fits, follows or draws; the loss is reported every n steps and at the end."""
    length = {"steps": 5, "checkpoint_every": 5, "valid_every": 2}
    settings = config(objective=STATEFUL[name], encoder=TRANSFORMER, train=length)
    _, without = run(tmp_path / "without", settings)
    valid = HeldOut((synthetic_batch(99, 0), synthetic_batch(99, 1)), 2, 4, 3.0)
    lines = list[str]()
    _, engine = run(tmp_path / "with", settings, held_out=valid, say=lines.append)
    assert losses(tmp_path / "with") == losses(tmp_path / "without")
    expected = weights(without)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(engine).items())
    rows = {row["step"]: row for row in read_rows(tmp_path / "with" / "metrics.jsonl")}
    assert [step for step, row in rows.items() if "valid/loss/total" in row] == [2, 4, 5]
    record = engine.module.objective.monitoring()
    assert ("valid/metric/perplexity" in rows[2]) == bool(record.books)
    assert next(line for line in lines if "held-out loss" in line).startswith("step 2/5")


def test_a_checkpoint_of_another_config_is_refused_with_the_field(tmp_path: Path) -> None:
    run(tmp_path, config(steps=2))
    with pytest.raises(ConfigError, match=r"seed: 0 in the checkpoint, 1 now"):
        run(tmp_path, config(seed=1))
    deeper = {"name": "transformer", "layers": 3, "dim": 32, "heads": 2, "ffn_dim": 64}
    with pytest.raises(ConfigError, match=r"encoder\.layers: 2 in the checkpoint, 3 now"):
        run(tmp_path, config(encoder=deeper))
    with pytest.raises(ConfigError, match="another name="):
        run(tmp_path, config(optimizer={"lr": 2e-3}))
    assert run(tmp_path, config(steps=4))[0] is Ending.FINISHED  # more steps are accepted


def test_a_damaged_checkpoint_is_reported_with_the_remedy(tmp_path: Path) -> None:
    run(tmp_path, config())
    model = tmp_path / "checkpoints" / "step_00000006" / "model.safetensors"
    whole = model.read_bytes()
    model.write_bytes(whole[:1000])
    with pytest.raises(ValueError, match=r"step_00000006: damaged.*step_00000004"):
        run(tmp_path, config(steps=8))
    model.write_bytes(whole)
    flipped = bytearray(whole)
    flipped[-100] ^= 64
    model.write_bytes(flipped)
    with pytest.raises(ValueError, match=r"damaged \(.*checksum mismatch.*model.safetensors.*step_00000004"):
        run(tmp_path, config(steps=8))
    model.unlink()
    with pytest.raises(ValueError, match=r"model.safetensors is missing"):
        run(tmp_path, config(steps=8))
    (tmp_path / "checkpoints" / "latest").write_text("step_00000004\n")
    assert run(tmp_path, config())[0] is Ending.FINISHED


def test_a_full_disk_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    """The file size limit is half of the model, so that the write itself fails, as on a full disk."""
    run(tmp_path, config(steps=2))
    size = (tmp_path / "checkpoints" / "step_00000002" / "model.safetensors").stat().st_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, before[1]))
    try:
        with pytest.raises(OSError, match=r"model.safetensors cannot be written: .*too large"):
            run(tmp_path, config())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["latest", "step_00000002"]
    assert run(tmp_path, config())[0] is Ending.FINISHED


@pytest.mark.parametrize("behind", [True, False], ids=["behind", "in the loop"])
def test_a_save_that_fails_once_is_retried_immediately(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, behind: bool
) -> None:
    real, failures = checkpoint.save_tensors, iter([True])

    def failing(*arguments: Any, **options: Any) -> None:
        if next(failures, False):
            raise OSError("no space left for a moment")
        real(*arguments, **options)

    monkeypatch.setattr(checkpoint, "save_tensors", failing)
    said: list[str] = []
    settings = {"steps": 6, "checkpoint_every": 2, "keep_last": 3, "save_behind": behind}
    run(tmp_path, config(train=settings), say=said.append)
    reported = [line for line in said if "checkpoint" in line]
    assert [line.split()[0] for line in reported] == ["warning:", "checkpoint", "checkpoint", "checkpoint"]
    assert "step_00000002 cannot be saved (no space left for a moment); trying again" in reported[0]
    assert all(Path(line.removeprefix("checkpoint ")).is_dir() for line in reported[1:])
    assert stored.damage(tmp_path / "checkpoints" / "step_00000002") == ""


def test_a_save_that_keeps_failing_is_never_reported_as_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*arguments: Any, **options: Any) -> None:
        raise OSError("no space left")

    run(tmp_path, config(steps=2))
    monkeypatch.setattr(checkpoint, "save_tensors", failing)
    said: list[str] = []
    with pytest.raises(OSError, match=r"step_00000004 cannot be saved, 2 tries failed: no space left"):
        run(tmp_path, config(train={"steps": 40, "checkpoint_every": 4}), say=said.append)
    assert not any(line.startswith("checkpoint") for line in said)
    steps = [int(line.split()[1].split("/")[0]) for line in said if line.startswith("step ")]
    assert max(steps) < 8, "the error is noticed before the next checkpoint is due"
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["latest", "step_00000002"]


def test_a_new_start_removes_leftovers_of_killed_starts(tmp_path: Path) -> None:
    run(tmp_path, config(steps=2))
    folder = tmp_path / "checkpoints"
    for name in (".step_00000004.1", ".step_00000006.2", ".stand_in_step_00000002"):
        (folder / name).mkdir()
        (folder / name / "model.safetensors").write_bytes(b"half")
    (folder / ".latest.4711").write_text("step_0000")
    (folder / ".step_00000008.999").mkdir()  # belongs to a newer start
    run(tmp_path, config(steps=4))
    # the second start has number 2, so that the name for its save at step 4 was free
    assert sorted(path.name for path in folder.iterdir()) == [
        ".step_00000006.2",
        ".step_00000008.999",
        "latest",
        "step_00000002",
        "step_00000004",
    ]


def test_a_stand_in_checkpoint_that_latest_points_to_is_kept(tmp_path: Path) -> None:
    run(tmp_path, config(steps=2))
    folder = tmp_path / "checkpoints"
    (folder / "step_00000002").rename(folder / ".stand_in_step_00000002")
    (folder / "latest").write_text(".stand_in_step_00000002\n")
    new = RunFolder(tmp_path)
    new.claim()
    checkpoint.remove_leftovers(new)
    assert (folder / ".stand_in_step_00000002" / "state.json").is_file()
    (folder / "latest").write_bytes(b"\xff damaged")  # it may have named the stand-in, the only complete checkpoint
    checkpoint.remove_leftovers(new)
    assert (folder / ".stand_in_step_00000002" / "state.json").is_file()


def test_a_superseded_start_writes_nothing(tmp_path: Path) -> None:
    old, new = RunFolder(tmp_path), RunFolder(tmp_path)
    assert (old.claim(), new.claim()) == (1, 2)
    new.require_current()
    with pytest.raises(StaleIncarnationError, match="start number 1 of the run and number 2 exists"):
        old.require_current()
    settings = config(steps=2)
    engine = make_engine(settings, build_model(settings), DistributedContext())
    with pytest.raises(StaleIncarnationError):
        train(
            settings, engine, SyntheticReader(), old, Heartbeat(tmp_path, 0, 600), lambda: False, say=lambda line: None
        )
    assert not (tmp_path / "checkpoints").exists()
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_superseded_start_does_not_change_files_of_the_newer_one(tmp_path: Path) -> None:
    """This holds for a rollback, and for dropping metrics rows at the start."""
    settings = config()
    _, engine = run(tmp_path, settings)
    old = RunFolder(tmp_path)
    old.claim()
    RunFolder(tmp_path).claim()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(StaleIncarnationError):
        checkpoint.roll_back(old, engine, settings, 4)
    with pytest.raises(StaleIncarnationError):
        MetricsWriter(old, settings, engine.module, 2)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("cut_off_at", range(4))
def test_latest_points_to_a_complete_checkpoint_wherever_a_rollback_is_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut_off_at: int
) -> None:
    """A rollback renames newer checkpoints and then saves the same step again; it is interrupted before each move."""
    settings = config()
    _, engine = run(tmp_path, settings)
    folder = RunFolder(tmp_path)
    folder.claim()
    moves = 0

    def counted(move: Callable[..., Any]) -> Callable[..., Any]:
        def moved(path: Path, *rest: Any) -> Any:
            nonlocal moves
            if path.exists() and path.parent == folder.checkpoints:
                if moves == cut_off_at:
                    raise KeyboardInterrupt
                moves += 1
            return move(path, *rest)

        return moved

    monkeypatch.setattr(Path, "rename", counted(Path.rename))
    monkeypatch.setattr(checkpoint, "remove", counted(checkpoint.remove))
    with contextlib.suppress(KeyboardInterrupt), checkpoint.Saver(folder, engine, settings) as saver:
        saver.save(checkpoint.roll_back(folder, engine, settings, 4))
    monkeypatch.undo()
    assert moves == cut_off_at, "the rollback was interrupted at this move"
    named = folder.checkpoints / (folder.checkpoints / "latest").read_text().strip()
    assert stored.damage(named) == ""
    assert steps_done(tmp_path) == 4
    assert checkpoint.load_latest(folder, engine, settings).step == 4


def test_checkpoint_permissions_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        run(tmp_path, config(steps=2))
    finally:
        os.umask(before)
    files = list((tmp_path / "checkpoints" / "step_00000002").iterdir())
    assert {path.name: path.stat().st_mode & 0o777 for path in files} == {path.name: 0o640 for path in files}


def test_a_checkpoint_contains_no_pickles(tmp_path: Path) -> None:
    run(tmp_path, config(steps=2))
    folder = tmp_path / "checkpoints" / "step_00000002"
    assert sorted(path.name for path in folder.iterdir()) == [
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
    ]
    assert json.loads((folder / "state.json").read_text())["config"]["objective"]["name"] == "best_rq"
    shutil.rmtree(tmp_path)


def test_the_data_wait_of_each_rank_is_logged() -> None:
    result = StepResult(0.0, {}, RankSignals(wait_seconds=(0.5, 9.0)), 0.0)
    assert data_waits(result, 2.0, 2) == {
        "perf/data_wait_share/rank_0": 0.25,
        "perf/data_wait_share/rank_1": 1.0,
        "perf/data_wait_share_worst": 1.0,
        "perf/data_wait_worst_rank": 1.0,
    }
    many = StepResult(0.0, {}, RankSignals(wait_seconds=(0.5,) * (RANKS_SHOWN + 1)), 0.0)
    assert len(data_waits(many, 2.0, RANKS_SHOWN + 1)) == 2
    assert data_waits(result, 2.0, 1) == {}


def test_compiling_is_announced_before_the_first_update() -> None:
    compiled = config(engine={"name": "torch", "compile": True}).cautions()
    assert any("engine.compile=true" in caution and "minutes" in caution for caution in compiled)
    assert not any("engine.compile" in caution for caution in config().cautions())
