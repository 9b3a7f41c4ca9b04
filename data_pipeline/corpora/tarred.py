"""Corpora in tars: WebDataset, Lhotse Shar and NeMo's tarred data sets. Audio of any rate and codec is converted.

Members are not unpacked: a recording's path is the address of its bytes in the tar (`core.tar_members`).
"""

from __future__ import annotations

import dataclasses
import gzip
import io
import re
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any, Final

import fsspec

from data_pipeline.core.jsonl import Line, each_line
from data_pipeline.core.schema import ConfigError
from data_pipeline.core.tar_members import TarMember, list_members, read_member
from data_pipeline.core.tar_samples import MOST_LABEL_BYTES, UnusableError, member_labels
from data_pipeline.core.types import SAMPLE_RATE, AudioFile, Span
from data_pipeline.corpora.config import LhotseSharCorpus, NemoTarredCorpus, TarredCorpus, WebDatasetCorpus
from data_pipeline.corpora.listing import Entry, list_files
from data_pipeline.corpora.records import Discovered, reject_file, sorted_spans

WHOLE_SECONDS: Final = 0.05
"""Seconds that a supervision may omit at both ends of a cut and still cover all of it."""


def read_tarred(corpus: TarredCorpus, found: Discovered, endings: tuple[str, ...]) -> None:
    """Adds the recordings of a corpus in tars.

    Args:
        corpus: the corpus.
        found: recordings, rejects, and counts of members that are not audio are added to it.
        endings: endings of audio members, in lower case without the dot.

    Raises:
        ConfigError: the folder has no tars, or no cuts or manifest.
    """
    entries = [entry for entry in list_files(corpus.path) if not entry.is_folder]
    reading = _Reading(corpus, found, endings, [entry for entry in entries if entry.ending == ".tar"])
    if not reading.tars:
        raise ConfigError(f"corpus.path={corpus.path}: holds no .tar files; give the folder that holds them")
    if isinstance(corpus, WebDatasetCorpus):
        reading.read_webdataset()
    elif isinstance(corpus, LhotseSharCorpus):
        reading.read_shar(corpus, entries)
    else:
        reading.read_nemo(corpus, entries)


