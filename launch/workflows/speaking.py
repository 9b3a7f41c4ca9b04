"""Speaks a text into a file or to standard output, or each line of a text file into a file of a folder."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import soundfile

from data_pipeline.audio.errors import AudioError
from data_pipeline.audio.pcm import to_pcm16
from data_pipeline.core.atomic_files import write_synced
from data_pipeline.core.jsonl import append_row
from data_pipeline.core.schema import ConfigError
from data_pipeline.core.types import SAMPLE_RATE
from data_pipeline.loader.recordings import Unusable, sources
from launch.cli.tables import warn
from launch.exit_codes import ExitCode
from pretrain.generation.config import STDOUT, SpeakConfig
from pretrain.generation.text import TextError, sentences
from pretrain.generation.voice import Speaker, UnitVoice, open_speaker
from pretrain.inference.sampling import NoEndError, Sampling
from pretrain.models.synthesis.synthesizer import Controls, Drawing

REJECTS = "rejects.jsonl"
"""List of the lines that could not be spoken, in the folder `out`."""
FORMATS = {".wav": "WAV", ".flac": "FLAC", ".ogg": "OGG"}
LONGEST_FILE = 50_000_000
"""Bytes of a text file."""


def run(config: SpeakConfig) -> ExitCode:
    """Speaks all texts of a config.

    Returns:
        DONE, or FAILED if a line of the file was left out.

    Raises:
        ConfigError: text, file, output, checkpoint, head or prompt cannot be used; nothing was written.
        ValueError: the checkpoint is damaged.
        OSError: a result cannot be written.
    """
    lines = _lines(config.file) if config.file else []
    if config.out != STDOUT and not config.file:
        _format(Path(config.out))
    prompt = _prompt(config.voice) if config.voice else None
    voice = open_speaker(config.checkpoint, config.head, config.device)
    if isinstance(voice, UnitVoice):
        voice = replace(voice, sampling=Sampling(config.temperature, config.top_p, config.seed))
        if config.style:
            raise ConfigError(f"style={config.style!r}: the head units takes none; give a recording as voice=")
    else:
        voice = voice.styled(config.style) if config.style else voice
        voice = replace(voice, drawing=Drawing(config.steps, config.temperature, config.seed))
    if config.pitch and not voice.has_pitch:
        raise ConfigError(f"pitch={config.pitch:g}: the head was trained without pitch; leave it out")
    if prompt is not None:
        voice = replace(voice, prompt=voice.encode(prompt))
    speaking = _Speaking(config, voice)
    return speaking.lines(lines) if config.file else speaking.text(config.text)


class _Speaking:
    def __init__(self, config: SpeakConfig, voice: Speaker) -> None:
        self.config, self.voice = config, voice
        self.controls = Controls(config.speed, config.pitch, config.energy)
        self.samples, self.started = 0, time.monotonic()

    def text(self, text: str) -> ExitCode:
        """Speaks one text into a file, or to standard output."""
        found = sentences(text, self.voice.tokenizer, self.config.language, self.config.max_words)
        try:
            if self.config.out == STDOUT:
                with contextlib.suppress(BrokenPipeError):  # the reader of the pipe has closed it
                    for part_T in self._parts(found):
                        sys.stdout.buffer.write(to_pcm16(part_T))
                        sys.stdout.buffer.flush()
            else:
                self._write(Path(self.config.out).expanduser(), np.concatenate(list(self._parts(found))))
        except NoEndError as error:
            warn(str(error))
            return ExitCode.FAILED
        self._report(1, 0)
        return ExitCode.DONE

    def lines(self, lines: list[str]) -> ExitCode:
        """Speaks each line into a file of the folder `out`; lines that cannot be spoken are listed there."""
        folder = Path(self.config.out).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / REJECTS).unlink(missing_ok=True)
        done = rejected = 0
        digits = max(4, len(str(len(lines))))
        for number, line in enumerate(lines, start=1):
            try:
                found = sentences(line, self.voice.tokenizer, self.config.language, self.config.max_words)
                wave_T = np.concatenate(list(self._parts(found)))
            except (TextError, NoEndError) as error:
                warn(f"left out line {number}: {error}")
                append_row(folder / REJECTS, {"line": number, "text": line, "error": str(error)})
                rejected += 1
                continue
            self._write(folder / f"{number:0{digits}}.wav", wave_T)
            done += 1
        self._report(done, rejected)
        return ExitCode.FAILED if rejected else ExitCode.DONE

    def _parts(self, found: list[list[int]]) -> Iterator[np.ndarray]:
        """Yields the audio of each sentence, with a pause before all but the first."""
        for number, ids in enumerate(found):
            wave_T = self.voice.speak(ids, self.controls, self.config.vocoder)
            pause_T = np.zeros(round(self.config.pause * SAMPLE_RATE) if number else 0, np.float32)
            self.samples += len(pause_T) + len(wave_T)
            yield np.concatenate([pause_T, wave_T])

    def _write(self, target: Path, wave_T: np.ndarray) -> None:
        """Writes a sound file under another name first, so that there is never half a file."""
        target.parent.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        soundfile.write(buffer, wave_T, SAMPLE_RATE, format=_format(target))
        temporary = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            write_synced(temporary, buffer.getvalue())
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)

    def _report(self, done: int, rejected: int) -> None:
        seconds, spoken = time.monotonic() - self.started, self.samples / SAMPLE_RATE
        left_out = f"; left out {rejected:,} lines, listed in {Path(self.config.out) / REJECTS}" if rejected else ""
        speed = f", {spoken / seconds:.1f} × real time" if seconds > 0 else ""
        warn(f"{done:,} texts, {spoken:.1f} s of speech{speed}{left_out}")


def _format(target: Path) -> str:
    if target.suffix.lower() not in FORMATS:
        raise ConfigError(f"out={target}: must end in {', '.join(FORMATS)}, or be - for standard output")
    return FORMATS[target.suffix.lower()]


def _lines(file: str) -> list[str]:
    path = Path(file).expanduser()
    try:
        if path.stat().st_size > LONGEST_FILE:
            raise ConfigError(f"file={file}: has more than {LONGEST_FILE:,} bytes; split it")
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"file={file}: cannot be read as text in UTF-8 ({error})") from None
    if not any(line.strip() for line in lines):
        raise ConfigError(f"file={file}: has no line with text")
    return lines


def _prompt(place: str) -> np.ndarray:
    """Returns the first recording of `voice`, (T,) at 16 kHz. Raises ConfigError."""
    try:
        found = next(iter(sources([place])[0].recordings()))
        if isinstance(found, Unusable):
            raise ConfigError(f"voice={place}: {found.error}")
        return np.concatenate(list(found.blocks()) or [np.zeros(0, np.float32)])
    except AudioError as error:
        raise ConfigError(f"voice={place}: {error}") from None
    except ConfigError as error:
        raise ConfigError(str(error).replace("files=", "voice=", 1)) from None
