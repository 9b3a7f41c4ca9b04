"""Transcribes audio while it arrives: standard input, or recordings as if they arrived."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator

import torch

from data_pipeline.audio.codecs import Wave
from data_pipeline.audio.errors import AudioError
from data_pipeline.core.schema import ConfigError
from data_pipeline.core.text import table_cell, visible
from data_pipeline.core.types import SAMPLE_RATE
from data_pipeline.loader.recordings import Recording, Unusable, live_pcm, sources
from launch.cli.tables import warn
from launch.exit_codes import ExitCode
from pretrain.recognition.config import TranscribeConfig
from pretrain.recognition.recogniser import open_recogniser
from pretrain.recognition.streaming_recogniser import StreamingRecogniser, Update
from pretrain.recognition.transcript import Word, word_values


def run(config: TranscribeConfig) -> ExitCode:
    """Transcribes each recording as a stream; one that cannot be read, or gets too long, is named.

    Returns:
        DONE, or FAILED where a recording was left out or ended early.

    Raises:
        ConfigError: a file, the checkpoint or the head does not exist, or the model cannot stream with these settings.
        ValueError: the checkpoint or shards are damaged.
    """
    found = sources(config.files, config.pcm_rate)
    recogniser = StreamingRecogniser(
        open_recogniser(config.checkpoint, config.head, config.device),
        config,
        config.chunk,
        config.left,
        max_minutes=config.max_minutes,
    )
    chunk, left = recogniser.model.chunking
    delay_ms = 1_000 * recogniser.model.delay_seconds
    warn(f"chunk={chunk} left={left}: text {delay_ms:.0f} ms after the beginning of its chunk, plus computing")
    printer, failed = _Printer(config, several=sum(source.count for source in found) > 1), False
    for recording in (recording for source in found for recording in source.recordings()):
        try:
            if isinstance(recording, Unusable):
                raise AudioError(recording.reason, recording.error)
            failed |= not _transcribe(recogniser, recording.name, _blocks(recording, config), printer)
        except AudioError as error:
            warn(f"left out {recording.name}: {error}")
            failed = True
    return ExitCode.FAILED if failed else ExitCode.DONE


def _blocks(recording: Recording, config: TranscribeConfig) -> Iterator[Wave]:
    if recording.is_stdin:
        return live_pcm(sys.stdin.buffer, config.pcm_rate)
    return recording.blocks()


def _transcribe(recogniser: StreamingRecogniser, name: str, blocks: Iterator[Wave], printer: _Printer) -> bool:
    """Streams one recording; what was heard until Ctrl-C or `max_minutes` is written before that ends it.

    Returns:
        Whether the whole recording was streamed.
    """
    state, seconds, busy, problem = recogniser.start(), 0.0, 0.0, ""
    printer.begin(name)
    try:
        for part in _parts(blocks, recogniser.chunk_samples):
            started = time.monotonic()
            state, [update] = recogniser.push(state, [torch.from_numpy(part)])
            busy, seconds = busy + time.monotonic() - started, seconds + len(part) / SAMPLE_RATE
            printer.show(update)
    except KeyboardInterrupt:  # the usual end of a microphone's stream
        printer.show(recogniser.finish(state)[1][0])
        raise
    except ConfigError as error:
        problem = str(error)
    [update] = recogniser.break_off(state) if problem else recogniser.finish(state)[1]
    printer.show(update)
    if problem:
        warn(f"{visible(name)}: ended after {seconds:.1f} s: {problem}")
    elif seconds:
        warn(f"{visible(name)}: {seconds:.1f} s of audio, {busy / seconds:.3f} s of computing per second")
    return not problem


def _parts(blocks: Iterator[Wave], most: int) -> Iterator[Wave]:
    """Yields blocks in parts of at most `most` samples."""
    for block in blocks:
        for first in range(0, len(block), most):
            yield block[first : first + most]


class _Printer:
    """Prints updates: the words of segments that ended to standard output, partial text as the format has it.

    several: of several recordings, each line of text and tsv begins with the recording's name.
    """

    def __init__(self, config: TranscribeConfig, several: bool) -> None:
        self.config, self.several, self.name, self.last = config, several, "", ""
        if config.format == "tsv":
            self._line(("file\t" if several else "") + "start\tend\tword\tconfidence")

    def begin(self, name: str) -> None:
        """Begins a recording."""
        self.name, self.last = name, ""

    def show(self, update: Update) -> None:
        """Prints the result of a push."""
        if update.words:
            self._words(update.words)
        if self.config.partial and update.text != self.last:
            self.last = update.text
            if self.config.format == "json":
                seconds = round(update.seconds, 3)
                values = {"type": "partial", "text": update.text, "stable": update.stable, "seconds": seconds}
                self._line(json.dumps({"file": self.name} | values, ensure_ascii=False))
            elif sys.stderr.isatty():
                print(f"\r\x1b[K{visible(update.text)[-100:]}", end="", file=sys.stderr, flush=True)
            else:
                print(f"… {visible(update.text)}", file=sys.stderr, flush=True)

    def _words(self, words: tuple[Word, ...]) -> None:
        if self.config.partial and self.config.format != "json" and sys.stderr.isatty():
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
        text = " ".join(word.text for word in words)
        name = f"{visible(self.name)}\t" if self.several else ""
        if self.config.format == "text":
            self._line(name + visible(text))
        elif self.config.format == "tsv":
            for word in words:
                cells = f"{word.start:.3f}\t{word.end:.3f}\t{table_cell(word.text)}\t{word.confidence:.4f}"
                self._line(name + cells)
        else:
            listed = [word_values(word) for word in words]
            values = {"type": "final", "start": listed[0]["start"], "end": listed[-1]["end"], "text": text}
            self._line(json.dumps({"file": self.name} | values | {"words": listed}, ensure_ascii=False))

    def _line(self, text: str) -> None:
        print(text, flush=True)
