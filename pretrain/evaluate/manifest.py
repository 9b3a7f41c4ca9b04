"""Labelled utterances from manifests, read as `auricle preprocess` reads them, and frame labels with times."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np

from data_pipeline.audio.codecs import AudioError, Wave, read_mono
from data_pipeline.core.schema import ConfigError
from data_pipeline.core.types import SAMPLE_RATE, AudioFile
from data_pipeline.corpora.config import ManifestCorpus
from data_pipeline.corpora.local_speech import MANIFEST_NAME, SPEECH_VARIABLE, speech_manifest
from data_pipeline.corpora.manifest import ManifestReader
from data_pipeline.corpora.records import Discovered, Reject
from data_pipeline.corpora.tables import ENDINGS, as_text, read_table

SPLITS = ("train", "valid", "test")
SPLIT_NAMES: Final = {
    "train": ("train", "training"),
    "valid": ("valid", "validation", "val", "dev", "development"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Usual values of the column split, in lower case."""
FOR_PRETRAINING: Final = "pretrain"
"""Value of the column split of recordings that are not evaluated, even where speakers are divided again."""
SHOWN_SPLITS: Final = 8
"""Values of the column split that a message names."""
FIELDS: Final = ("speaker", "text", "language", "corpus", "split")
"""Fields of an utterance that may be used as its label; every other column is in `labels`."""
TIMES: Final = {
    "path": ("path", "audio", "audio_filepath", "file", "utterance", "id"),
    "start": ("start_s", "begin_s", "start", "begin", "start_time", "begin_time"),
    "end": ("end_s", "stop_s", "end", "stop", "end_time", "stop_time"),
    "label": ("phone", "label", "symbol", "text", "phoneme"),
}
"""Names of the columns of a table of frame labels; times are in seconds."""
ALIGNMENT_REMEDY: Final = (
    "tasks of kind frames read the phones of each recording from a table with the columns path (as in the manifest), "
    "start_s, end_s (seconds) and phone; set phones=TABLE, or name it as the task's alignment; task=speaker and others "
    "read the manifest alone"
)


@dataclass(frozen=True, slots=True)
class Utterance:
    """A recording, or a part of one, with its labels.

    path: local path or fsspec URL.  name: unique in a task, the path below the manifest's folder.  labels: further
    columns by name.  start, stop: first sample and the one after the last, at 16 kHz; None: to the end.  channel: the
    one to take, from 0; None: the mix.  image: path or URL of an image of it.
    """

    path: str
    name: str
    speaker: str = ""
    text: str = ""
    language: str = ""
    corpus: str = ""
    split: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    file: str = ""
    start: int = 0
    stop: int | None = None
    channel: int | None = None
    image: str = ""

    def value(self, column: str) -> str:
        """Returns the value of a column; "" if the utterance has none."""
        found: str = getattr(self, column) if column in FIELDS else self.labels.get(column, "")
        return found

    @property
    def part(self) -> str:
        """The split (train, valid or test) that the value of the column split stands for; "" for other values."""
        value = self.split.casefold()
        return next((split for split, names in SPLIT_NAMES.items() if value in names), "")


@dataclass(frozen=True)
class Listing:
    """The utterances of a manifest or corpus, the columns that have values, and what cannot be used."""

    utterances: list[Utterance]
    columns: tuple[str, ...]
    rejects: list[Reject]


@dataclass(frozen=True, slots=True)
class Interval:
    """A phone, or another frame label, from `start` to `end`, in seconds."""

    start: float
    end: float
    phone: str


def find_manifest(given: str) -> Path:
    """Returns the path of the manifest: `given`, or manifest.tsv in the folder that AURICLE_SPEECH names.

    Raises:
        ConfigError: neither exists.
    """
    path = Path(given).expanduser() if given else speech_manifest()
    if path is None:
        raise ConfigError(
            "manifest: is required and was not given. Set manifest=FILE, a tab-separated list of labelled audio (path, "
            f"speaker, text, label, language, corpus, split), or the environment variable {SPEECH_VARIABLE}=FOLDER to "
            f"a folder with {MANIFEST_NAME}"
        )
    if not path.is_file():
        reason = "is a folder" if path.is_dir() else "there is no such file"
        raise ConfigError(f"manifest={path}: {reason}; name a tab-separated list of labelled audio")
    return path


def manifest_in(folder: Path) -> Path | None:
    """Returns the table `manifest` in a folder, of any kind that can be read; None if there is none."""
    return next((file for ending in ENDINGS if (file := folder / f"manifest.{ending}").is_file()), None)


