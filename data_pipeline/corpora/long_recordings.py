"""Divides long recordings into parts of half an hour, which are planned and processed like recordings.

A part's samples depend on the recording and the part's times alone, so that it makes no difference which parts are
processed together, where and when.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Final

from data_pipeline.audio.time_ranges import exact_length
from data_pipeline.core.storage import is_url
from data_pipeline.core.types import SAMPLE_RATE, AudioFile, part_suffix
from data_pipeline.corpora.recordings import FileRow, file_of, row_of

PART_SECONDS: Final = 1_800
"""Length of a part; the last one has half as much to one and a half times as much."""
LONG_SECONDS: Final = 3_600
"""Recordings from this length on are divided."""
LEAST_BYTES: Final = 4_000 * LONG_SECONDS
"""Smaller files are shorter, or of nearly silent audio that costs little."""
ENDINGS: Final = (b"wav", b"wave", b"flac", b"aif", b"aiff", b"au", b"caf", b"w64", b"rf64")


def parts_of(row: FileRow) -> list[FileRow]:
    """Returns the parts of a recording; the recording itself if it is short, remote, or of another codec.

    A span belongs to the part in which it begins. A part in which none begins is joined to the one before.
    """
    if row.size < LEAST_BYTES or row.path.rpartition(b".")[2].lower() not in ENDINGS:
        return [row]
    path = os.fsdecode(row.path)
    if is_url(path) or (seconds := exact_length(path.removeprefix("file://"), LONG_SECONDS)) < LONG_SECONDS:
        return [row]
    file, number = file_of(row), max(round(seconds / PART_SECONDS), 2)
    begins = [PART_SECONDS * part for part in range(number)]
    if file.spans:
        held = {min(span.start // (SAMPLE_RATE * PART_SECONDS), number - 1) for span in file.spans}
        begins = [0, *(PART_SECONDS * part for part in sorted(held)[1:])]
    ends = [*begins[1:], None]
    return [row_of(_part(file, (begin, end), seconds)) for begin, end in zip(begins, ends, strict=True)]


def _part(file: AudioFile, part: tuple[int, int | None], seconds: float) -> AudioFile:
    begin, end = part
    last = 1 << 62 if end is None else end * SAMPLE_RATE
    return dataclasses.replace(
        file,
        file_id=file.file_id + part_suffix(part),
        seconds=(seconds if end is None else end) - begin,
        spans=tuple(span for span in file.spans if begin * SAMPLE_RATE <= span.start < last),
        part=part,
    )
