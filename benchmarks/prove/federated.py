"""Measures what federated pretraining keeps of the gain of a central run on the same audio.

    python benchmarks/prove/federated.py                      # 4 processor minutes of each training, and 9 evaluations
    python benchmarks/prove/federated.py --minutes 0.3 --seeds 1 --max-speakers 12

Speech: manifest.tsv of the folder that AURICLE_SPEECH names; every speaker of speechocean762's split train is a device.
BEST-RQ by sums of gradients, eight devices a round, as a central run on all shards; once all devices answer, once 30 %
of them never do, with more rounds for the same amount of audio. Devices are objects of this process: messages, checks
and sums are those of a real run, without Flower. Measure: phone accuracy on non-silence frames of unseen speakers over
random weights. Writes benchmarks/results/federated.json and .md. Exit code 1 unless 95 % of the central run's gain is
kept where all devices answer, and 90 % where 30 % never do.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.prove.common import markdown_table, parser_of, real_speech  # noqa: E402
from data_pipeline.core import jsonl  # noqa: E402
from data_pipeline.core.rng import keyed_rng  # noqa: E402
from data_pipeline.core.schema import dump, load  # noqa: E402
from data_pipeline.core.storage import FileStore  # noqa: E402
from data_pipeline.corpora.config import ManifestCorpus  # noqa: E402
from data_pipeline.corpora.discovery import discover  # noqa: E402
from data_pipeline.preprocess.config import PreprocessConfig  # noqa: E402
from data_pipeline.preprocess.unit_worker import process_unit  # noqa: E402
from data_pipeline.preprocess.work_plan import freeze_plan  # noqa: E402
from launch.cli.compose import compose  # noqa: E402
from launch.config import PretrainJob  # noqa: E402
from launch.runs.metadata import run_config  # noqa: E402
from pretrain.checkpointing.run_folder import RunFolder  # noqa: E402
from pretrain.config import Config  # noqa: E402
from pretrain.engines import make_engine  # noqa: E402
from pretrain.engines.distributed import DistributedContext  # noqa: E402
from pretrain.evaluate.config import EvaluateConfig, NeuralConfig, SupervisedConfig  # noqa: E402
from pretrain.evaluate.evaluator import evaluate  # noqa: E402
from pretrain.evaluate.manifest import Utterance, read_manifest  # noqa: E402
from pretrain.evaluate.metrics import NON_SILENCE  # noqa: E402
from pretrain.evaluate.rows import ResultRow  # noqa: E402
from pretrain.federated.config import DeviceConfig  # noqa: E402
from pretrain.federated.device import Device  # noqa: E402
from pretrain.federated.server import FederatedEngine, RoundReader  # noqa: E402
from pretrain.monitoring.heartbeat import Heartbeat  # noqa: E402
from pretrain.train import train  # noqa: E402
from pretrain.train_module import build_model, open_run_reader  # noqa: E402
from tests.support.federation import InProcessDevices  # noqa: E402

CENTRAL, ALL, SOME = "central", "all answer", "30 % never answer"
PER_ROUND, ABSENT = 8, 0.3
KEPT_ALL, KEPT_SOME = 0.95, 0.90
TIMED_STEPS = 10
WORLD = DistributedContext()
Gains = dict[str, float]
"""Points over random weights of each kind of run."""


def shards_of(speaker: str, utterances: Sequence[Utterance], folder: Path) -> Path:
    """Writes the audio of one speaker as shards; existing ones stay."""
    out, manifest = folder / speaker, folder / f"{speaker}.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    if not manifest.exists():
        jsonl.append_rows(manifest, [{"path": u.path, "speaker": u.speaker, "corpus": u.corpus} for u in utterances])
    job = PreprocessConfig(out=str(out), corpus=ManifestCorpus(path=str(manifest), allow_outside=True))
    for unit in freeze_plan(FileStore(job.out), discover(job.corpus).recordings, job).work_units():
        process_unit(unit, job)
    return out


def devices_of(config: Config, shards: Sequence[Path], absent: set[str]) -> InProcessDevices:
    """Returns devices of this process with one model; those in `absent` never answer."""
    made = [
        Device(dump(config), DeviceConfig(server="127.0.0.1:1", shards=str(folder), device="cpu")) for folder in shards
    ]
    for device in made[1:]:
        device.engine = made[0].engine  # each request brings the weights

    def answers(device: Device) -> Callable[[bytes], list[bytes]]:
        return lambda request: [] if device.name in absent else [device.answer(request)]

    def close() -> None:
        for device in made:
            device.close()

    named = {device.name: answers(device) for device in sorted(made, key=lambda each: each.name)}
    return InProcessDevices(named, close)


def settings(name: str, shards: Sequence[Path], runs: Path, seed: int, steps: int, *overrides: str) -> Config:
    """Returns the config of a run: the recipe's, with the same optimizer and audio per update for all."""
    places = ",".join(str(folder) for folder in shards)
    lines = [
        "+experiment=quality_best_rq", f"name={name}", f"runs={runs}", f"data.shards=[{places}]", f"seed={seed}",
        "data.batch_seconds=64", "objective.projection=random", "objective.refine=false",
        f"data.micro_batches={PER_ROUND}", "data.workers=0", "device=cpu",
        f"train.steps={steps}", f"train.checkpoint_every={steps}", "train.media_every=0",
        f"schedule.warmup_steps={max(1, steps // 20)}", "health.on_collapse=warn", "health.on_spike=warn", *overrides,
    ]  # fmt: skip
    return run_config(load(PretrainJob, compose("pretrain", lines)))


