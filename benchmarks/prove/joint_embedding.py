"""Retrieval across speech, images and texts, on real data of unseen speakers and unseen images.

    AURICLE_SPEECH=FOLDER python benchmarks/prove/joint_embedding.py        # about 20 minutes of one core

Digits: spoken in English (fsdd) and Arabic (arabic_speech_commands) by unseen speakers (to train, also those in
sentences of speechocean762 and LibriSpeech, cut out by their alignment),
handwritten (scikit-learn's digits, images that training does not see), and their English words. Three arms:

    all pairs   every sample has speech, an image and a word
    emergent    a sample has speech and a word, or an image and a word: speech and images never meet in training
    untrained   the same towers with their initial weights

A query ranks ten candidates of another kind, one of each digit, drawn at random: chance is 10 %.

Sentences: spoken sentences of speechocean762 and their texts, speakers and sentences unseen; a query ranks all of
them. The towers learn phrases of a few words first (`joint_embedding_sentences.py`).

Writes benchmarks/results/joint_embedding.md and .json. Exit code 1 unless the goals for digits are reached: 85 % in all
six directions, and 70 % between speech and images that never met.
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.prove.common import parser_of, real_speech  # noqa: E402
from benchmarks.prove.joint_embedding_data import (  # noqa: E402
    FURTHER,
    WORDS,
    Matrix,
    Sample,
    augmented,
    cut_words,
    handwritten,
    shifted,
    word_of,
)
from benchmarks.prove.joint_embedding_sentences import sentences  # noqa: E402
from benchmarks.prove.joint_embedding_towers import config, embedded, model, tower, train  # noqa: E402
from data_pipeline.audio.codecs import read_mono  # noqa: E402
from pretrain.config import Config  # noqa: E402
from pretrain.evaluate.manifest import Utterance, read_manifest  # noqa: E402

ARABIC = "arabic_speech_commands"
DIGITS = ("fsdd", ARABIC)
GALLERIES = 50
"""Draws of ten candidates for each query."""


def main() -> int:
    """Runs all arms; returns the exit code."""
    parser = parser_of(__doc__)
    parser.add_argument("--digit-minutes", type=float, default=4.0, help="processor time of an arm (default: 4)")
    parser.add_argument("--sentence-minutes", type=float, default=9.0, help="processor time (default: 9)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=("digits", "sentences"), help="keep the other part's figures of the last run")
    given = parser.parse_args()
    manifest = real_speech()
    if manifest is None:
        return 0
    torch.set_num_threads(1)
    listed, written_to = read_manifest(manifest), given.out / "joint_embedding.json"
    results: dict[str, Any] = json.loads(written_to.read_bytes()) if given.only else {}
    command = ("python benchmarks/prove/joint_embedding.py " + " ".join(sys.argv[1:])).strip()
    for part, measure in (("digits", digits), ("sentences", sentences)):
        if given.only in (None, part):
            began = time.process_time()
            found = measure(listed, given)
            results[part] = {"command": command, "processor_seconds": round(time.process_time() - began), **found}
            print(json.dumps(results[part], ensure_ascii=False), flush=True)
    return report({"digits": results["digits"], "sentences": results["sentences"]}, given)


def digits(listed: Sequence[Utterance], given: argparse.Namespace) -> dict[str, Any]:
    """Trains and measures the arms of the digits."""
    spoken = [u for u in listed if (u.corpus in DIGITS or u.corpus == FURTHER) and word_of(u) in WORDS]
    spoken = [u for u in spoken if u.corpus != FURTHER or u.language == "en"]
    unheard = [u for u in spoken if u.split == "test"]
    heard = [u for u in spoken if u.split != "test"] + cut_words(listed)
    waves = {u.name: read_mono(u.path)[u.start : u.stop].astype(np.float32) for u in (*heard, *unheard)}
    voices: dict[tuple[bool, str], dict[str, list[Utterance]]] = {}
    for u in heard:
        voices.setdefault((u.corpus == ARABIC, word_of(u)), {}).setdefault(u.speaker, []).append(u)
    seen, unseen = handwritten()
    found: dict[str, Any] = {
        "training": {"utterances": len(heard), "speakers": len({u.speaker for u in heard}), "images": len(seen)},
        "test": {"utterances": len(unheard), "speakers": len({u.speaker for u in unheard}), "images": len(unseen)},
    }

    def drawn(rng: np.random.Generator, progress: float, both: bool) -> list[Sample]:
        samples = []
        for number in range(48 if both else 32):
            # both languages, their digits, and the speakers of a digit, as often
            speakers = list(voices[number % 2 == 0, WORDS[rng.integers(10)]].values())
            own = speakers[rng.integers(len(speakers))]
            u = own[rng.integers(len(own))]
            wave = augmented(waves[u.name], rng)
            digit = WORDS.index(word_of(u)) if both else int(rng.integers(10))
            pixels = shifted(seen_by_digit[digit][rng.integers(len(seen_by_digit[digit]))], rng)
            if both:
                samples.append(Sample(f"{number}", wave, pixels, word_of(u)))
            else:
                samples.append(Sample(f"s{number}", wave, None, word_of(u)))
                samples.append(Sample(f"i{number}", None, pixels, WORDS[digit]))
        return samples

    seen_by_digit = [[pixels for pixels, digit in seen if digit == wanted] for wanted in range(10)]
    for arm in ("untrained", "all pairs", "emergent"):
        emergent = arm == "emergent"
        pairs = ["speech-text", "image-text"] if emergent else []
        settings = digit_config(pairs, given.seed)
        engine, steps = model(settings), 0
        if arm != "untrained":
            draw = functools.partial(drawn, both=not emergent)
            steps = train(engine, settings, draw, given.digit_minutes)
        speech = embedded(engine, "speech", [Sample(u.name, waves[u.name]) for u in unheard])
        image = embedded(engine, "image", [Sample(str(n), None, pixels) for n, (pixels, _) in enumerate(unseen)])
        text = embedded(engine, "text", [Sample(word, None, None, word) for word in WORDS])
        classes = {
            "speech": np.array([WORDS.index(word_of(u)) for u in unheard]),
            "image": np.array([digit for _, digit in unseen]),
            "text": np.arange(10),
        }
        vectors = {"speech": speech, "image": image, "text": text}
        found[arm] = {"updates": steps, "recall": directions(vectors, classes)}
        for corpus in DIGITS:
            rows = np.array([u.corpus == corpus for u in unheard])
            part, part_classes = vectors | {"speech": speech[rows]}, classes | {"speech": classes["speech"][rows]}
            found[arm][corpus] = directions(part, part_classes)
        print(f"{arm}: {steps} updates, " + shown(found[arm]["recall"]), flush=True)
    return found


def digit_config(pairs: Sequence[str], seed: int) -> Config:
    """Returns the config of the digits' model."""
    head = {
        "name": "joint_embedding", "embedding_dim": 64, "loss": "softmax", "pairs": list(pairs),
        "towers": {"text": tower("text", 64, 1), "image": tower("image", 64, 2)},
    }  # fmt: skip
    return config(96, 2, {"joint": head}, seed, 2e-3)


