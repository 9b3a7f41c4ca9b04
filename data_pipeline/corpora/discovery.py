"""Finds the recordings of a corpus. Unusable inputs are listed with a reason, or counted."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import operator
import re
from pathlib import Path, PurePosixPath
from typing import Final

from data_pipeline.audio import codecs
from data_pipeline.core.external_sort import ExternalSort
from data_pipeline.core.schema import ConfigError
from data_pipeline.core.storage import FileStore
from data_pipeline.core.text import visible
from data_pipeline.core.types import AudioFile
from data_pipeline.corpora import layouts
from data_pipeline.corpora.config import (
    SOUND_ENDINGS,
    CorpusConfig,
    LhotseCorpus,
    LibriSpeechCorpus,
    ManifestCorpus,
    PathCorpus,
    TarredCorpus,
)
from data_pipeline.corpora.layout import About, Row
from data_pipeline.corpora.lhotse_manifests import read_lhotse
from data_pipeline.corpora.listing import Entry, list_files
from data_pipeline.corpora.long_recordings import parts_of
from data_pipeline.corpora.manifest import discover_manifest
from data_pipeline.corpora.recordings import Recordings, licences_of
from data_pipeline.corpora.records import Discovered, RecordingId, Reject, reject_file
from data_pipeline.corpora.tarred import read_tarred
from data_pipeline.shards.index_rows import MOST_NAMES

FIELDS: Final = ("speaker", "language", "text", "split")
"""Groups of `corpus.pattern` that are fields of a recording; all other ones are labels."""


def corpus_fingerprint(corpus: CorpusConfig) -> str:
    """Returns a short hash of the fields of a corpus config that determine its recordings."""
    fields = dataclasses.asdict(corpus)
    del fields["licence"]
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:8]


def discover(corpus: CorpusConfig, scratch: Path | None = None, *, in_parts: bool = False) -> Discovered:
    """Finds the recordings of a corpus; nothing is decoded, except by `corpus.probe`.

    Each file, and each row of a table, becomes a recording, a span of one, a reject, or is counted as skipped. The
    recordings are not in memory together.

    Args:
        corpus: a config of one of the classes of `corpora.config`.
        scratch: folder for temporary files of large corpora; None: that of the system.
        in_parts: whether a long recording becomes several; see `long_recordings`.

    Returns:
        Recordings, rejects with reasons, counts of skipped files by ending, licences, and warnings.

    Raises:
        ConfigError: the corpus does not exist or is empty, or its table or pattern is invalid.
        StorageReadError: the storage cannot list it now.
    """
    found = Discovered(Recordings(scratch, parts_of if in_parts else None))
    if isinstance(corpus, PathCorpus):
        _from_path(corpus, found)
    elif isinstance(corpus, ManifestCorpus):
        discover_manifest(corpus, found)
    elif isinstance(corpus, LhotseCorpus):
        read_lhotse(corpus, found)
    elif isinstance(corpus, TarredCorpus):
        read_tarred(corpus, found, SOUND_ENDINGS)
    else:
        _from_layout(corpus, found)
    if not found.recordings and not found.rejects:
        splits = f" in the splits {', '.join(corpus.splits)}" if corpus.splits else ""
        others = ", ".join(
            f"{count:,} of {visible(name) or 'no ending'}" for name, count in found.skipped.most_common(5)
        )
        raise ConfigError(
            f"corpus.path={corpus.path}: holds no sound files{splits}; check the path, corpus.extensions and "
            f"corpus.splits{f' (files not taken: {others})' if others else ''}"
        )
    _survey(found, corpus)
    return found


def _survey(found: Discovered, corpus: CorpusConfig) -> None:
    """Collects licences, rejects repeated recordings, and marks one reject of each recording without a usable part.

    Raises:
        ConfigError: there are more corpora or languages than a shard may have.
    """
    corpora, languages = set[str](), set[str]()
    lost = {reject.recording_id for reject in found.rejects}
    count = 0
    for row in found.recordings:
        count += 1
        corpora.add(row.corpus)
        languages.add(row.language)
        lost.discard((row.corpus, row.file_id))
        if names := licences_of(row, corpus.licence):
            found.licences.setdefault(row.corpus, set()).update(names)
        for field, names in (("corpus", corpora), ("language", languages)):
            if len(names) > MOST_NAMES:
                raise ConfigError(
                    f"corpus.path={corpus.path}: its recordings have more than {MOST_NAMES:,} values of {field}, such "
                    f"as {visible(min(names))!r}, and each is sampled separately. Name the right column with "
                    f"corpus.columns.{field}=COLUMN, or rename this one so that it becomes a label"
                )
    _mark_recordings(found, lost)
    if count < found.recordings.added:
        found.rejects += [
            reject_file(file, "discover", "listed_twice", "another file has the same printable name")
            for file in found.recordings.repeated()
        ]


def _from_path(corpus: PathCorpus, found: Discovered) -> None:
    name = corpus.corpus or PurePosixPath(corpus.path.rstrip("/")).name or "corpus"
    pattern = _compiled(corpus.pattern)
    endings = tuple("." + ending.lower().lstrip(".") for ending in corpus.extensions)
    matched = unmatched = 0
    example = ""
    for entry in list_files(corpus.path):
        if not entry.is_folder and not entry.relative.lower().endswith(endings) and not _holds_audio(entry, corpus):
            found.skipped[entry.ending] += 1
            continue
        file = AudioFile(entry.path, entry.file_id, name, language=corpus.language, size=entry.size, mtime=entry.mtime)
        if entry.problem:
            found.rejects.append(reject_file(file, "discover", entry.problem, entry.error))
            continue
        match = pattern.search(entry.file_id) if pattern else None
        groups = {key: value or "" for key, value in match.groupdict().items()} if match else {}
        if match:
            matched += 1
        else:
            unmatched, example = unmatched + 1, example or entry.file_id
        if corpus.splits and groups.get("split", "") not in corpus.splits:
            continue
        found.recordings.append(
            dataclasses.replace(
                file,
                speaker=groups.get("speaker", ""),
                language=groups.get("language", "") or corpus.language,
                text=groups.get("text", ""),
                split=groups.get("split", ""),
                labels={name: value for name, value in groups.items() if name not in FIELDS and value},
            )
        )
    if pattern and unmatched:
        message = f"corpus.pattern={corpus.pattern!r}: matches {matched:,} of {matched + unmatched:,} recordings"
        if not matched:
            raise ConfigError(f"{message}; it is searched in paths below corpus.path, such as {visible(example)!r}")
        found.warnings.append(f"{message}; the other ones have no speaker, such as {visible(example)!r}")


def _holds_audio(entry: Entry, corpus: PathCorpus) -> bool:
    """Returns whether a file of an unknown ending can be opened as audio, if `corpus.probe` is set."""
    if not corpus.probe or entry.problem:
        return False
    try:
        with codecs.local_copy(entry.path) as path:
            return codecs.probe_content(path) is not None
    except codecs.AudioError:
        return False


def _from_layout(corpus: CorpusConfig, found: Discovered) -> None:
    """Joins files and rows of tables, both sorted by key on disk, so that neither has to fit into memory."""
    if isinstance(corpus, LibriSpeechCorpus) and corpus.download:
        layouts.download(corpus)
    layout = layouts.layout_of(corpus, FileStore(corpus.path))
    joined, tables, number = ExternalSort(found.recordings.folder), list[str](), 0
    for number, entry in enumerate(list_files(corpus.path), start=1):
        if entry.is_folder:
            file = AudioFile(entry.path, entry.file_id, corpus.name)
            found.rejects.append(reject_file(file, "discover", entry.problem, entry.error))
        elif layout.tables.fullmatch(entry.file_id):
            tables.append(entry.file_id)
        elif (key := layout.key(entry.file_id)) is None:
            found.skipped[entry.ending] += 1
        else:
            joined.add(key, (number, dataclasses.astuple(entry), None))
    of_files, of_rows = list[tuple[int, Reject]](), list[tuple[int, Reject]]()
    for number, row in enumerate(layout.rows(sorted(tables)), start=1):
        if isinstance(row, Reject):
            of_rows.append((number, row))
        else:
            joined.add(row.key, (number, None, tuple(row)))
    for _, same in itertools.groupby(joined, key=operator.itemgetter(0)):
        items = [item for _, item in same]
        entries = [(number, Entry(*entry)) for number, entry, _ in items if entry]
        rows = {number: Row(*row) for number, _, row in items if row}
        one = layout.join([entry.file_id for _, entry in entries], list(rows.values()))
        of_rows += [(min(rows, default=0), reject) for reject in one.rejects]
        for number, entry in entries:
            about = one.known.get(entry.file_id)
            if about is None:
                found.skipped[entry.ending] += 1
                continue
            file = _described(entry, about, corpus.name)
            if entry.problem:
                of_files.append((number, reject_file(file, "discover", entry.problem, entry.error)))
            elif not corpus.splits or about.split in corpus.splits:
                found.recordings.append(file, number)
    for rejects in (of_files, of_rows):
        found.rejects += [reject for _, reject in sorted(rejects, key=operator.itemgetter(0))]


def _described(entry: Entry, about: About, corpus: str) -> AudioFile:
    return AudioFile(
        path=entry.path,
        file_id=entry.file_id,
        corpus=corpus,
        speaker=about.speaker,
        language=about.language,
        text=about.text,
        split=about.split,
        seconds=about.seconds,
        size=entry.size,
        mtime=entry.mtime,
        spans=about.spans,
    )


def _compiled(pattern: str) -> re.Pattern[str] | None:
    try:
        return re.compile(pattern) if pattern else None
    except re.error as error:
        raise ConfigError(f"corpus.pattern={pattern!r}: is not a regular expression ({error})") from None


def _mark_recordings(found: Discovered, lost: set[RecordingId]) -> None:
    """Marks the first reject of each lost recording, so that recordings in and out can be balanced."""
    for number, reject in enumerate(found.rejects):
        is_recording = bool(reject.file_id) and not reject.error.startswith("folder:")
        if is_recording and reject.recording_id in lost:
            lost.discard(reject.recording_id)
            found.rejects[number] = dataclasses.replace(reject, recording=True)