def read_manifest(manifest: Path) -> list[Utterance]:
    """Returns the usable rows of a manifest, in its order; see `read_listing`."""
    return read_listing(manifest).utterances


def read_listing(manifest: Path, columns: Mapping[str, str] | None = None) -> Listing:
    """Reads a manifest (TSV, CSV, JSON lines) by the code of `auricle preprocess`: synonyms, spans, channels, rejects.

    Args:
        manifest: the table; relative paths begin at its folder.
        columns: names of the columns path, speaker, text … where they differ.

    Raises:
        ConfigError: the table cannot be read or has no column of paths; names the columns that it has.
    """
    if not manifest.is_file():
        raise ConfigError(
            f"manifest={manifest}: there is no such file; it lists path, speaker, split and labels of audio"
        )
    found = Discovered()
    corpus = ManifestCorpus(path=str(manifest), columns=dict(columns or {}), allow_outside=True)
    reader = ManifestReader(corpus, found)
    for row in read_table(corpus.path, "manifest"):
        reader.add(row)
    reader.finish()
    return Listing(utterances_of(found.recordings.in_place()), tuple(reader.seen), found.rejects)


def utterances_of(files: Iterable[AudioFile], prefix: str = "") -> list[Utterance]:
    """Returns an utterance for each recording without marked parts, and for each part of the other ones."""
    return [utterance for file in files for utterance in _parts(file, prefix + file.file_id)]


def _parts(file: AudioFile, name: str) -> Iterable[Utterance]:
    if not file.spans:
        yield Utterance(
            path=file.path,
            name=name,
            speaker=file.speaker,
            text=file.text,
            language=file.language,
            corpus=file.corpus,
            split=file.split,
            labels=file.labels,
            file=name,
            image=file.image,
        )
    for span in file.spans:
        yield Utterance(
            path=file.path,
            name=f"{name}:{span.start}-{span.stop or ''}{'' if span.channel is None else f'-{span.channel}'}",
            speaker=span.speaker or file.speaker,
            text=span.text,
            language=span.language or file.language,
            corpus=file.corpus,
            split=span.split or file.split,
            labels=span.labels or file.labels,
            file=name,
            start=span.start,
            stop=span.stop,
            channel=span.channel,
            image=span.image,
        )


def span_columns(utterance: Utterance) -> dict[str, float]:
    """Returns the columns of a manifest that select the utterance's part of its recording; none for a whole one."""
    if utterance.start == 0 and utterance.stop is None and utterance.channel is None:
        return {}
    columns: dict[str, float] = {"begin": utterance.start / SAMPLE_RATE}
    columns["end"] = -1 if utterance.stop is None else utterance.stop / SAMPLE_RATE  # -1: the end of the file
    return columns | ({} if utterance.channel is None else {"channel": utterance.channel})


def read_audio(utterance: Utterance) -> Wave:
    """Decodes an utterance as `auricle preprocess` does: (T,) float32 at 16 kHz.

    Raises:
        AudioError: the recording is unusable, or the utterance has no sample.
    """
    wave_T = read_mono(utterance.path, channel=utterance.channel)[utterance.start : utterance.stop]
    if not len(wave_T):
        raise AudioError("no_samples", f"{utterance.name}: begins after the end of the recording")
    return wave_T


def read_phones(alignment: Path, required: Sequence[str] = ("path", "start", "end")) -> dict[str, list[Interval]]:
    """Reads a table of frame labels (TSV, CSV, JSON lines): path as in the manifest to labels in order.

    Args:
        alignment: the table.
        required: those of its columns without which it is refused; labels without a path are those of "".

    Raises:
        ConfigError: there is no such file, or a column is missing; names those that exist.
    """
    if not alignment.is_file():
        raise ConfigError(f"phones={alignment}: there is no such file; {ALIGNMENT_REMEDY}")
    found: dict[str, list[Interval]] = {}
    for row in read_table(str(alignment), "phones"):
        picked = {
            field: next((row.values[name] for name in names if name in row.values), None)
            for field, names in TIMES.items()
        }
        lacking = [f"{name} ({', '.join(TIMES[name])})" for name in required if picked[name] is None]
        if row.number == 1 and not row.problem and lacking:
            raise ConfigError(
                f"phones={alignment}: lacks the columns {'; '.join(lacking)}; its columns are: {', '.join(row.values)}"
            )
        try:
            start, end = float(picked["start"] or 0.0), float(picked["end"] or 0.0)
        except (TypeError, ValueError):
            raise ConfigError(f"phones={alignment}: row {row.number}: a time is not a number of seconds") from None
        interval = Interval(start, end, as_text(picked["label"] or ""))
        found.setdefault(as_text(picked["path"] or ""), []).append(interval)
    return found


