"""One unit of work: recordings in, one shard out. Pure of Ray: the same unit gives the same bytes wherever it runs."""

from __future__ import annotations

import dataclasses
import json
import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from data_pipeline.audio import codecs, vad
from data_pipeline.audio.quality import measure, normalised, verdict
from data_pipeline.audio.segmentation import cut, marked
from data_pipeline.core.rng import keyed_seed
from data_pipeline.core.storage import FileStore, is_url
from data_pipeline.core.types import SAMPLE_RATE, AudioFile, Segment
from data_pipeline.corpora.records import Reject, printable, stat
from data_pipeline.preprocess.config import PreprocessConfig
from data_pipeline.preprocess.work_plan import Unit, set_root
from data_pipeline.shards.records import DoneRecord
from data_pipeline.shards.writer import ShardWriter, commit

TIMED_LABELS: Final = ("phones", "phone", "words", "word", "start_s", "end_s")
"""Labels that describe a whole utterance and say nothing of a part of it."""
FlowKey = tuple[str, str, str, str]
"""(corpus, language, stage, reason); the stages "in" and "out" have no reason."""


@dataclass
class Tally:
    """What became of a unit's files: counts and audio samples by flow key, and the list of what was left out."""

    counts: Counter[FlowKey] = field(default_factory=Counter)
    samples: Counter[FlowKey] = field(default_factory=Counter)
    rejects: list[Reject] = field(default_factory=list)

    def add(self, key: FlowKey, samples: int) -> None:
        """One more file or segment."""
        self.counts[key] += 1
        self.samples[key] += samples

    def reject(self, reject: Reject) -> None:
        """One file or segment less."""
        self.rejects.append(reject)
        self.add((reject.corpus, reject.language, reject.stage, reject.reason), reject.samples)

    def merge(self, other: Tally) -> None:
        """Adds another tally."""
        self.counts.update(other.counts)
        self.samples.update(other.samples)
        self.rejects += other.rejects

    def flow(self) -> tuple[tuple[str, str, str, str, int, int], ...]:
        """Sorted rows for the record."""
        return tuple((*key, self.counts[key], self.samples[key]) for key in sorted(self.counts))


@dataclass(frozen=True)
class UnitResult:
    """What a worker tells the driver."""

    record: DoneRecord
    seconds: float
    """Processor time, roughly: how long the unit took."""


