"""Layouts of known corpora: find the speaker, language, words and split of a recording in its path and in tables.

Tables of a corpus are authoritative: a row without a usable file is a reject.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Final

import ijson

from data_pipeline.core.schema import ConfigError
from data_pipeline.core.storage import FileStore
from data_pipeline.core.types import SAMPLE_RATE, AudioFile, Span
from data_pipeline.corpora.config import (
    SOUND_ENDINGS,
    CommonVoiceCorpus,
    CorpusConfig,
    GigaSpeechCorpus,
    LibriSpeechCorpus,
    MlsCorpus,
    VoxPopuliCorpus,
)
from data_pipeline.corpora.layout import About, Joined, Layout, PathLayout, Row
from data_pipeline.corpora.records import Reject, reject_file, sorted_spans

GARBAGE_TAGS: Final = ("<SIL>", "<MUSIC>", "<NOISE>", "<OTHER>")
"""Texts of GigaSpeech's segments without speech, which its own recipes exclude."""


class LibriSpeech(PathLayout):
    """LibriSpeech (Panayotov et al. 2015)."""

    tables = re.compile(r".*\.trans\.txt")

    def __init__(self, corpus: LibriSpeechCorpus, store: FileStore) -> None:
        super().__init__(corpus.name, store)
        self._corpus = corpus

    def key(self, path: str) -> str | None:
        """Returns the path of a FLAC file."""
        return path if path.endswith(".flac") else None

    def rows(self, tables: Sequence[str]) -> Iterator[Row | Reject]:
        """Yields the transcripts of the chapters."""
        for table in tables:
            folder = table.rpartition("/")[0]
            subset = folder.split("/")[-3] if folder.count("/") >= 2 else ""
            if self._corpus.splits and subset not in self._corpus.splits:
                continue
            for number, line in self.lines(table):
                name, _, text = line.partition(" ")
                path = f"{folder}/{name}.flac"
                yield Row(path, table, number, path, self._corpus.language, (text.strip(),))

    def about(self, path: str, row: Row | None) -> About | None:
        """Returns speaker and subset from the path."""
        found = re.search(r"(?:^|/)([^/]+)/([^/]+)/[^/]+/[^/]+\.flac$", path)
        return About(found[2], self._corpus.language, row.values[0] if row else "", found[1]) if found else None


class MultilingualLibriSpeech(PathLayout):
    """Multilingual LibriSpeech (Pratap et al. 2020), as FLAC or in its Opus distribution."""

    tables = re.compile(r"[^/]+/transcripts\.txt")
    _PATH: Final = re.compile(r"([^/]+)/audio/([^/]+)/[^/]+/([^/]+)\.(?:flac|opus|ogg|mp3|wav)")

    def __init__(self, corpus: MlsCorpus, store: FileStore) -> None:
        super().__init__(corpus.name, store)
        self._splits = corpus.splits or ("train", "dev", "test")
        folder = PurePosixPath(corpus.path.rstrip("/")).name
        self._language = corpus.language or folder.removeprefix("mls_").removesuffix("_opus")

    def key(self, path: str) -> str | None:
        """Returns split and name."""
        found = self._PATH.fullmatch(path)
        return f"{found[1]}/{found[3]}" if found else None

    def rows(self, tables: Sequence[str]) -> Iterator[Row | Reject]:
        """Yields the transcripts of the splits."""
        for split in self._splits:
            table = f"{split}/transcripts.txt"
            for number, line in self.lines(table) if table in tables else ():
                name, _, text = line.partition("\t")
                name = name.strip()
                speaker, _, book = name.rpartition("_")[0].partition("_")
                path = f"{split}/audio/{speaker}/{book}/{name}"
                yield Row(f"{split}/{name}", table, number, path, self._language, (text.strip(),))

    def about(self, path: str, row: Row | None) -> About | None:
        """Returns speaker and split from the path."""
        found = self._PATH.fullmatch(path)
        return About(found[2], self._language, row.values[0] if row else "", found[1]) if found else None


