"""Reads labelled utterances from a manifest, and phone alignments. Speakers of test must not occur in train."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipeline.core.schema import ConfigError
from data_pipeline.corpora.local_speech import MANIFEST_NAME, SPEECH_VARIABLE, speech_manifest

SPLITS = ("train", "valid", "test")


@dataclass(frozen=True, slots=True)
class Utterance:
    """One line of the manifest."""

    path: Path
    name: str
    speaker: str
    text: str
    label: str
    language: str
    corpus: str
    split: str


@dataclass(frozen=True, slots=True)
class Interval:
    """A phone from `start` to `end`, in seconds."""

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


def read_manifest(manifest: Path) -> list[Utterance]:
    """Reads all rows. Raises ConfigError if the file does not exist, ValueError if a column is missing."""
    if not manifest.is_file():
        raise ConfigError(
            f"manifest={manifest}: there is no such file; it lists path, speaker, corpus, split and labels"
        )
    with manifest.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    missing = {"path", "speaker", "corpus", "split"} - set(rows[0] if rows else ())
    if missing:
        raise ValueError(f"manifest={manifest}: lacks the columns {', '.join(sorted(missing))}")
    texts = ("speaker", "text", "label", "language", "corpus", "split")
    return [
        Utterance(manifest.parent / row["path"], row["path"], *(row.get(name) or "" for name in texts)) for row in rows
    ]


def read_phones(alignment: Path) -> dict[str, list[Interval]]:
    """Reads an alignment: path as in the manifest -> phones in order. Raises ConfigError if the file does not exist."""
    if not alignment.is_file():
        raise ConfigError(f"phones={alignment}: there is no such file; phone tasks need an alignment")
    found: dict[str, list[Interval]] = defaultdict(list)
    with alignment.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE):
            found[row["path"]].append(Interval(float(row["start_s"]), float(row["end_s"]), row["phone"]))
    return dict(found)


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


def require_disjoint(train: Iterable[Utterance], test: Iterable[Utterance]) -> None:
    """Raises ValueError naming the speakers that are in both splits."""
    both = {u.speaker for u in train} & {u.speaker for u in test}
    if both:
        raise ValueError(
            f"these speakers are in both train and test, so the result would be meaningless: {sorted(both)[:5]}"
        )
