"""Corpora of lhotse: its recipes, which list about a hundred public corpora, and its manifests on disk.

Both give recordings with supervisions, or cuts. Each supervision, and each recording or cut without one, becomes a row
of a manifest, so joining, rejects and labels are those of `manifest.py`. Audio that lhotse would get from a command is
refused.
"""

from __future__ import annotations

import gzip
import itertools
import json
import operator
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from data_pipeline.core.external_sort import ExternalSort
from data_pipeline.core.jsonl import each_line
from data_pipeline.core.schema import ConfigError, hint
from data_pipeline.corpora.config import LhotseCorpus, ManifestCorpus
from data_pipeline.corpora.manifest import ManifestReader
from data_pipeline.corpora.records import Discovered
from data_pipeline.corpora.tables import TableRow

KINDS: Final = ("recordings", "supervisions", "cuts")
WHOLE_SECONDS: Final = 0.05
"""A supervision that leaves out less than this at both ends of a recording covers all of it."""
LABELS: Final = ("gender", "accent", "emotion")
"""Fields of a supervision, or of its `custom`, that become labels."""

Part = dict[str, Iterable[Mapping[str, Any]]]
"""The manifests of one split: recordings, supervisions and cuts, as plain values."""


def read_lhotse(corpus: LhotseCorpus, found: Discovered) -> None:
    """Adds the recordings of a corpus that lhotse describes.

    Args:
        corpus: The recipe or the manifests.
        found: Gets recordings, and rows that cannot be used.

    Raises:
        ConfigError: There is no such recipe, it fails, or there are no manifests.
    """
    path = Path(corpus.path).expanduser()
    parts = _prepared(corpus, path) if corpus.recipe else _stored(path)
    root = corpus.root or str(path if path.is_dir() else path.parent)
    name = corpus.corpus or corpus.recipe or path.name.partition(".")[0]
    table = ManifestCorpus(
        path=corpus.path, root=root, corpus=name, language=corpus.language, splits=corpus.splits, allow_outside=True
    )
    reader, number = ManifestReader(table, found), 0
    for split, part in parts:
        for values, problem in _rows(part, found.recordings.folder):
            number += 1
            reader.add(TableRow(number, {} if problem else {"split": split, **values}, problem))
    reader.finish()


def _prepared(corpus: LhotseCorpus, path: Path) -> list[tuple[str, Part]]:
    """Runs a recipe; it lists files and writes nothing."""
    try:
        from lhotse import recipes
    except ImportError:
        raise ConfigError(f"corpus.recipe={corpus.recipe}: needs the package lhotse; pip install lhotse") from None
    known = sorted(name.removeprefix("prepare_") for name in dir(recipes) if name.startswith("prepare_"))
    if corpus.recipe not in known:
        raise ConfigError(
            f"corpus.recipe={corpus.recipe}: lhotse has no such recipe{hint(corpus.recipe, known)}; it has "
            f"{len(known)}, see `lhotse prepare --help`"
        )
    if not path.is_dir():
        raise ConfigError(f"corpus.path={corpus.path}: there is no such folder")
    try:
        made = getattr(recipes, f"prepare_{corpus.recipe}")(path.absolute(), **corpus.options)
    except Exception as error:  # each of about a hundred recipes has its own
        raise ConfigError(
            f"corpus.recipe={corpus.recipe}: lhotse cannot list {corpus.path} ({type(error).__name__}: {error}). Set "
            "its further arguments by corpus.options, or write manifests with `lhotse prepare` and name their folder "
            "as corpus.path without corpus.recipe"
        ) from None
    return list(_splits(made, ""))


def _splits(made: Mapping[str, Any], name: str) -> Iterator[tuple[str, Part]]:
    """Yields the manifests of each split of what a recipe returned, which may be nested (by language, say)."""
    kinds: Part = {kind: made[kind].to_dicts() for kind in KINDS if hasattr(made.get(kind), "to_dicts")}
    if kinds:
        yield name, kinds
    for key, value in made.items():
        if isinstance(value, Mapping):
            yield from _splits(value, f"{name}-{key}" if name else str(key))


def _stored(path: Path) -> list[tuple[str, Part]]:
    """Reads manifests; of a folder with recordings its cuts are left out, since they are of the same audio."""
    files = [path] if path.is_file() else sorted(path.glob("*.jsonl*")) if path.is_dir() else []
    found: dict[str, dict[str, list[Path]]] = {}
    for file in files:
        kind = next((kind for kind in KINDS if kind in file.name), "cuts" if file == path else "")
        if kind:
            split = re.sub(r"^.*?(recordings|supervisions|cuts)_?|\.jsonl.*$", "", file.name)
            found.setdefault(split, {}).setdefault(kind, []).append(file)
    if not found:
        raise ConfigError(
            f"corpus.path={path}: holds no manifests of lhotse (*recordings*.jsonl.gz, *supervisions*.jsonl.gz or "
            "*cuts*.jsonl.gz); set corpus.recipe to list a corpus by one of lhotse's recipes"
        )
    if any("recordings" in kinds for kinds in found.values()):
        found = {split: {kind: kinds[kind] for kind in kinds if kind != "cuts"} for split, kinds in found.items()}
    return [
        (split, {kind: itertools.chain.from_iterable(map(_objects, files)) for kind, files in kinds.items()})
        for split, kinds in sorted(found.items())
    ]