def train_one(config: Config, devices: InProcessDevices | None) -> Path:
    """Trains a run in this process, centrally or on devices; returns its folder."""
    folder = RunFolder(Path(config.runs) / config.name)
    folder.claim()
    (folder.path / "config.json").write_text(json.dumps(dump(config)), encoding="utf-8")
    module = build_model(config)
    engine: Any = (
        make_engine(config, module, WORLD)
        if devices is None
        else FederatedEngine(module, config, WORLD, devices, run="run")
    )
    reader: Any = open_run_reader(config) if devices is None else RoundReader(devices)
    train(config, engine, reader, folder, Heartbeat(folder.path, 0, 3600), lambda: False, say=lambda line: None)
    reader.close()
    return folder.path


def gain(config: Config, devices: InProcessDevices | None, given: Namespace) -> float:
    """Trains a run; returns the accuracy of its phone probe on unseen speakers, less that of random weights."""
    probe = EvaluateConfig(
        checkpoint=str(train_one(config, devices)),
        task="phones",
        manifest=str(given.manifest),
        max_utterances=given.max_utterances,
        seeds=1,
        bootstrap=100,
        supervised=SupervisedConfig(epochs=0),
        neural=NeuralConfig(epochs=0),
    )
    rows: list[ResultRow] = [row for row in evaluate(probe, say=lambda line: None) if row.measure == NON_SILENCE]
    assert rows[-1].over_random is not None
    over_random = rows[-1].over_random[0]
    print(f"{config.name}: {100 * rows[-1].value:.1f} %, {100 * over_random:+.1f} over random weights")
    return over_random


def gains_of(seed: int, speakers: Sequence[str], shards: Sequence[Path], steps: int, given: Namespace) -> Gains:
    """Returns the gain of each kind of run with one seed. steps: updates of the central run."""
    federated = [
        "engine.name=federated", f"engine.federated.per_round={PER_ROUND}", "engine.federated.min_devices=1",
    ]  # fmt: skip
    absent = {s for s in speakers if keyed_rng(seed, s, "absent").random() < ABSENT}
    more = round(steps * len(speakers) / (len(speakers) - len(absent)))
    kinds = {
        CENTRAL: (steps, ["engine.name=torch"], None),
        ALL: (steps, federated, set[str]()),
        SOME: (more, federated, absent),
    }
    found = {}
    for kind, (rounds, overrides, silent) in kinds.items():
        config = settings(f"run_{kind.split()[0]}_{seed}", shards, given.work / "runs", seed, rounds, *overrides)
        devices = None if silent is None else devices_of(config, shards, silent)
        found[kind] = gain(config, devices, given)
    return found


def finished(given: Namespace, seed: int, steps: int) -> Gains | None:
    """Returns the gains of a seed that an earlier call with the same number of updates finished in the work folder."""
    rows = jsonl.read(given.work / "gains.jsonl").rows
    return next((row["gains"] for row in rows if (row["seed"], row["updates"]) == (seed, steps)), None)


