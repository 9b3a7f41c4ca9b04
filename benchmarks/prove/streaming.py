"""What short chunks and little left context cost: errors and delays of a trained recogniser's streams.

    python benchmarks/prove/streaming.py            # about 25 minutes of processor time on one core

Trains one recogniser on strings of real spoken words (AURICLE_SPEECH: digits of fsdd and arabic_speech_commands by
their English names, and the words of speech_commands_v1), spliced from words of one speaker: a Conformer with chunks of
160 ms to 1.3 s and the heads ctc, transducer and sequence. `auricle evaluate task=streaming` streams strings of unseen
speakers for each decoder, chunk length and left context. Writes benchmarks/results/streaming_quality.md and .json.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.prove.common import markdown_table, parser_of, quiet_auricle, real_speech  # noqa: E402
from data_pipeline.audio.codecs import encode, to_int16  # noqa: E402
from data_pipeline.core.types import SAMPLE_RATE  # noqa: E402
from pretrain.evaluate.manifest import Utterance, read_audio, read_manifest  # noqa: E402
from pretrain.profiling.processor import model_name  # noqa: E402

CORPORA = ("fsdd", "arabic_speech_commands", "speech_commands_v1")
SYMBOLS = "' abcdefghijklmnopqrstuvwxyz"
SEEDS = {"train": 0, "test": 1}
COPIES = 6
"""Strings of training for each word that is heard."""
MODEL = (
    "objective=none", "objective.mask_time=0.05", "frontend=log_mel", "frontend.normalize=fixed",
    "encoder=conformer", "encoder.dim=144", "encoder.layers=4", "encoder.heads=4", "encoder.ffn_dim=576",
    "encoder.kernel=15", "encoder.attention=chunked", "encoder.chunk_convolution=true", "encoder.layer_drop=0.0",
    "encoder.chunk_frames=[4,8,16,32]", "encoder.left_chunks=[1,4,-1]",
    "heads.ctc.name=ctc", "heads.ctc.tokens=text", "heads.ctc.vocabulary=28",
    "heads.transducer.name=transducer", "heads.transducer.tokens=text", "heads.transducer.vocabulary=28",
    "heads.transducer.joint_dim=144", "heads.transducer.weight=0.5",
    "heads.text.name=sequence", "heads.text.vocabulary=28", "heads.text.decoder.layers=2", "heads.text.decoder.heads=4",
    "heads.text.decoder.ffn_dim=576", "heads.text.weight=0.3",
    "data.batch_seconds=40", "data.micro_batches=1", "data.min_seconds=0.2", "data.max_seconds=8",
    "data.bucket_ratio=1.3", "data.workers=0", "engine.name=torch", "optimizer.lr=2e-3", "optimizer.clip_norm=1",
    "optimizer.weight_decay=0.0", "schedule.name=tri_stage", "schedule.warmup_steps=166", "schedule.hold_fraction=0.4",
    "schedule.final_scale=0.05",
    "train.media_every=0", "train.histograms_every=0", "health.on_collapse=warn", "launcher.processes=1",
    "launcher.threads=1",
)  # fmt: skip
DECODERS = {
    "CTC, greedy": ("asr.head=ctc", "streaming.decoder=greedy"),
    "CTC, prefix beam": ("asr.head=ctc", "streaming.decoder=beam"),
    "transducer, greedy": ("asr.head=transducer", "streaming.decoder=greedy"),
    "CTC, rescored": ("asr.head=ctc", "streaming.decoder=rescoring"),
}


def main() -> int:
    """Trains, streams and reports; returns the exit code."""
    parser = parser_of(__doc__, "streaming")
    parser.add_argument("--steps", type=int, default=2000, help="updates (default: 2000)")
    parser.add_argument("--strings", type=int, default=30, help="strings of each corpus in the test (default: 30)")
    parser.add_argument("--chunks", default="", help="chunk lengths, with commas; empty: all that are trained")
    parser.add_argument("--left", default="", help="left contexts in chunks, likewise")
    parser.add_argument("--beam", type=int, default=8)
    parser.add_argument("--resume", action="store_true", help="continue the run in the work folder, on its shards")
    given = parser.parse_args()
    manifest = real_speech()
    if manifest is None:
        return 0
    listed = read_manifest(manifest)
    if not given.resume:
        shutil.rmtree(given.work, ignore_errors=True)
        write_strings(listed, "train", given)
        write_shards(given)
    write_strings(listed, "test", given)
    training = train(given)
    found = {name: streams(name, given) for name in DECODERS}
    report(found, training, given)
    return 0


def write_strings(listed: Sequence[Utterance], split: str, given: argparse.Namespace) -> None:
    """Writes the strings of a split, and their manifest."""
    rng, rows = np.random.default_rng(SEEDS[split]), []
    for corpus in CORPORA:
        words = [u for u in listed if u.corpus == corpus and u.split == split and word_of(u)]
        count = COPIES * len(words) if split == "train" else given.strings
        rows += [row | {"split": split} for row in strings(words, count, given.work / split, rng)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (given.work / f"{split}.jsonl").write_text(lines, encoding="utf-8")


def write_shards(given: argparse.Namespace) -> None:
    """Writes shards and tokens of the training."""
    corpus_fields = ["corpus=manifest", f"corpus.path={given.work / 'train.jsonl'}", f"runs={given.work}"]
    quiet_auricle("preprocess", *corpus_fields, f"out={given.work / 'shards'}", "min_shards=4")
    shards = f"shards={given.work / 'shards'}"
    quiet_auricle("tokens", shards, f"out={given.work / 'letters'}", f"symbols={SYMBOLS}")


def word_of(utterance: Utterance) -> str:
    """Returns the spoken word; Arabic digits have it as their label."""
    return utterance.text or utterance.value("label")


def strings(words: Sequence[Utterance], count: int, folder: Path, rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    """Writes strings of three to five words of one speaker with short pauses; yields their rows."""
    folder.mkdir(parents=True, exist_ok=True)
    waves = {u.name: read_audio(u) for u in words}
    of: dict[str, list[Utterance]] = {}
    for u in words:
        of.setdefault(u.speaker, []).append(u)
    for number in range(count):
        one = words[int(rng.integers(len(words)))].speaker  # as often as they speak
        own = [of[one][int(k)] for k in rng.integers(len(of[one]), size=int(rng.integers(3, 6)))]
        parts = [np.pad(waves[u.name], (0, int(rng.integers(SAMPLE_RATE // 50, SAMPLE_RATE // 4)))) for u in own]
        path = folder / f"{own[0].corpus}_{number:05}.flac"
        path.write_bytes(encode(to_int16(np.concatenate(parts)), SAMPLE_RATE, "flac"))
        yield {"path": str(path), "speaker": one, "text": " ".join(map(word_of, own)), "corpus": own[0].corpus}


def train(given: argparse.Namespace) -> dict[str, int]:
    """Trains the recogniser; returns the number of updates and strings, and seconds of processor time."""
    length = [f"train.steps={given.steps}"]
    length += [f"train.checkpoint_every={max(1, given.steps // 4)}"]
    data = [f"data.shards={given.work / 'shards'}", f"data.tokens.text={given.work / 'letters'}"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    quiet_auricle("pretrain", *MODEL, *length, *data, f"runs={given.work / 'runs'}", "name=recogniser")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return {"updates": given.steps, "processor_seconds": seconds, "strings": lines_of(given.work / "train.jsonl")}


def lines_of(path: Path) -> int:
    """Returns the number of lines of a file."""
    return len(path.read_text(encoding="utf-8").splitlines())


def streams(name: str, given: argparse.Namespace) -> dict[str, float]:
    """Returns all measures of the streams with a decoder."""
    out = given.work / "found" / name.replace(", ", "_").replace(" ", "_")
    data = [f"checkpoint={given.work / 'runs' / 'recogniser'}", f"manifest={given.work / 'test.jsonl'}", f"out={out}"]
    grid = [f"streaming.chunks={given.chunks}", f"streaming.left={given.left}", "streaming.push_ms=100"]
    grid += [f"asr.beam={given.beam}", "threads=1"]
    quiet_auricle("evaluate", "task=streaming", *data, *DECODERS[name], *grid)
    return {row["measure"]: row["value"] for row in json.loads((out / "results.json").read_bytes())}


def report(found: dict[str, dict[str, float]], training: dict[str, int], given: argparse.Namespace) -> None:
    """Writes the tables and their numbers."""
    command = ("python benchmarks/prove/streaming.py " + " ".join(sys.argv[1:])).strip()
    first = next(iter(found.values()))
    settings = [name.removeprefix("word error rate, ") for name in first if name.startswith("word error rate, chunk")]
    lines = [
        "# Streams of a trained recogniser: chunk × left context", "",
        f"`{command}` on one core of {model_name()}. Training: {training['updates']:,} updates on "
        f"{training['strings']:,} strings, {training['processor_seconds'] / 60:.0f} minutes of processor time"
        f"{' since the run was continued' if given.resume else ''}. Test: "
        f"{lines_of(given.work / 'test.jsonl')} strings of 3 to 5 words of unseen speakers of {', '.join(CORPORA)}, "
        f"in pushes of 100 ms. Chunks are frames of 40 ms, the left context chunks (-1: all); beams of {given.beam}.",
        "", "Word error rate:", "",
    ]  # fmt: skip
    rates = [
        [name, *(f"{values[f'word error rate, {name}']:.1%}" for values in found.values())]
        for name in ("whole recordings", *settings)
    ]
    lines += markdown_table(["", *found], rates)
    measures = (
        "algorithmic delay, ms", "emission after the end of a word, ms, p50", "computing, ms per second of audio",
        "push, ms, p50", "push, ms, p95", "push, ms, max", "state, kB",
    )  # fmt: skip
    for decoder, values in found.items():
        lines += ["", f"{decoder}:", ""]
        rows = [[name, *(f"{values[f'{measure}, {name}']:.0f}" for measure in measures)] for name in settings]
        lines += markdown_table(["", *measures], rows)
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "streaming_quality.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    text = json.dumps({"command": command, "training": training, "found": found}, indent=1, ensure_ascii=False)
    (given.out / "streaming_quality.json").write_text(text + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    sys.exit(main())
