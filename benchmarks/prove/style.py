"""Trains a voice whose style words set, and measures whether opposite words move F0 and rate the right way.

    python benchmarks/prove/style.py                  # about 25 minutes of one core
    python benchmarks/prove/style.py --trained        # measures what an earlier call trained in --work

On real speech (AURICLE_SPEECH): children and adults of speechocean762 reading English, from split train. Sex and age
are columns of its manifest; pitch and rate are measured, with thirds of the data as bounds. Unheard texts of split
test are spoken in pairs of opposite styles. F0 is the median that swift-f0 finds in the audio, rate the number of
letters over its length. Beside it: the F0 of the same mel frames through Griffin-Lim, and the one that the synthesiser
predicts. Writes benchmarks/results/style.md and .json; exit code 1 unless 90 % of the pairs move the right way, in F0
by either vocoder and in rate.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.prove.common import markdown_table, parser_of, quiet_auricle, real_speech, step_seconds  # noqa: E402
from benchmarks.prove.synthesis import LETTERS  # noqa: E402
from data_pipeline.audio.codecs import read_mono  # noqa: E402
from data_pipeline.core.jsonl import read_rows  # noqa: E402
from data_pipeline.core.rng import keyed_rng  # noqa: E402
from data_pipeline.labels.pitch import LOWEST_HZ, STEPS_PER_OCTAVE, pitch_labels  # noqa: E402
from pretrain.evaluate.manifest import Utterance, read_manifest  # noqa: E402
from pretrain.generation.voice import Voice, open_voice  # noqa: E402
from pretrain.profiling.processor import model_name  # noqa: E402

PAIRS = {
    "F0": (
        ("low", "high"), ("a man", "a woman"), ("a man, low", "a child, high"), ("deep, slow", "bright, slow"),
        ("a low voice, fast", "a high voice, fast"), ("an adult, low", "an adult, high"),
    ),
    "rate": (
        ("slow", "fast"), ("a man, slowly", "a man, quickly"), ("a child, slow and high", "a child, fast and high"),
        ("a woman, slow", "a woman, fast"), ("low, slow", "low, quick"), ("high, slow", "high, fast"),
    ),
}  # fmt: skip
"""Pairs of styles of which the second one has the higher F0, or the faster speech."""
GATE = 0.9
GRIFFIN_LIM = "F0, Griffin-Lim"


def main() -> int:
    """Trains, measures and writes; returns the exit code."""
    parser = parser_of(__doc__, "style")
    parser.add_argument("--minutes", type=float, default=20.0, help="of training (default: 20)")
    parser.add_argument("--train", type=int, default=400, help="recordings for training (default: 400)")
    parser.add_argument("--texts", type=int, default=12, help="unheard texts (default: 12)")
    parser.add_argument("--trained", action="store_true", help="measure the run that an earlier call left in --work")
    given = parser.parse_args()
    manifest = real_speech()
    if manifest is None:
        return 0
    torch.set_num_threads(1)
    found = [u for u in read_manifest(manifest) if u.corpus == "speechocean762" and u.text]
    heard = chosen([u for u in found if u.split == "train"], given.train)
    texts = [u.text for u in chosen([u for u in found if u.split == "test"], given.texts)]
    runs = given.work / "runs"
    if not given.trained:
        shutil.rmtree(given.work, ignore_errors=True)
        data = prepare(heard, given.work)
        pilot = train(data, runs, "pilot", 6)
        train(data, runs, "voice", max(20, int(60 * given.minutes / step_seconds(pilot, skip=2))))
    voice = open_voice(str(runs / "voice"))
    rows = [measured(voice, kind, pair, texts) for kind, pairs in PAIRS.items() for pair in pairs]
    rows += [measured(voice, kind, pair, texts) for kind in (GRIFFIN_LIM, "F0, as predicted") for pair in PAIRS["F0"]]
    kept = {
        kind: float(np.mean([row["right"] for row in rows if row["kind"] == kind]))
        for kind in {row["kind"]: 0 for row in rows}
    }
    steps = read_rows(runs / "voice" / "metrics.jsonl")
    seconds = statistics.median(row["perf/step_seconds"] for row in steps) * steps[-1]["step"]
    words = voice.head.config.style_words
    assert words is not None
    values = {
        "command": "python benchmarks/prove/style.py " + " ".join(sys.argv[1:]),
        "recordings": len(heard), "texts": len(texts), "updates": steps[-1]["step"], "seconds": round(seconds),
        "pitch_hz": words.pitch_hz, "tokens_per_second": words.tokens_per_second, "right": kept, "pairs": rows,
        "machine": model_name(),
    }  # fmt: skip
    report(given.out, values)
    return 0 if min(max(kept["F0"], kept[GRIFFIN_LIM]), kept["rate"]) >= GATE else 1


def chosen(utterances: Sequence[Utterance], count: int) -> list[Utterance]:
    """Draws utterances, the same in each call."""
    order = keyed_rng(0, "style").permutation(len(utterances))[:count]
    return [utterances[number] for number in order]


def f0(wave_T: np.ndarray) -> float:
    """Returns the median F0 of a recording in Hz; 0 where no frame is voiced."""
    labels_F = pitch_labels()(wave_T).astype(float)
    voiced_F = labels_F[labels_F > 0]
    return float(LOWEST_HZ * 2 ** ((np.median(voiced_F) - 1) / STEPS_PER_OCTAVE)) if len(voiced_F) else 0.0


def prepare(heard: Sequence[Utterance], work: Path) -> list[str]:
    """Writes shards, tokens and pitch labels; returns the settings of a run that name them, and the bounds."""
    work.mkdir(parents=True)
    lines, pitches, rates = [], [], []
    for utterance in heard:
        wave_T = read_mono(utterance.path)
        pitches.append(f0(wave_T))
        rates.append((len(utterance.text) + 2) / (len(wave_T) / 16_000))
        row = {"path": str(utterance.path), "speaker": utterance.speaker, "text": utterance.text, "corpus": "read"}
        row |= {"sex": utterance.value("sex"), "age": utterance.value("label")}
        lines.append(json.dumps(row))
    (work / "list.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    shards, tokens, labels = work / "shards", work / "tokens", work / "pitch"
    corpus = ["corpus=manifest", f"corpus.path={work / 'list.jsonl'}", "corpus.allow_outside=true"]
    quiet_auricle("preprocess", *corpus, f"out={shards}", f"runs={work}", "min_shards=2")
    quiet_auricle("tokens", f"shards={shards}", f"out={tokens}", LETTERS)
    quiet_auricle("targets", f"shards={shards}", f"out={labels}", "features=pitch", f"runs={work}")
    bounds = {
        "pitch_hz": np.quantile([pitch for pitch in pitches if pitch], (1 / 3, 2 / 3)),
        "tokens_per_second": np.quantile(rates, (1 / 3, 2 / 3)),
    }
    words = [f"{name}: [{low:.4g}, {high:.4g}]" for name, (low, high) in bounds.items()]
    places = [f"data.shards={shards}", f"data.tokens.text={tokens}", f"data.targets.pitch={labels}"]
    return [*places, "data.labels=[sex,age]", f"+heads.voice.style_words={{{', '.join(words)}}}"]


def train(data: Sequence[str], runs: Path, name: str, steps: int) -> Path:
    """Trains `synthesis_tiny` with words for so many updates; returns the run folder."""
    length = [f"train.steps={steps}", f"schedule.warmup_steps={max(1, steps // 20)}", f"train.checkpoint_every={steps}"]
    one_core = ["engine.name=torch", "data.workers=0", "launcher=local", "launcher.threads=1", "train.media_every=0"]
    more = [f"train.log_every={1 if steps < 20 else 10}", "+heads.voice.style_drop=0.8", "data.batch_seconds=16"]
    quiet_auricle(
        "pretrain", "+experiment=synthesis_tiny", *data, *length, *one_core, *more, f"runs={runs}", f"name={name}"
    )
    return runs / name


def measured(voice: Voice, kind: str, pair: tuple[str, str], texts: Sequence[str]) -> dict[str, Any]:
    """Speaks all texts in both styles of a pair.

    Returns:
        The share of texts for which the second one is higher or faster, and the medians of both.
    """
    found = np.zeros((2, len(texts)))
    for side, style in enumerate(pair):
        styled = replace(voice.styled(style), prompt=None)
        for number, text in enumerate(texts):
            ids = voice.tokenizer.encode(text)
            if kind == "F0, as predicted":
                found[side, number] = predicted_f0(styled, ids)
                continue
            wave_T = styled.speak(ids, vocoder="griffin_lim" if kind == GRIFFIN_LIM else "istft")
            found[side, number] = len(ids) / (len(wave_T) / 16_000) if kind == "rate" else f0(wave_T)
    right = float(np.mean((found[1] > found[0]) & (found.min(0) > 0)))
    medians = [float(np.median(side)) for side in found]
    print(f"{kind}: {pair[0]} → {pair[1]}: {right:.0%} right, {medians[0]:.3g} → {medians[1]:.3g}", flush=True)
    return {"kind": kind, "styles": pair, "right": right, "medians": medians}


@torch.inference_mode()
def predicted_f0(voice: Voice, ids: Sequence[int]) -> float:
    """Returns the mean F0 of a text's tokens in Hz, as the synthesiser predicts it before there is audio."""
    parts, there = voice.head.synthesizer, torch.ones(1, dtype=torch.bool)
    assert parts.pitch is not None
    tokens_1N, _ = voice.head.with_marks(torch.tensor([list(ids)]), there)
    valid_1N = torch.ones_like(tokens_1N, dtype=torch.bool)
    x_1ND = parts.tower(parts.embedding(tokens_1N), valid_1N) + voice.head.style_of(None, voice.words)[:, None]
    return float(100.0 * 2 ** parts.pitch(x_1ND, valid_1N).mean())


