"""Frame labels from files: tables, NIST's CTM, Praat's TextGrid, and TIMIT's .PHN, also those that a manifest names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Final

from data_pipeline.core.schema import ConfigError
from data_pipeline.core.storage import is_url
from data_pipeline.core.types import SAMPLE_RATE
from data_pipeline.corpora.tables import ENDINGS
from pretrain.evaluate.manifest import Interval, Utterance, intervals_of, read_phones

Aligned = Mapping[str, list[Interval]]
"""Labels by name of an utterance, in seconds from its start."""
COLUMN: Final = "phones"
"""Column of a manifest that names the file of labels of each row; it comes before the alignment of a task."""


def choose_alignment(asked: str, usual: str, utterances: Sequence[Utterance]) -> str:
    """Returns where frame labels are: as the evaluation asks, else in files of the column `phones`, else as usual."""
    return asked or (COLUMN if names_files(COLUMN, utterances) else usual)


def names_files(column: str, utterances: Iterable[Utterance]) -> bool:
    """Returns whether a column names files of labels, by their endings."""
    known = (*READERS, ".ctm", *(f".{ending}" for ending in ENDINGS))
    return any(PurePosixPath(u.labels.get(column, "")).suffix.lower() in known for u in utterances)


def read_alignment(given: str, root: Path, utterances: Sequence[Utterance], tier: str) -> Aligned:
    """Returns the labels of the utterances that have some.

    Args:
        given: a table or CTM file, a folder of TextGrids, the ending of a file beside each recording, such as .PHN, or
            a column with the file of each; relative paths begin at `root`.
        root: folder of the task's data.
        utterances: the utterances.
        tier: name of the tier in TextGrids.

    Raises:
        ConfigError: the file or folder does not exist or cannot be read.
    """
    path = alignment_path(given, root)
    if is_ending(given):
        found = {u.name: _beside(u, given, tier) for u in utterances}
    elif names_files(given, utterances):  # before the folder, since the table of the task phones is in a folder phones
        found = _from_column(given, root, utterances, tier)
    elif path.is_dir():
        found = _from_folder(path, utterances, tier)
    else:
        table = read_ctm(path) if path.suffix.lower() == ".ctm" else read_phones(path)
        by_stem = {PurePosixPath(name).stem: name for name in table} if path.suffix.lower() == ".ctm" else {}
        found = {}
        for u in utterances:
            named = by_stem.get(PurePosixPath(u.file).stem)
            found[u.name] = intervals_of(u, table if named is None else {u.file: table[named]})
    return {name: labels for name, labels in found.items() if labels}


def is_ending(given: str) -> bool:
    """Returns whether an alignment is the ending of a file beside each recording, such as .PHN."""
    return given.startswith(".") and "/" not in given


def alignment_path(given: str, root: Path) -> Path:
    """Returns the place of an alignment; relative paths begin at `root`, the folder of the task's data."""
    return root / Path(given).expanduser()


def read_ctm(file: Path) -> dict[str, list[Interval]]:
    """Reads NIST's CTM: lines of recording, channel, start, duration in seconds, symbol; `;;` begins a comment.

    Raises:
        ConfigError: the file does not exist or a line is not of this form.
    """
    found: dict[str, list[Interval]] = {}
    for number, line in enumerate(_text(file).splitlines(), start=1):
        parts = line.split()
        if not parts or line.startswith(";;"):
            continue
        try:
            name, _, start, duration, symbol = parts[:5]
            interval = Interval(float(start), float(start) + float(duration), symbol)
        except ValueError:
            raise ConfigError(f"{file}: line {number} is not `recording channel start duration symbol`") from None
        found.setdefault(name, []).append(interval)
    return found


def read_textgrid(file: Path, tier: str) -> list[Interval]:
    """Reads the intervals of one tier of a TextGrid, in Praat's long or short form.

    Raises:
        ConfigError: the file cannot be read or has no such tier; names those that it has.
    """
    from praatio import textgrid

    try:
        grid = textgrid.openTextgrid(str(file), includeEmptyIntervals=True)
    except Exception as error:  # praatio raises many types for damaged files
        raise ConfigError(f"{file}: cannot be read as a TextGrid ({type(error).__name__}: {error})") from None
    if tier not in grid.tierNames:
        raise ConfigError(f"{file}: has no tier {tier!r}; it has: {', '.join(grid.tierNames)}; set tier")
    return [Interval(float(start), float(end), label.strip()) for start, end, label in grid.getTier(tier).entries]


