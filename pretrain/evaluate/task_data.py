"""Reads the data of a task: utterances with labels, from manifests, folders, known layouts and shards, and splits."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from data_pipeline.core.rng import keyed_rng
from data_pipeline.core.schema import ConfigError, did_you_mean, suggest
from data_pipeline.corpora.config import CorpusConfig, ManifestCorpus, PathCorpus, WebDatasetCorpus, corpus_type
from data_pipeline.corpora.discovery import discover
from data_pipeline.corpora.manifest import ManifestReader
from data_pipeline.corpora.records import Discovered
from data_pipeline.corpora.tables import TableRow, read_table
from pretrain.evaluate.alignments import COLUMN, alignment_path, is_ending
from pretrain.evaluate.config import MEASURES, OF_HEADS, EvaluateConfig, task_names
from pretrain.evaluate.label_sets import REST
from pretrain.evaluate.manifest import (
    FIELDS,
    FOR_PRETRAINING,
    SPLITS,
    Listing,
    Utterance,
    find_manifest,
    manifest_in,
    read_listing,
    require_disjoint,
    splits_in_words,
    thinned,
    unused_splits,
    utterances_of,
)
from pretrain.evaluate.tasks import Task, TaskConfig, open_task

SHARE: Final = 5
"""One in this many speakers (or takes) is for test, and one for validation, where splits are made."""


def list_task(task: Task, given: str) -> tuple[Listing, Path]:
    """Lists the utterances of a task, with labels from its columns, files and patterns.

    Args:
        task: the task.
        given: its manifest, folder or shards.

    Returns:
        The utterances, and the folder at which relative paths of the task begin.

    Raises:
        ConfigError: the data cannot be read; a table has no column of paths.
    """
    settings, path = task.config, Path(given).expanduser()
    if not path.exists():
        raise ConfigError(f"task={task.name}: its data {given}: there is no such file or folder")
    root = _root(path)
    listing = _listed(settings, path)
    kept = listing.utterances
    if settings.exclude:
        kept = [u for u in kept if not re.search(settings.exclude, u.file)]
    if settings.label_files:
        kept = list(_with_labels(settings, root, kept))
    if settings.split_lists:
        kept = _by_lists(settings, root, kept)
    columns = dict.fromkeys((*listing.columns, *(name for u in kept for name in u.labels)))
    columns |= dict.fromkeys(name for name in FIELDS if any(u.value(name) for u in kept))
    return Listing(kept, tuple(columns), listing.rejects), root


def _listed(settings: TaskConfig, path: Path) -> Listing:
    if settings.tables:
        return _from_tables(settings, path)
    if settings.layout != "auto":
        folders = sorted(f for f in path.iterdir() if f.is_dir()) if settings.each_folder else [path]
        return _discovered(
            [(_corpus(settings.layout, folder), folder.name) for folder in folders], settings.each_folder
        )
    if path.is_file():
        return read_listing(path, settings.columns)
    manifest = manifest_in(path)
    if manifest is not None and not settings.pattern:
        return read_listing(manifest, settings.columns)
    if (path / "_done").is_dir() or any(path.glob("*.tar")):
        return _discovered([(WebDatasetCorpus(path=str(path)), path.name)], False)
    listing = _discovered([(PathCorpus(path=str(path), pattern=settings.pattern), path.name)], False)
    if settings.pattern:
        pattern = re.compile(settings.pattern)
        listing.utterances[:] = [u for u in listing.utterances if pattern.search(u.file)]
    return listing


def _corpus(layout: str, folder: Path) -> CorpusConfig:
    values: dict[str, Any] = {"path": str(folder)}
    if layout == "common_voice":
        values |= {"language": folder.name}
    return corpus_type(layout)(**values)


def _discovered(corpora: Sequence[tuple[CorpusConfig, str]], prefixed: bool) -> Listing:
    utterances, rejects = [], []
    for corpus, name in corpora:
        found = discover(corpus)
        utterances += utterances_of(found.files, f"{name}/" if prefixed else "")
        rejects += found.rejects
    return Listing(utterances, (), rejects)


def _from_tables(settings: TaskConfig, root: Path) -> Listing:
    """Reads a manifest per split; their paths begin at `root`."""
    utterances, rejects, seen = [], [], dict[str, None]()
    for split, pattern in settings.tables.items():
        files = sorted(root.glob(pattern))
        if not files:
            raise ConfigError(f"tables.{split}={pattern}: there is no such file below {root}")
        for file in files:
            found = Discovered()
            corpus = ManifestCorpus(path=str(file), root=str(root), columns=settings.columns, allow_outside=True)
            reader = ManifestReader(corpus, found)
            for row in read_table(corpus.path, f"tables.{split}"):
                reader.add(TableRow(row.number, row.values | {"split": split}, row.problem))
            reader.finish()
            seen |= reader.seen
            utterances += utterances_of(found.recordings.in_place())
            rejects += found.rejects
    return Listing(utterances, tuple(seen), rejects)


def _with_labels(settings: TaskConfig, root: Path, utterances: Iterable[Utterance]) -> Iterator[Utterance]:
    """Adds the columns of `label_files`; utterances that no line names are left out."""
    pattern, known = re.compile(settings.label_pattern), dict[str, dict[str, str]]()
    if "name" not in pattern.groupindex:
        raise ConfigError(f"label_pattern={settings.label_pattern!r}: needs a group (?P<name>…), a file's name")
    for file in sorted(root.glob(settings.label_files)):
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            if match := pattern.search(line):
                values = {name: value or "" for name, value in match.groupdict().items()}
                known[values.pop("name")] = values
    if not known:
        raise ConfigError(f"label_files={settings.label_files}: no line below {root} matches label_pattern")
    for u in utterances:
        if (found := known.get(Path(u.file).stem)) is not None:
            own: dict[str, Any] = {name: value for name, value in found.items() if name in FIELDS}
            yield dataclasses.replace(u, labels={**u.labels, **found}, **own)


def _by_lists(settings: TaskConfig, root: Path, utterances: Iterable[Utterance]) -> list[Utterance]:
    """Takes splits from files with a path per line; recordings in none of them are for train."""
    named: dict[str, str] = {}
    for split, given in settings.split_lists.items():
        file = root / given
        if not file.is_file():
            raise ConfigError(f"split_lists.{split}={given}: there is no such file below {root}")
        for line in file.read_text(encoding="utf-8").splitlines():
            named[line.strip()] = split
    return [dataclasses.replace(u, split=named.get(u.file, "train")) for u in utterances]


def label_of(task: Task, utterance: Utterance) -> str:
    """Returns the label of an utterance before folding; "" if a column of it has no value."""
    parts = [utterance.value(column) for column in task.config.label]
    return "_".join(parts) if all(parts) else ""


def folded(task: Task, label: str) -> str:
    """Returns the label that a label counts as; "" if its utterances are not used."""
    fold = task.config.fold
    return fold.get(label, fold.get(REST, label))


def labelled(task: Task, listing: Listing, utterances: Iterable[Utterance]) -> list[tuple[Utterance, str]]:
    """Returns the utterances whose label is used, with it.

    Raises:
        ConfigError: a column of the label does not exist, or labels are empty; names the columns that exist.
    """
    chosen = list(utterances)
    listed = ", ".join(listing.columns) or "none"
    for column in task.config.label:
        if chosen and not any(u.value(column) for u in chosen):
            near = did_you_mean(f"label: [{found}]" if (found := suggest(column, listing.columns)) else "")
            raise ConfigError(
                f"task={task.name}: no utterance has a value in the column {column!r}, which holds the class{near}; "
                f"set the task's label, or name the column; the columns are: {listed}"
            )
    empty = [u.name for u in chosen if not label_of(task, u)]
    if empty:
        raise ConfigError(
            f"task={task.name}: {len(empty)} of {len(chosen)} utterances have an empty label, such as {empty[0]}; fill "
            f"the column {'+'.join(task.config.label)} or leave these rows out; the columns are: {listed}"
        )
    pairs = ((u, folded(task, label_of(task, u))) for u in chosen)
    return [(u, label) for u, label in pairs if label]


def require_classes(task: Task, classes: Mapping[str, int], listing: Listing) -> None:
    """Raises ConfigError for fewer than two classes, on which every answer would be right."""
    if len(classes) < 2:
        raise ConfigError(
            f"task={task.name}: has {len(classes)} class{'' if len(classes) == 1 else 'es'} "
            f"({', '.join(classes) or 'none'}), and needs two or more; the columns are: {', '.join(listing.columns)}"
        )


def require_test_classes(task: Task, labels: Collection[str], where: str, split: str) -> None:
    """Refuses a test split of one class, on which always answering that class is right.

    Args:
        task: the task.
        labels: the classes of the test split.
        where: what holds the labels, for the message.
        split: the name of the split, likewise.

    Raises:
        ConfigError: there are fewer than two classes.
    """
    if len(labels) < 2:
        raise ConfigError(
            f"task={task.name}: its split {split} has one class in {where} ({', '.join(labels) or 'none'}), and needs "
            "two or more; give it recordings of another class, or divide the data in another way (the column split, "
            "the task's splits, max_utterances)"
        )


def chosen_corpora(task: Task, utterances: Sequence[Utterance], corpora: Sequence[str]) -> list[Utterance]:
    """Returns the utterances of the corpora that are asked for, or else of the task's where the data has those.

    Raises:
        ConfigError: the data has no utterance of them.
    """
    known = sorted({u.corpus for u in utterances})
    wanted = list(corpora) or [name for name in task.config.corpora if name in known]
    chosen = [u for u in utterances if u.corpus in wanted] if wanted else list(utterances)
    if not chosen:
        near = [found for name in corpora if (found := suggest(name, known))]
        instead = did_you_mean(f"corpora={','.join(near)}" if near else "")
        raise ConfigError(
            f"task={task.name}: no utterance of {', '.join(wanted) or 'any corpus'} in its data, which has the corpora "
            f"{', '.join(known) or 'none'}{instead}"
        )
    return chosen


def divide(
    task: Task, utterances: Sequence[Utterance], most: int = 0, ask: str = "test", classes: Sequence[str] = ()
) -> tuple[list[list[Utterance]], str]:
    """Divides utterances into train, valid and test.

    Splits of the data are used as far as it has them. Without test or train, all speakers are divided again; without
    valid, speakers of train are taken. Which speaker goes where depends on the names of the speakers alone. Utterances
    for pretraining are in no split, unless the task's `splits` name them.

    Args:
        task: the task.
        utterances: all utterances.
        most: maximum number of utterances per split; 0: all.
        ask: split that is evaluated. "valid": the data's valid becomes test, and a few speakers of train valid.
        classes: class of each utterance, for tasks that divide the takes of a class.

    Returns:
        The three splits, and how they were made and what is in none of them; "" where all are the data's own.

    Raises:
        ConfigError: a split is empty, or speakers are not known.
        ValueError: a speaker is in two splits.
    """
    if not task.disjoint:
        parts, note = _takes(utterances, classes), f"every {SHARE}th utterance of a class is for test"
        if ask == "valid":
            parts = [parts[0], parts[2], parts[1]]
    else:
        parts, note = _speakers(task, utterances)
        require_disjoint(*parts)
        if ask == "valid":
            kept = sorted({u.speaker for u in parts[0]})[::6]
            inner = [u for u in parts[0] if u.speaker in kept]
            parts = [[u for u in parts[0] if u.speaker not in kept], inner, parts[1]]
    if empty := [split for split, part in zip(SPLITS, parts, strict=True) if not part]:
        speakers = len({u.speaker for u in utterances})
        raise ConfigError(
            f"task={task.name}: no utterance for {' and '.join(empty)}: {len(utterances)} utterances of {speakers} "
            f"speakers, splits {', '.join(sorted({u.split or 'none' for u in utterances})) or 'none'}; give data of "
            "three or more speakers, or set the task's splits to the values of the column split"
        )
    return [thinned(part, most) for part in parts], note


def _takes(utterances: Sequence[Utterance], classes: Sequence[str]) -> list[list[Utterance]]:
    parts: list[list[Utterance]] = [[], [], []]
    seen: Counter[str] = Counter()
    for u, name in zip(utterances, classes, strict=True):
        turn = seen[name] % SHARE
        seen[name] += 1
        parts[2 if turn == 0 else 1 if turn == 1 else 0].append(u)
    return parts


def _speakers(task: Task, utterances: Sequence[Utterance]) -> tuple[list[list[Utterance]], str]:
    nameless = sum(not u.speaker for u in utterances)
    if nameless:
        raise ConfigError(
            f"task={task.name}: {nameless} of {len(utterances)} utterances have no speaker, so that splits may share "
            "speakers; name the column (columns: {speaker: NAME}), or set split_by: takes and read the figure with care"
        )
    by_split: dict[str, list[Utterance]] = {split: [] for split in (*SPLITS, "")}
    for u in utterances:
        by_split[split_of(task, u)].append(u)
    train, valid, test, others = by_split.values()
    notes = []
    if not (train and test):
        others = [u for u in others if u.split.casefold() == FOR_PRETRAINING]
        divided = [u for u in utterances if split_of(task, u) or u.split.casefold() != FOR_PRETRAINING]
        (train, valid, test), counts = _divided(divided)
        notes.append(f"speakers were divided: {counts[0]} train, {counts[1]} valid, {counts[2]} test")
        if any(u.split for u in divided):
            notes.append(f"splits of the data, which lack train or test: {splits_in_words(divided)}")
    elif not valid:
        order = _shuffled(train)
        held = set(order[: max(1, len(order) // SHARE)])
        train, valid = [u for u in train if u.speaker not in held], [u for u in train if u.speaker in held]
        notes.append(f"{len(held)} of {len(order)} speakers of train are for validation")
    if others:
        notes.append(unused_splits(others))
    return [train, valid, test], "; ".join(notes)


def split_of(task: Task, utterance: Utterance) -> str:
    """Returns the split of an utterance, by the values that the task names or else the usual ones; "" for others."""
    named = task.config.splits
    own = next((split for split, values in named.items() if utterance.split in values), "")
    return own or ("" if utterance.part in named else utterance.part)


def _divided(utterances: Sequence[Utterance]) -> tuple[list[list[Utterance]], list[int]]:
    """Divides all speakers; returns the three splits, and the number of speakers of each."""
    order = _shuffled(utterances)
    share = max(1, len(order) // SHARE)
    owner = {name: 2 if at < share else 1 if at < 2 * share else 0 for at, name in enumerate(order)}
    parts = [[u for u in utterances if owner[u.speaker] == number] for number in range(3)]
    return parts, [sum(value == number for value in owner.values()) for number in range(3)]


def _shuffled(utterances: Iterable[Utterance]) -> list[str]:
    """Returns the speakers in an order that depends on their names alone."""
    names = sorted({u.speaker for u in utterances})
    return [names[i] for i in keyed_rng(0, "splits").permutation(len(names))]


def data_of(config: EvaluateConfig, task: Task) -> str:
    """Returns the manifest, folder or shards of a task. Raises ConfigError if none is given."""
    given = config.data.get(task.name) or task.config.data
    return given or str(find_manifest(config.manifest))


def inputs(config: EvaluateConfig) -> dict[str, str]:
    """Returns the data of each task of an evaluation, by its name. Raises ConfigError for a task without data."""
    found = {}
    for name in task_names(config):
        if name in OF_HEADS:
            found[name] = str(find_manifest(config.manifest))
        else:
            task = open_task(config.frames if name in MEASURES else name)
            found[task.name] = data_of(config, task)
    return found


def alignments(config: EvaluateConfig) -> Iterator[str]:
    """Yields the table or folder of frame labels of each task of an evaluation, unless its manifest names files."""
    for name in task_names(config):
        if name in OF_HEADS:
            continue
        task = open_task(config.frames if name in MEASURES else name)
        given = config.phones or task.config.alignment
        if task.config.kind == "frames" and given and not is_ending(given):
            data = Path(data_of(config, task)).expanduser()
            path = alignment_path(given, _root(data))
            if path.exists() or not _has_column(data, config.phones or COLUMN):
                yield str(path)


def _has_column(data: Path, column: str) -> bool:
    """Returns whether a row of a task's manifest has a column; False for data without a manifest."""
    manifest = data if data.is_file() else manifest_in(data)
    return manifest is not None and any(column in row.values for row in read_table(str(manifest), "manifest"))


def _root(data: Path) -> Path:
    """Returns the folder at which relative paths of a task's data begin."""
    return data.parent if data.is_file() else data


def data_fingerprint(path: Path) -> str:
    """Returns a hash of a manifest's content, or of the names and sizes of all files below a folder."""
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    found = hashlib.sha256()
    for file in sorted(path.rglob("*")):
        if file.is_file():
            found.update(
                f"{file.relative_to(path).as_posix()}\0{file.stat().st_size}\n".encode("utf-8", "surrogateescape")
            )
    return found.hexdigest()
