"""Processes one unit of work, from recordings to a shard. Independent of Ray: the same unit gives the same bytes."""

from __future__ import annotations

import dataclasses
import json
import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np

from data_pipeline.audio import codecs, vad
from data_pipeline.audio.quality import measure_quality, normalised, reject_reason
from data_pipeline.audio.segmentation import cut, marked
from data_pipeline.audio.time_ranges import decode_part, decode_range
from data_pipeline.core.retries import StorageReadError
from data_pipeline.core.rng import keyed_seed
from data_pipeline.core.storage import FileStore, is_url
from data_pipeline.core.types import SAMPLE_RATE, AudioFile, Segment, Span
from data_pipeline.corpora.records import Reject, printable, reject_file, stat
from data_pipeline.images import decoding
from data_pipeline.preprocess.config import PreprocessConfig
from data_pipeline.preprocess.plan_file import PlannedUnit, PlanTable, WorkUnit
from data_pipeline.preprocess.work_plan import set_root
from data_pipeline.shards.records import DoneRecord
from data_pipeline.shards.writer import ShardWriter, commit

TIMED_LABELS: Final = ("phones", "phone", "words", "word", "start_s", "end_s")
"""Labels that are valid for a whole utterance only, not for a part of it."""
TRIM_TOLERANCE: Final = SAMPLE_RATE // 50
"""20 ms in samples: a span that the recording's end shortens by more loses its text."""
FlowKey = tuple[str, str, str, str]
"""(corpus, language, stage, reason), see `Tally`."""


@dataclass
class Tally:
    """Counts and audio samples by (corpus, language, stage, reason), and the list of rejects.

    The stage `in` counts recordings read (reason `overlap`: samples that are in several segments), `out` segments
    written, `recording` the outcome of each recording (`used`, or stage and reason of its rejection), `text` texts that
    were dropped; every other stage counts rejects. Samples of `in` are the sum of those of all other stages.
    """

    counts: Counter[FlowKey] = field(default_factory=Counter)
    samples: Counter[FlowKey] = field(default_factory=Counter)
    rejects: list[Reject] = field(default_factory=list)

    def add(self, key: FlowKey, samples: int) -> None:
        """Counts one more recording or segment."""
        self.counts[key] += 1
        self.samples[key] += samples

    def reject(self, reject: Reject) -> None:
        """Counts and lists one rejected recording or segment."""
        self.rejects.append(reject)
        self.add((reject.corpus, reject.language, reject.stage, reject.reason), reject.samples)

    def merge(self, other: Tally) -> None:
        """Adds another tally."""
        self.counts.update(other.counts)
        self.samples.update(other.samples)
        self.rejects += other.rejects

    def flow(self) -> tuple[tuple[str, str, str, str, int, int], ...]:
        """Returns sorted rows for the record."""
        return tuple((*key, self.counts[key], self.samples[key]) for key in sorted(self.counts))


@dataclass(frozen=True)
class UnitResult:
    """The result of a unit, returned to the driver."""

    record: DoneRecord
    seconds: float
    """Duration of the unit's processing."""


def process_planned(planned: PlannedUnit, config: PreprocessConfig) -> UnitResult:
    """Processes a unit of the plan of `config.out`, from which it reads its recordings; see `process_unit`."""
    return process_unit(PlanTable(FileStore(config.out), planned.table).unit(planned), config)


def process_unit(unit: WorkUnit, config: PreprocessConfig) -> UnitResult:
    """Writes and commits a unit's shard, if it is not finished.

    Args:
        unit: the unit's recordings.
        config: the job.

    Returns:
        The record of the unit: this process's, or that of another process that was faster.

    Raises:
        OSError: the output, or a copy of an input, cannot be written. Unreadable inputs are listed instead.
    """
    began = time.monotonic()
    store = FileStore(set_root(config, unit))
    done = f"_done/{unit.name}.json"
    if store.exists(done):
        return UnitResult(DoneRecord.from_json(store.read(done), done), 0.0)
    tally = Tally()
    with store.scratch(f"{unit.name}+") as folder:
        writer = ShardWriter(folder)
        try:
            for file in unit.files:
                tally.merge(_process_file(file, config, writer))
            blank = DoneRecord(unit=unit.name, shard="", sha256="", bytes=0, index_sha256="", segments=0, samples=0)
            reasons = Counter(f"{reject.stage}/{reject.reason}" for reject in tally.rejects)
            record = dataclasses.replace(
                blank, files=len(unit.files), rejects=dict(sorted(reasons.items())), flow=tally.flow()
            )
            record = commit(store, writer, record, rejects_jsonl(tally.rejects))
        finally:
            writer.close()
    return UnitResult(record, time.monotonic() - began)