def affordable(shards: Sequence[Path], given: Namespace) -> int:
    """Returns the updates of a central run that fit in its share of the processor time."""
    shutil.rmtree(given.work / "runs" / "timing", ignore_errors=True)  # else it is resumed at its end
    tick = time.process_time()  # of one thread: other processes on the machine do not change the number of updates
    train_one(settings("timing", shards, given.work / "runs", 0, TIMED_STEPS, "engine.name=torch"), None)
    return max(TIMED_STEPS, int(given.minutes * 60 / given.seeds / ((time.process_time() - tick) / TIMED_STEPS)))


def report(given: Namespace, gains: Mapping[str, list[float]], figures: dict[str, Any]) -> bool:
    """Writes federated.json and federated.md; returns whether both gates are passed."""
    mean = {kind: sum(values) / len(values) for kind, values in gains.items()}
    kept = {kind: value / mean[CENTRAL] for kind, value in mean.items()}
    passed = kept[ALL] >= KEPT_ALL and kept[SOME] >= KEPT_SOME
    when, machine = time.strftime("%Y-%m-%d"), f"{platform.machine()}, {os.cpu_count()} cores"
    figures = {"when": when, "machine": machine, **figures, "gains": gains, "kept": kept, "passed": passed}
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "federated.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    rows = [
        (
            kind,
            f"{100 * mean[kind]:+.1f}",
            ", ".join(f"{100 * v:+.1f}" for v in gains[kind]),
            f"{100 * kept[kind]:.0f} %",
        )
        for kind in gains
    ]
    page = [
        "# Federated pretraining: gain over random weights, phones of unseen speakers", "",
        f"BEST-RQ, {figures['speakers']} devices of one speaker each, {PER_ROUND} asked a round, {figures['rounds']} "
        f"updates of 64 s, {figures['seeds']} seeds, {figures['minutes']} processor minutes ({when}, "
        f"{machine}). With absent devices, more rounds give the same amount of audio.", "",
        *markdown_table(("run", "points over random weights", "by seed", "share of the central gain"), rows), "",
        f"The gates (95 % where all answer, 90 % where 30 % never do) are {'passed' if passed else 'missed'}.",
        "Devices are objects of one process, without Flower; sums of gradients alone.", "",
        f"Made by `python benchmarks/prove/federated.py --updates {figures['rounds']}`.", "",
    ]  # fmt: skip
    (given.out / "federated.md").write_text("\n".join(page), encoding="utf-8")
    print("\n".join(page))
    return passed


def main() -> int:
    """Returns exit code 0 where both gates are passed."""
    parser = parser_of(__doc__, "federated")
    parser.add_argument("--minutes", type=float, default=4.0, help="of each of three trainings, over all seeds")
    parser.add_argument("--updates", type=int, default=0, help="of the central run, instead of a time")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--max-speakers", type=int, default=0)
    parser.add_argument("--max-utterances", type=int, default=150, help="of each split in the phone probe")
    given = parser.parse_args()
    given.manifest = real_speech()
    if given.manifest is None:
        return 0
    torch.set_num_threads(1)
    begun = time.process_time()
    listed = [u for u in read_manifest(given.manifest) if u.corpus == "speechocean762" and u.split == "train"]
    speakers = sorted({u.speaker for u in listed})[: given.max_speakers or None]
    shards = [shards_of(s, [u for u in listed if u.speaker == s], given.work / "speakers") for s in speakers]
    steps = given.updates or affordable(shards, given)
    print(f"{steps} updates each, {(time.process_time() - begun) / 60:.1f} minutes so far", flush=True)
    found: list[Gains] = []
    passed = False
    for seed in range(given.seeds):  # a page after each seed: a run that is stopped leaves the seeds that it finished
        gains = finished(given, seed, steps)
        if gains is None:
            gains = gains_of(seed, speakers, shards, steps=steps, given=given)
            jsonl.append_rows(given.work / "gains.jsonl", [{"seed": seed, "updates": steps, "gains": gains}])
        found.append(gains)
        minutes = round((time.process_time() - begun) / 60)
        figures = {"speakers": len(speakers), "rounds": steps, "seeds": len(found), "minutes": minutes}
        passed = report(given, {kind: [gains[kind] for gains in found] for kind in found[0]}, figures)
    return 0 if passed and len(found) == given.seeds else 1


if __name__ == "__main__":
    sys.exit(main())
