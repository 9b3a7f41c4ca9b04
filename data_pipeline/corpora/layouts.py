"""How known corpora lay out their files: from the path of a recording to its speaker, language, words and split."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from data_pipeline.core.schema import ConfigError
from data_pipeline.core.storage import FileStore
from data_pipeline.core.types import SAMPLE_RATE, Span
from data_pipeline.corpora.config import (
    CommonVoiceCorpus,
    GigaSpeechCorpus,
    LibriSpeechCorpus,
    MlsCorpus,
    VoxPopuliCorpus,
)


@dataclass(frozen=True)
class About:
    """What a corpus says on one of its recordings."""

    speaker: str = ""
    language: str = ""
    text: str = ""
    split: str = ""
    seconds: float = 0.0
    spans: tuple[Span, ...] = ()


Describe = Callable[[str], About | None]
"""The path of a file below the corpus to what is known; None for a file that is no recording of the corpus."""


def librispeech(corpus: LibriSpeechCorpus) -> Describe:
    """Panayotov et al. 2015."""
    store, chapters = FileStore(corpus.path), dict[str, dict[str, str]]()

    def words(folder: str, name: str) -> str:
        if folder not in chapters:
            table = f"{folder}/{'-'.join(folder.split('/')[-2:])}.trans.txt"
            lines = store.read(table).decode().splitlines() if store.exists(table) else []
            chapters[folder] = {key: text for key, _, text in (line.partition(" ") for line in lines)}
        return chapters[folder].get(name, "")

    def describe(path: str) -> About | None:
        found = re.search(r"(?:^|/)([^/]+)/([^/]+)/([^/]+)/([^/]+)\.flac$", path)
        if not found:
            return None
        subset, speaker, _, name = found.groups()
        return About(speaker, corpus.language, words(path.rpartition("/")[0], name), subset)

    return describe


def mls(corpus: MlsCorpus) -> Describe:
    """Pratap et al. 2020."""
    store = FileStore(corpus.path)
    language = corpus.language or PurePosixPath(corpus.path.rstrip("/")).name.removeprefix("mls_")
    texts: dict[str, str] = {}
    for split in ("train", "dev", "test"):
        if store.exists(f"{split}/transcripts.txt"):
            lines = store.read(f"{split}/transcripts.txt").decode().splitlines()
            texts |= {key: text for key, _, text in (line.partition("\t") for line in lines)}

    def describe(path: str) -> About | None:
        found = re.fullmatch(r"([^/]+)/audio/([^/]+)/[^/]+/([^/]+)\.(?:flac|opus|ogg|mp3|wav)", path)
        return About(found[2], language, texts.get(found[3], ""), found[1]) if found else None

    return describe


def common_voice(corpus: CommonVoiceCorpus) -> Describe:
    """Ardila et al. 2020. Raises ConfigError where a table is missing."""
    clips: dict[str, About] = {}
    for split in corpus.splits:
        for row in _table(corpus.path, f"{split}.tsv"):
            language = row.get("locale") or corpus.language
            about = About(row.get("client_id") or "", language, row.get("sentence") or "", split)
            clips.setdefault(row.get("path") or "", about)
    return lambda path: clips.get(path.removeprefix("clips/")) if path.startswith("clips/") else None


def voxpopuli(corpus: VoxPopuliCorpus) -> Describe:
    """Wang et al. 2021."""
    store, known = FileStore(corpus.path), dict[str, About]()
    for language in store.names():
        for name in store.names(language, ".tsv"):
            for row in _table(corpus.path, f"{language}/{name}"):
                text = row.get("normalized_text") or row.get("raw_text") or ""
                known[row.get("id") or ""] = About(row.get("speaker_id") or "", language, text, row.get("split") or "")

    def describe(path: str) -> About | None:
        found = re.fullmatch(r"([^/]+)/[^/]+/([^/]+)\.(?:ogg|opus|wav|flac)", path)
        if not found or (corpus.language and found[1] != corpus.language):
            return None
        return known.get(found[2], About(language=found[1]))

    return describe


def gigaspeech(corpus: GigaSpeechCorpus) -> Describe:
    """Chen et al. 2021. A recording's split is the one of `corpus.splits` that it is in; samples are its segments."""
    store = FileStore(corpus.path)
    if not store.exists("GigaSpeech.json"):
        raise ConfigError(f"corpus.path={corpus.path}: holds no GigaSpeech.json")
    table: dict[str, Any] = json.loads(store.read("GigaSpeech.json"))
    known: dict[str, About] = {}
    for audio in table.get("audios", []):
        subsets = [str(subset) for subset in audio.get("subsets", [])]
        split = next((subset for subset in subsets if subset in corpus.splits), subsets[0] if subsets else "")
        language = str(table.get("language") or corpus.language).lower()
        spans = [_giga_span(row) for row in audio.get("segments", [])]
        ordered = tuple(sorted(spans, key=lambda span: (span.start, span.stop)))
        known[audio["path"]] = About("", language, "", split, float(audio.get("duration") or 0.0), ordered)
    return known.get


def _giga_span(row: dict[str, Any]) -> Span:
    start, stop = (round(float(row[name]) * SAMPLE_RATE) for name in ("begin_time", "end_time"))
    return Span(start, stop, str(row.get("speaker") or ""), str(row.get("text_tn") or ""))


READERS: dict[str, Callable[[Any], Describe]] = {
    "librispeech": librispeech,
    "mls": mls,
    "common_voice": common_voice,
    "voxpopuli": voxpopuli,
    "gigaspeech": gigaspeech,
}


def download(corpus: LibriSpeechCorpus) -> None:
    """Fetches LibriSpeech's subsets as far as they are missing. Raises ConfigError where that does not work."""
    if not corpus.splits:
        raise ConfigError("corpus.download=true: say which subsets in corpus.splits, e.g. corpus.splits=[dev-clean]")
    from torchaudio.datasets import LIBRISPEECH

    root = Path(corpus.path).expanduser()
    root.mkdir(parents=True, exist_ok=True)
    for subset in corpus.splits:
        try:
            LIBRISPEECH(str(root), url=subset, download=True)
        except (OSError, RuntimeError, ValueError) as error:
            raise ConfigError(
                f"corpus.download=true: {subset} could not be fetched ({error}); with no way to the network, put the "
                f"corpus into {root} by hand and leave corpus.download out"
            ) from None


def _table(root: str, name: str) -> Iterator[dict[str, str]]:
    store = FileStore(root)
    if not store.exists(name):
        raise ConfigError(f"corpus.path={root}: holds no {name}; check the path and corpus.splits")
    text = io.StringIO(store.read(name).decode("utf-8-sig"), newline="")
    yield from csv.DictReader(text, delimiter="\t", quoting=csv.QUOTE_NONE)
