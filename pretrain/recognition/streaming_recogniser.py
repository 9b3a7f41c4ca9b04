"""Recognises streams: returns partial text for audio in parts of any size, and words with times when a segment ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from pretrain.inference.streaming_encoder import MAX_MINUTES, StreamedModel
from pretrain.inference.streaming_state import StreamState, join, split
from pretrain.interfaces.decoding import EndPoints
from pretrain.interfaces.frames import EncoderOutput
from pretrain.recognition.config import DecodingConfig
from pretrain.recognition.recogniser import Recogniser
from pretrain.recognition.text_decoder import TextState
from pretrain.recognition.transcript import Word


class RecognitionState(NamedTuple):
    """State of B streams of recognition: the model's, and each stream's decoder."""

    stream: StreamState
    texts: tuple[TextState, ...]

    @property
    def bytes(self) -> int:
        """Size of all numbers in bytes."""
        return self.stream.bytes + sum(text.bytes for text in self.texts)


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
        self.model = StreamedModel(recogniser.model, chunk, left_chunks, max_minutes)
        self.decoder = recogniser.text_decoder(decoding or DecodingConfig(), end_points or EndPoints())

    @property
    def chunk_samples(self) -> int:
        """Samples by which a stream advances with each chunk."""
        return self.model.window.hop * self.model.chunking.chunk

    def start(self, rows: int = 1) -> RecognitionState:
        """Returns the state of `rows` streams before their first sample."""
        return RecognitionState(self.model.start(rows), tuple(self.decoder.start() for _ in range(rows)))

    def push(self, state: RecognitionState, samples: Sequence[Tensor]) -> tuple[RecognitionState, list[Update]]:
        """Appends 16 kHz audio in [-1, 1] to each stream, (T_b,); returns the new state and an update per stream."""
        stream, output = self.model.push(state.stream, samples)
        return self._decoded(stream, state.texts, output, last=False)

    def finish(self, state: RecognitionState) -> tuple[RecognitionState, list[Update]]:
        """Ends the streams; the updates have their last words."""
        stream, output = self.model.finish(state.stream)
        return self._decoded(stream, state.texts, output, last=True)

    def break_off(self, state: RecognitionState) -> list[Update]:
        """Returns the last words of streams that cannot go on, from the frames that were computed."""
        updates = []
        for frames, text in zip(state.stream.frames, state.texts, strict=True):
            _, words, ended = self.decoder.finish(text)
            updates.append(Update(tuple(words), "", "", frames / self.model.rate_hz, ended))
        return updates

    def _decoded(
        self, stream: StreamState, texts: Sequence[TextState], output: EncoderOutput, last: bool
    ) -> tuple[RecognitionState, list[Update]]:
        updates, states, frames_BFX = [], [], self.decoder.read(output)
        for row, (state, length) in enumerate(zip(texts, output.lengths_B.tolist(), strict=True)):
            state, words, ended = self.decoder.push(state, frames_BFX[row, :length])
            if last:
                state, further, end = self.decoder.finish(state)
                words, ended = [*words, *further], ended or end
            text, stable = self.decoder.text(state.decoder.symbols), self.decoder.text(state.decoder.stable)
            shared = next((i for i, (a, b) in enumerate(zip(text, stable, strict=False)) if a != b), len(stable))
            seconds = stream.frames[row] / self.model.rate_hz
            updates.append(Update(tuple(words), text, text[:shared], seconds, ended))
            states.append(state)
        return RecognitionState(stream, tuple(states)), updates


def join_recognitions(states: Sequence[RecognitionState]) -> RecognitionState:
    """Returns one state with the streams of all, in order."""
    stream = join([state.stream for state in states])
    return RecognitionState(stream, tuple(text for state in states for text in state.texts))


def split_recognitions(state: RecognitionState) -> list[RecognitionState]:
    """Returns the state of each stream alone."""
    pairs = zip(split(state.stream), state.texts, strict=True)
    return [RecognitionState(stream, (text,)) for stream, text in pairs]
