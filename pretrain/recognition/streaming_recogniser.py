"""Recognises streams: returns partial text for audio in parts of any size, and words with times when a segment ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pretrain.inference.ctc_alignment import align
from pretrain.inference.ctc_decoding import BeamSearch, Prefix
from pretrain.inference.streaming_ctc import DecoderState, EndPoints, Segment, StreamingDecoder
from pretrain.inference.streaming_encoder import MAX_MINUTES, StreamedModel
from pretrain.inference.streaming_state import StreamState, join, split
from pretrain.interfaces.frames import EncoderOutput
from pretrain.recognition.config import DecodingConfig
from pretrain.recognition.recogniser import Recogniser
from pretrain.recognition.transcript import Word, WordBuilder


class RecognitionState(NamedTuple):
    """State of B streams of recognition: the model's, and each stream's decoder."""

    stream: StreamState
    decoders: tuple[DecoderState, ...]


class Update(NamedTuple):
    """Result of a push for one stream.

    words: of the segments that ended; final.
    text: of the current segment so far.  stable: the beginning of `text` that later audio cannot change.
    seconds: audio that the text covers, from the stream's start.
    ended: whether a segment ended.
    """

    words: tuple[Word, ...]
    text: str
    stable: str
    seconds: float
    ended: bool


class StreamingRecogniser:
    """Recognises streams with a trained model; keeps no state.

    Args:
        recogniser: model and head.
        decoding: decoder and beam.
        chunk: frames per chunk, among those trained; None: the first.
        left_chunks: left context in chunks, among those trained; None: the first.
        end_points: when segments end.
        max_minutes: longest stream with an unlimited left context.

    Raises:
        ConfigError: the model cannot stream with these settings; names the fields and the remedy.
    """

    def __init__(
        self,
        recogniser: Recogniser,
        decoding: DecodingConfig | None = None,
        chunk: int | None = None,
        left_chunks: int | None = None,
        end_points: EndPoints | None = None,
        max_minutes: float = MAX_MINUTES,
    ) -> None:
        decoding = decoding or DecodingConfig()
        self.model = StreamedModel(recogniser.model, chunk, left_chunks, max_minutes)
        self.head, self.symbols = recogniser.head, recogniser.head.symbols
        search = None if decoding.decoder == "greedy" else BeamSearch(decoding.beam)
        self.decoder = StreamingDecoder(self.model.rate_hz, recogniser.silent, search, end_points or EndPoints())

    def start(self, rows: int = 1) -> RecognitionState:
        """Returns the state of `rows` streams before their first sample."""
        return RecognitionState(self.model.start(rows), tuple(self.decoder.start() for _ in range(rows)))

    def push(self, state: RecognitionState, samples: Sequence[Tensor]) -> tuple[RecognitionState, list[Update]]:
        """Appends 16 kHz audio in [-1, 1] to each stream, (T_b,); returns the new state and an update per stream."""
        stream, output = self.model.push(state.stream, samples)
        return self._decoded(stream, state.decoders, output, last=False)

    def finish(self, state: RecognitionState) -> tuple[RecognitionState, list[Update]]:
        """Ends the streams; the updates have their last words."""
        stream, output = self.model.finish(state.stream)
        return self._decoded(stream, state.decoders, output, last=True)

    def _decoded(
        self, stream: StreamState, decoders: Sequence[DecoderState], output: EncoderOutput, last: bool
    ) -> tuple[RecognitionState, list[Update]]:
        updates, states = [], []
        with torch.inference_mode():
            log_probs_BFV = self.head.log_probs(output).cpu().numpy()
        for row, (decoder, length) in enumerate(zip(decoders, output.lengths_B.tolist(), strict=True)):
            decoder, ended = self.decoder.push(decoder, log_probs_BFV[row, :length])
            if last:
                ended += self.decoder.finish(decoder)
                decoder = self.decoder.start(decoder.first + len(decoder.frames))
            words = tuple(word for segment in ended for word in self.words(segment))
            text, stable = self._text(decoder.symbols), self._text(decoder.stable)
            shared = next((i for i, (a, b) in enumerate(zip(text, stable, strict=False)) if a != b), len(stable))
            seconds = stream.frames[row] / self.model.rate_hz
            updates.append(Update(words, text, text[:shared], seconds, bool(ended)))
            states.append(decoder)
        return RecognitionState(stream, tuple(states)), updates

    def words(self, segment: Segment) -> list[Word]:
        """Returns the words of a segment with times from the stream's start, by Viterbi alignment."""
        words = WordBuilder(self.model.rate_hz)
        aligned = align(segment.log_probs_FV, segment.symbols)
        for symbol, place in zip(segment.symbols, aligned, strict=True):
            words.add(self.symbols[symbol], place, segment.first)
        words.end_word()
        return words.words

    def _text(self, symbols: Prefix) -> str:
        return "".join(self.symbols[symbol] for symbol in symbols)


def join_recognitions(states: Sequence[RecognitionState]) -> RecognitionState:
    """Returns one state with the streams of all, in order."""
    stream = join([state.stream for state in states])
    return RecognitionState(stream, tuple(decoder for state in states for decoder in state.decoders))


def split_recognitions(state: RecognitionState) -> list[RecognitionState]:
    """Returns the state of each stream alone."""
    pairs = zip(split(state.stream), state.decoders, strict=True)
    return [RecognitionState(stream, (decoder,)) for stream, decoder in pairs]
