"""Compares the time-contrastive objective with wav2vec 2.0 at equal operations, at three speaking rates.

    python benchmarks/prove/time_contrastive.py                # about 18 minutes on two cores

Both train the same model on the same speech (splits pretrain and train of AURICLE_SPEECH, no labels) for as many
updates, with as many operations per update: the time-contrastive one encodes each utterance twice, and so half as many.
A linear probe for phones is then fitted at speed 1 and evaluated at 1, 0.8 and 1.2, on unseen speakers. Writes
benchmarks/results/time_contrastive.md and .json. Exit code 1 where the criterion is not met: higher accuracy at speed
1, and at 0.8 and 1.2 at most half of the loss of accuracy.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.prove.common import auricle, markdown_table, parser_of, real_speech, step_seconds  # noqa: E402
from data_pipeline.audio.transforms import change_speed  # noqa: E402
from data_pipeline.core.jsonl import read_rows  # noqa: E402
from data_pipeline.core.schema import load  # noqa: E402
from data_pipeline.core.types import Batch  # noqa: E402
from launch.cli.compose import compose  # noqa: E402
from launch.runs.summary import audio_hours  # noqa: E402
from pretrain.config import Config  # noqa: E402
from pretrain.evaluate.config import EvaluateConfig, ProbeConfig  # noqa: E402
from pretrain.evaluate.features import Labelled, phone_frames  # noqa: E402
from pretrain.evaluate.frozen_encoders import FrozenEncoder, freeze, log_mel_with_context, open_encoder  # noqa: E402
from pretrain.evaluate.manifest import Interval, Utterance  # noqa: E402
from pretrain.evaluate.metrics import NON_SILENCE, Tally, bootstrap  # noqa: E402
from pretrain.evaluate.probe import fit_probe  # noqa: E402
from pretrain.evaluate.task_inputs import TaskInputs  # noqa: E402
from pretrain.interfaces.frames import StepContext  # noqa: E402
from pretrain.profiling import flops  # noqa: E402
from pretrain.profiling.processor import model_name  # noqa: E402
from pretrain.train_module import build_model  # noqa: E402

PLAIN, TIMED = "wav2vec2", "time_contrastive"
SPEEDS = (1.0, 0.8, 1.2)
BATCH_SECONDS = 28.0
TIMED_STEPS = 30
COMMON = (
    "frontend=log_mel", "frontend.subsampling=2", "frontend.dropout=0", "encoder=transformer_tiny", "encoder.dropout=0",
    "data.micro_batches=2", "data.min_seconds=1", "data.max_seconds=6", "data.workers=1",
    "objective.mask_span=6", "objective.projection_dim=128", "objective.negatives=50",
    "optimizer.lr=1e-3", "optimizer.clip_norm=1", "schedule.name=cosine", "schedule.warmup_steps=60",
    "engine.name=torch", "engine.precision=bf16", "train.media_every=0",
    "health.on_collapse=warn", "health.on_chance=warn",
)  # fmt: skip
OWN = {PLAIN: ("objective.n_codes=64", "objective.code_dim=128"), TIMED: ("objective.clusters=50",)}


@dataclass(frozen=True)
class Found:
    """Results of one model's probes: one tally per seed for each speed."""

    who: str
    tallies: Mapping[float, list[Tally]]

    def accuracy(self, speed: float) -> float:
        """Returns the accuracy on non-silence frames, over all speakers."""
        return bootstrap(self.tallies[speed], 100).value

    def lost(self, speed: float) -> float:
        """Returns the accuracy lost against speed 1."""
        return self.accuracy(1.0) - self.accuracy(speed)


def overrides(objective: str, batch_seconds: float) -> list[str]:
    """Returns the overrides of a run."""
    return [f"objective={objective}", *COMMON, *OWN[objective], f"data.batch_seconds={batch_seconds:.2f}"]