def intervals_of(utterance: Utterance, phones: Mapping[str, Sequence[Interval]]) -> list[Interval]:
    """Returns the labels of an utterance, in seconds from its start; those of its file if it has none of its own."""
    if utterance.name in phones:
        return list(phones[utterance.name])
    begin = utterance.start / SAMPLE_RATE
    end = float("inf") if utterance.stop is None else utterance.stop / SAMPLE_RATE
    inside = (i for i in phones.get(utterance.file, ()) if i.end > begin and i.start < end)
    return [Interval(max(i.start, begin) - begin, min(i.end, end) - begin, i.phone) for i in inside]


def grid_labels(intervals: Sequence[Interval], seconds: float, rate_hz: float) -> list[str]:
    """Returns the phone at the centre of each of floor(seconds · rate_hz) cells of a grid; "" if there is none.

    Args:
        intervals: the utterance's phones, in order.
        seconds: its duration.
        rate_hz: cells per second.
    """
    labels = [""] * int(seconds * rate_hz)
    for interval in intervals:
        first = int(np.ceil(interval.start * rate_hz - 0.5))
        last = int(np.ceil(interval.end * rate_hz - 0.5))
        for cell in range(max(0, first), min(last, len(labels))):
            labels[cell] = interval.phone
    return labels


def labelled_parts(
    utterances: Iterable[Utterance], corpora: Sequence[str], split: str, is_labelled: Callable[[Utterance], bool]
) -> tuple[list[Utterance], list[Utterance]]:
    """Returns the labelled utterances of split train, and those of another split; no speaker is in both.

    Args:
        utterances: the manifest.
        corpora: names of the corpora to use; empty: all.
        split: the other split.
        is_labelled: whether an utterance has the label.

    Raises:
        ValueError: a speaker is in both splits.
    """
    chosen = [u for u in utterances if (not corpora or u.corpus in corpora) and is_labelled(u)]
    train, other = ([u for u in chosen if u.part == name] for name in ("train", split))
    require_disjoint(train, other)
    return train, other


def corpora_in_words(chosen: Sequence[str], utterances: Iterable[Utterance]) -> str:
    """Returns the field `corpora`, what it chooses, and the corpora that there are, for a message."""
    there = ", ".join(sorted({u.corpus or "(unnamed)" for u in utterances})) or "none"
    return f"corpora={','.join(chosen)}{'' if chosen else '(all)'}; the manifest has the corpora: {there}"


def splits_in_words(utterances: Iterable[Utterance]) -> str:
    """Returns the number of utterances by value of the column split, such as "pretrain 20, held-out 3"."""
    counts = Counter(u.split or "(none)" for u in utterances).most_common()
    shown = ", ".join(f"{value} {count}" for value, count in counts[:SHOWN_SPLITS])
    return f"{shown} and {len(counts) - SHOWN_SPLITS} more values" if len(counts) > SHOWN_SPLITS else shown


def unused_splits(utterances: Sequence[Utterance]) -> str:
    """Returns a note on utterances that are in no split of an evaluation; "" if there are none."""
    if not utterances:
        return ""
    return f"{len(utterances)} utterances of other splits are not used: {splits_in_words(utterances)}"


def thinned(part: Sequence[Utterance], most: int) -> list[Utterance]:
    """Returns at most `most` utterances, every n-th, so that few of them still have many speakers; all for 0."""
    return list(part[:: -(-len(part) // most)] if most and part else part)


def require_disjoint(*parts: Iterable[Utterance]) -> None:
    """Raises ValueError naming the speakers that are in two of the splits train, valid and test."""
    found = [{u.speaker for u in part} for part in parts]
    names = SPLITS if len(parts) == len(SPLITS) else ("train", "test")
    for i, one in enumerate(found):
        for j, other in enumerate(found[:i]):
            if both := sorted(one & other):
                raise ValueError(
                    f"these speakers are in both {names[j]} and {names[i]}, so the result would be meaningless: "
                    f"{', '.join(name or 'unknown' for name in both[:5])}"
                )


def reasons(rejects: Iterable[Reject]) -> str:
    """Returns the number of rejects by reason, such as "vanished 3, bad_span 1"."""
    return ", ".join(f"{reason} {count}" for reason, count in Counter(one.reason for one in rejects).most_common())
