"""Transcribes recordings by a head `units` that writes texts: recording to units to text."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from data_pipeline.core.schema import ConfigError
from data_pipeline.core.types import SAMPLE_RATE
from pretrain.generation.unit_reader import UnitReader
from pretrain.inference.windows import cut_at_quiet
from pretrain.interfaces.decoding import AlignedSymbol
from pretrain.recognition.config import TranscribeConfig
from pretrain.recognition.recogniser import QUIET_SECONDS
from pretrain.recognition.transcript import DecodedPart, Transcript, WordBuilder


@dataclass(frozen=True)
class UnitTranscriber:
    """Writes texts of recordings, piece by piece.

    Args:
        reader: a trained head.
        config: windows; of the decoders, greedy alone.

    Raises:
        ConfigError: another decoder.
    """

    reader: UnitReader
    config: TranscribeConfig

    def __post_init__(self) -> None:
        if self.config.decoder != "greedy":
            raise ConfigError(
                f"decoder={self.config.decoder}: the head units writes the most probable letters; take greedy"
            )

    def transcribe(self, name: str, blocks: Iterable[np.ndarray]) -> Transcript:
        """Returns the text of a recording. The letters of a piece share its time and confidence equally.

        Args:
            name: of the recording.
            blocks: (T,) audio at 16 kHz, block by block.

        Raises:
            ConfigError: a piece has more units than the head was trained with.
            NoEndError: the end of a piece's text was not written.
        """
        config = self.config
        words, parts, offset = WordBuilder(SAMPLE_RATE), list[DecodedPart](), 0
        longest, searched, quiet = (
            round(seconds * SAMPLE_RATE) for seconds in (config.window_seconds, config.overlap_seconds, QUIET_SECONDS)
        )
        for piece_T in cut_at_quiet(blocks, longest, searched, quiet):
            (symbols, log_prob), length = self.reader.read(piece_T), len(piece_T)
            for number, symbol in enumerate(symbols):
                begin, end = (place * length // len(symbols) for place in (number, number + 1))
                place = AlignedSymbol(begin, end, log_prob)
                words.add(symbol, place, offset)
            words.end_word()
            parts.append(DecodedPart(offset / SAMPLE_RATE, (offset + length) / SAMPLE_RATE, "units"))
            offset += length
        return Transcript(name, offset / SAMPLE_RATE, tuple(words.words), tuple(parts))
