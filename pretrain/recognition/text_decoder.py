"""From a model's frames to words: a head's decoder, segments, rescoring at their ends, and word times.

State in, state out. Streams and whole recordings use it alike.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from data_pipeline.core.schema import ConfigError
from pretrain.heads.sequence import Sequence
from pretrain.inference import rescoring
from pretrain.interfaces.decoding import DecodedSegment, EndPoints, Prefix, StreamDecoderState
from pretrain.interfaces.frames import EncoderOutput
from pretrain.interfaces.models import Memory
from pretrain.interfaces.objectives import TextHead
from pretrain.recognition.config import DecodingConfig
from pretrain.recognition.transcript import Word, WordBuilder


class TextState(NamedTuple):
    """State of one stream.

    decoder: the current segment.  memory_FM: its frames for the attention decoder, of all memories side by side.
    """

    decoder: StreamDecoderState
    memory_FM: np.ndarray

    @property
    def bytes(self) -> int:
        """Size in bytes."""
        return self.decoder.bytes + self.memory_FM.nbytes


class TextDecoder:
    """Decodes the frames of a head, segment by segment; keeps no state.

    Args:
        head: with the names of its symbols; in evaluation mode.
        attention: attention decoder of the same tokens, for decoder=rescoring.
        rate_hz: encoder frames per second.
        decoding: decoder and beam.
        end_points: when segments end.

    Raises:
        ConfigError: decoder=rescoring without an attention decoder.
    """

    def __init__(
        self, head: TextHead, attention: Sequence | None, rate_hz: float, decoding: DecodingConfig,
        end_points: EndPoints,
    ) -> None:  # fmt: skip
        self.head, self.rate_hz, self.weight = head, rate_hz, decoding.ctc_weight
        self.attention = attention if decoding.decoder == "rescoring" else None
        if decoding.decoder == "rescoring" and attention is None:
            raise ConfigError(
                "decoder=rescoring: the run has no head `sequence` over the tokens of the head that recognises; take "
                "greedy or beam"
            )
        beam = 0 if decoding.decoder == "greedy" else decoding.beam
        self.decoder = head.streaming_decoder(rate_hz, beam, end_points)

    def start(self) -> TextState:
        """Returns the state before the first frame of a stream."""
        return TextState(self.decoder.start(), np.zeros((0, self._memory_width), np.float32))

    @torch.inference_mode()
    def read(self, encoded: EncoderOutput) -> np.ndarray:
        """Returns all that is read of the encoder's output, (B, F, X): the head's frames, and those of memories."""
        parts = [self.head.decoder_frames(encoded)]
        if self.attention is not None:
            parts += [memory.x_BMD for memory in self.attention.memories(encoded)]
        found: np.ndarray = torch.cat([part.float() for part in parts], dim=2).cpu().numpy()
        return found

    def push(self, state: TextState, frames_FX: np.ndarray) -> tuple[TextState, list[Word], bool]:
        """Decodes further frames.

        Args:
            state: from `start` or the previous push.
            frames_FX: (F, X), a row of `read`.

        Returns:
            The new state, the words of the segments that ended, and whether one did.
        """
        own = frames_FX.shape[1] - self._memory_width
        memory_FM = np.concatenate([state.memory_FM, frames_FX[:, own:]])
        decoder, ended = self.decoder.push(state.decoder, frames_FX[:, :own])
        begin = state.decoder.first
        words = [word for segment in ended for word in self._words(segment, memory_FM[segment.first - begin :])]
        return TextState(decoder, memory_FM[decoder.first - begin :]), words, bool(ended)

    def finish(self, state: TextState) -> tuple[TextState, list[Word], bool]:
        """Ends the current segment; returns the state after it, its words, and whether there was one."""
        ended = self.decoder.finish(state.decoder)
        words = [word for segment in ended for word in self._words(segment, state.memory_FM)]
        after = self.decoder.start(state.decoder.first + state.decoder.n_frames)
        return TextState(after, state.memory_FM[:0]), words, bool(ended)

    def text(self, symbols: Prefix) -> str:
        """Returns what symbols write."""
        return "".join(self.head.symbols[symbol] for symbol in symbols)

    @property
    def _memory_width(self) -> int:
        return sum(self.attention.memory_dims) if self.attention is not None else 0

    def _words(self, segment: DecodedSegment, memory_FM: np.ndarray) -> list[Word]:
        """Returns the words of a segment with times from the stream's start. memory_FM: from its first frame on."""
        symbols = segment.candidates[0].symbols
        if self.attention is not None:
            memories = self._memories(memory_FM[: segment.n_frames])
            vocabulary = len(self.head.symbols)
            symbols = rescoring.best(segment.candidates, self.attention.decoder, memories, vocabulary, self.weight)
        words = WordBuilder(self.rate_hz)
        for symbol, aligned in zip(symbols, segment.align(symbols), strict=True):
            words.add(self.head.symbols[symbol], aligned, segment.first)
        words.end_word()
        return words.words

    def _memories(self, memory_FM: np.ndarray) -> list[Memory]:
        assert self.attention is not None
        device = next(self.attention.parameters()).device
        length_1 = torch.tensor([len(memory_FM)], device=device)
        parts = np.split(memory_FM, np.cumsum(self.attention.memory_dims)[:-1], axis=1)
        return [Memory(torch.from_numpy(part_FD).to(device)[None], length_1) for part_FD in parts]
