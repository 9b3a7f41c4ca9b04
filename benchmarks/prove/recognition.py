"""Compares recognisers that had equal time: from scratch, fine-tuned from self-supervision, and both at once.

    python benchmarks/prove/recognition.py                # about 30 minutes on two cores

On real speech (AURICLE_SPEECH), three seeds each, with the same labelled utterances of speechocean762:

    scratch     CTC alone
    fine-tuned  BEST-RQ on the unlabelled splits pretrain and train for a share of the time, then CTC
    joint       BEST-RQ and CTC together, labels where the data have them

Every arm gets the same processor time, measured by the step; the character error rate is that of unseen speakers (split
test), greedy, with intervals over speakers. Writes benchmarks/results/recognition.md and .json. Exit code 1 unless
fine-tuned or joint is better than scratch by more than the 95 % interval of the difference.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from data_pipeline.audio.codecs import read_mono  # noqa: E402
from data_pipeline.core.jsonl import read_rows  # noqa: E402
from data_pipeline.corpora.local_speech import speech_manifest  # noqa: E402
from pretrain.evaluate.asr import by_speaker  # noqa: E402
from pretrain.evaluate.manifest import Utterance, read_manifest  # noqa: E402
from pretrain.evaluate.metrics import Tally, bootstrap  # noqa: E402
from pretrain.recognition.error_rates import Decoders, edits, recognise, written  # noqa: E402
from pretrain.recognition.recogniser import open_recogniser  # noqa: E402

CORPUS = "speechocean762"
PRETRAINING_SHARE = 0.5
"""Of the time of the fine-tuned arm."""
MODEL = (
    "frontend=log_mel", "encoder=transformer_tiny", "engine.name=torch", "data.micro_batches=4", "data.min_seconds=0.5",
    "data.max_seconds=8", "data.bucket_ratio=1.3", "data.batch_seconds=48", "data.workers=1", "train.media_every=0",
    "optimizer.lr=1e-3", "optimizer.weight_decay=0.0", "optimizer.clip_norm=1", "schedule.name=tri_stage",
    "schedule.hold_fraction=0.4", "schedule.final_scale=0.05", "health.on_collapse=warn",
)  # fmt: skip
CTC = ("heads.text.name=ctc", "data.labels=[text]")
ARMS: dict[str, tuple[str, ...]] = {
    "scratch": ("objective=none", "objective.mask_time=0.1", *CTC),
    "pretrained": ("objective=best_rq", "objective.n_codes=1024"),
    "fine-tuned": ("objective=none", "objective.mask_time=0.1", *CTC),
    "joint": (
        "objective=best_rq",
        "objective.n_codes=1024",
        *CTC,
        "heads.text.input=whole",
    ),
}
UNLABELLED = ("pretrained", "joint")
"""Arms that read all speech; the other ones read the labelled utterances alone."""


def main() -> int:
    """Runs all arms; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=2.8, help="training time of an arm and seed (default: 2.8)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--utterances", type=int, default=0, help="labelled utterances for training; 0: all")
    parser.add_argument("--test", type=int, default=200, help="utterances of the test split (default: 200)")
    parser.add_argument("--work", type=Path, default=Path("prove/recognition"), help="folder for data and runs")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder for the table")
    given = parser.parse_args()
    manifest = speech_manifest()
    if manifest is None:
        print("set AURICLE_SPEECH to a folder with manifest.tsv", file=sys.stderr)
        return 2
    shutil.rmtree(given.work, ignore_errors=True)
    began, listed = time.monotonic(), read_manifest(manifest)
    shards = {name: preprocess(listed, given.work / name, given.utterances, name) for name in ("labelled", "all")}
    test = [u for u in listed if u.corpus == CORPUS and u.split == "test" and u.text]
    test = test[:: -(-len(test) // given.test)]
    steps = {arm: affordable(arm, shards, given.work, given.minutes) for arm in ARMS}
    tallies: dict[str, list[Tally]] = {"scratch": [], "fine-tuned": [], "joint": []}
    for seed in range(given.seeds):
        for arm, found in tallies.items():
            run = train(arm, shards, given.work, seed, steps)
            found.append(character_errors(run, test))
            print(f"seed {seed}, {arm}: CER {bootstrap([found[-1]], 100).value:.1%}", flush=True)
    rates = {arm: bootstrap(found, 2_000) for arm, found in tallies.items()}
    gains = {arm: bootstrap(tallies["scratch"], 2_000, minus=tallies[arm]) for arm in ("fine-tuned", "joint")}
    better = [arm for arm, gain in gains.items() if gain.low > 0]
    report(given, rates, gains, steps, time.monotonic() - began)
    print(f"better than from scratch: {', '.join(better) or 'none'}")
    return 0 if better else 1


def preprocess(listed: Sequence[Utterance], folder: Path, most: int, name: str) -> str:
    """Writes the labelled utterances of split train, or these and all speech without labels; returns the shards."""
    labelled = [u for u in listed if u.corpus == CORPUS and u.split == "train" and u.text]
    labelled = labelled[:: -(-len(labelled) // most)] if most else labelled
    heard = {u.name for u in labelled}
    rest = [u for u in listed if u.split in ("pretrain", "train") and u.name not in heard] if name == "all" else []
    folder.mkdir(parents=True)
    rows = [(u, written(u.text, " 'abcdefghijklmnopqrstuvwxyz")) for u in labelled] + [(u, "") for u in rest]
    lines = [
        json.dumps({"path": str(u.path), "speaker": u.speaker, "text": text, "corpus": u.corpus}) for u, text in rows
    ]
    (folder / "list.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    corpus = ["corpus=manifest", f"corpus.path={folder / 'list.jsonl'}", "corpus.allow_outside=true"]
    auricle("preprocess", *corpus, f"out={folder / 'shards'}", f"runs={folder}", "min_shards=4")
    return str(folder / "shards")


def overrides(arm: str, shards: dict[str, str], work: Path, name: str, steps: int, seed: int) -> list[str]:
    """Returns the command line of a training run."""
    data = shards["all" if arm in UNLABELLED else "labelled"]
    length = [f"train.steps={steps}", f"schedule.warmup_steps={max(1, steps // 10)}", f"train.checkpoint_every={steps}"]
    return [*ARMS[arm], *MODEL, *length, f"data.shards={data}", f"runs={work / 'runs'}", f"name={name}", f"seed={seed}"]


def affordable(arm: str, shards: dict[str, str], work: Path, minutes: float) -> int:
    """Returns the updates of an arm in its time, from the median step of a short run."""
    name = f"timing_{arm}"
    auricle("pretrain", *overrides(arm, shards, work, name, 12, 0))
    rows = read_rows(work / "runs" / name / "metrics.jsonl")[3:]
    seconds = float(np.median([row["perf/step_seconds"] for row in rows]))
    share = {"pretrained": PRETRAINING_SHARE, "fine-tuned": 1 - PRETRAINING_SHARE}.get(arm, 1.0)
    return max(10, int(60 * minutes * share / seconds))


def train(arm: str, shards: dict[str, str], work: Path, seed: int, steps: dict[str, int]) -> Path:
    """Trains an arm with a seed; returns the run folder of its recogniser."""
    more: list[str] = []
    if arm == "fine-tuned":
        auricle("pretrain", *overrides("pretrained", shards, work, f"pretrained_{seed}", steps["pretrained"], seed))
        frozen = steps[arm] // 20
        more = [f"init={work / 'runs' / f'pretrained_{seed}'}", f"objective.frozen_steps={frozen}"]
    name = f"{arm}_{seed}"
    auricle("pretrain", *overrides(arm, shards, work, name, steps[arm], seed), *more)
    return work / "runs" / name


def character_errors(run: Path, test: Sequence[Utterance]) -> Tally:
    """Returns character edits and characters of each test speaker, greedily decoded."""
    recogniser = open_recogniser(str(run))
    references = [written(u.text, recogniser.head.symbols) for u in test]
    [(_, texts)] = recognise(recogniser, (read_mono(str(u.path)) for u in test), Decoders())
    return by_speaker(test, edits(references, texts, by_words=False))


def auricle(*arguments: str) -> None:
    """Runs a command of auricle; its output is shown where it fails."""
    done = subprocess.run(
        [sys.executable, "-m", "launch.main", *arguments], cwd=ROOT, capture_output=True, encoding="utf-8", check=False
    )
    if done.returncode:
        print(done.stdout[-2000:], done.stderr[-4000:], file=sys.stderr)
        raise SystemExit(f"auricle {' '.join(arguments)} ended with exit code {done.returncode}")


def report(given: argparse.Namespace, rates: Any, gains: Any, steps: dict[str, int], seconds: float) -> None:
    """Writes the table and its numbers."""
    command = "python benchmarks/prove/recognition.py " + " ".join(sys.argv[1:])
    lines = [
        "# Recognition: from scratch, fine-tuned, joint",
        "",
        f"`{command.strip()}`, {seconds / 60:.0f} minutes on {platform.machine()}; {given.seeds} seeds, "
        f"{given.minutes:g} minutes of training each, unseen speakers of {CORPUS}.",
        "",
        "| arm | updates | character error rate | 95 % | better than scratch by | 95 % |",
        "|---|---|---|---|---|---|",
    ]
    for arm, rate in rates.items():
        gain = gains.get(arm)
        shown = f"{100 * gain.value:+.1f} points | {100 * gain.low:+.1f} … {100 * gain.high:+.1f}" if gain else " | "
        updates = f"{steps['pretrained']} + {steps[arm]}" if arm == "fine-tuned" else str(steps[arm])
        lines.append(f"| {arm} | {updates} | {rate.value:.1%} | {rate.low:.1%} … {rate.high:.1%} | {shown} |")
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "recognition.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    values = {
        "command": command, "steps": steps, "seconds": seconds,
        "rates": {arm: [rate.value, rate.low, rate.high] for arm, rate in rates.items()},
        "gains": {arm: [gain.value, gain.low, gain.high] for arm, gain in gains.items()},
    }  # fmt: skip
    (given.out / "recognition.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    sys.exit(main())
