"""Layouts of known corpora: map the path of a recording to its speaker, language, words and split.

Tables of a corpus are authoritative: a row without a usable file is a reject.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Final

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
from data_pipeline.corpora.records import Reject, reject_file, sorted_spans
from data_pipeline.corpora.tables import rows_of

GARBAGE_TAGS: Final = ("<SIL>", "<MUSIC>", "<NOISE>", "<OTHER>")
"""Texts of GigaSpeech's segments without speech, which its own recipes exclude."""


@dataclass(frozen=True)
class About:
    """Metadata of a recording from its corpus."""

    speaker: str = ""
    language: str = ""
    text: str = ""
    split: str = ""
    seconds: float = 0.0
    spans: tuple[Span, ...] = ()


NO_TABLE: Final = re.compile(r"(?!)")


@dataclass(frozen=True)
class Layout:
    """The content of a corpus's tables."""

    describe: Callable[[str], About | None]
    """Returns the metadata of a path below the corpus; None for a file that is not a recording."""
    rejects: list[Reject] = field(default_factory=list)
    """Rows of tables without a usable file or segment."""
    tables: re.Pattern[str] = NO_TABLE
    """Matches the paths of the tables below the corpus, which are read but do not count as recordings."""


def librispeech(corpus: LibriSpeechCorpus, names: Set[str]) -> Layout:
    """Reads the layout of LibriSpeech (Panayotov et al. 2015)."""
    store, words, rejects = FileStore(corpus.path), dict[str, str](), list[Reject]()
    for table in sorted(name for name in names if name.endswith(".trans.txt")):
        folder = table.rpartition("/")[0]
        subset = folder.split("/")[-3] if folder.count("/") >= 2 else ""
        if corpus.splits and subset not in corpus.splits:
            continue
        for number, line in _lines(store.read(table)):
            key, _, text = line.partition(" ")
            words[f"{folder}/{key}.flac"] = text.strip()
            if f"{folder}/{key}.flac" not in names:
                file = AudioFile("", f"{folder}/{key}.flac", corpus.name, language=corpus.language)
                rejects.append(_missing(store, file, table, number))

    def describe(path: str) -> About | None:
        found = re.search(r"(?:^|/)([^/]+)/([^/]+)/[^/]+/[^/]+\.flac$", path)
        return About(found[2], corpus.language, words.get(path, ""), found[1]) if found else None

    return Layout(describe, rejects, re.compile(r".*\.trans\.txt"))


def mls(corpus: MlsCorpus, names: Set[str]) -> Layout:
    """Reads the layout of Multilingual LibriSpeech (Pratap et al. 2020), as FLAC or in its Opus distribution."""
    store = FileStore(corpus.path)
    folder = PurePosixPath(corpus.path.rstrip("/")).name
    language = corpus.language or folder.removeprefix("mls_").removesuffix("_opus")
    pattern = re.compile(r"([^/]+)/audio/([^/]+)/[^/]+/([^/]+)\.(?:flac|opus|ogg|mp3|wav)")
    matches = (pattern.fullmatch(name) for name in sorted(names))
    recordings = {(found[1], found[3]) for found in matches if found}
    texts, rejects = dict[tuple[str, str], str](), list[Reject]()
    for split in corpus.splits or ("train", "dev", "test"):
        table = f"{split}/transcripts.txt"
        for number, line in _lines(store.read(table)) if table in names else ():
            key, _, text = line.partition("\t")
            texts[split, key.strip()] = text.strip()
            if (split, key.strip()) not in recordings:
                speaker, _, book = key.strip().rpartition("_")[0].partition("_")
                file_id = f"{split}/audio/{speaker}/{book}/{key.strip()}"
                file = AudioFile("", file_id, corpus.name, language=language)
                rejects.append(_missing(store, file, table, number))

    def describe(path: str) -> About | None:
        found = pattern.fullmatch(path)
        return About(found[2], language, texts.get((found[1], found[3]), ""), found[1]) if found else None

    return Layout(describe, rejects, re.compile(r"[^/]+/transcripts\.txt"))