def read_samples(file: Path) -> list[Interval]:
    """Reads TIMIT's .PHN and .WRD: lines of first sample, last sample, symbol, at 16 kHz. Raises ConfigError."""
    found = []
    for number, line in enumerate(_text(file).splitlines(), start=1):
        parts = line.split(maxsplit=2)
        if not parts:
            continue
        try:
            start, end, symbol = int(parts[0]), int(parts[1]), parts[2]
        except (ValueError, IndexError):
            raise ConfigError(f"{file}: line {number} is not `first_sample last_sample symbol`") from None
        found.append(Interval(start / SAMPLE_RATE, end / SAMPLE_RATE, symbol.strip()))
    return found


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read ({error})") from None


READERS: Final[dict[str, Callable[[Path, str], list[Interval]]]] = {
    ".textgrid": read_textgrid,
    ".phn": lambda file, _: read_samples(file),
    ".wrd": lambda file, _: read_samples(file),
}
"""Reader of a file with the labels of one recording, by ending in lower case."""


def _beside(utterance: Utterance, ending: str, tier: str) -> list[Interval]:
    """Returns the labels in the file beside a recording; none if there is no such file."""
    reader = READERS.get(ending.lower())
    if reader is None:
        raise ConfigError(f"alignment={ending}: must be one of {', '.join(READERS)}, or the path of a table or folder")
    if is_url(utterance.path):
        return []
    stem = Path(utterance.path).with_suffix("")
    for name in (stem.name + ending, stem.name + ending.lower(), stem.name + ending.upper()):
        if (file := stem.with_name(name)).is_file():
            return intervals_of(utterance, {utterance.file: reader(file, tier)})
    return []


def _from_column(column: str, root: Path, utterances: Sequence[Utterance], tier: str) -> dict[str, list[Interval]]:
    """Reads the file that each row names; its times begin at the start of the recording, also for a part of it."""
    files = {given: root / Path(given).expanduser() for u in utterances if (given := u.labels.get(column, ""))}
    tables = {given: _of_file(file, tier) for given, file in files.items() if file.is_file()}
    if not tables:
        raise ConfigError(
            f"phones={column}: none of the {len(files)} files in this column of the manifest exists, such as "
            f"{next(iter(files.values()))}"
        )
    named = ((u, tables[given]) for u in utterances if (given := u.labels.get(column, "")) in tables)
    return {u.name: intervals_of(u, {u.file: _of_recording(u, table)}) for u, table in named}


def _of_file(file: Path, tier: str) -> dict[str, list[Interval]]:
    """Returns the labels in a file by recording; "" if it names none."""
    ending = file.suffix.lower()
    if ending in READERS:
        return {"": READERS[ending](file, tier)}
    return read_ctm(file) if ending == ".ctm" else read_phones(file, required=("start", "end"))


def _of_recording(utterance: Utterance, table: Mapping[str, list[Interval]]) -> list[Interval]:
    """Returns the labels of an utterance's recording; those of the only one, whatever its name."""
    if len(table) == 1:
        return next(iter(table.values()))
    stem = PurePosixPath(utterance.file).stem
    return table.get(utterance.file) or next((v for name, v in table.items() if PurePosixPath(name).stem == stem), [])


def _from_folder(folder: Path, utterances: Iterable[Utterance], tier: str) -> dict[str, list[Interval]]:
    """Finds each recording's file at the same path below `folder`, or by its name if that is unique there."""
    by_path: dict[str, Path] = {}
    by_stem: dict[str, list[Path]] = {}
    for file in sorted(folder.rglob("*")):
        if file.suffix.lower() in READERS:
            by_path[file.relative_to(folder).with_suffix("").as_posix()] = file
            by_stem.setdefault(file.stem, []).append(file)
    if not by_path:
        raise ConfigError(f"alignment={folder}: holds no files of labels ({', '.join(READERS)})")
    found = {}
    for u in utterances:
        inner = str(PurePosixPath(u.file).with_suffix(""))
        same = by_stem.get(PurePosixPath(u.file).stem, [])
        match = by_path.get(inner) or (same[0] if len(same) == 1 else None)
        if match is not None:
            found[u.name] = intervals_of(u, {u.file: READERS[match.suffix.lower()](match, tier)})
    return found