def report(out: Path, values: dict[str, Any]) -> None:
    """Writes the table and its numbers."""
    units = {"F0": "Hz", GRIFFIN_LIM: "Hz", "rate": "letters/s", "F0, as predicted": "Hz"}
    rows = [
        (row["kind"], " → ".join(row["styles"]), f"{row['right']:.0%}",
         " → ".join(f"{value:.3g}" for value in row["medians"]) + f" {units[row['kind']]}")
        for row in values["pairs"]
    ]  # fmt: skip
    lines = [
        "# Style by words: opposite words move F0 and rate",
        "",
        f"`{values['command'].strip()}`, one core ({values['machine']}); {values['updates']} updates of "
        f"`synthesis_tiny` with `style_words` in {values['seconds'] / 60:.1f} minutes on "
        f"{values['recordings']} recordings of children "
        f"and adults; {values['texts']} unheard texts, each in both styles of a pair. F0 is measured in the audio by "
        "swift-f0. Whether the speech can be understood is not measured here.",
        "",
        *markdown_table(("measure", "styles", "right way", "medians"), rows),
        "",
        "In all: "
        + ", ".join(f"{kind} {share:.1%}" for kind, share in values["right"].items())
        + f". The goal is {GATE:.0%}, in the audio.",
    ]
    out.mkdir(parents=True, exist_ok=True)
    (out / "style.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (out / "style.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    sys.exit(main())
