"""Error rates of a recogniser's texts: greedy, by beam search, and with an n-gram of symbols."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from data_pipeline.core.schema import ConfigError
from pretrain.inference.ctc_decoding import NGram, beam_search, greedy
from pretrain.inference.joint_decoding import JointConfig
from pretrain.inference.word_lm import WordBeamSearch
from pretrain.recognition.config import DecodingConfig
from pretrain.recognition.recogniser import Recogniser


@dataclass(frozen=True)
class Errors:
    """Error rates of one decoder: edits per word and per character, and the number of utterances."""

    decoder: str
    wer: float
    cer: float
    utterances: int


@dataclass(frozen=True)
class Decoders:
    """beam: prefixes kept in beam search; 0: greedy only.  ngram: fitted on texts; its score is weighted by `weight`,
    and `weight` is also the bonus per symbol."""

    beam: int = 0
    ngram: NGram | None = None
    weight: float = 0.5
    words: WordBeamSearch | None = None
    """With a word language model."""
    token_bonus: float = 0.0
    """Added per token where an attention decoder takes part."""


def written(text: str, symbols: Iterable[str]) -> str:
    """Returns a text in the recogniser's symbols: lower case, other characters dropped, single spaces."""
    known = set("".join(symbols))
    return " ".join("".join(symbol for symbol in text.lower() if symbol in known).split())


def fit_ngram(texts: Iterable[str], order: int, symbols: Sequence[str]) -> NGram | None:
    """Returns an n-gram of the symbols of texts; None for order 0, and for symbols of several characters."""
    if not order or any(len(symbol) != 1 for symbol in symbols):
        return None
    numbers = {symbol: number for number, symbol in enumerate(symbols)}
    return NGram([[numbers[s] for s in written(text, symbols)] for text in texts], order, len(symbols))


def recognise(recogniser: Recogniser, waves: Iterable[np.ndarray], decoders: Decoders) -> list[tuple[str, list[str]]]:
    """Returns the texts that each decoder finds, by the name of the decoder.

    Args:
        recogniser: computes each recording at once.
        waves: (T,) audio at 16 kHz.
        decoders: the decoders to run.
    """
    if not recogniser.head.gives_log_probs:
        return _without_ctc(recogniser, waves, decoders)
    outputs, joint = [], []
    for wave in waves:
        outputs.append(recogniser.frames(wave))
        if recogniser.attention is not None and decoders.beam:
            search = JointConfig(beam=decoders.beam, bonus=decoders.token_bonus)
            joint.append(recogniser.joint(wave, search)[1].tokens)

    def spelled(symbols: Sequence[int]) -> str:
        return " ".join("".join(recogniser.head.symbols[number] for number in symbols).split())

    found = [("greedy", [spelled(greedy(output)) for output in outputs])]
    if decoders.beam:
        name = f"beam {decoders.beam}"
        found.append((name, [spelled(beam_search(output, decoders.beam)) for output in outputs]))
        if joint:
            found.append((f"{name}, attention and CTC", [spelled(symbols) for symbols in joint]))
        if words := decoders.words:
            found.append((f"{name} + word model", [spelled(words(output)) for output in outputs]))
        if model := decoders.ngram:
            weight = decoders.weight
            decoded = [spelled(beam_search(o, decoders.beam, model, weight, bonus=weight)) for o in outputs]
            found.append((f"{name} + {model.order}-gram", decoded))
    return found


def _without_ctc(
    recogniser: Recogniser, waves: Iterable[np.ndarray], decoders: Decoders
) -> list[tuple[str, list[str]]]:
    """Returns the texts of a transducer, or of an attention decoder alone."""
    bonus = decoders.token_bonus
    configs = {"greedy": DecodingConfig(token_bonus=bonus)}
    if decoders.beam:
        configs[f"beam {decoders.beam}"] = DecodingConfig(decoder="beam", beam=decoders.beam, token_bonus=bonus)
    found: dict[str, list[str]] = {name: [] for name in configs}
    for wave in waves:
        for name, decoding in configs.items():
            found[name].append(recogniser.transcribe("", [wave], decoding).text)
    return list(found.items())


def require_jiwer() -> None:
    """Raises ConfigError if jiwer, which counts the errors, is not installed."""
    if importlib.util.find_spec("jiwer") is None:
        raise ConfigError("word and character error rates need the package jiwer: pip install jiwer")


def edits(references: Sequence[str], texts: Sequence[str], by_words: bool) -> list[tuple[int, int]]:
    """Returns (substitutions, deletions and insertions; words or characters of the reference) of each text, by jiwer.

    Raises:
        ConfigError: jiwer is not installed.
    """
    require_jiwer()
    import jiwer

    process = jiwer.process_words if by_words else jiwer.process_characters
    found = []
    for reference, text in zip(references, texts, strict=True):
        made = process(reference, text)
        wrong = made.substitutions + made.deletions
        found.append((wrong + made.insertions, made.hits + wrong))
    return found


def errors(decoder: str, references: Sequence[str], texts: Sequence[str]) -> Errors:
    """Returns word and character error rates by jiwer.

    Raises:
        ConfigError: jiwer is not installed.
        ValueError: no reference has any text.
    """
    if not any(reference.strip() for reference in references):
        raise ValueError("error rates: none of the references has any text")
    wer, cer = (
        sum(wrong for wrong, _ in counts) / sum(units for _, units in counts)
        for counts in (edits(references, texts, by_words) for by_words in (True, False))
    )
    return Errors(decoder, wer, cer, len(texts))