def process_unit(unit: Unit, config: PreprocessConfig) -> UnitResult:
    """Writes the unit's shard and commits it. Bad files are listed, not raised.

    Raises OSError when the output cannot be written, e.g. when the disk is full; nothing half-done is left then.
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
                _process_file(file, config, writer, tally)
            blank = DoneRecord(unit=unit.name, shard="", sha256="", bytes=0, index_sha256="", segments=0, samples=0)
            reasons = Counter(f"{reject.stage}/{reject.reason}" for reject in tally.rejects)
            record = dataclasses.replace(
                blank, files=len(unit.files), rejects=dict(sorted(reasons.items())), flow=tally.flow()
            )
            record = commit(store, writer, record, rejects_jsonl(tally.rejects))
        finally:
            writer.close()
    return UnitResult(record, time.monotonic() - began)


def rejects_jsonl(rejects: list[Reject]) -> bytes:
    """One JSON object a line."""
    return b"".join(json.dumps(dataclasses.asdict(reject), sort_keys=True).encode() + b"\n" for reject in rejects)


def _process_file(file: AudioFile, config: PreprocessConfig, writer: ShardWriter, tally: Tally) -> None:
    mark, mine, read, kept = writer.mark(), Tally(), [0], 0
    try:
        with codecs.local_copy(file.path) as path:
            blocks = _counted(codecs.decode(path, SAMPLE_RATE), read)
            for said, start, wave, whole in _pieces(file, blocks, config):
                kept += len(wave)
                _write_segment(said, start, wave, config, writer, mine, path if whole else "")
        _check_unchanged(file)
        if kept < read[0]:
            stage, reason = ("cut", "not_marked") if file.spans else ("vad", "no_speech")
            mine.add((file.corpus, file.language, stage, reason), read[0] - kept)
    except codecs.AudioError as error:
        writer.rollback(mark)
        mine = Tally()
        mine.reject(_reject(file, "decode", error.reason, str(error), 0, read[0]))
    tally.merge(mine)
    tally.add((file.corpus, file.language, "in", ""), read[0])


def _counted(blocks: Iterable[codecs.Wave], read: list[int]) -> Iterator[codecs.Wave]:
    for block in blocks:
        read[0] += len(block)
        yield block


def _pieces(
    file: AudioFile, blocks: Iterator[codecs.Wave], config: PreprocessConfig
) -> Iterator[tuple[AudioFile, int, codecs.Wave, bool]]:
    """(what is known of it, start, wave, whether that is all of the recording)."""
    longest = round(config.cut.max_seconds * SAMPLE_RATE)
    # the words of a recording, and its phones, belong to no single piece of it
    silent = dataclasses.replace(file, text="", labels=_without_words(file.labels))
    if file.spans:
        taken: set[int] = set()
        for span, start, wave, whole in marked(blocks, file.spans, longest):
            if start in taken:  # listed twice
                continue
            taken.add(start)
            known = dataclasses.replace(file, speaker=span.speaker or file.speaker, text=span.text)
            known = dataclasses.replace(known, labels={**silent.labels, **span.labels})
            if not whole:
                known = dataclasses.replace(known, text="", labels=_without_words(known.labels))
            yield known, start, wave, False
    elif config.vad.enabled:
        for start, wave in vad.speech(blocks, longest, config.vad):
            yield silent, start, wave, False
    else:
        for start, wave, whole in cut(blocks, longest):
            yield file if whole else silent, start, wave, whole


def _without_words(labels: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in labels.items() if name not in TIMED_LABELS}


def _write_segment(
    file: AudioFile,
    start: int,
    wave: codecs.Wave,
    config: PreprocessConfig,
    writer: ShardWriter,
    tally: Tally,
    source: str,
) -> None:
    """`source`: local path of a recording of which `wave` is all; "" for a piece of one."""
    if len(wave) < config.cut.min_seconds * SAMPLE_RATE:
        tally.reject(_reject(file, "cut", "too_short", "", start, len(wave)))
        return
    measures = measure(wave, SAMPLE_RATE)
    if reason := verdict(measures, config.filters):
        tally.reject(_reject(file, "filter", reason, "", start, len(wave)))
        return
    segment = Segment(
        key=segment_key(file, start),
        file_id=file.file_id,
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
    if config.loudness_dbfs is not None:
        wave, extra["gain_db"] = normalised(wave, measures, config.loudness_dbfs)
    weight = config.weights.get(file.corpus, 1.0) * config.weights.get(file.language, 1.0)
    if weight != 1.0:
        extra["weight"] = weight
    samples = codecs.to_int16(wave)
    copy = config.copy_flac and config.codec == "flac" and source
    encoded = copy and codecs.stored_flac(source, samples, SAMPLE_RATE)
    encoded = encoded or codecs.encode(samples, SAMPLE_RATE, config.codec)
    writer.add(segment, config.codec, encoded, len(wave), **extra)
    tally.add((file.corpus, file.language, "out", ""), len(wave))


def segment_key(file: AudioFile, start: int) -> str:
    """Readable, unique in the data set, ASCII, without dots: name of the file, hash of its id, start in samples."""
    stem = file.file_id.rsplit("/", 1)[-1].rsplit(".", 1)[0]
    readable = re.sub(r"[^A-Za-z0-9_]+", "-", stem).strip("-")[:40] or "audio"
    return f"{readable}-{keyed_seed(file.corpus, file.file_id):016x}-{start:010d}"


def _check_unchanged(file: AudioFile) -> None:
    try:
        now = stat(file.path)
    except FileNotFoundError:
        raise codecs.AudioError("vanished", "is not there any more") from None
    except OSError as error:
        raise codecs.AudioError("unreadable", f"cannot be read: {error.strerror or error}") from None
    if now != (file.size, file.mtime):
        raise codecs.AudioError("changed", "has changed since the work was planned")


def _reject(file: AudioFile, stage: str, reason: str, error: str, start: int, samples: int) -> Reject:
    path = file.path if is_url(file.path) else printable(file.path)
    return Reject(path, file.file_id, file.corpus, file.language, stage, reason, error, start, samples)
