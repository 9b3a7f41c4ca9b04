"""Measures what few weights reach: Arabic digits of unseen speakers, by prompts, LoRA, adapters, biases, head or all.

    python benchmarks/prove/prompts.py                       # ≤ 20 minutes on two cores
    python benchmarks/prove/prompts.py --base runs/T --quick
    python benchmarks/prove/prompts.py --base runs/T --pilot  # learning rates of each way, on English words

Speech: manifest.tsv of the folder that AURICLE_SPEECH names. The base is pretrained (recipe quality_hubert) on its
splits pretrain and train without the digits and words that are measured. Each fold leaves a third of the twelve Arabic
speakers out; every way trains on the others' 320 clips with the same updates and the same random head, for each seed.
Writes benchmarks/results/prompts.json and .md. Exit code 1 unless the best way under 1 % of the weights of front end
and encoder is within 3 points of full fine-tuning, and prompts are above the head alone.
"""

from __future__ import annotations

import csv
import json
import os
import platform
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "2")

import torch
from torch.nn.utils.rnn import pad_sequence

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.prove.common import auricle, markdown_table, parser_of, real_speech  # noqa: E402
from data_pipeline.core.rng import keyed_rng  # noqa: E402
from data_pipeline.core.schema import load  # noqa: E402
from data_pipeline.core.types import Batch  # noqa: E402
from pretrain.adaptation.finetune import checkpoint_architecture  # noqa: E402
from pretrain.config import Config  # noqa: E402
from pretrain.engines import make_engine  # noqa: E402
from pretrain.engines.distributed import DistributedContext  # noqa: E402
from pretrain.evaluate.manifest import read_audio, read_manifest  # noqa: E402
from pretrain.evaluate.metrics import Interval95, Tally, bootstrap  # noqa: E402
from pretrain.heads.classifier import Classifier  # noqa: E402
from pretrain.interfaces.frames import StepContext  # noqa: E402
from pretrain.interop.init_weights import load_initial  # noqa: E402
from pretrain.lr_schedule import learning_rate  # noqa: E402
from pretrain.nn.tuning import learned_share  # noqa: E402
from pretrain.train_module import TrainModule, build_model  # noqa: E402

FOLDS = 3
WAYS = ("full", "lora", "adapter", "bias", "prompt", "head")
PRETRAINING = ("librispeech", "librispeech-26", "speechocean762", "kerstin")
DIGITS, WORDS = "arabic_speech_commands", "speech_commands_v1"
CLIPS = 16
"""Per update."""
LIMIT, WITHIN = 0.01, 0.03
PILOT_RATES = (1e-3, 3e-3, 1e-2, 3e-2)
RATES = {"full": 3e-3, "lora": 1e-2, "adapter": 3e-3, "bias": 1e-2, "prompt": 1e-2, "head": 1e-2}
"""Peak learning rates, the best ones of `--pilot`: English words of other speakers and another corpus.

LoRA's factor alpha / rank = 1 was chosen on the split valid of the Arabic digits: two of the twelve speakers.
"""


@dataclass(frozen=True)
class Clip:
    """A recording of one word.  wave_T: (T,) float32 at 16 kHz."""

    key: str
    speaker: str
    label: str
    split: str
    wave_T: torch.Tensor


@dataclass
class Row:
    """The result of one way to tune.  share: of the weights of front end and encoder that learn."""

    way: str
    share: float
    accuracy: Interval95
    over_full: Interval95
    over_head: Interval95
    seconds: float


def read_clips(manifest: Path, corpus: str) -> list[Clip]:
    """Returns the labelled clips of a corpus."""
    listed = [u for u in read_manifest(manifest) if u.corpus == corpus and u.labels.get("label")]
    waves = (torch.from_numpy(read_audio(u).copy()) for u in listed)
    return [Clip(u.name, u.speaker, u.labels["label"], u.split, w) for u, w in zip(listed, waves, strict=True)]


def pretrained(manifest: Path, work: Path, steps: int) -> Path:
    """Pretrains the base on speech of other corpora; a finished one stays."""
    work.mkdir(parents=True, exist_ok=True)
    subset = work / "pretraining.tsv"
    with manifest.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file, delimiter="\t") if row["corpus"] in PRETRAINING]
    with subset.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), delimiter="\t")
        writer.writeheader()
        writer.writerows(row for row in rows if row["split"] in ("pretrain", "train"))
    corpus = ["corpus=manifest", f"corpus.path={subset}", f"corpus.root={manifest.parent}"]
    auricle("preprocess", *corpus, f"out={work / 'shards'}")
    auricle("targets", f"shards={work / 'shards'}", f"out={work / 'mfcc'}", "rounds=8")
    given = ["+experiment=quality_hubert", f"data.shards={work / 'shards'}", f"data.targets={{mfcc: {work / 'mfcc'}}}"]
    given += [f"runs={work}", "name=base", f"train.steps={steps}", f"train.checkpoint_every={steps}"]
    auricle("pretrain", *given, "health.on_collapse=warn", "train.media_every=0", "launcher.processes=2")
    return work / "base"