@dataclasses.dataclass
class _Reading:
    """Reads the tars of one corpus."""

    corpus: TarredCorpus
    found: Discovered
    endings: tuple[str, ...]
    tars: list[Entry]

    def read_webdataset(self) -> None:
        """Adds each audio member as a recording."""
        from webdataset.tariterators import base_plus_ext

        for entry in self.tars:
            key, audio, documents = None, list[TarMember](), dict[str, bytes]()
            for member in [*self._members(entry), None]:
                now = base_plus_ext(member.name)[0] if member is not None else None
                if key is not None and now != key:
                    self._add_sample(entry, key, audio, documents)
                    audio, documents = [], {}
                key = now
                if member is None or key is None:
                    continue
                if self._is_audio(member):
                    audio.append(member)
                elif member.name.endswith((".json", ".txt")) and member.size <= MOST_LABEL_BYTES:
                    documents[member.name] = read_member(member)

    def read_shar(self, corpus: LhotseSharCorpus, entries: list[Entry]) -> None:
        """Adds the audio of cuts, which is in their order: the n-th pair of members belongs to the n-th cut."""
        by_name = {entry.relative: entry for entry in entries}
        for entry in self.tars:
            folder, _, name = entry.relative.rpartition("/")
            stem = re.fullmatch(rf"{re.escape(corpus.audio_field)}\.(.+)\.tar", name)
            if not stem:
                continue
            names = [f"{folder}/cuts.{stem[1]}.{ending}".lstrip("/") for ending in ("jsonl.gz", "jsonl")]
            cuts = next((by_name[name] for name in names if name in by_name), None)
            if cuts is None:
                self._reject(entry, "", "no_cuts", f"there is no {names[0]} beside it")
                continue
            members = [member for member in self._members(entry) if not member.name.endswith((".json", ".nometa"))]
            rows = _lines(cuts.path)
            for number, member in enumerate(members):
                if number >= len(rows):
                    self._reject(entry, member.name, "not_listed", f"{cuts.relative} has {len(rows)} cuts")
                    continue
                self._add_cut(entry, member, number + 1, rows[number])
            for number in range(len(members), len(rows)):
                self._reject(entry, f"cut {number + 1}", "missing", "the tar has no audio for this cut", number + 1)

    def read_nemo(self, corpus: NemoTarredCorpus, entries: list[Entry]) -> None:
        """Adds the members that rows name; several rows of a member are spans of it."""
        manifests = [entry for entry in entries if re.search(corpus.manifest, entry.relative)]
        if not manifests:
            raise ConfigError(
                f"corpus.path={corpus.path}: no file matches corpus.manifest={corpus.manifest!r}, so members have no "
                "rows; name the manifest, or read the tars as corpus=webdataset"
            )
        members: dict[str, list[tuple[Entry, TarMember]]] = {}
        for entry in self.tars:
            for member in self._members(entry):
                members.setdefault(member.name, []).append((entry, member))
        rows: dict[TarMember, list[tuple[int, dict[str, Any]]]] = {}
        for manifest in manifests:
            for number, line in enumerate(_lines(manifest.path), 1):
                try:
                    row = _row(line, f"row {number}")
                    member = _member_of(row, members)
                except UnusableError as error:
                    self._reject(manifest, "", error.reason, str(error), number)
                    continue
                rows.setdefault(member, []).append((number, row))
        for entry, member in (place for places in members.values() for place in places):
            if member in rows:
                self._add_rows(entry, member, rows[member])
            elif self._is_audio(member):
                self._reject(entry, member.name, "not_listed", "no row of the manifest names this member")
            else:
                self._skip(member)

    def _members(self, entry: Entry) -> Iterator[TarMember]:
        """Yields the regular members of a tar; other members, and the end of a damaged tar, are rejected."""
        if entry.problem:
            self._reject(entry, "", entry.problem, entry.error)
            return
        try:
            for member in list_members(entry.path):
                if isinstance(member, TarMember):
                    yield member
                else:
                    self._reject(entry, member.name, "no_file", "is a link or a device")
        except (tarfile.TarError, OSError) as error:
            self._reject(entry, "", "damaged_tar", f"cannot be read to its end: {error}")

    def _add_sample(self, entry: Entry, key: str, audio: list[TarMember], documents: Mapping[str, bytes]) -> None:
        for member in audio:
            stem = member.name.rpartition(".")[0]
            try:
                labels = member_labels(documents, key, stem)
            except UnusableError as error:
                self._reject(entry, member.name, error.reason, str(error))
                continue
            labels.pop("file_id", "")
            file = self._file(entry, member)
            file = dataclasses.replace(
                file,
                corpus=labels.pop("corpus", "") or file.corpus,
                language=labels.pop("language", "") or file.language,
                speaker=labels.pop("speaker", ""),
                text=labels.pop("text", ""),
                split=labels.pop("split", ""),
            )
            if not self.corpus.splits or file.split in self.corpus.splits:
                self.found.recordings.append(dataclasses.replace(file, labels=labels))

    def _add_cut(self, entry: Entry, member: TarMember, number: int, line: Line) -> None:
        try:
            cut = _row(line, f"cut {number}")
            if member.name.endswith(".nodata"):
                raise UnusableError("missing", "the cut has no audio")
            identity = cut.get("id")
            if isinstance(identity, str) and not member.name.startswith(identity):
                raise UnusableError("mismatch", f"the cut at its place is {identity!r}")
            spans = _supervisions(cut, number)
        except UnusableError as error:
            self._reject(entry, member.name, error.reason, str(error), number)
            return
        file = self._file(entry, member)
        seconds = cut.get("duration")
        seconds = float(seconds) if isinstance(seconds, int | float) else 0.0
        if len(spans) == 1 and _covers(spans[0], seconds):
            only = spans[0]
            file = dataclasses.replace(
                file, speaker=only.speaker, text=only.text, language=only.language or file.language
            )
            spans = []
        self.found.recordings.append(dataclasses.replace(file, seconds=seconds, spans=sorted_spans(spans)))

    def _add_rows(self, entry: Entry, member: TarMember, rows: list[tuple[int, dict[str, Any]]]) -> None:
        file = self._file(entry, member)
        spans: list[Span] = []
        for number, row in rows:
            speaker, text = _text(row, "speaker"), _text(row, "text")
            language = _text(row, "lang") or _text(row, "language")
            offset, duration = row.get("offset"), row.get("duration")
            if len(rows) == 1 and not offset:
                seconds = float(duration) if isinstance(duration, int | float) else 0.0
                file = dataclasses.replace(
                    file, speaker=speaker, text=text, language=language or file.language, seconds=seconds
                )
                break
            try:
                start, stop = _samples(offset or 0.0, "offset"), _samples(duration, "duration")
                if stop <= 0:
                    raise UnusableError("span", f"duration={duration!r} is not above 0")
            except UnusableError as error:
                self._reject(entry, member.name, error.reason, str(error), number)
                continue
            spans.append(Span(start, start + stop, speaker, text, language=language, row=number))
        if spans or (len(rows) == 1 and not rows[0][1].get("offset")):
            self.found.recordings.append(dataclasses.replace(file, spans=sorted_spans(spans)))

    def _file(self, entry: Entry, member: TarMember) -> AudioFile:
        return AudioFile(
            path=member.url,
            file_id=f"{entry.file_id}/{member.name}",
            corpus=self.corpus.corpus or PurePosixPath(self.corpus.path.rstrip("/")).name or "corpus",
            language=self.corpus.language,
            size=member.size,
            mtime=entry.mtime,
        )

    def _is_audio(self, member: TarMember) -> bool:
        return member.name.rpartition(".")[2].lower() in self.endings

    def _skip(self, member: TarMember) -> None:
        self.found.skipped["." + member.name.rpartition(".")[2].lower()] += 1

    def _reject(self, entry: Entry, name: str, reason: str, error: str, row: int = 0) -> None:
        file_id = f"{entry.file_id}/{name}".rstrip("/")
        corpus = self.corpus.corpus or PurePosixPath(self.corpus.path.rstrip("/")).name or "corpus"
        file = AudioFile(entry.path, file_id, corpus, language=self.corpus.language)
        self.found.rejects.append(reject_file(file, "discover", reason, error, row=row))


