"""What short chunks and little left context cost: errors and delays of a trained recogniser's streams.

    python benchmarks/prove/streaming.py            # about 20 minutes of processor time on one core

Trains one recogniser on strings of real spoken words (AURICLE_SPEECH: digits of fsdd and arabic_speech_commands by
their English names, digits in sentences and prompts, and the words of speech_commands_v1), spliced from words of one
speaker, single words first: a Conformer with chunks of 160 ms to 1.3 s and the heads ctc, transducer and sequence.
`auricle evaluate task=streaming` streams strings of unseen speakers for each decoder, chunk length and left context.
Writes benchmarks/results/streaming_quality.md and .json.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.prove.common import markdown_table, parser_of, quiet_auricle, real_speech  # noqa: E402
from benchmarks.prove.joint_embedding_data import (  # noqa: E402
    FURTHER,
    Matrix,
    Sample,
    augmented,
    cut_words,
    word_of,
)
from benchmarks.prove.joint_embedding_data import WORDS as DIGITS  # noqa: E402
from benchmarks.prove.joint_embedding_towers import model, train  # noqa: E402
from data_pipeline.audio.codecs import encode, to_int16  # noqa: E402
from data_pipeline.core.schema import load  # noqa: E402
from data_pipeline.core.types import SAMPLE_RATE  # noqa: E402
from data_pipeline.text.artefact import TokensConfig, make_tokens  # noqa: E402
from data_pipeline.text.tokenizer import load_tokenizer  # noqa: E402
from pretrain.checkpointing.initial import write_initial  # noqa: E402
from pretrain.config import Config  # noqa: E402
from pretrain.evaluate.manifest import Utterance, read_audio, read_manifest  # noqa: E402
from pretrain.profiling.processor import model_name  # noqa: E402

CORPORA = ("fsdd", "arabic_speech_commands", "speech_commands_v1")
TOKENS = 64
"""Of byte pairs: every word of so few is one of them."""
SECONDS, MOST = 22.0, 40
"""Audio and strings of an update."""
ENCODER = {
    "name": "conformer", "dim": 128, "layers": 3, "heads": 4, "ffn_dim": 384, "kernel": 15, "attention": "chunked",
    "chunk_convolution": True, "chunk_frames": [4, 8, 16, 32], "left_chunks": [1, 4, -1], "dropout": 0.05,
    "layer_drop": 0.0,
}  # fmt: skip
TEXT = {"tokens": "text", "vocabulary": TOKENS}
HEADS = {
    "ctc": TEXT | {"name": "ctc"},
    "transducer": TEXT | {"name": "transducer", "joint_dim": 128, "weight": 0.5},
    "text": TEXT | {"name": "sequence", "weight": 0.3, "decoder": {"layers": 1, "heads": 4, "ffn_dim": 256}},
}
DECODERS = {
    "CTC, greedy": ("asr.head=ctc", "streaming.decoder=greedy"),
    "CTC, prefix beam": ("asr.head=ctc", "streaming.decoder=beam"),
    "transducer, greedy": ("asr.head=transducer", "streaming.decoder=greedy"),
    "CTC, rescored": ("asr.head=ctc", "streaming.decoder=rescoring"),
}


def main() -> int:
    """Trains, streams and reports; returns the exit code."""
    parser = parser_of(__doc__, "streaming")
    parser.add_argument("--minutes", type=float, default=8.0, help="processor time of training (default: 8)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--strings", type=int, default=30, help="strings of each corpus in the test (default: 30)")
    parser.add_argument("--chunks", default="", help="chunk lengths, with commas; empty: all that are trained")
    parser.add_argument("--left", default="", help="left contexts in chunks, likewise")
    parser.add_argument("--beam", type=int, default=8)
    given = parser.parse_args()
    manifest = real_speech()
    if manifest is None:
        return 0
    shutil.rmtree(given.work, ignore_errors=True)
    torch.set_num_threads(1)
    listed = read_manifest(manifest)
    write_test(listed, given)
    training = train_recogniser(listed, given)
    found = {name: streams(name, given) for name in DECODERS}
    report(found, training, given)
    return 0


def write_test(listed: Sequence[Utterance], given: argparse.Namespace) -> None:
    """Writes strings of three to five words of one speaker with short pauses, and their manifest."""
    (given.work / "test").mkdir(parents=True)
    rng, rows = np.random.default_rng(1), []
    for corpus in CORPORA:
        words = [u for u in listed if u.corpus == corpus and u.split == "test" and word_of(u)]
        of = by_speaker(words)
        for number in range(given.strings):
            one = words[int(rng.integers(len(words)))].speaker  # as often as they speak
            own = [of[one][int(k)] for k in rng.integers(len(of[one]), size=int(rng.integers(3, 6)))]
            wave = spliced([read_audio(u) for u in own], rng)
            path = given.work / "test" / f"{corpus}_{number:03}.flac"
            path.write_bytes(encode(to_int16(wave), SAMPLE_RATE, "flac"))
            text = " ".join(map(word_of, own))
            rows.append({"path": str(path), "speaker": one, "text": text, "corpus": corpus, "split": "test"})
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (given.work / "test.jsonl").write_text(lines, encoding="utf-8")


def by_speaker(words: Sequence[Utterance]) -> dict[str, list[Utterance]]:
    """Returns the words of each speaker."""
    found: dict[str, list[Utterance]] = {}
    for u in words:
        found.setdefault(u.speaker, []).append(u)
    return found


def spliced(waves: Sequence[Matrix], rng: np.random.Generator) -> Matrix:
    """Returns words one after the other, with pauses of 20 to 250 ms."""
    return np.concatenate([np.pad(wave, (0, int(rng.integers(SAMPLE_RATE // 50, SAMPLE_RATE // 4)))) for wave in waves])


def train_recogniser(listed: Sequence[Utterance], given: argparse.Namespace) -> dict[str, int]:
    """Trains the recogniser and writes its run; returns the number of updates, speakers and words."""
    english = [u for u in listed if u.corpus in (CORPORA[0], FURTHER) and u.language == "en" and word_of(u) in DIGITS]
    groups = [english + cut_words(listed), *([u for u in listed if u.corpus == corpus] for corpus in CORPORA[1:])]
    groups = [[u for u in group if u.split != "test" and word_of(u)] for group in groups]
    words = [u for group in groups for u in group]
    waves = {u.name: read_audio(u).astype(np.float32) for u in words}
    folder = str(given.work / "words")
    make_tokens(TokensConfig(shards="none", out=folder, kind="bpe", size=TOKENS), sorted(set(map(word_of, words))))
    tokenizer, speakers = load_tokenizer(folder), [list(by_speaker(group).values()) for group in groups]

    def drawn(rng: np.random.Generator, progress: float) -> list[Sample]:
        longest, samples, seconds = 1 + round(4 * min(1.0, 2 * progress)), [], 0.0
        count = int(rng.integers(1, longest + 1)) if progress < 0.5 else int(rng.integers(2, longest + 1))
        while len(samples) < MOST and seconds < SECONDS:  # the corpora and the speakers of each as often
            voices = speakers[len(samples) % len(speakers)]
            voice = voices[rng.integers(len(voices))]
            own = [voice[int(k)] for k in rng.integers(len(voice), size=count)]
            wave = augmented(spliced([waves[u.name] for u in own], rng), rng)
            tokens = tuple(tokenizer.encode(" ".join(map(word_of, own))))
            samples.append(Sample(f"{len(samples)}", wave, tokens=tokens))
            seconds += len(wave) / SAMPLE_RATE
        return samples

    settings = config_of(folder, given.seed)
    engine, before = model(settings), time.process_time()
    steps = train(engine, settings, drawn, given.minutes)
    write_initial(given.work / "recogniser", engine.module, settings, {"text": tokenizer.sha256})
    return {
        "updates": steps,
        "processor_seconds": round(time.process_time() - before),
        "words": len(words),
        "speakers": sum(map(len, speakers)),
    }


def config_of(tokens: str, seed: int) -> Config:
    """Returns the config of the recogniser; its data are drawn here."""
    return load(
        Config,
        {
            "name": "recogniser",
            "data": {"shards": "none", "micro_batches": 1, "tokens": {"text": tokens}},
            "frontend": {"name": "log_mel", "normalize": "fixed", "n_mels": 40, "dropout": 0.0},
            "encoder": ENCODER,
            "objective": {"name": "none", "mask_time": 0.05, "mask_time_span": 8, "mask_channels": 0.05},
            "heads": HEADS,
            "optimizer": {"lr": 1e-3, "weight_decay": 0.01, "clip_norm": 1.0},
            "schedule": {"name": "cosine", "warmup_steps": 60},
            "engine": {"name": "torch"},
            "seed": seed,
        },
    )


def lines_of(path: Path) -> int:
    """Returns the number of lines of a file."""
    return len(path.read_text(encoding="utf-8").splitlines())


def streams(name: str, given: argparse.Namespace) -> dict[str, float]:
    """Returns all measures of the streams with a decoder."""
    out = given.work / "found" / name.replace(", ", "_").replace(" ", "_")
    data = [f"checkpoint={given.work / 'recogniser'}", f"manifest={given.work / 'test.jsonl'}", f"out={out}"]
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
        f"`{command}` on one core of {model_name()}. Training: {training['updates']:,} updates, "
        f"{training['processor_seconds'] / 60:.0f} minutes of processor time, on strings spliced from "
        f"{training['words']:,} words of {training['speakers']} speakers. Test: "
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
