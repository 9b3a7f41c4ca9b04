"""The inputs of one task: its utterances, labels, splits and decoded audio."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from data_pipeline.core.schema import ConfigError
from pretrain.evaluate import alignments, definitions, label_sets, verification
from pretrain.evaluate.config import MEASURES, EvaluateConfig, items, layer_numbers
from pretrain.evaluate.features import POOLS, Labelled, Waves, phone_frames, pooled
from pretrain.evaluate.frozen_encoders import FrozenEncoder, followed
from pretrain.evaluate.manifest import SPLITS, Interval, Utterance, reasons
from pretrain.evaluate.metrics import NON_SILENCE
from pretrain.evaluate.task_data import (
    chosen_corpora,
    data_of,
    divide,
    labelled,
    list_task,
    require_classes,
    require_test_classes,
)
from pretrain.evaluate.tasks import Task, open_task
from pretrain.recognition.error_rates import require_jiwer

Say = Callable[[str], None]
SHOWN = 12
"""Classes and unusable recordings that are named before a task starts."""


class TaskInputs:
    """The utterances of one task, with labels, splits and decoded audio.

    Args:
        config: the evaluation.
        name: a task, or a measure on the labels of the task `config.frames`.
        say: receives progress messages.
        waves: decoded audio, shared by tasks.

    Raises:
        ConfigError: the task's data or list of trials cannot be read, a column is missing, labels are empty, it or its
            test split has one class, or a package that it needs is missing.
        ValueError: a speaker is in two splits.
    """

    def __init__(self, config: EvaluateConfig, name: str, say: Say, waves: Waves | None = None) -> None:
        self.config, self.say, self.waves = config, say, waves or Waves()
        self.name = definitions.title(name)
        self.task: Task = open_task(config.frames if name in MEASURES else name)
        self.layers = layer_numbers(config)
        self.label_set = config.label_set or self.task.config.label_set
        self.alignment = ""
        """Where the frame labels are; "" for other kinds."""
        self.phones: dict[str, list[Interval]] = {}
        self.label: dict[str, str] = {}
        self.silence: frozenset[str] = frozenset()
        self.trials: verification.Trials | None = None
        self.notes: list[str] = []
        given = data_of(config, self.task)
        listing, self.root = list_task(self.task, given)
        if listing.rejects:
            self._unusable([f"{one.path}: {one.reason} ({one.error})" for one in listing.rejects])
            self.notes.append(f"{len(listing.rejects)} rows rejected ({reasons(listing.rejects)})")
        utterances = chosen_corpora(self.task, listing.utterances, items(config.corpora))
        if self.kind == "frames":
            utterances = self._aligned(utterances)
        elif self.kind == "text":
            require_jiwer()
            utterances = [u for u in utterances if u.text.strip()]
            if not utterances:
                raise ConfigError(
                    f"task={self.name}: no utterance has a text; the columns are: {', '.join(listing.columns)}"
                )
        elif self.kind == "pairs":
            self.label = {u.name: u.speaker for u in utterances}
        else:
            found = labelled(self.task, listing, utterances)
            utterances, self.label = [u for u, _ in found], {u.name: label for u, label in found}
        self.parts = self._usable(self._divided(utterances))
        self.classes = self._classes()
        if self.kind != "text":
            require_classes(self.task, self.classes, listing)
        if self.kind in ("frames", "utterances", "ranking"):  # pairs has its own check; few_shot joins train and test
            where = self.alignment or f"the column {'+'.join(self.task.config.label)}"
            require_test_classes(self.task, self._labels(self.parts[2]), where, config.ask)
        self._announce()

    @property
    def kind(self) -> str:
        """The kind of the task."""
        return self.task.config.kind

    def _aligned(self, utterances: Sequence[Utterance]) -> list[Utterance]:
        """Reads the frame labels; returns the utterances that have some."""
        settings, symbols = self.task.config, label_sets.read(self.label_set)
        self.alignment = given = alignments.choose_alignment(self.config.phones, settings.alignment, utterances)
        if not given:
            raise ConfigError(
                f"task={self.name}: has no frame labels; set phones, the task's alignment, or name a file per "
                f"recording in the manifest's column {alignments.COLUMN}"
            )
        found = alignments.read_alignment(given, self.root, utterances, settings.tier)
        self.phones, self.silence = {name: symbols.intervals(some) for name, some in found.items()}, symbols.silence
        aligned = [u for u in utterances if self.phones.get(u.name)]
        if len(aligned) < len(utterances):
            without = [u.name for u in utterances if not self.phones.get(u.name)]
            self.notes.append(
                f"{len(without)} of {len(utterances)} utterances have no frame labels, such as {without[0]}"
            )
        if not aligned:
            raise ConfigError(f"task={self.name}: {given} has labels of none of its {len(utterances)} utterances")
        return aligned

    def _divided(self, utterances: list[Utterance]) -> list[list[Utterance]]:
        most, ask = self.config.max_utterances, self.config.ask
        if self.kind == "pairs" and self.task.config.trials:
            used, self.trials, lost = verification.read_trials(self.root / self.task.config.trials, utterances)
            speakers = {u.speaker for u in used}
            others = [u for u in utterances if u.speaker not in speakers]
            if lost:
                self.notes.append(f"{lost} trials name recordings that the data lacks")
            return [[], verification.sampled(others), used]
        parts, note = divide(self.task, utterances, most, ask, [self.label.get(u.name, "") for u in utterances])
        if note:
            self.notes.append(note)
        return parts

    def _usable(self, parts: list[list[Utterance]]) -> list[list[Utterance]]:
        """Decodes all utterances and leaves out those that cannot be used, which are counted and named."""
        kept, self.seconds, problems = [], 0.0, dict[str, list[str]]()
        for split, part in zip(SPLITS, parts, strict=True):
            usable, problems[split], seconds = self.waves.usable(part)
            if part and not usable:
                raise ConfigError(f"task={self.name}: no recording of split {split} can be used; {problems[split][0]}")
            kept.append(usable)
            self.seconds += seconds
        if found := [problem for some in problems.values() for problem in some]:
            self._unusable(found)
            self.notes.append(f"{len(found)} recordings cannot be used")
        if self.trials is not None and (lost := problems["test"]):
            raise ConfigError(f"task={self.name}: {len(lost)} recordings of its trials cannot be used; {lost[0]}")
        return kept

    def _unusable(self, problems: Sequence[str]) -> None:
        for problem in problems[:SHOWN]:
            self.say(f"{self.name}: rejected {problem}")
        if len(problems) > SHOWN:
            self.say(f"{self.name}: and {len(problems) - SHOWN} more")

    def _labels(self, utterances: Sequence[Utterance]) -> set[str]:
        if self.kind == "frames":
            return {i.phone for u in utterances for i in self.phones[u.name]}
        return {self.label[u.name] for u in utterances} if self.label else set()

    def _classes(self) -> dict[str, int]:
        labels = self._labels([u for part in self.parts for u in part])
        return {label: number for number, label in enumerate(sorted(labels))}

    def _announce(self) -> None:
        """Says what was found before anything is computed: hours, speakers and utterances of each split, classes."""
        sizes = ", ".join(
            f"{split} {len(part)} of {len({u.speaker for u in part})} speakers"
            for split, part in zip(SPLITS, self.parts, strict=True)
            if part
        )
        shown = list(self.classes)[:SHOWN] + (["…"] if len(self.classes) > SHOWN else [])
        classes = f"; {len(self.classes)} classes: {' '.join(shown)}" if self.classes and self.kind != "pairs" else ""
        notes = "".join(f"; {note}" for note in self.notes)
        self.say(f"{self.name}: {self.seconds / 3600:.2f} h; utterances: {sizes}{classes}{notes}")
        if self.kind == "frames" and not self.silent:
            self.say(
                f"{self.name}: warning: none of these classes is silence in label_set={self.label_set}, so pauses "
                f"count as speech; if they have labels, set label_set ({', '.join(definitions.names('label_set'))})"
            )
        if self.kind == "utterances" and len(self.classes) > 1:
            [(common, count)] = Counter(self.label[u.name] for u in self.parts[2]).most_common(1)
            self.say(f"{self.name}: always answering {common!r} would score {count / len(self.parts[2]):.1%}")

    def features(self, encoder: FrozenEncoder, part: Sequence[Utterance]) -> Labelled:
        """Returns the labelled feature vectors of one split."""
        self.say(f"{self.name}: {encoder.name} encodes {len(part)} utterances")
        with followed(encoder, len(part)) as counted:
            if self.kind == "frames":
                return phone_frames(
                    counted, part, phones=self.phones, classes=self.classes, waves=self.waves, layers=self.layers
                )
            pool = POOLS[self.task.config.pool]
            return pooled(counted, part, self.label, self.classes, self.waves, pool=pool, layers=self.layers)

    def counted(self, test: Labelled) -> dict[str, np.ndarray]:
        """Returns the weight (0 or 1) of each vector, (N,), by the name of the measure."""
        everything = np.ones(len(test.y_N))
        if self.kind != "frames":
            return {"accuracy": everything}
        return {NON_SILENCE: 1.0 - np.isin(test.y_N.numpy(), self.silent), "all frames": everything}

    @property
    def silent(self) -> list[int]:
        """The classes of silence."""
        return [self.classes[phone] for phone in sorted(self.silence) if phone in self.classes]
