"""Finds a manifest's columns by their names, which differ between tools, and reads times in any of their units.

Names are compared without case and separators: `Start Time`, `startTime` and `start_time` are the same. A unit at the
end of a name is used: `start_ms`, `Begin Time (s)`, `duration[ms]`.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, Final

from data_pipeline.corpora.tables import as_text

COLUMNS: Final[dict[str, tuple[str, ...]]] = {
    "path": (
        "path", "audio_filepath", "audio", "audio_path", "file", "filename", "wav", "filepath", "audio_file",
        "audio_filename", "wav_path", "wav_filename", "wav_filepath", "clip", "clip_path", "begin_path", "begin_file",
    ),
    "speaker": ("speaker", "speaker_id", "spk", "client_id", "spk_id", "speaker_name", "speaker_label"),
    "language": ("language", "lang", "locale", "language_code", "lang_code"),
    "text": (
        "text", "transcript", "sentence", "transcription", "normalized_text", "text_normalized", "raw_text",
        "raw_transcription", "txt",
    ),
    "corpus": ("corpus", "dataset", "source"),
    "split": ("split", "subset", "partition"),
    "seconds": ("seconds", "duration_s", "duration", "dur"),
    "begin": ("begin_s", "begin_time", "begin", "start_s", "start_time", "start", "onset"),
    "end": ("end_s", "end_time", "end", "stop_s", "stop_time", "stop"),
    "image": ("image", "image_path", "image_filepath", "image_file"),
    "channel": ("channel", "channel_id", "channel_selector", "channel_index"),
}  # fmt: skip
"""Usual names of a manifest's columns, the preferred first; `_TIMES` has the patterns of further names of times. Every
other column becomes a label. Begin, end or duration of a row select a part of its file, and channel a channel. Image
names a picture of what is said."""

_UNITS: Final = {
    1.0: ("s", "sec", "secs", "second", "seconds", "ssmsec", "hhmmssms"),  # the last two are of ELAN
    1e3: ("ms", "msec", "msecs", "millis", "millisecond", "milliseconds"),
    1e6: ("us", "usec", "usecs", "microsecond", "microseconds"),
    1e9: ("ns", "nsec", "nanosecond", "nanoseconds"),
    1 / 60: ("minute", "minutes"),
}
_PER_SECOND: Final = {name: rate for rate, names in _UNITS.items() for name in names}
_UNIT: Final = rf"(?:in)?(?P<unit>{'|'.join(sorted(_PER_SECOND, key=len, reverse=True))})?"
_OF: Final = r"(?:t|time|timestamp|segment|seg|utterance|utt|audio|clip|chunk|speech|word|sentence|turn|region|cut)*"
_PART: Final = r"(?:segment|seg|utterance|utt|clip|chunk|speech|word|turn|region|cut|t)?"
_AT: Final = r"(?:time|timestamp|ts|offset|position|pos|at)*"
_WEAK: Final = {"from", "to", "length", "len"}
_TIMES: Final[dict[str, tuple[re.Pattern[str], ...]]] = {
    "begin": (
        re.compile(rf"{_OF}(?:starts?|begins?|beg|onset|xmin|tmin){_AT}{_UNIT}"),
        re.compile(rf"from{_AT}{_UNIT}"),
        re.compile(rf"(?:audio|segment|clip|time)?offset{_UNIT}"),
    ),
    "end": (
        re.compile(rf"{_OF}(?:ends?|stops?|finish|until|xmax|tmax){_AT}{_UNIT}"),
        re.compile(rf"to{_AT}{_UNIT}"),
    ),
    "seconds": (
        re.compile(rf"{_PART}(?:durations?|dur|seconds|secs){_UNIT}"),
        re.compile(rf"{_PART}(?:length|len){_UNIT}"),
        re.compile(rf"(?:audio|file|recording|total)(?:duration|dur|length|len){_UNIT}"),
    ),
}  # fmt: skip
"""Patterns of normalised names of times, the preferred first."""
_WHOLE: Final = _TIMES["seconds"][2]
"""Names of the length of the whole file, which is not that of the part that a row selects."""
_OFFSET: Final = _TIMES["begin"][2]

_BEGIN_WORDS: Final = ("start", "begin", "beg", "onset", "offset", "from", "xmin", "tmin")
_TIME_WORDS: Final = (
    *_BEGIN_WORDS, "end", "stop", "finish", "until", "to", "xmax", "tmax", "dur", "length", "len", "time", "ts",
    "sec", "second", "ms", "msec", "sample", "frame", "interval", "span",
)  # fmt: skip
_PAIR_WORDS: Final = (*_TIME_WORDS, "segment")
_EXACT_WORDS: Final = ("beg", "to", "ts", "ms", "len", "end", "sec", "from")
"""Words that are too short to be searched at the start of longer ones."""
_OTHER_WORDS: Final = frozenset(
    (
        "rate", "hz", "sr", "date", "year", "month", "day", "id", "char", "chars", "character", "characters", "token",
        "tokens", "page", "line", "verse", "chapter",
    )
)  # fmt: skip
"""Words of names that are not of times: start_char, sample_rate."""
_NUMBER: Final = re.compile(r"-?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?", re.ASCII)
_CLOCK: Final = re.compile(r"(?:(\d+):)?(\d{1,2}):(\d{2}(?:[.,]\d+)?)", re.ASCII)


class ColumnNames:
    """Finds the columns of a manifest's rows.

    Args:
        chosen: column by field, from the config; "" for a field that the table does not have.
        units_per_second: unit of times whose column has none in its name: 1 for seconds, 16000 for samples at 16 kHz.
    """

    def __init__(self, chosen: Mapping[str, str], units_per_second: float = 1.0) -> None:
        self.chosen, self.rate = chosen, units_per_second
        self._known: dict[tuple[str, ...], dict[str, list[str]]] = {}
        self._rates: dict[str, float] = {}
        self._fixed: dict[tuple[str, ...], dict[str, str]] = {}
        """Columns of the shapes of rows for which they do not depend on values."""

    def of(self, row: Mapping[str, Any]) -> dict[str, str]:
        """Returns the column of each field for which the row has a value."""
        names = tuple(row)
        if names in self._fixed:
            return self._fixed[names]
        if names not in self._known:
            self._known[names] = {field: self._candidates(field, names) for field in COLUMNS}
        found = self._found(row, names)
        if not any(self._depends(field, name) for field, chosen in self._known[names].items() for name in chosen):
            self._fixed[names] = found
        return found

    def _found(self, row: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, str]:
        found = {
            field: next((name for name in candidates if self._holds(field, name, row[name])), "")
            for field, candidates in self._known[names].items()
        }
        if _is_weak(found["begin"]) != _is_weak(found["end"]) and not {"begin", "end"} & set(self.chosen):
            found |= {field: "" for field in ("begin", "end") if _is_weak(found[field])}  # from or to, alone
        begin, length = found["begin"], found["seconds"]
        if "seconds" not in self.chosen and _is_weak(length) and (not begin or found["end"]):
            found["seconds"] = ""  # characters or samples, perhaps, where no begin precedes it
        if "end" not in self.chosen and begin and not found["end"] and "onset" in _key(begin):
            found["end"] = next((name for name in names if _OFFSET.fullmatch(_key(name)) and name != begin), "")
        return {field: name for field, name in found.items() if name}

    def unread_times(self, row: Mapping[str, Any], columns: Mapping[str, str]) -> list[str]:
        """Returns the columns with times that change what a row means and that no field reads; [] for most rows.

        Args:
            row: values by column.
            columns: column by field, from `of`.
        """
        used, words = set(columns.values()), tuple[str, ...]()
        if "begin" not in columns and self.chosen.get("begin") != "":
            words = _BEGIN_WORDS
        elif "begin" in columns and "end" not in columns and self.chosen.get("end") != "":
            words = () if "seconds" in columns and not self.is_whole(columns["seconds"]) else _TIME_WORDS
            used -= {columns["seconds"]} if words and "seconds" in columns else set()
        if not words:
            return []
        named = [name for name in row if name not in used and _is_named(name, (*words, *_PAIR_WORDS))]
        return [name for name in named if _is_time(name, row[name], words)]

    def is_whole(self, column: str) -> bool:
        """Returns whether a column of lengths is of whole files by its name, such as audio_duration."""
        return self.chosen.get("seconds") != column and bool(_WHOLE.fullmatch(_key(column)))

    def seconds(self, column: str, value: Any) -> float:
        """Returns a time in seconds, from a number in the column's unit or a clock time (1:02:03.5); NaN for others."""
        text = value.strip() if isinstance(value, str) else ""
        if clock := _CLOCK.fullmatch(text):
            hours, minutes, seconds = (float((part or "0").replace(",", ".")) for part in clock.groups())
            return 3600 * hours + 60 * minutes + seconds if seconds < 60 else math.nan
        number = _number(value)
        if column not in self._rates:
            self._rates[column] = self._rate(column)
        return number if number == -1 else number / self._rates[column]

    def _rate(self, column: str) -> float:
        unit = next((found["unit"] for found in _matches(_key(column)) if found["unit"]), "")
        last = (_words(column) or [""])[-1]
        return _PER_SECOND.get(unit or last, self.rate)

    def _candidates(self, field: str, names: Iterable[str]) -> list[str]:
        if field in self.chosen:
            return [name for name in names if name and name == self.chosen[field]]
        keys = {name: _key(name) for name in names if name not in self.chosen.values()}
        # an exact name first, since Text and text may both be there
        usual = [
            name
            for known in COLUMNS[field]
            for name in sorted(keys, key=lambda n: n != known)
            if keys[name] == _key(known)
        ]
        timed = [name for form in _TIMES.get(field, ()) for name in keys if form.fullmatch(keys[name])]
        counted = []
        if self.rate != 1 and field in ("begin", "end"):
            starts = ("start", "begin", "frameoffset") if field == "begin" else ("end", "stop")
            counted = [n for n in keys if re.fullmatch(rf"(?:{'|'.join(starts)})(?:samples?|frames?)?", keys[n])]
        elif self.rate != 1 and field == "seconds":
            counted = [name for name in keys if re.fullmatch(r"(?:n|num)(?:samples|frames)", keys[name])]
        return list(dict.fromkeys([*usual, *timed, *counted]))

    def _holds(self, field: str, name: str, value: Any) -> bool:
        """Returns whether a column has the field's value: `from` may name a place, and `source` a page."""
        if not self._depends(field, name):
            return True
        text = as_text(value)
        return "/" not in text if field == "corpus" else any(letter.isdigit() for letter in text)

    def _depends(self, field: str, name: str) -> bool:
        """Returns whether it depends on the value whether a column has the field."""
        if field in self.chosen:
            return False
        return _key(name) == "source" if field == "corpus" else field in ("begin", "end") and _is_weak(name)