def rejects_jsonl(rejects: Iterable[Reject]) -> bytes:
    """Returns one JSON object per line."""
    return b"".join(json.dumps(dataclasses.asdict(reject), sort_keys=True).encode() + b"\n" for reject in rejects)


def segment_key(file: AudioFile, start: int, channel: int | None = None, repeat: int = 0) -> str:
    """Returns a segment's key, which is readable, unique in the data set, ASCII, and without dots.

    It consists of the file's name, a hash of its id, the start in samples, the channel if the corpus names one, and a
    number from the second segment with the same start on. Segments of a part have the keys of the whole recording.
    """
    stem = file.source_id.rsplit("/", 1)[-1].rsplit(".", 1)[0]
    readable = re.sub(r"[^A-Za-z0-9_]+", "-", stem).strip("-")[:40] or "audio"
    more = f"-c{channel}" * (channel is not None) + f"-{repeat + 1}" * bool(repeat)
    return f"{readable}-{keyed_seed(file.corpus, file.source_id):016x}-{start:010d}{more}"


def _process_file(file: AudioFile, config: PreprocessConfig, writer: ShardWriter) -> Tally:
    """Writes the segments of one recording, or none if it cannot be read to its end."""
    mark, recording = writer.mark(), _Recording(file, config, writer)
    try:
        with codecs.local_copy(file.path) as path:
            if is_url(file.path) and file.size and Path(path).stat().st_size != file.size:
                got = Path(path).stat().st_size
                raise codecs.AudioError("read_error", f"the server gave {got:,} of {file.size:,} bytes")
            recording.read(path)
        _check_unchanged(file)
        return recording.finished()
    except codecs.AudioError as error:
        writer.rollback(mark)
        return recording.failed(error)


@dataclass(frozen=True)
class _Piece:
    """A segment that is written if it passes the filters."""

    known: AudioFile
    """The recording, with the speaker, text and labels of this piece."""
    start: int
    wave: codecs.Wave
    channel: int | None = None
    source: str = ""
    """Local path of the recording, if the piece is all of it."""