class CommonVoice(Layout):
    """Common Voice (Ardila et al. 2020)."""

    tables = re.compile(r"[^/]+\.tsv")

    def __init__(self, corpus: CommonVoiceCorpus, store: FileStore) -> None:
        super().__init__(corpus.name, store)
        self._corpus = corpus

    def key(self, path: str) -> str | None:
        """Returns the path without the ending of a sound file."""
        # some releases leave .mp3 out of the table, and clips are often converted
        stem, _, ending = path.rpartition(".")
        return (stem if ending.lower() in SOUND_ENDINGS else path) if path.startswith("clips/") else None

    def rows(self, tables: Sequence[str]) -> Iterator[Row | Reject]:
        """Yields the clips of the splits."""
        for split in self._corpus.splits:
            table = f"{split}.tsv"
            if table not in tables:
                there = ",".join(name.removesuffix(".tsv") for name in tables)
                instead = f"the tables there are corpus.splits=[{there}]" if there else "check the path"
                raise ConfigError(f"corpus.path={self.store.root}: holds no {table}; {instead}")
            for number, row, problem in self.table(table):
                language, path = row.get("locale") or self._corpus.language, f"clips/{row.get('path', '')}"
                if problem or not row.get("path"):
                    yield self.bad_row(table, number, path, language, problem or "names no clip")
                    continue
                values = (row.get("client_id", ""), row.get("sentence", ""), split)
                yield Row(self.key(path) or path, table, number, path, language, values)

    def join(self, paths: Sequence[str], rows: Sequence[Row]) -> Joined:
        """Gives each row the clip that it names, or else one of the same name with another ending."""
        known, rejects = dict[str, About](), list[Reject]()
        for row in rows:
            named = (row.file_id, f"{row.file_id}.mp3", *paths)
            path = next((path for path in named if path in paths), "")
            if not path:
                rejects.append(self.missing(row))
            elif path in known:
                error = f"row {row.number} of {row.table}: is in {known[path].split}.tsv already"
                file = dataclasses.replace(self.file(row), file_id=path)
                rejects.append(reject_file(file, "discover", "listed_twice", error, row=row.number))
            else:
                speaker, text, split = row.values
                known[path] = About(speaker, row.language, text, split)
        return Joined(known, rejects)


class VoxPopuli(PathLayout):
    """VoxPopuli (Wang et al. 2021)."""

    tables = re.compile(r"[^/]+/[^/]+\.tsv")
    _PATH: Final = re.compile(r"([^/]+)/[^/]+/([^/]+)\.(?:ogg|opus|wav|flac)")

    def __init__(self, corpus: VoxPopuliCorpus, store: FileStore) -> None:
        super().__init__(corpus.name, store)
        self._corpus = corpus

    def key(self, path: str) -> str | None:
        """Returns language and name."""
        found = self._PATH.fullmatch(path)
        if not found or (self._corpus.language and found[1] != self._corpus.language):
            return None
        return f"{found[1]}/{found[2]}"

    def rows(self, tables: Sequence[str]) -> Iterator[Row | Reject]:
        """Yields the transcribed recordings."""
        for table in tables:
            language = table.partition("/")[0]
            if self._corpus.language and language != self._corpus.language:
                continue
            for number, row, problem in self.table(table):
                name, split = row.get("id", ""), row.get("split", "")
                if self._corpus.splits and not problem and split not in self._corpus.splits:
                    continue
                key = f"{language}/{name}"
                if problem or not name:
                    yield self.bad_row(table, number, key, language, problem or "names no recording")
                    continue
                text = row.get("normalized_text") or row.get("raw_text") or ""
                yield Row(key, table, number, key, language, (row.get("speaker_id", ""), text, split))

    def about(self, path: str, row: Row | None) -> About | None:
        """Returns what the row of a recording says, or its language."""
        if row is None:
            return About(language=path.partition("/")[0])
        return About(row.values[0], row.language, row.values[1], row.values[2])


