"""Measures the health detectors: failures planted into training on real speech, and healthy runs.

    python benchmarks/prove/detectors.py                        # ≤ 6 minutes on one core
    python benchmarks/prove/detectors.py --replay RUN...        # applies the current detectors to recorded runs

Trains small models on a few minutes of speech (split pretrain of AURICLE_SPEECH): healthy ones, and one per failure.
Writes benchmarks/results/detectors.md. Exit code 1 where a failure is missed or a healthy run raises an alarm.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # small models: more threads only wait for each other

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.prove.common import parser_of, real_speech  # noqa: E402
from data_pipeline.audio.codecs import read_mono  # noqa: E402
from data_pipeline.core.jsonl import read_rows  # noqa: E402
from data_pipeline.core.rng import keyed_rng  # noqa: E402
from data_pipeline.core.schema import load  # noqa: E402
from data_pipeline.core.types import SAMPLE_RATE, Batch, Cursor, Step  # noqa: E402
from pretrain.checkpointing.run_folder import RunFolder  # noqa: E402
from pretrain.config import Config, HealthConfig  # noqa: E402
from pretrain.engines.base import (  # noqa: E402
    SAMPLES,
    Engine,
    StepResult,
)
from pretrain.engines.distributed import DistributedContext  # noqa: E402
from pretrain.engines.signals import RankSignals  # noqa: E402
from pretrain.evaluate.manifest import read_manifest  # noqa: E402
from pretrain.evaluate.metrics import NON_SILENCE  # noqa: E402
from pretrain.interfaces.frames import StepContext  # noqa: E402
from pretrain.monitoring.health_monitor import HealthMonitor, UnhealthyError  # noqa: E402
from pretrain.train_module import build_model  # noqa: E402
from tests.support import planted_failures  # noqa: E402

CLIP, CLIPS, MICRO_BATCHES = 2, 4, 3
"""Seconds of a clip, clips of a micro-batch, micro-batches of an update: 24 s of audio per update."""
SECONDS = CLIP * CLIPS * MICRO_BATCHES
PLANTED, HEALTHY_STEPS, STEPS = 120, 240, 200
"""The update before which a failure is planted, and the lengths of runs without and with one."""
BEST_RQ: dict[str, Any] = {"name": "best_rq", "n_codes": 128}
WAV2VEC2: dict[str, Any] = {"name": "wav2vec2", "n_codes": 32, "code_dim": 64, "projection_dim": 64, "negatives": 50}
HUBERT: dict[str, Any] = {"name": "hubert", "units": 50, "projection_dim": 0, "mask_span": 4}
EFFICIENT: dict[str, Any] = {"name": "efficient", "units": 64, "predict_layers": [1, 2], "relabel_step": 120,
                             "relabel_layer": 1, "relabel_units": 50}  # fmt: skip
DATA2VEC: dict[str, Any] = {"name": "data2vec", "ema_steps": 100}
HEALTHY = (BEST_RQ, WAV2VEC2, HUBERT, EFFICIENT, DATA2VEC)


class Speech:
    """Global steps of real speech in memory: random clips of the split `pretrain`, equal at every start."""

    plan_hash = "speech in memory"

    def __init__(self, waves: list[np.ndarray]) -> None:
        self.waves = waves

    def batch(self, number: int, micro_batch: int) -> Batch:
        rng = keyed_rng(number, micro_batch, "clips")
        clips, keys = [], []
        for wave_i in rng.integers(len(self.waves), size=CLIPS).tolist():
            wave = self.waves[wave_i]
            start = int(rng.integers(0, len(wave) - CLIP * SAMPLE_RATE))
            clips.append(torch.from_numpy(wave[start : start + CLIP * SAMPLE_RATE]))
            keys.append(f"{wave_i}-{start}-{number}")
        wave_BT = torch.stack(clips)
        return Batch(wave_BT, torch.full((CLIPS,), wave_BT.shape[1]), tuple(keys), micro_batch)

    def steps(self, cursor: Cursor | None = None) -> Iterator[Step]:
        number = cursor.step if cursor else 0
        while True:
            batches = [self.batch(number, j) for j in range(MICRO_BATCHES)]
            samples = SECONDS * SAMPLE_RATE
            number += 1
            yield Step(tuple(batches), samples, samples, Cursor(self.plan_hash, 0, number))

    def close(self) -> None:
        """Does nothing: there are no workers."""


class Changed(Speech):
    """Steps that `change` alters from update PLANTED on."""

    def __init__(self, waves: list[np.ndarray], change: Callable[[int, Step], Step]) -> None:
        super().__init__(waves)
        self.change = change

    def steps(self, cursor: Cursor | None = None) -> Iterator[Step]:
        first = cursor.step if cursor else 0
        for number, step in enumerate(super().steps(cursor), first):
            yield self.change(number, step) if number >= PLANTED else step


def slowly(number: int, step: Step) -> Step:
    time.sleep(0.6)
    return step


def with_a_nan(number: int, step: Step) -> Step:
    if number == PLANTED:
        step.batches[1].wave_BT[2, 5_000] = float("nan")
    return step


def features_of_another_scale(engine: Engine) -> None:
    mel = engine.module.objective.mel
    plain = mel.forward

    def scaled(*given: Any) -> Any:
        frames = plain(*given)
        return frames._replace(x_BFD=4.0 * frames.x_BFD - 6.0)

    mel.forward = scaled


@dataclass(frozen=True)
class Case:
    """A failure, how it is planted, and the detectors of which one must report it."""

    name: str
    detectors: tuple[str, ...]
    objective: dict[str, Any] = field(default_factory=lambda: BEST_RQ)
    plant: planted_failures.Plant | None = None
    once: bool = True
    planted: int = PLANTED
    scaled: tuple[int, ...] = ()
    change: Callable[[int, Step], Step] | None = None
    top: dict[str, Any] = field(default_factory=dict)
    evaluations: tuple[float, ...] = ()


FIXED_LR = {"optimizer": {"lr": 1e-9}}
CASES = (
    Case("dead stem: its weights become 0", ("stem deviation",), plant=planted_failures.zero_stem, once=False),
    Case("collapsed targets: all of one code", ("code use", "dead codes"), plant=planted_failures.one_code, once=False),
    Case("collapsed code book (wav2vec 2.0)", ("target_std deviation", "code use", "too good"), WAV2VEC2,
         planted_failures.one_code, once=False),
    Case("constant prediction (data2vec)", ("prediction_std deviation",), DATA2VEC,
         planted_failures.same_prediction, once=False),
    Case("no learning: loss at chance", ("chance",), planted=0, top=FIXED_LR),
    Case("no learning (wav2vec 2.0)", ("chance", "accuracy at chance"), WAV2VEC2, planted=0, top=FIXED_LR),
    Case("a sample is NaN", ("not finite",), change=with_a_nan),
    Case("weights are NaN", ("not finite",), plant=planted_failures.break_stem),
    Case("a gradient a thousand times as large", ("gradient spike",), scaled=(PLANTED,)),
    Case("a micro-batch of each update is skipped", ("audio per update",),
         plant=planted_failures.skip_last_micro_batch),
    Case("fall of the rank: two channels dominate", ("layer_1 rank", "layer_2 rank"),
         plant=planted_failures.shrink_rank),
    Case("targets of features that are not normalised", ("target inputs",),
         plant=features_of_another_scale, planted=0),
    Case("fixed targets without information", ("target entropy",), plant=planted_failures.one_code, once=False,
         planted=0),
    Case("data comes too late", ("data wait",), change=slowly),
    Case("a probe that falls three times", ("phones/non_silence_frames falling",), planted=0,
         evaluations=(0.40, 0.37, 0.33, 0.31)),
)  # fmt: skip


def config(objective: dict[str, Any], steps: int, **top: Any) -> Config:
    """Returns the config of two blocks of 64 at 25 Hz, with a shorter grace period than the default."""
    return load(
        Config,
        {
            "data": {"shards": "memory", "micro_batches": MICRO_BATCHES, "batch_seconds": SECONDS},
            "frontend": {"name": "log_mel"},
            "encoder": {"name": "transformer", "layers": 2, "dim": 64, "heads": 2, "ffn_dim": 256, "norm": "pre",
                        "dropout": 0.0, "layer_drop": 0.0},
            "objective": objective,
            "optimizer": {"lr": 2e-3, "clip_norm": 10.0},
            "schedule": {"name": "constant", "warmup_steps": 20},
            "train": {"steps": steps, "checkpoint_every": steps, "media_every": 0},
            "engine": {"name": "torch", "timeout_minutes": 0.5},
            "health": {"every": 5, "window": 40, "grace_steps": 100},
            **top,
        },
    )  # fmt: skip


def healthy(waves: list[np.ndarray], objective: dict[str, Any], folder: Path) -> str:
    """Trains, and returns a row of the table with the alarms."""
    planted_failures.run(folder, config(objective, HEALTHY_STEPS), reader=lambda: Speech(waves))
    rows, found = read_rows(folder / "metrics.jsonl"), planted_failures.events(folder)
    losses = [row["loss/total"] for row in rows]
    said = ", ".join(f"{event['detector']} at {event['step']}" for event in found)
    curve = f"{np.mean(losses[:10]):.3f} → {np.mean(losses[-10:]):.3f}"
    return f"| {objective['name']} | {len(rows)} | {curve} | {len(found)}{f' ({said})' if said else ''} |"


def planted(waves: list[np.ndarray], case: Case, folder: Path) -> tuple[str, bool]:
    """Plants a failure; returns a row of the table, and whether it was reported."""
    folder.mkdir(parents=True)
    if case.evaluations:
        lines = [
            {"step": step, "name": "phones/non_silence_frames", "measure": NON_SILENCE, "value": value}
            for step, value in enumerate(case.evaluations)
        ]
        (folder / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    reader = Changed(waves, case.change) if case.change else Speech(waves)
    steps = 30 if case.evaluations else 140 if case.planted == 0 else STEPS
    stopped = ""
    try:
        settings = config(case.objective, steps, **case.top)
        planted_failures.run(
            folder,
            settings,
            plant=case.plant,
            once=case.once,
            scaled=case.scaled,
            reader=lambda: reader,
            planted=case.planted,
        )
    except UnhealthyError as error:
        stopped = str(error)
    found = planted_failures.events(folder)
    before = [event for event in found if event["step"] < case.planted]
    seen = next((e for e in found if e["step"] >= case.planted and e["detector"] in case.detectors), None)
    kept = " and kept the batch" if list((folder / "health").glob("step_*/rank_0.safetensors")) else ""
    skipped = any(row.get("health/skipped") for row in read_rows(folder / "metrics.jsonl"))
    action = f"stopped{kept}" if stopped else f"skipped the update{kept}" if skipped else "warned"
    if seen is None or before:
        return f"| {case.name} | missed: {[event['detector'] for event in found]} | | |", False
    return f"| {case.name} | {seen['detector']} | {seen['step'] - case.planted} | {action} |", True


def speech(manifest: Path) -> list[np.ndarray]:
    """Returns some minutes of speech of many speakers."""
    utterances = [u for u in read_manifest(manifest) if u.split == "pretrain" and u.corpus == "librispeech"]
    waves = [read_mono(str(u.path)) for u in utterances[::2]]
    return [wave for wave in waves if len(wave) > CLIP * SAMPLE_RATE]


class Recorded:
    """Activation statistics of a finished run, read from its rows."""

    def __init__(self) -> None:
        self.row: dict[str, Any] = {}

    def read(self) -> tuple[dict[str, float], dict[str, float]]:
        return tuple(
            {name.removeprefix(prefix): value for name, value in self.row.items() if name.startswith(prefix)}
            for prefix in ("health/std/", "health/rank/")
        )  # type: ignore[return-value]


def replay(folder: Path) -> list[str]:
    """Returns the alarms of the current detectors on a recorded run; its rows have no counts of codes."""
    config = load(Config, json.loads((folder / "config.json").read_text(encoding="utf-8")))
    then = config.health
    today = HealthConfig(every=then.every, window=then.window, grace_steps=then.grace_steps, confirm=then.confirm)
    config = dataclasses.replace(config, health=today)
    with tempfile.TemporaryDirectory() as scratch:
        engine: Any = SimpleNamespace(world=DistributedContext(), module=build_model(config))
        watch = HealthMonitor(config, engine, RunFolder(Path(scratch)), {}, say=lambda line: None)
        recorded = Recorded()
        watch.stats = recorded  # type: ignore[assignment]
        for row in read_rows(folder / "metrics.jsonl"):
            recorded.row = row
            metrics = {name: (np.array([value]), 1.0) for name, value in row.items() if isinstance(value, float)}
            metrics[SAMPLES] = (np.array([row["data/audio_seconds"] * SAMPLE_RATE]), 1.0)
            seconds = row["perf/step_seconds"]
            signals = RankSignals(wait_seconds=(row["perf/data_wait_share"] * seconds,))
            result = StepResult(row["loss/total"], metrics, signals, row["opt/grad_norm"])
            step = Step((), result.samples, result.samples, Cursor("", 0, row["step"]))
            watch.record_update(StepContext(config.seed, row["step"] - 1), result, step, seconds)
        return [f"{alarm.finding.detector} at {alarm.step}" for alarm in watch.alarms]


def main() -> int:
    """Returns exit code 0 where every failure is reported and no healthy run raises an alarm."""
    parser = parser_of(__doc__)
    parser.add_argument("--replay", type=Path, nargs="+", help="run folders: print the alarms of the current detectors")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    given = parser.parse_args()
    if given.replay:
        for folder in given.replay:
            print(f"{folder}: {', '.join(replay(folder)) or 'no alarm'}", flush=True)
        return 0
    manifest = real_speech()
    if manifest is None:
        return 0
    begun, waves = time.monotonic(), speech(manifest)
    seen, calm = [], []
    with tempfile.TemporaryDirectory(prefix="auricle-detectors-") as home:
        for number, objective in enumerate(HEALTHY if not given.only else ()):
            calm.append(healthy(waves, objective, Path(home) / f"healthy-{number}"))
            print(calm[-1], flush=True)
        for number, case in enumerate(case for case in CASES if given.only in case.name):
            seen.append(planted(waves, case, Path(home) / f"planted-{number}"))
            print(seen[-1][0], flush=True)
    alarms = [row for row in calm if not row.endswith("| 0 |")]
    if not given.only:
        write(given.out / "detectors.md", [row for row, _ in seen], calm, len(alarms), time.monotonic() - begun)
    return 0 if all(good for _, good in seen) and not alarms else 1


def write(path: Path, seen: list[str], calm: list[str], alarms: int, seconds: float) -> None:
    """Writes detectors.md."""
    settings = config(BEST_RQ, 1).health
    text = [
        "# Health detectors: planted failures and updates until the alarm", "",
        f"`benchmarks/prove/detectors.py`, {seconds / 60:.1f} minutes on one core. Real speech, {SECONDS} s an update, "
        f"two blocks of 64. Planted before update {PLANTED} (or the first); checked every {settings.every} updates, "
        f"{settings.confirm} times in a row, codes and losses pooled over {settings.window}, loss and codes checked "
        f"from update {settings.grace_steps} on.", "",
        "| planted failure | detector | updates later | reaction |", "| --- | --- | --- | --- |", *seen, "",
        "A rank that hangs is named, with its stacks, before the collective times out, in both engines: "
        "`tests/faults/test_hung_rank.py`.", "",
        f"False alarms over {len(calm)} healthy runs: {alarms}.", "",
        "| healthy run | updates | loss | alarms |", "| --- | --- | --- | --- |", *calm, "",
    ]  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(text), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