def batch_of(clips: list[Clip], number: int = 0) -> Batch:
    """Returns clips as one micro-batch."""
    lengths_B = torch.tensor([len(clip.wave_T) for clip in clips])
    wave_BT = pad_sequence([clip.wave_T for clip in clips], batch_first=True)
    labels = {"label": tuple(clip.label for clip in clips)}
    return Batch(wave_BT, lengths_B, tuple(clip.key for clip in clips), number, labels=labels)


def tuned(base: Path, way: str, train: list[Clip], classes: list[str], lr: float, steps: int, seed: int) -> TrainModule:
    """Tunes the base on clips in one way, by the engine of `auricle pretrain`."""
    head = {"name": "classifier", "label": "label", "classes": classes, "loss": "softmax"}
    values = {
        **checkpoint_architecture(str(base)), "init": str(base), "seed": seed,
        "data": {"shards": "clips", "micro_batches": 1},
        "objective": {"name": "none"}, "heads": {"digit": head}, "tune": {"name": way},
        "engine": {"name": "torch", "precision": "bf16"},
        "optimizer": {"lr": lr, "weight_decay": 0.0, "clip_norm": 1.0}, "train": {"steps": steps},
        "schedule": {"name": "tri_stage", "warmup_steps": steps // 10, "hold_fraction": 0.4, "final_scale": 0.05},
    }  # fmt: skip
    config = load(Config, values)
    module = build_model(config)
    load_initial(config, module)
    engine = make_engine(config, module, DistributedContext())
    for step in range(steps):
        chosen = keyed_rng(seed, step, "clips").choice(len(train), min(CLIPS, len(train)), replace=False)
        rate = learning_rate(config.optimizer, config.schedule, steps, step)
        engine.step([batch_of([train[number] for number in chosen])], StepContext(seed, step), rate)
    return module.eval()


@torch.inference_mode()
def tally(module: TrainModule, test: list[Clip]) -> dict[str, tuple[float, float]]:
    """Returns hits and trials of each speaker."""
    head = module.heads["digit"]
    assert isinstance(head, Classifier)
    names, found = list(head.ids), {clip.speaker: (0.0, 0.0) for clip in test}
    for first in range(0, len(test), CLIPS):
        part = test[first : first + CLIPS]
        batch = batch_of(part)
        best_B = head.logits(module.model(batch.wave_BT, batch.lengths_B)).argmax(1).tolist()
        for clip, best in zip(part, best_B, strict=True):
            hits, trials = found[clip.speaker]
            found[clip.speaker] = (hits + (names[best] == clip.label), trials + 1)
    return found


def pilot(base: Path, clips: list[Clip], steps: int) -> None:
    """Prints the accuracy of each way at several learning rates on the splits train and valid of another corpus."""
    train, valid = ([clip for clip in clips if clip.split == split] for split in ("train", "valid"))
    classes = sorted({clip.label for clip in clips})
    for way in WAYS:
        for lr in PILOT_RATES:
            found = tally(tuned(base, way, train, classes, lr, steps, 0), valid).values()
            print(f"{way:8} lr {lr:g}: {sum(h for h, _ in found) / sum(n for _, n in found):.3f}", flush=True)


def measure(base: Path, clips: list[Clip], cases: list[list[tuple[int, int]]], steps: int) -> list[Row]:
    """Tunes the base in every way.

    Args:
        base: the pretrained run.
        clips: of all speakers.
        cases: (seed, fold) of the tunings whose test speakers are counted together.
        steps: updates of each tuning.
    """
    speakers, classes = sorted({clip.speaker for clip in clips}), sorted({clip.label for clip in clips})
    tallies: dict[str, list[Tally]] = {}
    shares: dict[str, float] = {}
    seconds: dict[str, float] = {}
    for way in WAYS:
        begun, tallies[way] = time.monotonic(), []
        for case in cases:
            found: dict[str, tuple[float, float]] = {}
            for seed, fold in case:
                left_out = set(speakers[fold::FOLDS])
                train = [clip for clip in clips if clip.speaker not in left_out]
                module = tuned(base, way, train, classes, RATES[way], steps, seed)
                found |= tally(module, [clip for clip in clips if clip.speaker in left_out])
                learned, total = learned_share(module.model)
                shares[way] = learned / total
            tallies[way].append(found)
            print(f"{way}, seeds and folds {case}: {found}", flush=True)
        seconds[way] = (time.monotonic() - begun) / sum(map(len, cases))
    return [
        Row(
            way,
            shares[way],
            bootstrap(tallies[way], 2_000),
            bootstrap(tallies[way], 2_000, tallies["full"]),
            bootstrap(tallies[way], 2_000, tallies["head"]),
            seconds[way],
        )
        for way in WAYS
    ]


def write(result: dict[str, Any], rows: list[Row], out: Path) -> bool:
    """Writes both files; returns whether the gates are passed."""
    out.mkdir(parents=True, exist_ok=True)
    small = [row for row in rows if row.share < LIMIT and row.way != "head"]
    best, by_way = max(small, key=lambda row: row.accuracy.value), {row.way: row for row in rows}
    passed = [best.over_full.value >= -WITHIN, by_way["prompt"].over_head.value > 0]
    result |= {"best": best.way, "within_3_points": passed[0], "prompts_above_head": passed[1]}
    (out / "prompts.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")

    def points(found: Interval95, sign: str = "") -> str:
        return f"{100 * found.value:{sign}.1f} ({100 * found.low:{sign}.1f} to {100 * found.high:{sign}.1f})"

    table = [
        (
            row.way, f"{row.share:.2%}", points(row.accuracy), points(row.over_full, "+"), points(row.over_head, "+"),
            f"{row.seconds:.0f}",
        )
        for row in rows
    ]  # fmt: skip
    lines = [
        "# Few weights: Arabic digits of unseen speakers", "",
        f"{result['when']}, {result['machine']}, {result['minutes']} minutes: `{result['command']}`", "",
        f"{FOLDS} folds over {result['speakers']} speakers, seeds and folds {result['cases']}, {result['steps']} "
        f"updates of {CLIPS} clips; intervals over speakers. Base: quality_hubert, {result['base_steps']} updates.", "",
        *markdown_table(
            ("tune", "weights that learn", "accuracy in %", "above full", "above head alone", "seconds"), table
        ),
        "", f"Best way under 1 % of the weights: {best.way}. Within 3 points of full fine-tuning: "
        f"{'yes' if passed[0] else 'no'}. Prompts above the head alone: {'yes' if passed[1] else 'no'}.",
    ]  # fmt: skip
    (out / "prompts.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))
    return all(passed)


def main() -> int:
    """Returns exit code 0 where both gates are passed."""
    parser = parser_of(__doc__, "prompts")
    parser.add_argument("--base", type=Path, help="a finished run of quality_hubert; default: train one")
    parser.add_argument("--base-steps", type=int, default=400, help="updates of the base")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one fold for each seed: a third of the time")
    parser.add_argument("--steps", type=int, default=60, help="updates of each tuning")
    parser.add_argument("--pilot", action="store_true", help="only compare learning rates, on English words")
    given = parser.parse_args()
    manifest = real_speech()
    if manifest is None:
        return 0
    begun = time.monotonic()
    base = given.base or pretrained(manifest, given.work, given.base_steps)
    if given.pilot:
        pilot(base, read_clips(manifest, WORDS), given.steps)
        return 0
    clips = read_clips(manifest, DIGITS)
    cases = [[(seed, fold) for fold in range(FOLDS)] for seed in range(given.seeds)]
    if given.quick:
        cases = [[(fold, fold) for fold in range(FOLDS)]]
    rows = measure(base, clips, cases, given.steps)
    result = {
        "when": time.strftime("%Y-%m-%d"),
        "command": " ".join(["python", "benchmarks/prove/prompts.py", *sys.argv[1:]]),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "minutes": round((time.monotonic() - begun) / 60, 1),
        "cases": cases,
        "steps": given.steps,
        "base_steps": json.loads((base / "config.json").read_text(encoding="utf-8"))["train"]["steps"],
        "speakers": len({clip.speaker for clip in clips}),
        "learning_rates": RATES,
        "rows": [asdict(row) for row in rows],
    }
    return 0 if write(result, rows, given.out) else 1


if __name__ == "__main__":
    sys.exit(main())
