"""Synthesised speech: intelligibility by independent recognisers, distance from recordings of the text, and speed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torchaudio.functional import create_dct

from data_pipeline.audio.pcm import to_pcm16
from data_pipeline.core.schema import ConfigError
from data_pipeline.core.types import SAMPLE_RATE
from data_pipeline.labels import pitch
from pretrain.evaluate.config import EvaluateConfig, items
from pretrain.evaluate.features import Waves
from pretrain.evaluate.manifest import Utterance, thinned
from pretrain.evaluate.metrics import Interval95, Tally, bootstrap
from pretrain.evaluate.speaker_similarity import speaker_encoder
from pretrain.generation.text import TextError, sentences
from pretrain.generation.voice import Speaker
from pretrain.interfaces.frames import Frames
from pretrain.nn.spectral import LogMel
from pretrain.recognition.error_rates import Decoders, edits, recognise, written
from pretrain.recognition.recogniser import open_recogniser

CEPSTRA = 13
"""Cepstra of the mel-cepstral distortion; the first one, which is the loudness, is left out."""
LETTERS = "abcdefghijklmnopqrstuvwxyz' "
Transcribe = Callable[[npt.NDArray[np.float32]], str]


def figures(
    config: EvaluateConfig, voice: Speaker, utterances: Sequence[Utterance], waves: Waves, say: Callable[[str], None]
) -> Iterator[tuple[str, Interval95]]:
    """Yields measures of a voice on texts with a recording, with 95 % intervals over utterances.

    Args:
        config: corpora, split and recognisers.
        voice: synthesises the texts.
        utterances: the manifest.
        waves: decoded audio.
        say: receives a line for each measure.

    Raises:
        ConfigError: no text can be spoken, or a package is missing.
    """
    asked, spoken, seconds = [], [], []
    for utterance in _asked(config, utterances):
        try:
            ids = sentences(utterance.text, voice.tokenizer, config.synthesis.language, 10_000)
        except TextError as error:
            say(f"synthesis: {utterance.name} is left out: {error}")
            continue
        began = time.perf_counter()
        spoken.append(np.concatenate([voice.speak(part) for part in ids]))
        seconds.append((time.perf_counter() - began, len(spoken[-1]) / SAMPLE_RATE))
        asked.append(utterance)
    if not asked:
        raise ConfigError("task=synthesis: no text of the manifest can be spoken with the tokens of the checkpoint")
    recorded = [waves(utterance).numpy() for utterance in asked]
    kinds = {
        "recording": recorded,
        "recording through the vocoder": [copy_synthesis(voice, w) for w in recorded],
        "text": spoken,
    }
    names = [utterance.name for utterance in asked]

    def measured(name: str, counts: Sequence[tuple[float, float]]) -> tuple[str, Interval95]:
        tally: Tally = {key: (float(total), float(count)) for key, (total, count) in zip(names, counts, strict=True)}
        found = bootstrap([tally], config.bootstrap)
        say(f"synthesis, {name}: {found.value:.4g}")
        return name, found

    references = [written(utterance.text, LETTERS) for utterance in asked]
    for recogniser, transcribe in _recognisers(config, references):
        for kind, audio in kinds.items():
            texts = [written(transcribe(wave), LETTERS) for wave in audio]
            yield measured(f"word error rate of {kind}, {recogniser}", edits(references, texts, by_words=True))
    pairs = list(zip(recorded, spoken, strict=True))
    yield measured("mel-cepstral distortion, dB", [mel_cepstral_distortion(*pair) for pair in pairs])
    yield measured("F0 error, semitones", [pitch_error(*pair) for pair in pairs])
    yield measured("real-time factor", seconds)
    try:
        embed = speaker_encoder()
    except ConfigError as error:
        say(f"synthesis: {error}")
        return
    voices, said = [embed(wave) for wave in recorded], [embed(wave) for wave in spoken]
    others = [_next_of_speaker([utterance.speaker for utterance in asked], number) for number in range(len(asked))]
    cosines = [
        (float(one @ voices[other]), 1.0) if other is not None else (0.0, 0.0)
        for one, other in zip(voices, others, strict=True)
    ]
    if any(count for _, count in cosines):
        yield measured("speaker similarity of recordings of one speaker", cosines)
    yield measured(
        "speaker similarity of text and recording", [(float(a @ b), 1.0) for a, b in zip(voices, said, strict=True)]
    )


def _next_of_speaker(speakers: Sequence[str], number: int) -> int | None:
    """Returns the next place of the same speaker, from the beginning after the end; None where there is no other."""
    places = [*range(number + 1, len(speakers)), *range(number)]
    return next((place for place in places if speakers[place] == speakers[number]), None)


def copy_synthesis(voice: Speaker, wave_T: npt.NDArray[np.float32], vocoder: str = "istft") -> npt.NDArray[np.float32]:
    """Returns a recording (T,) converted to mel frames and back by a vocoder."""
    mel: Frames = voice.log_mel(torch.from_numpy(wave_T)[None], torch.tensor([len(wave_T)]))
    return voice.wave(mel, vocoder)


def _asked(config: EvaluateConfig, utterances: Sequence[Utterance]) -> list[Utterance]:
    corpora = items(config.corpora)
    chosen = [u for u in utterances if u.text.strip() and u.part == config.ask and (not corpora or u.corpus in corpora)]
    if not chosen:
        raise ConfigError(f"task=synthesis: no text in split {config.ask} of the manifest")
    return thinned(chosen, config.max_utterances)


def _recognisers(config: EvaluateConfig, references: Sequence[str]) -> Iterator[tuple[str, Transcribe]]:
    words = sorted({word for text in references for word in text.split()})
    if config.synthesis.listener == "words":
        yield "PocketSphinx with these words", pocketsphinx(words)
    else:
        yield "PocketSphinx", pocketsphinx()
    if config.synthesis.recogniser:
        own = open_recogniser(config.synthesis.recogniser, config.asr.head, config.device)

        def transcribe(wave_T: npt.NDArray[np.float32]) -> str:
            [(_, [text])] = recognise(own, [wave_T], Decoders())
            return text

        yield own.name, transcribe


def pocketsphinx(words: Sequence[str] = ()) -> Transcribe:
    """Returns PocketSphinx with its packaged American English model.

    Args:
        words: any sequence of these is recognised, all equally probable; empty: by its packaged language model.

    Raises:
        ConfigError: the package is missing, or does not know a word.
    """
    try:
        from pocketsphinx import Decoder
    except ImportError:
        raise ConfigError("task=synthesis: needs the package pocketsphinx: pip install pocketsphinx") from None
    decoder: Any = Decoder(lm=None, loglevel="FATAL") if words else Decoder(loglevel="FATAL")
    if unknown := [word for word in words if decoder.lookup_word(word) is None]:
        raise ConfigError(
            f"synthesis.listener=words: PocketSphinx does not know {', '.join(unknown[:5])}; take language_model"
        )
    if words:
        decoder.add_jsgf_string("words", f"#JSGF V1.0; grammar words; public <words> = ({' | '.join(words)})+ ;")
        decoder.activate_search("words")

    def transcribe(wave_T: npt.NDArray[np.float32]) -> str:
        decoder.start_utt()
        decoder.process_raw(to_pcm16(wave_T), full_utt=True)
        decoder.end_utt()
        found = decoder.hyp()
        return "" if found is None else str(found.hypstr)

    return transcribe


def cepstra(wave_T: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Returns mel cepstra 1 … 13 of ln amplitude, (F, 13), by an orthonormal DCT of 80 mel bands."""
    mel = LogMel(80, normalize="fixed")
    wave = torch.from_numpy(np.pad(wave_T, (0, max(mel.window - len(wave_T), 0))).astype(np.float32))
    with torch.inference_mode():
        log_FM = 0.5 * mel.log_power(wave[None])[0].double()
        dct_MC = create_dct(CEPSTRA + 1, mel.dim, "ortho").double() / np.sqrt(mel.dim / 2)
    made: npt.NDArray[np.float64] = (log_FM @ dct_MC)[:, 1:].numpy()
    return made


