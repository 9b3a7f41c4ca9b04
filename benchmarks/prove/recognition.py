"""Compares recognisers with few labels: from scratch, fine-tuned from self-supervision, and both at once.

    python benchmarks/prove/recognition.py                # about 25 minutes of processor time on one core

On real speech (AURICLE_SPEECH), three seeds each, with the same labelled utterances of `--corpora`:

    scratch     CTC alone
    fine-tuned  BEST-RQ on the unlabelled splits pretrain and train for a share of the time, then CTC
    given       CTC from a checkpoint of BEST-RQ that was trained once, as for users who have one: its time
                (`--pretraining`) is not counted, and CTC gets what it has in `fine-tuned`
    joint       BEST-RQ and CTC together; half of the audio of each update has a text
    plain       BEST-RQ alone, for the probe

All arms but `given` have the same processor time, measured by their updates; the character error rate is that of
unseen speakers (split test), greedy, with intervals over speakers. A linear probe reads phones from the frozen encoders
of `joint` and `plain`, the first seed's. Writes benchmarks/results/recognition.md and .json. Exit code 1 unless
fine-tuned or joint is better than scratch by more than the 95 % interval of the difference.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.prove.common import parser_of, quiet_auricle, real_speech  # noqa: E402
from data_pipeline.core.schema import load  # noqa: E402
from launch.cli.compose import compose  # noqa: E402
from pretrain.config import Config  # noqa: E402
from pretrain.engines import make_engine  # noqa: E402
from pretrain.engines.distributed import DistributedContext  # noqa: E402
from pretrain.evaluate.asr import by_speaker  # noqa: E402
from pretrain.evaluate.config import EvaluateConfig  # noqa: E402
from pretrain.evaluate.evaluator import evaluate  # noqa: E402
from pretrain.evaluate.manifest import Utterance, read_audio, read_manifest, span_columns  # noqa: E402
from pretrain.evaluate.metrics import NON_SILENCE, Tally, bootstrap  # noqa: E402
from pretrain.evaluate.rows import ResultRow, plain  # noqa: E402
from pretrain.interfaces.frames import StepContext  # noqa: E402
from pretrain.profiling.processor import model_name  # noqa: E402
from pretrain.recognition.error_rates import Decoders, edits, recognise, written  # noqa: E402
from pretrain.recognition.recogniser import open_recogniser  # noqa: E402
from pretrain.train_module import build_model, open_run_reader  # noqa: E402

PRETRAINING_SHARE = 0.6
"""Of the time of the fine-tuned arm."""
WARM_UP, TIMED = 2, 8
"""Updates before the timed ones, and timed ones."""
PROBED = 200
"""Most utterances of each split in the probe."""
MODEL = (
    "frontend=log_mel", "encoder=transformer_tiny", "encoder.dim=144", "encoder.ffn_dim=576", "engine.name=torch",
    "encoder.positions=conv_stack", "encoder.conv_positions_depth=2", "encoder.conv_positions_kernel=19",
    "data.micro_batches=1", "data.min_seconds=0.2", "data.max_seconds=4", "data.bucket_ratio=1.3",
    "data.batch_seconds=8", "data.workers=0", "train.media_every=0", "train.histograms_every=0",
    "optimizer.lr=2e-3", "optimizer.weight_decay=0.0", "optimizer.clip_norm=1", "schedule.name=tri_stage",
    "schedule.hold_fraction=0.4", "schedule.final_scale=0.05", "health.on_collapse=warn", "launcher.processes=1",
    "launcher.threads=1",
)  # fmt: skip
CTC = ("heads.text.name=ctc", "data.labels=[text]")
BEST_RQ = (
    "objective=best_rq", "objective.n_codes=100", "objective.code_dim=8", "objective.projection=pca",
    "objective.refine=true", "objective.mask_share=0.5", "objective.mask_block=3",
)  # fmt: skip
ARMS: dict[str, tuple[str, ...]] = {
    "scratch": ("objective=none", "objective.mask_time=0.1", *CTC),
    "pretrained": BEST_RQ,
    "given checkpoint": BEST_RQ,
    "fine-tuned": ("objective=none", "objective.mask_time=0.1", *CTC),
    "given": ("objective=none", "objective.mask_time=0.1", *CTC),
    "joint": (*BEST_RQ, *CTC, "heads.text.input=whole", "data.micro_batches=2", "data.text_share=0.5"),
    "plain": BEST_RQ,
}
STARTS = {"fine-tuned": "pretrained", "given": "given checkpoint"}
"""Arms that start from the encoder of another."""
UNLABELLED = ("pretrained", "given checkpoint", "joint", "plain")
"""Arms that read all speech; the other ones read the labelled utterances alone."""


def main() -> int:
    """Runs all arms; returns the exit code."""
    parser = parser_of(__doc__, "recognition")
    parser.add_argument("--minutes", type=float, default=1.5, help="processor time of an arm and seed (default: 1.5)")
    parser.add_argument("--pretraining", type=float, default=5.0, help="minutes of the given checkpoint (default: 5)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--corpora", nargs="+", default=["speech_commands_v1", "fsdd"], help="of the labelled audio")
    parser.add_argument("--utterances", type=int, default=120, help="labelled ones for training (default: 120; 0: all)")
    parser.add_argument("--test", type=int, default=10, help="most utterances of a test speaker (default: 10)")
    given = parser.parse_args()
    manifest = real_speech()
    if manifest is None:
        return 0
    shutil.rmtree(given.work, ignore_errors=True)
    began, listed = time.monotonic(), read_manifest(manifest)
    shards = {name: preprocess(listed, given, name) for name in ("labelled", "all")}
    test = few_of_each_speaker([u for u in listed if u.corpus in given.corpora and u.split == "test"], given.test)
    shares = {"pretrained": PRETRAINING_SHARE, "fine-tuned": 1 - PRETRAINING_SHARE, "given": 1 - PRETRAINING_SHARE}
    minutes = {arm: shares.get(arm, 1.0) * given.minutes for arm in ARMS} | {"given checkpoint": given.pretraining}
    steps = {arm: affordable(arm, shards, given.work, minutes[arm]) for arm in ARMS}
    tallies: dict[str, list[Tally]] = {"scratch": [], "fine-tuned": [], "given": [], "joint": []}
    for seed in range(given.seeds):
        for arm, found in tallies.items():
            run = train(arm, shards, given.work, seed, steps)
            found.append(character_errors(run, test))
            print(f"seed {seed}, {arm}: CER {bootstrap([found[-1]], 100).value:.1%}", flush=True)
    train("plain", shards, given.work, 0, steps)
    phones = probe(given.work / "runs", ("plain_0", "joint_0"), manifest)
    rates = {arm: bootstrap(found, 2_000) for arm, found in tallies.items()}
    gains = {arm: bootstrap(tallies["scratch"], 2_000, minus=tallies[arm]) for arm in list(tallies)[1:]}
    better = [arm for arm in ("fine-tuned", "joint") if gains[arm].low > 0]
    report(given, rates=rates, gains=gains, steps=steps, phones=phones, seconds=time.monotonic() - began)
    print(f"better than from scratch: {', '.join(better) or 'none'}")
    return 0 if better else 1


def few_of_each_speaker(utterances: Sequence[Utterance], most: int) -> list[Utterance]:
    """Returns at most `most` utterances with a text of each speaker."""
    of: dict[str, list[Utterance]] = {}
    for utterance in utterances:
        if utterance.text:
            of.setdefault(utterance.speaker, []).append(utterance)
    return [utterance for some in of.values() for utterance in some[:: -(-len(some) // most)]]


def preprocess(listed: Sequence[Utterance], given: argparse.Namespace, name: str) -> str:
    """Writes the labelled utterances of split train, or these and all speech without labels; returns the shards."""
    folder, most = given.work / name, given.utterances
    labelled = [u for u in listed if u.corpus in given.corpora and u.split == "train" and u.text]
    labelled = labelled[:: -(-len(labelled) // most)] if most else labelled
    heard = {u.name for u in labelled}
    rest = [u for u in listed if u.split in ("pretrain", "train") and u.name not in heard] if name == "all" else []
    folder.mkdir(parents=True)
    rows = [(u, written(u.text, " 'abcdefghijklmnopqrstuvwxyz")) for u in labelled] + [(u, "") for u in rest]
    lines = [
        json.dumps({"path": u.path, "speaker": u.speaker, "text": text, "corpus": u.corpus} | span_columns(u))
        for u, text in rows
    ]
    (folder / "list.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    corpus = ["corpus=manifest", f"corpus.path={folder / 'list.jsonl'}", "corpus.allow_outside=true"]
    quiet_auricle("preprocess", *corpus, f"out={folder / 'shards'}", f"runs={folder}", "min_shards=4")
    return str(folder / "shards")


def overrides(arm: str, shards: dict[str, str], work: Path, name: str, steps: int, seed: int) -> list[str]:
    """Returns the command line of a training run."""
    data = shards["all" if arm in UNLABELLED else "labelled"]
    length = [f"train.steps={steps}", f"schedule.warmup_steps={max(1, steps // 10)}", f"train.checkpoint_every={steps}"]
    return [*MODEL, *ARMS[arm], *length, f"data.shards={data}", f"runs={work / 'runs'}", f"name={name}", f"seed={seed}"]


def affordable(arm: str, shards: dict[str, str], work: Path, minutes: float) -> int:
    """Returns the updates of an arm in its processor time, from the mean of a few updates, data included."""
    values = compose("pretrain", overrides(arm, shards, work=work, name="timing", steps=100, seed=0))
    values.pop("launcher")
    config = load(Config, values)
    reader, engine = open_run_reader(config), make_engine(config, build_model(config), DistributedContext())
    steps, began = reader.steps(), 0.0
    for number in range(WARM_UP + TIMED):
        began = began if number > WARM_UP else time.process_time()
        engine.step(next(steps).batches, StepContext(0, number), 1e-3)
    seconds = (time.process_time() - began) / TIMED
    reader.close()
    return max(10, int(60 * minutes / seconds))


def train(arm: str, shards: dict[str, str], work: Path, seed: int, steps: dict[str, int]) -> Path:
    """Trains an arm with a seed; returns the run folder of its recogniser."""
    more: list[str] = []
    if start := STARTS.get(arm):
        name = "given_checkpoint" if arm == "given" else f"{start}_{seed}"
        if not (work / "runs" / name).exists():
            quiet_auricle("pretrain", *overrides(start, shards, work=work, name=name, steps=steps[start], seed=seed))
        more = [f"init={work / 'runs' / name}", f"objective.frozen_steps={steps[arm] // 20}"]
    name = f"{arm}_{seed}"
    quiet_auricle("pretrain", *overrides(arm, shards, work=work, name=name, steps=steps[arm], seed=seed), *more)
    return work / "runs" / name


def character_errors(run: Path, test: Sequence[Utterance]) -> Tally:
    """Returns character edits and characters of each test speaker, greedily decoded."""
    recogniser = open_recogniser(str(run))
    references = [written(u.text, recogniser.head.symbols) for u in test]
    [(_, texts)] = recognise(recogniser, (read_audio(u) for u in test), Decoders())
    return by_speaker(test, edits(references, texts, by_words=False))


def probe(runs: Path, names: Sequence[str], manifest: Path) -> list[ResultRow]:
    """Returns the accuracy of phones on non-silence frames, read by a linear probe from each run's frozen encoder."""
    checkpoint = ",".join(str(runs / name) for name in names)
    settings = EvaluateConfig(
        checkpoint=checkpoint, task="phones", manifest=str(manifest), seeds=1, baselines=False,
        max_utterances=PROBED,
    )  # fmt: skip
    return [row for row in evaluate(settings) if row.measure == NON_SILENCE]