def _member_of(row: Mapping[str, Any], members: Mapping[str, list[tuple[Entry, TarMember]]]) -> TarMember:
    """Returns the member that a NeMo row names. Raises UnusableError."""
    name = row.get("audio_filepath", row.get("audio_file"))
    if not isinstance(name, str):
        raise UnusableError("row", "has no audio_filepath")
    places = members.get(name) or members.get(re.sub(r"-sub\d+(?=\.[^.]*$)", "", name)) or []
    shard = row.get("shard_id")
    if len(places) > 1 and shard is not None:
        places = [place for place in places if re.search(rf"(?<!\d)0*{shard}\.tar$", place[0].relative)]
    if len(places) != 1:
        count = "no tar" if not places else f"{len(places)} tars, and shard_id does not decide between them"
        raise UnusableError("missing", f"{name!r} is a member of {count}")
    return places[0][1]


def _supervisions(cut: Mapping[str, Any], number: int) -> list[Span]:
    """Returns the spans of a cut's supervisions, of all tracks of a mixed cut. Raises UnusableError."""
    parts: list[tuple[float, Any]] = [(0.0, cut)]
    tracks = cut.get("tracks")
    if isinstance(tracks, list):
        parts = [(track.get("offset") or 0.0, track.get("cut")) for track in tracks if isinstance(track, dict)]
    spans = []
    for offset, part in parts:
        given = part.get("supervisions") or [] if isinstance(part, dict) else []
        for one in given if isinstance(given, list) else []:
            if not isinstance(one, dict):
                raise UnusableError("row", f"a supervision is a {type(one).__name__}, not an object")
            start = max(0, _samples(one.get("start"), "start") + _samples(offset, "offset"))
            length = _samples(one.get("duration"), "duration")
            channel = one.get("channel")
            if length > 0:
                many = isinstance(cut.get("channel"), list) and len(cut["channel"]) > 1
                span = Span(start, start + length, _text(one, "speaker"), _text(one, "text"), row=number)
                span = dataclasses.replace(span, language=_text(one, "language"))
                spans.append(dataclasses.replace(span, channel=channel) if many and isinstance(channel, int) else span)
    return spans


def _text(values: Mapping[str, Any], name: str) -> str:
    """Returns a value as text; "" if it is absent or null."""
    return "" if values.get(name) is None else str(values[name])


def _covers(span: Span, seconds: float) -> bool:
    slack = round(WHOLE_SECONDS * SAMPLE_RATE)
    return span.channel is None and span.start <= slack and (span.stop or 0) >= round(seconds * SAMPLE_RATE) - slack


def _samples(seconds: Any, name: str) -> int:
    """Converts seconds to samples. Raises UnusableError."""
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not abs(seconds) < 1e7:
        raise UnusableError("span", f"{name}={seconds!r} is not a number of seconds")
    return round(seconds * SAMPLE_RATE)


def _lines(path: str) -> list[Line]:
    """Returns the lines of a JSON-lines file, plain or gzipped."""
    with fsspec.open(path, "rb") as file:
        content = file.read()
    if content[:2] == b"\x1f\x8b":
        content = gzip.GzipFile(fileobj=io.BytesIO(content)).read()
    return list(each_line(content.split(b"\n")))


def _row(line: Line, name: str) -> dict[str, Any]:
    """Returns the object in a line. Raises UnusableError."""
    if line.row is None:
        raise UnusableError("labels", f"{name} {line.problem}")
    return line.row