class GigaSpeech(Layout):
    """GigaSpeech (Chen et al. 2021). Samples are its segments, selected by their subsets."""

    tables = re.compile(r"GigaSpeech\.json")
    _TABLE: Final = "GigaSpeech.json"

    def __init__(self, corpus: GigaSpeechCorpus, store: FileStore) -> None:
        super().__init__(corpus.name, store)
        self._corpus = corpus

    def key(self, path: str) -> str | None:
        """Returns the path."""
        return path

    def rows(self, tables: Sequence[str]) -> Iterator[Row | Reject]:
        """Yields the wanted recordings."""
        where, splits = f"corpus.path={self._corpus.path}", self._corpus.splits
        if self._TABLE not in tables:
            raise ConfigError(f"{where}: holds no {self._TABLE}")
        try:
            language = self._language()
            for number, audio in enumerate(self._audios(), start=1):
                try:
                    path, seconds = str(audio["path"]), float(audio.get("duration") or 0.0)
                    segments, subsets = list(audio.get("segments") or []), [str(s) for s in audio.get("subsets") or []]
                except (KeyError, TypeError, ValueError, AttributeError) as error:
                    file = AudioFile("", "", self.name, language=language)
                    yield reject_file(file, "discover", "bad_row", f"audio {number}: {error!r}", row=number)
                    continue
                wanted = [s for s in segments if not splits or _in_subsets(s, splits)]
                if (segments and not wanted) or (not segments and splits and not set(subsets) & set(splits)):
                    continue
                values = (json.dumps(wanted), json.dumps(subsets), repr(seconds))
                yield Row(path, self._TABLE, number, path, language, values)
        except (ValueError, ijson.JSONError) as error:
            raise ConfigError(f"{where}: {self._TABLE} cannot be read ({error!r})") from None

    def join(self, paths: Sequence[str], rows: Sequence[Row]) -> Joined:
        """Reads the segments of a recording; the last row with a usable one counts."""
        if not paths:
            return Joined({}, [self.missing(row) for row in rows])
        read = [self._read(row) for row in rows]
        usable = [about for about, _ in read if about]
        return Joined(dict.fromkeys(paths, usable[-1]) if usable else {}, [one for _, bad in read for one in bad])

    def _read(self, row: Row) -> tuple[About | None, list[Reject]]:
        segments, subsets, splits = json.loads(row.values[0]), json.loads(row.values[1]), self._corpus.splits
        made = [_giga_span(segment, self.file(row), row.number, splits) for segment in segments]
        spans = [span for span in made if isinstance(span, Span)]
        rejects = [reject for reject in made if isinstance(reject, Reject)]
        if segments and not spans:
            return None, rejects
        listed = [*subsets, *(span.split for span in spans)]
        split = next((subset for subset in listed if subset in splits), subsets[0] if subsets else "")
        about = About("", row.language, "", split, float(row.values[2]), sorted_spans(spans))
        return about, rejects

    def _language(self) -> str:
        """Returns the language of the table, which need not fit into memory. Raises ValueError without recordings."""
        language = ""
        is_listed = False
        with self.store.open(self._TABLE) as file:
            for prefix, event, value in ijson.parse(file):
                language = str(value or "") if prefix == "language" and event == "string" else language
                is_listed |= prefix == "audios" and event == "start_array"
                if language and is_listed:
                    break
        if not is_listed:
            raise ValueError("it has no list named audios")
        return (language or self._corpus.language).lower()

    def _audios(self) -> Iterator[Any]:
        with self.store.open(self._TABLE) as file:
            yield from ijson.items(file, "audios.item", use_float=True)


def _in_subsets(segment: Any, splits: tuple[str, ...]) -> bool:
    """Returns whether a segment is in one of these subsets; unreadable segments are kept and rejected later."""
    return not isinstance(segment, Mapping) or bool(set(map(str, segment.get("subsets") or ())) & set(splits))


def _giga_span(row: Any, file: AudioFile, audio: int, splits: tuple[str, ...]) -> Span | Reject:
    try:
        start, stop = (round(float(row[name]) * SAMPLE_RATE) for name in ("begin_time", "end_time"))
        speaker, text = row.get("speaker"), row.get("text_tn")
        name = str(row.get("sid") or "")
        subsets = [str(subset) for subset in row.get("subsets") or ()]
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
        return reject_file(
            file, "discover", "bad_span", f"audio {audio}: a segment has no times ({error!r})", row=audio
        )
    if not 0 <= start < stop:
        problem = f"audio {audio}: segment {name} from {start / SAMPLE_RATE:g} s to {stop / SAMPLE_RATE:g} s"
        return reject_file(file, "discover", "bad_span", problem, row=audio)
    text = "" if text is None else str(text)
    if any(tag in text for tag in GARBAGE_TAGS):
        problem = f"audio {audio}: segment {name} is {text}"
        return reject_file(file, "discover", "garbage", problem, start=start, samples=stop - start, row=audio)
    split = next((subset for subset in subsets if subset in splits), "")
    return Span(start, stop, "" if speaker is None else str(speaker), text, split=split, row=audio)


def layout_of(corpus: CorpusConfig, store: FileStore) -> Layout:
    """Returns the layout of a known corpus. Raises TypeError for a corpus without one."""
    match corpus:
        case LibriSpeechCorpus():
            return LibriSpeech(corpus, store)
        case MlsCorpus():
            return MultilingualLibriSpeech(corpus, store)
        case CommonVoiceCorpus():
            return CommonVoice(corpus, store)
        case VoxPopuliCorpus():
            return VoxPopuli(corpus, store)
        case GigaSpeechCorpus():
            return GigaSpeech(corpus, store)
    raise TypeError(f"corpus={corpus.name} has no known layout")


def download(corpus: LibriSpeechCorpus) -> None:
    """Downloads missing subsets of LibriSpeech. Raises ConfigError if that fails."""
    if not corpus.splits:
        raise ConfigError("corpus.download=true: name the subsets in corpus.splits, e.g. corpus.splits=[dev-clean]")
    from torchaudio.datasets import LIBRISPEECH

    root = Path(corpus.path).expanduser()
    root.mkdir(parents=True, exist_ok=True)
    for subset in corpus.splits:
        try:
            LIBRISPEECH(str(root), url=subset, download=True)
        except (OSError, RuntimeError, ValueError) as error:
            raise ConfigError(
                f"corpus.download=true: {subset} could not be fetched ({error}); without a network, copy the corpus "
                f"to {root} and leave corpus.download out"
            ) from None
