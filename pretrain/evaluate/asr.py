"""Word and character error rates of recognisers on unseen speakers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from data_pipeline.core.schema import ConfigError
from pretrain.evaluate.config import EvaluateConfig, items
from pretrain.evaluate.features import Waves
from pretrain.evaluate.manifest import Utterance, corpora_in_words, labelled_parts, thinned
from pretrain.evaluate.metrics import Interval95, Tally, bootstrap
from pretrain.inference.word_lm import WordBeamSearch
from pretrain.recognition.error_rates import Decoders, edits, fit_ngram, recognise, written
from pretrain.recognition.recogniser import Recogniser


def parts(config: EvaluateConfig, utterances: Sequence[Utterance]) -> tuple[list[Utterance], list[Utterance]]:
    """Returns the utterances with text of split train, and of the split that is asked for.

    Raises:
        ConfigError: there is none to evaluate.
        ValueError: a speaker is in both.
    """
    corpora = items(config.corpora)
    train, asked = labelled_parts(utterances, corpora, config.ask, lambda u: bool(u.text.strip()))
    if not asked:
        raise ConfigError(f"task=asr: no text in split ask={config.ask} of {corpora_in_words(corpora, utterances)}")
    return train, thinned(asked, config.max_utterances)


def error_rates(
    config: EvaluateConfig,
    recogniser: Recogniser,
    utterances: Sequence[Utterance],
    waves: Waves,
    say: Callable[[str], None],
) -> Iterator[tuple[str, str, Interval95]]:
    """Yields (measure, decoder, rate over all utterances with its 95 % interval over speakers).

    Args:
        config: decoders, corpora and split.
        recogniser: decodes.
        utterances: the manifest.
        waves: decoded audio.
        say: receives a line per decoder.
    """
    train, asked = parts(config, utterances)
    symbols = recogniser.head.symbols
    asked = [u for u in asked if written(u.text, symbols)]
    references = [written(u.text, symbols) for u in asked]
    if not asked:
        raise ConfigError(f"task=asr: no text has a symbol of the recogniser, {''.join(symbols)!r}")
    wanted = config.asr
    if wanted.lm and not recogniser.head.gives_log_probs:
        raise ConfigError(f"asr.lm={wanted.lm}: decodes by a CTC head, and the run has none; leave it out")
    ngram = fit_ngram((u.text for u in train), wanted.ngram, symbols) if train else None
    words = None
    if wanted.lm:
        words = WordBeamSearch(
            wanted.lm, symbols, beam=wanted.beam, weight=wanted.lm_weight, bonus=wanted.word_bonus, words=wanted.words
        )
    decoders = Decoders(wanted.beam, ngram, wanted.ngram_weight, words, wanted.token_bonus)
    audio = (waves(u).numpy() for u in asked)
    for decoder, texts in recognise(recogniser, audio, decoders):
        for measure, by_words in (("word error rate", True), ("character error rate", False)):
            counts = edits(references, texts, by_words)
            rate = bootstrap([by_speaker(asked, counts)], config.bootstrap)
            say(f"asr, {measure}: {rate.value:.1%}  {recogniser.name}, {decoder}")
            yield measure, decoder, rate


def by_speaker(utterances: Sequence[Utterance], counts: Sequence[tuple[int, int]]) -> Tally:
    """Returns edits and reference units of each speaker."""
    sums: dict[str, np.ndarray] = {}
    for utterance, count in zip(utterances, counts, strict=True):
        sums[utterance.speaker] = sums.get(utterance.speaker, np.zeros(2)) + np.array(count)
    return {speaker: (float(found[0]), float(found[1])) for speaker, found in sums.items()}