def directions(vectors: Mapping[str, Matrix], classes: Mapping[str, Matrix]) -> dict[str, float]:
    """Returns recall@1 among ten candidates, one of each digit, from each kind to each other one."""
    found = {}
    for query in vectors:
        for key in vectors:
            if query != key:
                rng = np.random.default_rng(0)
                similar = vectors[query] @ vectors[key].T
                members = [np.flatnonzero(classes[key] == digit) for digit in range(10)]
                hits = []
                for _ in range(GALLERIES if key != "text" else 1):
                    chosen = np.stack([rng.choice(rows, len(similar)) for rows in members], axis=1)
                    best = np.take_along_axis(similar, chosen, axis=1).argmax(1)
                    hits.append(float((best == classes[query]).mean()))
                found[f"{query} → {key}"] = float(np.mean(hits))
    return found


def shown(recall: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.1%}" for name, value in recall.items())


def run_of(part: Mapping[str, Any]) -> str:
    """Returns the command that measured a part, and its processor time where it was measured."""
    seconds = part.get("processor_seconds")
    return f"`{part['command']}`" + (f", {seconds / 60:.0f} minutes of processor time" if seconds else "")


def report(results: dict[str, Any], given: argparse.Namespace) -> int:
    """Writes the tables and their numbers; returns the exit code."""
    found, spoken = results["digits"], results["sentences"]
    trained, emergent = found["all pairs"]["recall"], found["emergent"]["recall"]
    goals = {
        "all six directions ≥ 85 %": min(trained.values()) >= 0.85,
        "speech ↔ image, never paired, ≥ 70 %": min(emergent["speech → image"], emergent["image → speech"]) >= 0.7,
    }
    arms = ("untrained", "all pairs", "emergent")
    lines = [
        "# Joint embedding: retrieval across speech, images and texts", "",
        f"One core ({platform.machine()}). Digits: {run_of(found)}. Sentences: {run_of(spoken)}.", "",
        f"Digits: {found['test']['utterances']} spoken digits of {found['test']['speakers']} unseen speakers and "
        f"{found['test']['images']} unseen images; training: {found['training']['utterances']} utterances of "
        f"{found['training']['speakers']} speakers, {found['training']['images']} images. Recall@1 among ten "
        "candidates, chance 10 %:", "",
        "| direction | " + " | ".join(f"{arm} ({found[arm]['updates']} updates)" for arm in arms) + " |",
        "|---|" + "---|" * len(arms),
    ]  # fmt: skip
    lines += [
        f"| {name} | " + " | ".join(f"{found[arm]['recall'][name]:.1%}" for arm in arms) + " |" for name in trained
    ]
    lines += [
        "",
        "By language (English: fsdd, 1 unseen speaker; Arabic: 2):",
        "",
        "| direction | corpus | all pairs | emergent |",
    ]
    lines += ["|---|---|---|---|"]
    for name in trained:
        if "speech" in name:
            for corpus in DIGITS:
                values = " | ".join(f"{found[arm][corpus][name]:.1%}" for arm in arms[1:])
                lines.append(f"| {name} | {corpus} | {values} |")
    lines += ["", *(f"Goal, {goal}: {'reached' if reached else '**missed**'}." for goal, reached in goals.items()), ""]
    lines += [
        f"Sentences: {spoken['test']['utterances']} utterances of {spoken['test']['speakers']} unseen speakers, as "
        f"many candidates; {spoken['test']['sentences also in training']} of the sentences were also read by training "
        f"speakers ({spoken['training']['utterances']} utterances, {spoken['training']['hours']} h; "
        f"{spoken['trained']['updates']} updates). Chance: {1 / spoken['test']['utterances']:.1%} at 1, "
        f"{10 / spoken['test']['utterances']:.1%} at 10.", "",
        "| direction | arm | queries | @1 | @5 | @10 | median rank |", "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for arm in ("untrained", "trained"):
        for name, values in spoken[arm].items():
            if name != "updates":
                at = " | ".join(f"{values[f'@{k}']:.1%}" for k in (1, 5, 10))
                lines.append(f"| {name} | {arm} | {values['queries']} | {at} | {values['median rank']:.0f} |")
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "joint_embedding.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    text = json.dumps({**results, "goals": goals}, indent=1, ensure_ascii=False)
    (given.out / "joint_embedding.json").write_text(text + "\n", encoding="utf-8")
    print("\n".join(lines))
    return 0 if all(goals.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
