"""Reads the forced alignment of the transcribed sentences in a folder of real speech."""

from __future__ import annotations

import csv
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from data_pipeline.core.types import SAMPLE_RATE

ALIGNMENT: Final = "phones/auto_pocketsphinx.tsv"
"""Times of phones and words, in the folder of speech."""
MARGIN: Final = 0.03
"""Seconds that words get on both sides."""


@dataclass(frozen=True)
class Word:
    """A word of a sentence. name: that of the sentence.  start, stop: first sample and the one after the last."""

    name: str
    text: str
    start: int
    stop: int

    @property
    def aligned_seconds(self) -> float:
        """Returns its duration without margins."""
        return (self.stop - self.start) / SAMPLE_RATE - 2 * MARGIN


def aligned_words(folder: Path) -> dict[str, list[Word]]:
    """Returns the words of each sentence with their times, a little longer than aligned. folder: that of speech."""
    found: dict[str, list[Word]] = {}
    with (folder / ALIGNMENT).open(encoding="utf-8") as file:
        rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        for (name, word), phones in itertools.groupby(rows, lambda row: (row["path"], row["word"])):
            times = list(phones)
            start, stop = float(times[0]["start_s"]) - MARGIN, float(times[-1]["end_s"]) + MARGIN
            if not word.startswith("<"):
                place = max(0, round(start * SAMPLE_RATE)), round(stop * SAMPLE_RATE)
                found.setdefault(name, []).append(Word(name, word, *place))
    return found