def common_voice(corpus: CommonVoiceCorpus, names: Set[str]) -> Layout:
    """Reads the layout of Common Voice (Ardila et al. 2020). Raises ConfigError if a table is missing."""
    store, rejects = FileStore(corpus.path), list[Reject]()
    clips: dict[str, About] = {}
    by_stem: dict[str, list[str]] = defaultdict(list)
    for name in sorted(names):
        stem, _, ending = name.rpartition(".")
        if name.startswith("clips/") and ending.lower() in SOUND_ENDINGS:
            by_stem[stem].append(name)
    for split in corpus.splits:
        table = f"{split}.tsv"
        for number, row, problem in _table(store, table, names):
            language = row.get("locale") or corpus.language
            given = f"clips/{row.get('path', '')}"
            stem, _, ending = given.rpartition(".")
            # some releases leave .mp3 out of the table, and clips are often converted
            stem = stem if ending.lower() in SOUND_ENDINGS else given
            name = next((name for name in (given, f"{given}.mp3", *by_stem.get(stem, ())) if name in names), "")
            file = AudioFile("", name or given, corpus.name, language=language)
            if problem or not row.get("path"):
                problem = problem or "names no clip"
                rejects.append(
                    reject_file(file, "discover", "bad_row", f"row {number} of {table}: {problem}", row=number)
                )
            elif not name:
                rejects.append(_missing(store, file, table, number))
            elif name in clips:
                problem = f"row {number} of {table}: is in {clips[name].split}.tsv already"
                rejects.append(reject_file(file, "discover", "listed_twice", problem, row=number))
            else:
                clips[name] = About(row.get("client_id", ""), language, row.get("sentence", ""), split)
    return Layout(clips.get, rejects, re.compile(r"[^/]+\.tsv"))


def voxpopuli(corpus: VoxPopuliCorpus, names: Set[str]) -> Layout:
    """Reads the layout of VoxPopuli (Wang et al. 2021)."""
    store, known, rejects = FileStore(corpus.path), dict[tuple[str, str], About](), list[Reject]()
    pattern = re.compile(r"([^/]+)/[^/]+/([^/]+)\.(?:ogg|opus|wav|flac)")
    matches = (pattern.fullmatch(name) for name in names)
    recordings = {(found[1], found[2]) for found in matches if found}
    for table in sorted(name for name in names if re.fullmatch(r"[^/]+/[^/]+\.tsv", name)):
        language = table.partition("/")[0]
        if corpus.language and language != corpus.language:
            continue
        for number, row, problem in _table(store, table, names):
            key, split = row.get("id", ""), row.get("split", "")
            if corpus.splits and not problem and split not in corpus.splits:
                continue
            file = AudioFile("", f"{language}/{key}", corpus.name, language=language)
            if problem or not key:
                problem = problem or "names no recording"
                rejects.append(
                    reject_file(file, "discover", "bad_row", f"row {number} of {table}: {problem}", row=number)
                )
            elif (language, key) not in recordings:
                rejects.append(_missing(store, file, table, number))
            else:
                text = row.get("normalized_text") or row.get("raw_text") or ""
                known[language, key] = About(row.get("speaker_id", ""), language, text, split)

    def describe(path: str) -> About | None:
        found = pattern.fullmatch(path)
        if not found or (corpus.language and found[1] != corpus.language):
            return None
        return known.get((found[1], found[2]), About(language=found[1]))

    return Layout(describe, rejects, re.compile(r"[^/]+/[^/]+\.tsv"))


