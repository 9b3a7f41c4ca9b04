"""Streams of a recogniser at each chunk length and left context: errors, speed, delays and size of the state.

The figures come from the stream itself: every utterance is pushed in parts, as from a microphone. A pass over whole
recordings that only imitates the pattern would hide whatever differs between the two.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from data_pipeline.core.schema import ConfigError
from data_pipeline.core.types import SAMPLE_RATE
from pretrain.evaluate.asr import by_speaker, parts
from pretrain.evaluate.config import EvaluateConfig, items
from pretrain.evaluate.features import Waves
from pretrain.evaluate.manifest import Utterance
from pretrain.evaluate.metrics import Interval95, bootstrap
from pretrain.inference.streaming_encoder import chosen
from pretrain.interfaces.streaming import StreamingEncoder
from pretrain.recognition.config import DecodingConfig
from pretrain.recognition.error_rates import edits, written
from pretrain.recognition.recogniser import Recogniser
from pretrain.recognition.streaming_recogniser import StreamingRecogniser
from pretrain.recognition.transcript import Word


@dataclass
class Streamed:
    """Results of the streams of some utterances.  pushes, audio: seconds.  emission: seconds from a word's end on."""

    texts: list[str] = field(default_factory=list)
    pushes: list[float] = field(default_factory=list)
    audio: float = 0.0
    state_bytes: int = 0
    emission: list[float] = field(default_factory=list)


def stream(recogniser: StreamingRecogniser, wave_T: torch.Tensor, push: int, found: Streamed) -> None:
    """Streams one utterance in pushes of `push` samples and adds the result to `found`.

    A word's emission delay is the audio that had arrived after its end (by Viterbi alignment) when the stable text
    first had the word entire; it does not include the time of computing.

    Args:
        recogniser: decodes the stream.
        wave_T: (T,) audio at 16 kHz.
        push: samples per push.
        found: results of all utterances.
    """
    words: list[Word] = []
    ends: list[float] = []
    state, before = recogniser.start(), 0
    for at in range(0, len(wave_T), push):
        began = time.perf_counter()
        state, [update] = recogniser.push(state, [wave_T[at : at + push]])
        found.pushes.append(time.perf_counter() - began)
        words += update.words
        heard = min(at + push, len(wave_T)) / SAMPLE_RATE
        entire = len(words) + len(update.stable.split()) - (not update.stable.endswith(" ") and bool(update.stable))
        ends += [heard] * (entire - before)
        before = max(before, entire)
    found.state_bytes = max(found.state_bytes, state.bytes)
    began = time.perf_counter()
    _, [update] = recogniser.finish(state)
    found.pushes.append(time.perf_counter() - began)
    words += update.words
    found.audio += len(wave_T) / SAMPLE_RATE
    found.texts.append(" ".join(word.text for word in words))
    ends += [len(wave_T) / SAMPLE_RATE] * (len(words) - len(ends))
    found.emission += [heard - word.end for heard, word in zip(ends, words, strict=False)]


def settings(config: EvaluateConfig, encoder: StreamingEncoder) -> list[tuple[int, int]]:
    """Returns the chunk lengths and left contexts to evaluate. Raises ConfigError for one that was not trained."""
    chunks, lefts = encoder.trained_chunks()
    for name, given in (("chunks", config.streaming.chunks), ("left", config.streaming.left)):
        if not all(part.lstrip("-").isdecimal() for part in items(given)):
            raise ConfigError(f"streaming.{name}={given}: must be numbers with commas between them")
    asked = [int(part) for part in items(config.streaming.chunks)] or list(chunks)
    contexts = [int(part) for part in items(config.streaming.left)] or list(lefts)
    return [tuple(chosen(encoder, chunk, left)) for chunk in asked for left in contexts]  # type: ignore[misc]


def report(
    config: EvaluateConfig,
    recogniser: Recogniser,
    utterances: Sequence[Utterance],
    waves: Waves,
    say: Callable[[str], None],
) -> Iterator[tuple[str, Interval95]]:
    """Yields (measure, value) of whole recordings, then of streams with each chunk length and left context.

    Args:
        config: split, corpora, chunks and contexts.
        recogniser: with a model that can stream.
        utterances: the manifest.
        waves: decoded audio.
        say: receives a line per setting.
    """
    decoding = DecodingConfig(decoder=config.streaming.decoder, beam=max(config.asr.beam, 1))
    StreamingRecogniser(recogniser, decoding)  # refuses a model that cannot stream before anything is computed
    symbols = recogniser.head.symbols
    asked = [u for u in parts(config, utterances)[1] if written(u.text, symbols)]
    if not asked:
        raise ConfigError(f"task=streaming: no text has a symbol of the recogniser, {''.join(symbols)!r}")
    references, nothing = [written(u.text, symbols) for u in asked], float("nan")
    assert isinstance(recogniser.model.encoder, StreamingEncoder)
    whole = [recogniser.transcribe(u.name, [waves(u).numpy()], decoding).text for u in asked]
    yield (
        "word error rate, whole recordings",
        bootstrap([by_speaker(asked, edits(references, whole, True))], config.bootstrap),
    )
    for chunk, left in settings(config, recogniser.model.encoder):
        model = StreamingRecogniser(recogniser, decoding, chunk, left)
        found, push = Streamed(), round(config.streaming.push_ms * SAMPLE_RATE / 1_000)
        for utterance in asked:
            stream(model, waves(utterance), push, found)
        rate = bootstrap([by_speaker(asked, edits(references, found.texts, True))], config.bootstrap)
        name = f"chunk {chunk}, left {left}"
        say(f"streaming, {name}: {rate.value:.1%} word errors, {sum(found.pushes) / found.audio:.3f} × real time")
        yield f"word error rate, {name}", rate
        pushes, emission = np.array(found.pushes) * 1e3, np.array(found.emission or [nothing]) * 1e3
        values = {
            "computing, ms per second of audio": 1e3 * sum(found.pushes) / found.audio,
            "push, ms, p50": float(np.median(pushes)),
            "push, ms, p95": float(np.quantile(pushes, 0.95)),
            "push, ms, max": float(pushes.max()),
            "state, kB": found.state_bytes / 1e3,
            "algorithmic delay, ms": 1e3 * model.model.delay_seconds,
            "emission after the end of a word, ms, p50": float(np.median(emission)),
            "emission after the end of a word, ms, p95": float(np.quantile(emission, 0.95)),
        }
        for measure, value in values.items():
            yield f"{measure}, {name}", Interval95(value, nothing, nothing)