def _objects(path: Path) -> Iterator[Mapping[str, Any]]:
    """Yields the rows of a manifest, which need not fit into memory."""
    with path.open("rb") as plain:
        is_packed = plain.read(2) == b"\x1f\x8b"
    try:
        with gzip.open(path) if is_packed else path.open("rb") as file:
            for line in each_line(file):
                yield line.row if line.row is not None else {"problem": line.problem}
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(f"corpus.path: {path} is damaged ({error})") from None


def _rows(part: Part, scratch: Path | None) -> Iterator[tuple[dict[str, Any], str]]:
    """Yields (values, problem) of each row that the manifests of one split mean, in the order of the recordings.

    Recordings and supervisions meet in an external sort by the recording's id.
    """
    joined, of_recordings = ExternalSort(scratch), ExternalSort(scratch)
    for kind, key in (("recordings", "id"), ("supervisions", "recording_id")):
        for one in part.get(kind, ()):
            if "problem" in one:
                yield {}, f"{kind[:-1]}: {one['problem']}"
            else:
                joined.add(str(one.get(key)), (len(joined), kind == "recordings", json.dumps(one)))
    for name, same in itertools.groupby(joined, key=operator.itemgetter(0)):
        items = [item for _, item in same]
        place, found = next(((n, text) for n, is_recording, text in reversed(items) if is_recording), (items[0][0], ""))
        of_recordings.add(place, (name, found, [text for _, is_recording, text in items if not is_recording]))
    for _, (name, found, said) in of_recordings:
        supervisions = [json.loads(text) for text in said]
        if found:
            yield from _spans_of(json.loads(found), supervisions)
        else:
            yield from (
                ({}, f"supervision {one.get('id')} is of recording {name}, which is not listed") for one in supervisions
            )
    for cut in part.get("cuts", ()):
        if "problem" in cut:
            yield {}, f"cut: {cut['problem']}"
        else:
            yield from _of_cut(cut)


def _of_cut(cut: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    recording, start = cut.get("recording"), cut.get("start", 0.0)
    if not isinstance(recording, Mapping) or not isinstance(start, int | float):
        yield {}, f"cut {cut.get('id')} is of type {cut.get('type')}, and only cuts of one recording are read"
        return
    whole = {"start": 0.0, "duration": cut.get("duration"), "channel": cut.get("channel")}
    inside = [one for one in cut.get("supervisions") or () if isinstance(one, Mapping)] or [whole]
    moved = [{**one, "start": _plus(one.get("start"), start)} for one in inside]
    yield from _spans_of(recording, moved)


def _spans_of(
    recording: Mapping[str, Any], supervisions: Iterable[Mapping[str, Any]]
) -> Iterator[tuple[dict[str, Any], str]]:
    """Yields the rows of one recording: one for each supervision, or one for all of it."""
    sources = recording.get("sources") or [{}]
    source, seconds = sources[0], recording.get("duration")
    problem = ""
    if source.get("type") not in ("file", "url"):
        kinds = f"of type {source.get('type')}"
        problem = f"recording {recording.get('id')} is {kinds}; only files and URLs are read, and no commands are run"
    if len(sources) > 1 and not problem:
        problem = f"recording {recording.get('id')} is spread over {len(sources)} files"
    if recording.get("transforms") and not problem:
        problem = f"recording {recording.get('id')} has transforms, which belong to training: see data.augment"
    base = {"path": source.get("source"), "seconds": seconds}
    several = len(recording.get("channel_ids") or ()) > 1
    for one in supervisions or [{}]:
        custom = one.get("custom") if isinstance(one.get("custom"), Mapping) else {}
        row = base | {name: one.get(name) for name in ("speaker", "language", "text")}
        row |= {name: one.get(name) or (custom or {}).get(name) for name in LABELS}
        if "start" in one and not _covers(one, seconds):
            row |= {"begin": one["start"], "end": _plus(one["start"], one.get("duration"))}
        channel = one.get("channel")
        channel = channel[0] if isinstance(channel, list) and len(channel) == 1 else channel
        if several and isinstance(channel, int):
            row["channel"] = channel
        yield {name: value for name, value in row.items() if value is not None}, problem


def _covers(supervision: Mapping[str, Any], seconds: Any) -> bool:
    start, duration = supervision.get("start"), supervision.get("duration")
    if not all(isinstance(value, int | float) for value in (start, duration, seconds)):
        return False
    return bool(abs(start or 0.0) <= WHOLE_SECONDS and abs((duration or 0.0) - seconds) <= WHOLE_SECONDS)


def _plus(start: Any, more: Any) -> Any:
    """Returns the sum of two times; a value that is not a number is returned for the row's own error."""
    if isinstance(start, int | float) and isinstance(more, int | float):
        return start + more
    return start if not isinstance(start, int | float) else more