def gigaspeech(corpus: GigaSpeechCorpus, names: Set[str]) -> Layout:
    """Reads the layout of GigaSpeech (Chen et al. 2021). Samples are its segments, selected by their subsets."""
    store = FileStore(corpus.path)
    if "GigaSpeech.json" not in names:
        raise ConfigError(f"corpus.path={corpus.path}: holds no GigaSpeech.json")
    try:
        table = json.loads(store.read("GigaSpeech.json"))
        audios = list(table["audios"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(f"corpus.path={corpus.path}: GigaSpeech.json cannot be read ({error!r})") from None
    known, rejects = dict[str, About](), list[Reject]()
    language = str(table.get("language") or corpus.language).lower()
    for number, audio in enumerate(audios, start=1):
        try:
            name, seconds = str(audio["path"]), float(audio.get("duration") or 0.0)
            segments, subsets = list(audio.get("segments") or []), [str(s) for s in audio.get("subsets") or []]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            file = AudioFile("", "", corpus.name, language=language)
            rejects.append(reject_file(file, "discover", "bad_row", f"audio {number}: {error!r}", row=number))
            continue
        file = AudioFile("", name, corpus.name, language=language)
        wanted = [s for s in segments if not corpus.splits or _in_subsets(s, corpus.splits)]
        if (segments and not wanted) or (not segments and corpus.splits and not set(subsets) & set(corpus.splits)):
            continue
        if name not in names:
            rejects.append(_missing(store, file, "GigaSpeech.json", number))
            continue
        made = [_giga_span(segment, file, number, corpus.splits) for segment in wanted]
        spans = [span for span in made if isinstance(span, Span)]
        rejects += [reject for reject in made if isinstance(reject, Reject)]
        if spans or not segments:
            listed = [*subsets, *(span.split for span in spans)]
            split = next((subset for subset in listed if subset in corpus.splits), subsets[0] if subsets else "")
            known[name] = About(
                speaker="", language=language, text="", split=split, seconds=seconds, spans=sorted_spans(spans)
            )
    return Layout(known.get, rejects, re.compile(r"GigaSpeech\.json"))


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


def read_layout(corpus: CorpusConfig, names: Set[str]) -> Layout:
    """Reads the tables of a known corpus.

    Args:
        corpus: its config.
        names: paths of all files below it.

    Raises:
        ConfigError: a table is missing or cannot be read.
        TypeError: the corpus has no layout of this module.
    """
    match corpus:
        case LibriSpeechCorpus():
            return librispeech(corpus, names)
        case MlsCorpus():
            return mls(corpus, names)
        case CommonVoiceCorpus():
            return common_voice(corpus, names)
        case VoxPopuliCorpus():
            return voxpopuli(corpus, names)
        case GigaSpeechCorpus():
            return gigaspeech(corpus, names)
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


def _missing(store: FileStore, file: AudioFile, table: str, number: int) -> Reject:
    error = f"row {number} of {table}: there is no such file"
    path = store.path(file.file_id)
    return dataclasses.replace(reject_file(file, "discover", "vanished", error, row=number), path=path)


def _lines(content: bytes) -> Iterator[tuple[int, str]]:
    """Yields (number, line) of a text file, split at newlines only; empty lines are skipped."""
    text = content.decode("utf-8-sig", "replace")
    lines = (line.rstrip("\r") for line in text.split("\n"))
    return ((number, line) for number, line in enumerate(lines, start=1) if line.strip())


def _table(store: FileStore, name: str, names: Set[str]) -> Iterator[tuple[int, dict[str, str], str]]:
    """Yields (number, values, problem) of each row of a TSV table."""
    if name not in names:
        ending = name.rpartition(".")[2]
        there = sorted(other.removesuffix(f".{ending}") for other in names if re.fullmatch(rf"[^/]+\.{ending}", other))
        instead = f"the tables there are corpus.splits=[{','.join(there)}]" if there else "check the path"
        raise ConfigError(f"corpus.path={store.root}: holds no {name}; {instead}")
    for row in rows_of(store.read(name), "quoted_tsv"):
        yield row.number, {key: str(value) for key, value in row.values.items()}, row.problem
