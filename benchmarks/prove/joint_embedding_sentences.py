"""Spoken sentences and their texts in `joint_embedding.py`: phrases of a few words first, whole sentences later.

A micro-batch has phrases of as many words, cut out of sentences by their forced alignment. Texts are the phones of
their words by a dictionary (`auricle tokens kind=phones`); the speech tower also learns them by CTC.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.prove.alignments import Word, aligned_words
from benchmarks.prove.joint_embedding_data import Sample, augmented, speech_folder, written
from benchmarks.prove.joint_embedding_towers import config, embedded, model, ranks, tower, train
from data_pipeline.audio.codecs import read_mono
from data_pipeline.core.types import SAMPLE_RATE
from data_pipeline.text.artefact import TokensConfig, make_tokens
from data_pipeline.text.tokenizer import Tokenizer, load_tokenizer
from pretrain.config import Config
from pretrain.evaluate.manifest import Utterance

CORPUS, FURTHER = "speechocean762", "librispeech-26"
"""Corpus of the test, and one more to learn from."""
SECONDS, MOST = 36.0, 64
"""Audio and phrases of a micro-batch."""
LONGEST_PHRASE = 8
"""Words."""


def sentences(listed: Sequence[Utterance], given: argparse.Namespace) -> dict[str, Any]:
    """Trains and measures the retrieval of sentences by speakers that were never heard."""
    heard = {u.name: u for u in listed if u.corpus in (CORPUS, FURTHER) and u.text and u.split != "test"}
    unheard: dict[str, Utterance] = {}
    for u in listed:
        if u.corpus == CORPUS and u.text and u.split == "test":
            unheard.setdefault(written(u.text), u)  # one utterance of each sentence
    test, known = list(unheard.values()), {written(u.text) for u in heard.values()}
    tokenizer = phones([written(u.text) for u in (*heard.values(), *test)])
    phrases = Phrases(
        [words for name, words in aligned_words(speech_folder(listed)).items() if name in heard], heard, tokenizer
    )
    hours = sum(map(len, phrases.waves.values())) / SAMPLE_RATE / 3600
    found: dict[str, Any] = {
        "training": {"utterances": len(phrases.waves), "hours": round(hours, 2)},
        "test": {
            "utterances": len(test),
            "speakers": len({u.speaker for u in test}),
            "sentences also in training": sum(written(u.text) in known for u in test),
        },
    }
    settings = sentence_config(given.seed, tokenizer.size)
    engine = model(settings)
    for arm in ("untrained", "trained"):
        steps = train(engine, settings, phrases.drawn, given.sentence_minutes) if arm == "trained" else 0
        speech = embedded(engine, "speech", [Sample(u.name, read_mono(u.path).astype(np.float32)) for u in test])
        text = embedded(engine, "text", [Sample(u.name, tokens=tokens_of(written(u.text), tokenizer)) for u in test])
        new = np.array([written(u.text) not in known for u in test])
        found[arm] = {
            "updates": steps,
            "speech → text": ranks(speech @ text.T),
            "text → speech": ranks(text @ speech.T),
            "speech → text, sentences not in training": ranks((speech @ text.T)[new], np.flatnonzero(new)),
        }
        print(f"sentences, {arm}: {steps} updates, {found[arm]}", flush=True)
    return found


def phones(texts: Sequence[str]) -> Tokenizer:
    """Returns the tokenizer of phones of English words."""
    with tempfile.TemporaryDirectory() as folder:
        make_tokens(TokensConfig(shards="none", out=folder, kind="phones"), texts)
        return load_tokenizer(folder)


def tokens_of(text: str, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Returns the phones of a text, without those of words outside the dictionary."""
    return tuple(number for word in text.split() for number in tokenizer.encode(word))


class Phrases:
    """Phrases of sentences that are heard in training.

    Args:
        aligned: the words of each sentence in their order.
        heard: the sentences by name.
        tokenizer: phones of the words.
    """

    def __init__(self, aligned: Sequence[Sequence[Word]], heard: dict[str, Utterance], tokenizer: Tokenizer) -> None:
        self.aligned = aligned
        self.waves = {words[0].name: read_mono(heard[words[0].name].path).astype(np.float32) for words in aligned}
        self.tokens = {word.text: tokens_of(written(word.text), tokenizer) for words in aligned for word in words}

    def drawn(self, rng: np.random.Generator, progress: float) -> list[Sample]:
        """Returns the phrases of a micro-batch; their number of words grows with the progress of training, 0 to 1."""
        longest = 1 + round((LONGEST_PHRASE - 1) * min(1.0, 1.5 * progress))
        count, samples, seconds = int(rng.integers(1 + longest // 3, longest + 1)), [], 0.0
        while len(samples) < MOST and seconds < SECONDS:
            words = self.aligned[rng.integers(len(self.aligned))]
            first = int(rng.integers(max(1, len(words) - count + 1)))
            own = words[first : first + count]
            wave = self.waves[own[0].name][own[0].start : own[-1].stop]
            tokens = tuple(number for word in own for number in self.tokens[word.text])
            if tokens and len(wave) > SAMPLE_RATE // 10:
                samples.append(Sample(f"{len(samples)}", augmented(wave, rng), tokens=tokens))
                seconds += len(wave) / SAMPLE_RATE
        return samples


def sentence_config(seed: int, vocabulary: int) -> Config:
    """Returns the config of the sentences' model, which also learns their phones by CTC."""
    text: dict[str, Any] = tower("text", 128, 2)
    text["embedding"] |= {"vocabulary": vocabulary, "positions": "none"}
    text["encoder"] = {
        "name": "conformer", "dim": 128, "layers": 1, "heads": 4, "ffn_dim": 256, "kernel": 5, "layer_drop": 0.0,
        "dropout": 0.0, "attention_dropout": 0.0,
    }  # fmt: skip
    head = {"name": "joint_embedding", "embedding_dim": 192, "loss": "softmax", "towers": {"text": text}}
    spoken = {"name": "ctc", "tokens": "text", "vocabulary": vocabulary, "weight": 0.5}
    return config(128, 3, {"joint": head, "text": spoken}, seed, 1e-3)
