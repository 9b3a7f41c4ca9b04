"""Separates mixtures of two unseen speakers, beside ideal masks.

    python benchmarks/prove/separation.py --minutes 30           # of one core, for each seed
    python benchmarks/prove/separation.py --minutes 30 --seeds 1

Trains a `separation` head with the encoder on mixtures of real speech (AURICLE_SPEECH), two different speakers at 0 ± 5
dB, and measures the improvement of the SI-SNR on mixtures of the 16 speakers of split test of speechocean762. A
finished run of --work is used again. Writes benchmarks/results/separation.md and .json. Exit code 1 where the mean
improvement over the seeds is below 3 dB.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.prove.common import parser_of, quiet_auricle, real_speech, step_seconds  # noqa: E402
from pretrain.evaluate.manifest import read_manifest  # noqa: E402
from pretrain.profiling.processor import model_name  # noqa: E402

GOAL_DB = 3.0
TESTED = "speechocean762"
CORPORA = ("librispeech", "librispeech-26", "speechocean762")
"""Corpora of whole sentences; the speakers of speechocean762's split test are in none of the training splits."""
RUN = (
    "objective=none", "frontend=log_mel", "frontend.subsampling=4", "encoder=transformer_tiny", "encoder.layers=2",
    "encoder.dim=128", "encoder.ffn_dim=512", "heads.apart.name=separation", "heads.apart.clustering=0.0",
    "data.sources=2", "data.labels=[speaker]",
    "data.augment.mix_prob=1.0", "data.augment.mix_least_share=1.0", "data.augment.mix_share=1.0",
    "data.min_seconds=1.0", "data.max_seconds=2.0",
    "data.batch_seconds=16", "data.micro_batches=1", "data.workers=1", "data.bucket_ratio=1.3", "engine.name=torch",
    "optimizer.lr=1e-3", "optimizer.clip_norm=5", "schedule.name=tri_stage", "schedule.hold_fraction=0.5",
    "schedule.final_scale=0.05", "train.media_every=0", "health.on_collapse=warn", "health.on_chance=warn",
)  # fmt: skip


def main() -> int:
    """Trains and measures; returns the exit code."""
    parser = parser_of(__doc__, "separation")
    parser.add_argument("--minutes", type=float, default=30, help="training time (default: 30)")
    parser.add_argument("--updates", type=int, default=0, help="updates, instead of a time")
    parser.add_argument("--seeds", type=int, default=3, help="runs that differ in their random draws (default: 3)")
    parser.add_argument(
        "--magnitudes", type=float, default=0.0, help="share of the updates before the waveform loss (default: 0)"
    )
    parser.add_argument("overrides", nargs="*", help="further fields of the run, such as heads.apart.hidden=128")
    given = parser.parse_args()
    manifest = real_speech()
    if manifest is None:
        return 0
    shards = preprocess(manifest, given.work)
    run = [*RUN, *given.overrides, f"data.shards={shards}", f"runs={given.work / 'runs'}"]
    steps = given.updates or affordable(run, given.work, given.minutes)
    length = [f"train.steps={steps}", f"schedule.warmup_steps={min(100, steps // 10)}"]
    length += [f"heads.apart.waveform_from={int(given.magnitudes * steps)}"]
    length += [f"train.checkpoint_every={max(1, steps // 10)}"]
    found = []
    for seed in range(given.seeds):
        name = f"two_speakers_{seed}"
        if not (given.work / "runs" / name / "checkpoints" / f"step_{steps:08d}").exists():
            quiet_auricle("pretrain", *run, *length, f"name={name}", f"seed={seed}")
        found.append(measured(given.work / "runs" / name, manifest, given.work / f"found_{seed}"))
    return report(given, found, steps)


def measured(run: Path, manifest: Path, out: Path) -> list[dict[str, Any]]:
    """Returns the rows of task=separation on unseen speakers: the run, then ideal masks."""
    fields = [f"checkpoint={run}", "task=separation", f"manifest={manifest}", f"corpora={TESTED}", f"out={out}"]
    quiet_auricle("evaluate", *fields)
    rows: list[dict[str, Any]] = json.loads((out / "results.json").read_text(encoding="utf-8"))
    return rows


def affordable(run: list[str], work: Path, minutes: float) -> int:
    """Returns the updates that fit in the time, by the median step of a short run."""
    quiet_auricle("pretrain", *run, "name=timing", "train.steps=12", "schedule.warmup_steps=4")
    return int(60 * minutes / step_seconds(work / "runs" / "timing", skip=3))


def preprocess(manifest: Path, work: Path) -> Path:
    """Writes shards of the training speakers; returns their folder."""
    heard = [u for u in read_manifest(manifest) if u.corpus in CORPORA and u.split in ("pretrain", "train")]
    work.mkdir(parents=True, exist_ok=True)  # finished shards are used again
    rows = [json.dumps({"path": str(u.path), "speaker": u.speaker, "corpus": u.corpus}) for u in heard]
    (work / "list.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    corpus = ["corpus=manifest", f"corpus.path={work / 'list.jsonl'}", "corpus.allow_outside=true"]
    quiet_auricle("preprocess", *corpus, f"out={work / 'shards'}", f"runs={work}", "min_shards=4")
    return work / "shards"


def report(given: argparse.Namespace, found: list[list[dict[str, Any]]], steps: int) -> int:
    """Writes the table and its numbers; returns the exit code."""
    command = " ".join(["python benchmarks/prove/separation.py", *sys.argv[1:]])
    mean = statistics.mean(rows[0]["value"] for rows in found)
    lines = [
        "# Separation of two unseen speakers",
        "",
        f"`{command}`: {steps} updates of each seed on {model_name()}. SI-SNR improvement in dB, 95 % over speakers.",
        "",
        "| seed | model | ideal ratio masks |",
        "|---|---|---|",
        *(f"| {seed} | {' | '.join(map(interval, rows))} |" for seed, rows in enumerate(found)),
        f"| mean | {mean:.2f} | {statistics.mean(rows[1]['value'] for rows in found):.2f} |",
        "",
        f"Goal {GOAL_DB:g} dB: {'reached' if mean >= GOAL_DB else '**missed**'}.",
    ]
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "separation.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    values = {"command": command, "steps": steps, "mean": mean, "seeds": found}
    (given.out / "separation.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    print("\n".join(lines))
    return 0 if mean >= GOAL_DB else 1


def interval(row: dict[str, Any]) -> str:
    """Returns a value with its interval."""
    return f"{row['value']:.2f} ({row['low']:.2f} … {row['high']:.2f})"


if __name__ == "__main__":
    sys.exit(main())