def forward_flops(objective: str) -> float:
    """Returns operations of one forward pass with loss and all views, per second of audio from the reader."""
    values = compose("pretrain", ["data.shards=none", *overrides(objective, BATCH_SECONDS)])
    module = build_model(load(Config, {name: value for name, value in values.items() if name != "launcher"})).train()
    seconds, total = 6.0, 0.0
    for step in range(8):  # the second view's length is drawn
        wave_BT = 0.1 * torch.randn(4, int(seconds * 16_000))
        batch = Batch(wave_BT, torch.full((4,), wave_BT.shape[1]), tuple("abcd"), 0)
        ctx = StepContext(0, step + 1)
        plan = module.prepare(batch, ctx)
        with flops.Counter() as counted, torch.no_grad():
            module(batch, plan, plan.counts_K, ctx)
        total += counted.get_total_flops() / (4 * seconds)
    return total / 8


def pretrain(objective: str, shards: Path, runs: Path, batch_seconds: float, steps: int, name: str) -> Path:
    """Trains once and returns the run folder."""
    common = [f"data.shards={shards}", f"runs={runs}", f"name={name}", f"train.steps={steps}"]
    auricle("pretrain", *overrides(objective, batch_seconds), *common, f"train.checkpoint_every={steps}")
    return runs / name


def steps_in(minutes: float, shards: Path, runs: Path, seconds_of: Mapping[str, float]) -> int:
    """Returns updates of each objective that fit into `minutes` of both together, at the speed of a few timed ones."""
    taken = 0.0
    for objective, batch_seconds in seconds_of.items():
        run = pretrain(
            objective, shards, runs, batch_seconds=batch_seconds, steps=TIMED_STEPS, name=f"{objective}_timing"
        )
        taken += step_seconds(run)
    return max(TIMED_STEPS, int(minutes * 60 / taken))


class Speeds:
    """The phone task's utterances at their own or another speed, alignments included."""

    def __init__(self, manifest: Path, most: int) -> None:
        config = EvaluateConfig(checkpoint="none", manifest=str(manifest), max_utterances=most)
        self.task = TaskInputs(config, "phones", print)

    def features(self, encoder: FrozenEncoder, part: Sequence[Utterance], speed: float) -> Labelled:
        """Returns the labelled frames of `part` at a speed."""
        phones = {
            u.name: [Interval(i.start / speed, i.end / speed, i.phone) for i in self.task.phones[u.name]] for u in part
        }

        def waves(utterance: Utterance) -> torch.Tensor:
            wave = self.task.waves(utterance)
            if speed == 1.0:
                return wave
            return torch.from_numpy(change_speed(wave.numpy(), speed, round(len(wave) / speed)))

        return phone_frames(encoder, part, phones, self.task.classes, waves)  # type: ignore[arg-type]

    def probe(self, who: str, encoder: FrozenEncoder) -> Found:
        """Fits at speed 1 on train, selects on valid, evaluates on test at every speed."""
        train, valid = (self.features(encoder, part, 1.0) for part in self.task.parts[:2])
        probe = fit_probe(train, valid, len(self.task.classes), ProbeConfig(), silent=self.task.silent)
        tallies: dict[float, list[Tally]] = {}
        for speed in SPEEDS:
            test = self.features(encoder, self.task.parts[2], speed)
            hits_N = (probe.predict(test.x_NLD) == test.y_N.numpy()).astype(float)
            tallies[speed] = [test.tally(hits_N, self.task.counted(test)[NON_SILENCE])]
        found = Found(who, tallies)
        print(f"{who}: " + ", ".join(f"{found.accuracy(speed):.1%} at {speed:g}×" for speed in SPEEDS), flush=True)
        return found


def verdicts(plain: Found, timed: Found) -> tuple[list[str], bool]:
    """Returns a sentence for each part of the criterion, and whether all of it is met."""
    gap = bootstrap(timed.tallies[1.0], 2_000, plain.tallies[1.0])
    better = "yes" if gap.low > 0 else "no" if gap.high < 0 else "not significantly"
    lines = [
        f"- at 1×: {100 * gap.value:+.1f} points over wav2vec 2.0 "
        f"(95 %: {100 * gap.low:+.1f} … {100 * gap.high:+.1f}); better: {better}"
    ]
    met = gap.low > 0
    for speed in SPEEDS[1:]:
        ours, theirs = timed.lost(speed), plain.lost(speed)
        half = ours <= 0.5 * theirs
        met = met and half
        lines.append(
            f"- at {speed:g}×: loses {100 * ours:.1f} points, wav2vec 2.0 {100 * theirs:.1f}; "
            f"at most half of that: {'yes' if half else 'no'}"
        )
    return lines, met