def report(
    given: argparse.Namespace, rates: Any, gains: Any, steps: dict[str, int], phones: list[ResultRow], seconds: float
) -> None:
    """Writes the table and its numbers."""
    command = "python benchmarks/prove/recognition.py " + " ".join(sys.argv[1:])
    lines = [
        "# Recognition: from scratch, fine-tuned, joint",
        "",
        f"`{command.strip()}`, {seconds / 60:.0f} minutes on {model_name()}; {given.seeds} seeds, "
        f"{given.minutes:g} minutes of processor time for each training, pretraining included, and "
        f"{given.pretraining:g} minutes for the checkpoint of `given`, which are not counted; "
        f"{given.utterances or 'all'} labelled utterances, unseen speakers of {' and '.join(given.corpora)}.",
        "",
        "| arm | updates | character error rate | 95 % | better than scratch by | 95 % |",
        "|---|---|---|---|---|---|",
    ]
    for arm, rate in rates.items():
        gain = gains.get(arm)
        shown = f"{100 * gain.value:+.1f} points | {100 * gain.low:+.1f} … {100 * gain.high:+.1f}" if gain else " | "
        updates = f"{steps[STARTS[arm]]} + {steps[arm]}" if arm in STARTS else str(steps[arm])
        lines.append(f"| {arm} | {updates} | {rate.value:.1%} | {rate.low:.1%} … {rate.high:.1%} | {shown} |")
    lines += ["", "| encoder | phones, non-silence frames | 95 % |", "|---|---|---|"]
    lines += [f"| {row.who} | {row.value:.1%} | {row.low:.1%} … {row.high:.1%} |" for row in phones]
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "recognition.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    values = {
        "command": command, "steps": steps, "seconds": seconds,
        "rates": {arm: [rate.value, rate.low, rate.high] for arm, rate in rates.items()},
        "gains": {arm: [gain.value, gain.low, gain.high] for arm, gain in gains.items()},
        "phones": plain(phones),
    }  # fmt: skip
    (given.out / "recognition.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    sys.exit(main())