class _Recording:
    """The segments of one recording, and its rejects."""

    def __init__(self, file: AudioFile, config: PreprocessConfig, writer: ShardWriter) -> None:
        self.file, self.config, self.writer = file, config, writer
        self.tally = Tally()
        self.length = 0
        """Samples that were read of the recording, or of the part of one."""
        begin, end = file.part or (0, None)
        self._begin, self._own = begin * SAMPLE_RATE, 1 << 62 if end is None else (end - begin) * SAMPLE_RATE
        self._longest = round(config.cut.max_seconds * SAMPLE_RATE)
        # words, phones and image of a recording do not apply to a single piece of it
        self._wordless = dataclasses.replace(file, text="", image="", labels=_without_words(file.labels))
        self._taken: list[tuple[int, int]] = []
        self._starts: Counter[tuple[int, int | None]] = Counter()
        self._kept = 0

    def read(self, path: str) -> None:
        """Decodes the recording once for each channel in use. Raises AudioError."""
        if self.file.spans:
            pieces = self._marked(path)
        elif self.config.vad.enabled:
            found = vad.speech(self._decoded(path), self._longest, self.config.vad, self._lead(path))
            pieces = (_Piece(self._wordless, self._begin + start, wave) for start, wave in found)
        else:
            found_whole = cut(self._decoded(path), self._longest)
            pieces = (
                _Piece(self.file, start, wave, source=path)
                if whole and self.file.part is None
                else _Piece(self._wordless, self._begin + start, wave)
                for start, wave, whole in found_whole
            )
        for piece in pieces:
            self._taken.append((piece.start, piece.start + len(piece.wave)))
            self._write(piece)

    def finished(self) -> Tally:
        """Returns the tally of a recording that was read to its end."""
        # the spans of a part may end behind it, in audio that the next part counts
        union = _union(self._taken, self._begin, self._begin + self.length)
        gap, overlap = self.length - union, sum(stop - start for start, stop in self._taken) - union
        if gap and not self._taken and not self.file.spans:
            self.tally.reject(reject_file(self.file, "vad", "no_speech", samples=gap))
        elif gap:
            self._count("cut" if self.file.spans else "vad", "not_marked" if self.file.spans else "pause", gap)
        if overlap:
            self._count("in", "overlap", overlap)
        return self._with_outcome()

    def failed(self, error: codecs.AudioError) -> Tally:
        """Returns the tally of a recording that cannot be used."""
        self.tally, self._kept = Tally(), 0
        self.tally.reject(reject_file(self.file, "decode", error.reason, str(error), samples=self.length))
        return self._with_outcome()

    def _with_outcome(self) -> Tally:
        self._count("in", "", self.length)
        if self._kept:
            self._count("recording", "used", 0)
            return self.tally
        if not self.tally.rejects:
            self.tally.reject(reject_file(self.file, "decode", "no_samples", "holds no samples"))
        # without a segment, the recording is represented by its reject with the most samples
        rejects = self.tally.rejects
        number = max(range(len(rejects)), key=lambda number: rejects[number].samples)
        rejects[number] = dataclasses.replace(rejects[number], recording=True)
        self._count("recording", f"{rejects[number].stage}/{rejects[number].reason}", 0)
        return self.tally

    def _count(self, stage: str, reason: str, samples: int) -> None:
        self.tally.add((self.file.corpus, self.file.language, stage, reason), samples)

    def _decoded(self, path: str, channel: int | None = None) -> Iterator[codecs.Wave]:
        """Yields the recording, or its part and what spans that begin in it need beyond its end."""
        part, length = self.file.part, 0
        if part and part[1] is not None and self.file.spans:
            stops = [span.stop for span in self.file.spans if span.stop is not None]
            last = max([*stops, part[1] * SAMPLE_RATE])
            part = part[0], None if len(stops) < len(self.file.spans) else -(-last // SAMPLE_RATE)
        for block in decode_part(path, part, channel):
            length += len(block)
            self.length = max(self.length, min(length, self._own))
            yield block

    def _lead(self, path: str) -> codecs.Wave | None:
        """Returns the audio before a part, which voice activity detection hears first; None at the very start."""
        if not self._begin:
            return None
        return np.concatenate(list(decode_range(path, self._begin - vad.LEAD, self._begin)))

    def _marked(self, path: str) -> Iterator[_Piece]:
        """Yields the parts that the corpus marks, channel by channel."""
        for channel in sorted(
            {span.channel for span in self.file.spans}, key=lambda number: (number is not None, number)
        ):
            spans = [span for span in self.file.spans if span.channel == channel]
            missing = dict.fromkeys(range(len(spans)))
            numbers = {id(span): number for number, span in enumerate(spans)}
            reason = "beyond_end"
            try:
                for span, start, wave, whole in marked(self._decoded(path, channel), spans, self._longest, self._begin):
                    missing.pop(numbers[id(span)], None)
                    yield _Piece(self._known(span, len(wave), whole), start, wave, channel)
                error = f"the recording ends at {(self._begin + self.length) / SAMPLE_RATE:.2f} s"
            except codecs.AudioError as found:
                if found.reason != "no_channel":
                    raise
                reason, error = found.reason, str(found)
            for span in (spans[number] for number in missing):
                where = f"row {span.row}: " * bool(span.row) + f"begins at {span.start / SAMPLE_RATE:.2f} s; {error}"
                self.tally.reject(reject_file(self.file, "cut", reason, where, start=span.start, row=span.row))

    def _known(self, span: Span, length: int, whole: bool) -> AudioFile:
        """Returns the metadata of a piece of a span; the text is included only if the piece is the whole span."""
        trimmed = whole and span.stop is not None and span.stop - span.start - length > TRIM_TOLERANCE
        if trimmed and span.text:
            self._count("text", "trimmed", 0)
        whole &= not trimmed
        labels = {**self._wordless.labels, **span.labels}
        return dataclasses.replace(
            self.file,
            speaker=span.speaker or self.file.speaker,
            language=span.language or self.file.language,
            split=span.split or self.file.split,
            text=span.text if whole else "",
            labels=labels if whole else _without_words(labels),
            image=span.image if whole else "",
        )

    def _write(self, piece: _Piece) -> None:
        """Adds a segment to the shard, or rejects it. Raises OSError if the shard cannot be written."""
        file, start, wave, config = piece.known, piece.start, piece.wave, self.config
        if len(wave) < config.cut.min_seconds * SAMPLE_RATE:
            self.tally.reject(reject_file(file, "cut", "too_short", start=start, samples=len(wave)))
            return
        measures = measure_quality(wave, SAMPLE_RATE)
        if reason := reject_reason(measures, config.filters):
            self.tally.reject(reject_file(file, "filter", reason, start=start, samples=len(wave)))
            return
        repeat = self._starts[start, piece.channel]
        self._starts[start, piece.channel] += 1
        segment = Segment(
            key=segment_key(file, start, piece.channel, repeat),
            file_id=file.source_id,
            start=start,
            length=len(wave),
            sample_rate=SAMPLE_RATE,
            corpus=file.corpus,
            speaker=file.speaker,
            language=file.language,
            text=file.text,
            labels={**file.labels, "split": file.split},
        )
        extra: dict[str, float] = {"level_dbfs": measures.level_dbfs, "snr_db": measures.snr_db}
        if piece.channel is not None:
            extra["channel"] = piece.channel
        if config.loudness_dbfs is not None:
            wave, extra["gain_db"] = normalised(wave, measures, config.loudness_dbfs)
        weight = config.weights.get(file.corpus, 1.0) * config.weights.get(file.language, 1.0)
        if weight != 1.0:
            extra["weight"] = weight
        audio = self._encoded(wave, piece.source)
        self.writer.add(segment, config.codec, audio, len(wave), self._image(file, start), **extra)
        self.tally.add((file.corpus, file.language, "out", ""), len(wave))
        self._kept += 1

    def _image(self, file: AudioFile, start: int) -> bytes:
        """Returns the image of a segment as PNG; b"" without one, or for one that cannot be used, which is listed."""
        if not file.image:
            return b""
        try:
            return decoding.stored(decoding.decode(decoding.read_image(file.image)), self.config.image_side)
        except decoding.ImageError as error:
            where = f"image {printable(file.image)}: {error}"
            self.tally.reject(reject_file(file, "image", error.reason, where, start=start))
            return b""

    def _encoded(self, wave: codecs.Wave, source: str) -> bytes:
        """Returns the segment's encoded audio. `source`: path of the recording, if the segment is all of it."""
        samples = codecs.to_int16(wave)
        if source and self.config.copy_flac and self.config.codec == "flac":
            try:
                stored = codecs.stored_flac(source, samples, SAMPLE_RATE)
            except OSError as error:  # the recording, not the shard, cannot be read
                raise codecs.AudioError("read_error", f"cannot be read: {error.strerror or error}") from None
            if stored:
                return stored
        return codecs.encode(samples, SAMPLE_RATE, self.config.codec)


def _without_words(labels: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in labels.items() if name not in TIMED_LABELS}


def _union(stretches: Iterable[tuple[int, int]], begin: int, end: int) -> int:
    """Returns the number of samples between begin and end in the union of the intervals."""
    total, at = 0, begin
    for start, stop in sorted(stretches):
        total += max(0, min(stop, end) - max(start, at))
        at = max(at, stop)
    return total


def _check_unchanged(file: AudioFile) -> None:
    try:
        now = stat(file.path)
    except FileNotFoundError:
        raise codecs.AudioError("vanished", "was removed while it was read") from None
    except StorageReadError as error:
        raise codecs.AudioError("read_error", error.reason) from None
    if now != (file.size, file.mtime):
        raise codecs.AudioError("changed", "has changed since the work was planned")