def _number(value: Any) -> float:
    """Returns a number, or a text of one in the form of JSON; NaN for anything else, such as 1_0, 5,5 and true."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return math.nan
    if isinstance(value, str) and not _NUMBER.fullmatch(value.strip()):
        return math.nan
    try:
        number = float(value)
    except OverflowError:
        return math.nan
    return number if math.isfinite(number) else math.nan


def _key(name: str) -> str:
    return "".join(letter for letter in name.casefold() if letter.isalnum())


def _words(name: str) -> list[str]:
    return [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)]


def _matches(key: str) -> Iterable[re.Match[str]]:
    return (found for forms in _TIMES.values() for form in forms if (found := form.fullmatch(key)))


def _is_weak(column: str) -> bool:
    return _key(column) in _WEAK


def _is_time(name: str, value: Any, words: tuple[str, ...]) -> bool:
    """Returns whether a column has times, by its name and value: a number, a clock time or a pair of numbers."""
    if isinstance(value, list):
        return len(value) == 2 and not any(math.isnan(_number(one)) for one in value) and _is_named(name, _PAIR_WORDS)
    is_number = not math.isnan(_number(value)) or (isinstance(value, str) and bool(_CLOCK.fullmatch(value.strip())))
    return is_number and _is_named(name, words)


@functools.lru_cache(maxsize=4096)
def _is_named(name: str, words: tuple[str, ...]) -> bool:
    given = _words(name)
    if _OTHER_WORDS.intersection(given):
        return False
    long = tuple(word for word in words if word not in _EXACT_WORDS)
    return any(word in words or word.startswith(long) for word in given)
