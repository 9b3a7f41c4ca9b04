"""The joint recipes on two ranks: recognition, synthesis and separation on one encoder, ZeRO, a kill and a resume."""

from __future__ import annotations

import socket
import subprocess
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.core.jsonl import read_rows
from data_pipeline.core.schema import load
from data_pipeline.core.types import SAMPLE_RATE
from data_pipeline.labels import pitch
from data_pipeline.labels.store import LabelMetadata, write_labels
from data_pipeline.text.tokenizer import write_tokens
from launch.cli.compose import compose
from launch.config import PretrainJob
from launch.runs import metadata
from tests.support.faults.kill_runs import kill_after, start
from tests.support.faults.site import learned
from tests.support.tiny_shards import Sound, write_shards

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

STEPS = 6
SYNTHESIZER = ("dim=16", "layers=1", "decoder_layers=1", "heads=2", "ffn_dim=32", "kernel=3", "predictor_dim=16")
SMALL = [
    "data.batch_seconds=16", "data.micro_batches=4", "data.max_seconds=4", "data.min_seconds=0.5", "data.workers=0",
    "data.augment.mix_prob=0.5", "encoder.dim=32", "encoder.layers=2", "encoder.heads=2", "encoder.ffn_dim=64",
    "objective.n_codes=32", *(f"heads.voice.synthesizer.{field}" for field in SYNTHESIZER),
    "heads.voice.synthesizer.vocoder.dim=16", "heads.voice.synthesizer.vocoder.layers=1",
    "heads.voice.synthesizer.vocoder.inner=32", "heads.apart.hidden=16", "heads.apart.recurrent_layers=1",
    f"train.steps={STEPS}", "train.checkpoint_every=2", "train.media_every=0", "train.log_every=1",
    "schedule.warmup_steps=2",
]  # fmt: skip
BASE = ["heads.voice.layers=[1,2]", "heads.apart.layers=[1,2]", "heads.voice.warmup=[0,4]", "heads.apart.warmup=[0,4]"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Returns fields that name shards of two speakers, their tokens and their pitch."""
    folder = tmp_path_factory.mktemp("joint")
    sounds = [Sound(f"take-{n:03d}", int((1.5 + 0.05 * n) * SAMPLE_RATE), speaker="ab"[n % 2]) for n in range(40)]
    parts = [sounds[::2], sounds[1::2]]
    write_shards(folder / "shards", parts)
    symbols = [*" 'abcdefghijklmnopqrstuvwxyz"]
    write_tokens(str(folder / "tokens"), {"kind": "characters", "label": "text", "case": "lower", "symbols": symbols})
    labels, rng = LabelMetadata("pitch", pitch.RATE_HZ, pitch.CLASSES), np.random.default_rng(0)
    (folder / "pitch").mkdir()
    labels.write(str(folder / "pitch"))
    for number, part in enumerate(parts):
        rows = [rng.integers(0, 60, sound.length // pitch.HOP) for sound in part]
        write_labels(str(folder / "pitch"), f"shard-{number:04d}.tar", labels, [sound.key for sound in part], rows)
    return [f"data.shards={folder}/shards", f"data.tokens.text={folder}/tokens", f"data.targets.pitch={folder}/pitch"]


def prepared(runs: Path, name: str, recipe: str, data: list[str], *more: str) -> Path:
    """Writes the run folder of a small copy of a recipe."""
    given = [f"+experiment={recipe}", *data, *SMALL, *(BASE if recipe == "joint_base" else []), *more]
    job = load(PretrainJob, compose("pretrain", [*given, f"runs={runs}", f"name={name}"]))
    return metadata.prepare(job)


def two_ranks(folder: Path) -> list[subprocess.Popen[bytes]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "DS_ACCELERATOR": "cpu"}
    return [start(folder, **group, RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(2)]


def finish(ranks: list[subprocess.Popen[bytes]]) -> None:
    for rank in ranks:
        _, said = rank.communicate(timeout=400)
        assert rank.returncode == 0, said.decode()[-3000:]


@pytest.mark.parametrize(
    ("recipe", "stage"), [("joint_tiny", 1), ("joint_tiny", 2), ("joint_base", 1), ("joint_base", 2)]
)
def test_a_killed_joint_run_on_two_ranks_has_the_losses_of_an_undisturbed_one(
    data: list[str], tmp_path: Path, recipe: str, stage: int
) -> None:
    engine = ["engine.name=deepspeed", f"engine.zero_stage={stage}"]
    whole, killed = (prepared(tmp_path, name, recipe, data, *engine) for name in ("whole", "killed"))
    finish(two_ranks(whole))
    first, second = two_ranks(killed)
    kill_after(killed, first, 3, 0.0)
    second.kill()
    second.wait()
    assert max(step for step, _, _ in learned(killed)) < STEPS
    finish(two_ranks(killed))
    assert learned(killed) == learned(whole)
    assert [step for step, _, _ in learned(whole)] == list(range(1, STEPS + 1))
    for name in ("model.safetensors", "optimizer.safetensors"):
        end = Path("checkpoints") / f"step_{STEPS:08d}" / name
        assert (killed / end).read_bytes() == (whole / end).read_bytes()
    rows = read_rows(whole / "metrics.jsonl")
    for task in ("text", "voice", "apart"):
        losses = [row[f"loss/{task}"] for row in rows if f"loss/{task}" in row]  # an update may have no mixture
        assert len(losses) > 2, task
        assert len(set(losses)) == len(losses), task


def test_one_rank_and_two_learn_alike(data: list[str], tmp_path: Path) -> None:
    two = prepared(tmp_path, "two", "joint_tiny", data, "engine.name=deepspeed", "engine.zero_stage=2")
    one = prepared(tmp_path, "one", "joint_tiny", data, "engine.name=torch")
    ranks = two_ranks(two)
    finish([start(one)])
    finish(ranks)
    for (step, loss, norm), (same, other_loss, other_norm) in zip(learned(one), learned(two), strict=True):
        assert step == same
        assert other_loss == pytest.approx(loss, rel=1e-5)
        assert other_norm == pytest.approx(norm, rel=1e-3)