def main() -> int:
    """Returns exit code 0 where the criterion is met."""
    parser = parser_of(__doc__, "time_contrastive")
    parser.add_argument("--minutes", type=float, default=12.0, help="of pretraining, both objectives together")
    parser.add_argument("--updates", type=int, default=0, help="of each objective; 0: as many as fit into the minutes")
    parser.add_argument("--max-utterances", type=int, default=0, help="per split of the probe; 0 takes all")
    parser.add_argument("--shards", type=Path, help="shards of AURICLE_SPEECH; written where not given")
    given = parser.parse_args()
    manifest = real_speech()
    if manifest is None:
        return 0
    begun = time.monotonic()
    shards = given.shards or given.work / "shards"
    if given.shards is None:
        auricle(
            "preprocess",
            "corpus=manifest",
            f"corpus.path={manifest}",
            "corpus.splits=[pretrain,train]",
            f"out={shards}",
        )
    flops = {objective: forward_flops(objective) for objective in (PLAIN, TIMED)}
    seconds_of = {PLAIN: BATCH_SECONDS, TIMED: BATCH_SECONDS * flops[PLAIN] / flops[TIMED]}
    steps = given.updates or steps_in(given.minutes, shards, given.work, seconds_of)
    runs = {
        o: pretrain(o, shards, given.work, batch_seconds=seconds_of[o], steps=steps, name=f"{o}_{steps}")
        for o in (PLAIN, TIMED)
    }
    spent: dict[str, tuple[float, float]] = {}
    for objective, run in runs.items():
        hours = audio_hours(read_rows(run / "metrics.jsonl"))[-1]
        spent[objective] = hours, 3 * 3600 * hours * flops[objective]

    speeds = Speeds(manifest, given.max_utterances)
    encoders = {objective: open_encoder(str(run)) for objective, run in runs.items()}
    fresh = encoders[PLAIN].fresh
    assert fresh is not None
    found = {objective: speeds.probe(objective, encoder) for objective, encoder in encoders.items()}
    others = [
        speeds.probe("random weights", freeze(fresh(0), "random weights")),
        speeds.probe("log-mel ±10 frames", log_mel_with_context()),
    ]
    lines, met = verdicts(found[PLAIN], found[TIMED])
    report(
        given, found=[*found.values(), *others], spent=spent, steps=steps, lines=lines, took=time.monotonic() - begun
    )
    print("\n".join(lines))
    return 0 if met else 1


COLUMNS = ("model", "distinct audio, training operations", "1×", "0.8×", "1.2×", "lost at 0.8×", "lost at 1.2×")


def report(
    given: Any, found: list[Found], spent: Mapping[str, tuple[float, float]], steps: int, lines: list[str], took: float
) -> None:
    """Writes time_contrastive.md and .json."""
    rows = []
    for one in found:
        values = [f"{100 * one.accuracy(speed):.1f}" for speed in SPEEDS] + [
            f"{100 * one.lost(s):.1f}" for s in SPEEDS[1:]
        ]
        audio = f"{spent[one.who][0]:.1f} h, {spent[one.who][1]:.2e} FLOP" if one.who in spent else "–"
        rows.append([one.who, audio, *values])
    text = [
        "# Time-contrastive objective and wav2vec 2.0 at equal operations", "",
        f"{time.strftime('%Y-%m-%d')}, {model_name()}, {os.cpu_count()} cores, {took / 60:.0f} minutes in all: "
        f"`{' '.join(['python', 'benchmarks/prove/time_contrastive.py', *sys.argv[1:]])}`; {steps} updates each, "
        "4 × 256 transformer on log-mel at 50 Hz. Accuracy of phones, non-silence frames, unseen speakers, in %.",
        "", *markdown_table(COLUMNS, rows), "",
        "Criterion: higher accuracy at 1×, and at most half of the loss at 0.8× and 1.2×.", "", *lines, "",
    ]  # fmt: skip
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "time_contrastive.md").write_text("\n".join(text), encoding="utf-8")
    plain = {one.who: {str(speed): one.accuracy(speed) for speed in SPEEDS} for one in found}
    values = {"steps": steps, "hours_and_flop": spent, "accuracy": plain}
    (given.out / "time_contrastive.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