def warping_path(distance_XY: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """Returns the cheapest path through a matrix of distances, (P, 2): dynamic time warping (Sakoe and Chiba 1978)."""
    X, Y = distance_XY.shape
    cost = np.full((X + 1, Y + 1), np.inf)
    cost[0, 0] = 0.0
    for x in range(X):
        row = distance_XY[x]
        for y in range(Y):
            cost[x + 1, y + 1] = row[y] + min(cost[x, y], cost[x, y + 1], cost[x + 1, y])
    path, x, y = [], X, Y
    while x and y:
        path.append((x - 1, y - 1))
        steps = ((x - 1, y - 1), (x - 1, y), (x, y - 1))
        x, y = min(steps, key=lambda step: cost[step])
    return np.array(path[::-1], np.int64).reshape(-1, 2)


def _aligned(one: npt.NDArray[np.float32], other: npt.NDArray[np.float32]) -> tuple[Any, Any, npt.NDArray[np.int64]]:
    a_FC, b_FC = cepstra(one), cepstra(other)
    squared = (a_FC**2).sum(1)[:, None] + (b_FC**2).sum(1)[None] - 2 * a_FC @ b_FC.T
    return a_FC, b_FC, warping_path(np.sqrt(np.maximum(squared, 0.0)))


def mel_cepstral_distortion(recorded: npt.NDArray[np.float32], spoken: npt.NDArray[np.float32]) -> tuple[float, float]:
    """Returns the sum over a time-warped path of 10 / ln 10 · √(2 Σ Δc²) in dB (Kubichek 1993), and its length."""
    a_FC, b_FC, path = _aligned(recorded, spoken)
    difference = a_FC[path[:, 0]] - b_FC[path[:, 1]]
    return float((10 / np.log(10) * np.sqrt(2 * (difference**2).sum(1))).sum()), float(len(path))


def pitch_error(recorded: npt.NDArray[np.float32], spoken: npt.NDArray[np.float32]) -> tuple[float, float]:
    """Returns the sum of |Δ F0| in semitones over the time-warped frames that both voice, and their number."""
    compute = pitch.pitch_labels()
    one, other = compute(recorded), compute(spoken)
    _, _, path = _aligned(recorded, spoken)
    a, b = (labels[path[:, side]].astype(float) for side, labels in enumerate((one, other)))
    both = (a > 0) & (b > 0)
    return float(np.abs(a - b)[both].sum() * 12 / pitch.STEPS_PER_OCTAVE), float(both.sum())
