"""Transcribes recordings one after another: finds them, shows progress, writes results and the list of rejects."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path, PurePosixPath

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from data_pipeline.audio.errors import AudioError
from data_pipeline.core.atomic_files import write_atomically
from data_pipeline.core.jsonl import append_row
from data_pipeline.core.schema import ConfigError
from data_pipeline.core.text import visible
from data_pipeline.loader.recordings import Recording, RecordingSource, Unusable, sources
from launch.cli.tables import warn
from launch.exit_codes import ExitCode
from launch.workflows import streaming_transcription
from launch.workflows.unit_transcription import UnitTranscriber
from pretrain.generation.unit_reader import open_reader, reads_units
from pretrain.inference.sampling import NoEndError
from pretrain.recognition.config import TranscribeConfig
from pretrain.recognition.recogniser import decoder, open_recogniser
from pretrain.recognition.transcript import ENDINGS, Transcript, format_transcript

REJECTS = "rejects.jsonl"
"""List of the recordings that could not be read, in the folder `out`."""
SUBTITLES = ("srt", "vtt")
Transcribe = Callable[[str, Iterable[np.ndarray]], Transcript]


def run(config: TranscribeConfig) -> ExitCode:
    """Transcribes all recordings of a config; unreadable recordings are listed and skipped.

    Returns:
        DONE, or FAILED if a recording was skipped.

    Raises:
        ConfigError: a file, the checkpoint or the head does not exist, or subtitles of several recordings have no
            folder.
        ValueError: the checkpoint or shards are damaged.
        OSError: a result cannot be written.
    """
    if config.stream:
        return streaming_transcription.run(config)
    found = sources(config.files, config.pcm_rate)
    total = sum(source.count for source in found)
    if total > 1 and config.format in SUBTITLES and not config.out:
        raise ConfigError(f"format={config.format}: subtitles of {total:,} recordings need a folder; set out=FOLDER")
    return _Transcription(config, _transcriber(config), total).perform(found)


def _transcriber(config: TranscribeConfig) -> Transcribe:
    """Returns what writes the text of a recording, given its name and its audio, block by block."""
    if reads_units(config.checkpoint, config.head):
        return UnitTranscriber(open_reader(config.checkpoint, config.head, config.device), config).transcribe
    recogniser = open_recogniser(config.checkpoint, config.head, config.device)
    decode = decoder(config, recogniser.head.symbols)
    return lambda name, blocks: recogniser.transcribe(name, blocks, config, decode)


class _Transcription:
    def __init__(self, config: TranscribeConfig, transcribe: Transcribe, total: int) -> None:
        self.config, self.transcribe, self.total = config, transcribe, total
        self.folder = Path(config.out).expanduser() if config.out else None
        self.rejects: Counter[str] = Counter()
        self.done, self.seconds = 0, 0.0
        self._used: set[str] = set()

    def perform(self, found: list[RecordingSource]) -> ExitCode:
        """Transcribes, then prints the totals to standard error."""
        if self.folder:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / REJECTS).unlink(missing_ok=True)
        started = time.monotonic()
        console = Console(stderr=True, markup=False, highlight=False)
        columns = (
            TextColumn("transcribing"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(),
        )  # fmt: skip
        with Progress(*columns, console=console, transient=True, disable=not sys.stderr.isatty()) as bar:
            task = bar.add_task("", total=self.total, speed="")
            for recording in (recording for source in found for recording in source.recordings()):
                self._one(recording)
                speed = self.seconds / (time.monotonic() - started)
                bar.update(task, advance=1, speed=f"{speed:.1f} × real time")
        self._report(time.monotonic() - started)
        return ExitCode.FAILED if self.rejects else ExitCode.DONE

    def _one(self, recording: Recording | Unusable) -> None:
        if isinstance(recording, Unusable):
            self._reject(recording)
            return
        try:
            made = self.transcribe(recording.name, recording.blocks())
        except AudioError as error:
            self._reject(Unusable(recording.name, error.reason, str(error)))
            return
        except NoEndError as error:
            self._reject(Unusable(recording.name, "no_end", str(error)))
            return
        self.done += 1
        self.seconds += made.seconds
        self._write(made)

    def _write(self, made: Transcript) -> None:
        content = format_transcript(made, self.config.format)
        if self.folder:
            target = self.folder / self._file_name(made.name)
            target.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(target, content)
            return
        if self.config.format == "text" and self.total > 1:
            content = f"{visible(made.name)}\t{content}"
        if self.config.format == "tsv" and self.total > 1:
            lines = content.splitlines(keepends=True)
            names = ["file", *[visible(made.name)] * (len(lines) - 1)]
            first = 0 if self.done == 1 else 1  # one header
            content = "".join(f"{name}\t{line}" for name, line in zip(names[first:], lines[first:], strict=True))
        print(content, end="", flush=True)

    def _file_name(self, name: str) -> str:
        """Returns the recording's name with the format's ending, below `out`; unique, also for a.wav and a.flac."""
        parts = [part for part in PurePosixPath(name).parts if part not in ("/", "..")]
        path = PurePosixPath(*parts or ["recording"])
        ending = ENDINGS[self.config.format]
        for candidate in _candidates(path, ending):
            if candidate not in self._used:
                self._used.add(candidate)
                return candidate
        raise AssertionError("the candidates do not end")

    def _reject(self, unusable: Unusable) -> None:
        self.rejects[unusable.reason] += 1
        warn(f"left out {unusable.name}: {unusable.error}")
        if self.folder:
            append_row(self.folder / REJECTS, asdict(unusable))

    def _report(self, seconds: float) -> None:
        speed = f"{self.seconds / seconds:.1f} × real time" if seconds else ""
        line = f"{self.done:,} of {self.total:,} recordings, {self.seconds / 60:.1f} minutes of audio, {speed}"
        if self.rejects:
            reasons = ", ".join(f"{reason}: {count:,}" for reason, count in self.rejects.most_common())
            listed = f"; listed in {self.folder / REJECTS}" if self.folder else ""
            line += f"; left out {self.rejects.total():,} ({reasons}){listed}"
        warn(line)


def _candidates(path: PurePosixPath, ending: str) -> Iterator[str]:
    stem = path.with_suffix("") if path.suffix.lower()[1:].isalnum() else path
    yield f"{stem}.{ending}"
    yield f"{path}.{ending}"
    number = 2
    while True:
        yield f"{path}.{number}.{ending}"
        number += 1
