"""One task: its utterances, labels and splits, and what encoders and baselines score on it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

from data_pipeline.core.schema import ConfigError
from pretrain.evaluate import alignments, few_shot, intrinsic, label_sets, retrieval, text_probe, verification
from pretrain.evaluate.config import MEASURES, EvaluateConfig, items, layer_numbers
from pretrain.evaluate.features import GRID_HZ, POOLS, Labelled, Waves, grid_frames, phone_frames, pooled
from pretrain.evaluate.frozen_encoders import FrozenEncoder, followed, freeze, log_mel_with_context
from pretrain.evaluate.manifest import SPLITS, Interval, Utterance, grid_labels, reasons
from pretrain.evaluate.metrics import Tally, bootstrap
from pretrain.evaluate.neural_probe import fit_neural
from pretrain.evaluate.probe import View, choose_view, fit, joined
from pretrain.evaluate.rows import Detail, Row
from pretrain.evaluate.supervised import Example, fit_supervised
from pretrain.evaluate.task_data import (
    chosen_corpora,
    data_of,
    divide,
    labelled,
    list_task,
    require_classes,
)
from pretrain.evaluate.tasks import Task, open_task

Say = Callable[[str], None]
Tallies = dict[str, list[Tally]]
"""Hits and trials by speaker of each seed, by the name of the measure."""
SHOWN = 12
"""Classes and unusable recordings that are named before a task starts."""


class TaskEvaluation:
    """One task with its utterances, labels and decoded audio.

    Args:
        config: the evaluation.
        name: a task, or a measure on the labels of the task `config.frames`.
        say: receives progress messages.
        waves: decoded audio, shared by tasks.

    Raises:
        ConfigError: the task's data cannot be read, a column is missing, labels are empty, or it has one class.
        ValueError: a speaker is in two splits.
    """

    def __init__(self, config: EvaluateConfig, name: str, say: Say, waves: Waves | None = None) -> None:
        self.config, self.say, self.waves = config, say, waves or Waves()
        self.details: list[Detail] = []
        self.name = name if name in MEASURES else Path(name).stem
        self.task: Task = open_task(config.frames if name in MEASURES else name)
        self.layers = layer_numbers(config)
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
        self._announce()

    @property
    def kind(self) -> str:
        """The kind of the task."""
        return self.task.config.kind

    def _aligned(self, utterances: Sequence[Utterance]) -> list[Utterance]:
        """Reads the frame labels; returns the utterances that have some."""
        settings, symbols = self.task.config, label_sets.read(self.task.config.label_set)
        given = self.config.phones or settings.alignment
        if not given:
            raise ConfigError(f"task={self.name}: has no frame labels; set phones, or the task's alignment")
        found = alignments.read_alignment(given, self.root, utterances, settings.tier)
        self.phones, self.silence = {name: symbols.intervals(some) for name, some in found.items()}, symbols.silence
        aligned = [u for u in utterances if self.phones.get(u.name)]
        if len(aligned) < len(utterances):
            self.notes.append(f"{len(utterances) - len(aligned)} of {len(utterances)} utterances have no frame labels")
        if not aligned:
            raise ConfigError(f"task={self.name}: {given} has labels of none of its {len(utterances)} utterances")
        return aligned

    def _divided(self, utterances: list[Utterance]) -> list[list[Utterance]]:
        most, ask = self.config.max_utterances, self.config.ask
        if self.kind == "pairs" and self.task.config.trials and (file := self.root / self.task.config.trials).is_file():
            used, self.trials, lost = verification.read_trials(file, utterances)
            speakers = {u.speaker for u in used}
            others = [u for u in utterances if u.speaker not in speakers]
            if lost:
                self.notes.append(f"{lost} trials name recordings that the data lacks")
            return [[], others[:: max(1, len(others) // 200)], used]
        parts, note = divide(self.task, utterances, most, ask, [self.label.get(u.name, "") for u in utterances])
        if note:
            self.notes.append(note)
        return parts

    def _usable(self, parts: list[list[Utterance]]) -> list[list[Utterance]]:
        """Decodes all utterances and leaves out those that cannot be used, which are counted and named."""
        kept, self.seconds, problems = [], 0.0, list[str]()
        for split, part in zip(SPLITS, parts, strict=True):
            usable, bad, seconds = self.waves.usable(part)
            if part and not usable:
                raise ConfigError(f"task={self.name}: no recording of split {split} can be used; {bad[0]}")
            kept.append(usable)
            self.seconds += seconds
            problems += bad
        if problems:
            self._unusable(problems)
            self.notes.append(f"{len(problems)} recordings cannot be used")
            if self.trials is not None:
                raise ConfigError(f"task={self.name}: {len(problems)} recordings of its trials cannot be used")
        return kept

    def _unusable(self, problems: Sequence[str]) -> None:
        for problem in problems[:SHOWN]:
            self.say(f"{self.name}: rejected {problem}")
        if len(problems) > SHOWN:
            self.say(f"{self.name}: and {len(problems) - SHOWN} more")

    def _classes(self) -> dict[str, int]:
        every = [u for part in self.parts for u in part]
        if self.kind == "frames":
            labels = {i.phone for u in every for i in self.phones[u.name]}
        else:
            labels = {self.label[u.name] for u in every} if self.label else set()
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
        if self.kind == "utterances" and len(self.classes) > 1:
            [(common, count)] = Counter(self.label[u.name] for u in self.parts[2]).most_common(1)
            self.say(f"{self.name}: always answering {common!r} would score {count / len(self.parts[2]):.1%}")

    def features(self, encoder: FrozenEncoder, part: Sequence[Utterance]) -> Labelled:
        """Returns the labelled feature vectors of one split."""
        self.say(f"{self.name}: {encoder.name} encodes {len(part)} utterances")
        with followed(encoder, len(part)) as counted:
            if self.kind == "frames":
                return phone_frames(counted, part, self.phones, self.classes, self.waves, self.layers)
            pool = POOLS[self.task.config.pool]
            return pooled(counted, part, self.label, self.classes, self.waves, pool=pool, layers=self.layers)

    def counted(self, test: Labelled) -> dict[str, np.ndarray]:
        """Returns the weight (0 or 1) of each vector, (N,), by the name of the measure."""
        everything = np.ones(len(test.y_N))
        if self.kind != "frames":
            return {"accuracy": everything}
        return {"non-silence frames": 1.0 - np.isin(test.y_N.numpy(), self.silent), "all frames": everything}

    @property
    def silent(self) -> list[int]:
        """The classes of silence."""
        return [self.classes[phone] for phone in sorted(self.silence) if phone in self.classes]

    def scores(self, make: Callable[[int], FrozenEncoder], same: bool) -> Tallies:
        """Returns the tallies of encoders by measure, for each seed.

        Args:
            make: returns the encoder of a seed.
            same: whether the encoder is the same for all seeds. Fits that draw nothing are then made once.
        """
        if self.kind == "text":
            return self._texts(make, same)
        tallies: Tallies = {}
        view: View | None = None
        for seed in range(1 if same else self.config.seeds):
            encoder = make(seed)
            train, valid, test = (self.features(encoder, part) for part in self.parts)
            if self.kind == "ranking":
                found = retrieval.ranking(test, retrieval.best_layer(valid))
                tallies.setdefault("mean average precision", []).append(found)
                continue
            if self.kind == "few_shot":
                for measure, tally in few_shot.tallies(valid, joined(train, test), self.config.few_shot, seed).items():
                    tallies.setdefault(measure, []).append(tally)
                continue
            classes, settings, disjoint = len(self.classes), self.config.probe, self.task.disjoint
            self.say(f"{self.name}: fits a probe to the features of {encoder.name}")
            view = view or choose_view(train, valid, classes, settings, disjoint, self.silent)
            probe = fit(train, classes, view, settings)
            guesses_N = probe.predict(test.x_NLD)
            self._tally(tallies, test, guesses_N)
            if seed == 0:
                self.details.append(self._detail(encoder.name, view, test, guesses_N))
            del train, valid, test  # before the features of the next seed are computed
        return tallies

    def _tally(self, tallies: Tallies, test: Labelled, guesses_N: np.ndarray) -> None:
        hits = (guesses_N == test.y_N.numpy()).astype(float)
        for measure, counts in self.counted(test).items():
            tallies.setdefault(measure, []).append(test.tally(hits, counts))

    def _detail(self, who: str, view: View, test: Labelled, guesses_N: np.ndarray) -> Detail:
        size, (counts_N, *_) = len(self.classes), self.counted(test).values()
        chosen = counts_N > 0
        pairs = test.y_N.numpy()[chosen] * size + guesses_N[chosen]
        confusion_CC = np.bincount(pairs, minlength=size * size).reshape(size, size)
        return Detail(self.name, who, view.by_layer, confusion_CC, tuple(self.classes))

    def neural(self, encoder: FrozenEncoder) -> Tallies:
        """Trains a network with as many weights as the encoder on log-mel with context; returns tallies by measure."""
        assert encoder.fresh is not None
        weights = sum(weight.numel() for weight in encoder.fresh(0).parameters())
        train, valid, test = (self.features(log_mel_with_context(), part) for part in self.parts)
        tallies: Tallies = {}
        for seed in range(self.config.seeds):
            self.say(f"{self.name}: trains a network on log-mel, run {seed + 1} of {self.config.seeds}")
            net = fit_neural(train, valid, len(self.classes), weights, self.config.neural, seed)
            self._tally(tallies, test, net.predict(test.x_NLD[:, 0]))
        return tallies

    def _texts(self, make: Callable[[int], FrozenEncoder], same: bool) -> Tallies:
        tallies: Tallies = {}
        spoken: list[list[text_probe.Spoken]] = []
        for seed in range(self.config.seeds):
            if not (same and spoken):
                encoder = make(seed)
                self.say(f"{self.name}: {encoder.name} encodes {sum(map(len, self.parts))} utterances")
                spoken = [[self._spoken(encoder, u) for u in part] for part in self.parts]
            probe = text_probe.fit_text(spoken[0], spoken[1], self.config.text, seed)
            for measure, by_words in (("word error rate", True), ("character error rate", False)):
                tallies.setdefault(measure, []).append(text_probe.counted(probe, spoken[2], by_words))
        return tallies

    def _spoken(self, encoder: FrozenEncoder, utterance: Utterance) -> text_probe.Spoken:
        x_LFD = encoder.encode(self.waves(utterance))
        chosen = x_LFD[self.layers] if self.layers and len(x_LFD) > 1 else x_LFD
        return text_probe.Spoken(chosen.half(), " ".join(utterance.text.lower().split()), utterance.speaker)

    def supervised(self, encoder: FrozenEncoder) -> Tallies:
        """Trains the encoder's architecture from scratch on the training split; returns tallies by measure."""
        assert encoder.fresh is not None
        examples = [[self._example(u, encoder.rate_hz) for u in part] for part in self.parts]
        tallies: Tallies = {}
        speakers = tuple(sorted({u.speaker for u in self.parts[2]}))
        owners = np.concatenate(
            [np.full(len(e[2]), speakers.index(u.speaker)) for u, e in zip(self.parts[2], examples[2], strict=True)]
        )
        truth = torch.cat([labels for _, _, labels in examples[2]])
        test = Labelled(torch.zeros(0), truth, owners, speakers)
        for seed in range(self.config.seeds):
            self.say(f"{self.name}: trains {encoder.name} from scratch, run {seed + 1} of {self.config.seeds}")
            predict = fit_supervised(
                encoder.fresh(seed),
                train=examples[0],
                valid=examples[1],
                classes=len(self.classes),
                config=self.config.supervised,
                seed=seed,
                per_frame=self.kind == "frames",
                device=self.config.device,
            )
            self._tally(tallies, test, np.concatenate(predict(examples[2])))
        return tallies

    def _example(self, utterance: Utterance, rate_hz: float) -> Example:
        wave_T = self.waves(utterance)
        if self.kind != "frames":
            return wave_T, torch.zeros(1, dtype=torch.long), torch.tensor([self.classes[self.label[utterance.name]]])
        labels = grid_labels(self.phones[utterance.name], len(wave_T) / 16_000, GRID_HZ)
        known = [cell for cell, phone in enumerate(labels) if phone in self.classes]
        frames = grid_frames(rate_hz, 10**9, len(labels))[known]
        return wave_T, frames, torch.tensor([self.classes[labels[cell]] for cell in known], dtype=torch.long)

    def rows(self, encoders: Sequence[FrozenEncoder]) -> list[Row]:
        """Scores the checkpoints, and the baselines of each architecture."""
        if self.task.config.caveat:
            self.say(f"{self.name}: {self.task.config.caveat}")
        return self.verification(encoders) if self.kind == "pairs" else self.probes(encoders)

    def probes(self, encoders: Sequence[FrozenEncoder]) -> list[Row]:
        """Probes the checkpoints, and the baselines of each architecture."""
        rows: list[Row] = []
        log_mel: Tallies = {}
        if self.config.baselines:
            baseline = log_mel_with_context()
            log_mel = self._report(baseline.name, self.scores(lambda seed: baseline, same=True))
            rows += self._rows(baseline.name, log_mel, {}, {}, {})
        for encoder in encoders:
            random: Tallies = {}
            supervised: Tallies = {}
            if self.config.baselines and encoder.fresh is not None:
                name = f"random weights ({encoder.name})"
                made = partial(self.random, encoder)
                random = self._report(name, self.scores(made, same=False))
                rows += self._rows(name, random, log_mel, {}, {})
                fitted = self.kind in ("frames", "utterances")
                if self.config.neural.epochs and fitted:
                    name = f"{log_mel_with_context().name}, network as large as {encoder.name}"
                    rows += self._rows(name, self._report(name, self.neural(encoder)), log_mel, {}, {})
                if self.config.supervised.epochs and fitted:
                    name = f"supervised from scratch ({encoder.name})"
                    supervised = self._report(name, self.supervised(encoder))
                    rows += self._rows(name, supervised, log_mel, random, {})
            found = self._report(encoder.name, self.scores(lambda seed: encoder, same=True))  # noqa: B023
            rows += self._rows(f"{encoder.name} (step {encoder.step})", found, log_mel, random, supervised)
        by_speaker = self.kind == "utterances" and self.task.config.label == ("speaker",)
        return rows + (self.verification(encoders) if by_speaker else [])

    def verification(self, encoders: Sequence[FrozenEncoder]) -> list[Row]:
        """Measures equal error rates: of the task's pairs, or on speakers of the data's splits valid and test."""
        _, valid, test = self.parts
        if self.kind != "pairs":
            everyone = [u for part in self.parts for u in part]
            valid, test = ([u for u in everyone if u.split == split] for split in ("valid", "test"))
            if not valid or len({u.speaker for u in test}) < 2:
                return []

        def measure(encoder: FrozenEncoder) -> intrinsic.Found:
            rate = verification.verification(
                encoder, valid, test, self.waves, self.trials, min(200, self.config.bootstrap)
            )
            return [("EER of verification", rate)]

        return self.unfitted(encoders, measure, context=10)

    def random(self, encoder: FrozenEncoder, seed: int) -> FrozenEncoder:
        """Builds the architecture of `encoder` with the random weights of a seed."""
        assert encoder.fresh is not None
        return freeze(encoder.fresh(seed), f"random weights ({encoder.name})", self.config.device)

    def unfitted(
        self, encoders: Sequence[FrozenEncoder], measure: Callable[[FrozenEncoder], intrinsic.Found], context: int
    ) -> list[Row]:
        """Applies a measure without fitting to log-mel, random weights (mean over seeds) and the checkpoints."""
        rows: list[Row] = []
        if self.config.baselines:
            baseline = log_mel_with_context(context)
            rows += self._found(baseline.name, [measure(baseline)])
            for encoder in encoders:
                if encoder.fresh is not None:
                    found = [measure(self.random(encoder, seed)) for seed in range(self.config.seeds)]
                    rows += self._found(f"random weights ({encoder.name})", found)
        for encoder in encoders:
            rows += self._found(f"{encoder.name} (step {encoder.step})", [measure(encoder)])
        return rows

    def _found(self, who: str, by_seed: Sequence[intrinsic.Found]) -> list[Row]:
        self.say(f"{self.name}: {who} measured")
        rows = []
        for same in zip(*by_seed, strict=True):
            means = np.mean([(i.value, i.low, i.high) for _, i in same], axis=0).tolist()
            rows.append(Row(self.name, same[0][0], who, *means))
        return rows

    def _report(self, who: str, tallies: Tallies) -> Tallies:
        for measure, by_seed in tallies.items():
            value = bootstrap(by_seed, 100).value
            self.say(f"{self.name}, {measure}: {value:.1%}  {who}")
        return tallies

    def _rows(
        self,
        who: str,
        tallies: Tallies,
        log_mel: Tallies,
        random: Tallies,
        supervised: Tallies,
    ) -> list[Row]:
        rows = []
        for measure, by_seed in tallies.items():
            times = self.config.bootstrap
            own = bootstrap(by_seed, times)
            over: list[tuple[float, float, float] | None] = []
            for other in (log_mel, random):
                gap = bootstrap(by_seed, times, other[measure]) if measure in other else None
                over.append((gap.value, gap.low, gap.high) if gap else None)
            retained = None
            if measure in supervised and measure in log_mel:
                base, reference = bootstrap(log_mel[measure], 100).value, bootstrap(supervised[measure], 100).value
                retained = (own.value - base) / (reference - base) if reference > base else None
            rows.append(
                Row(
                    task=self.name,
                    measure=measure,
                    who=who,
                    value=own.value,
                    low=own.low,
                    high=own.high,
                    over_log_mel=over[0],
                    over_random=over[1],
                    retained=retained,
                )
            )
        return rows

    def measures(self, encoders: Sequence[FrozenEncoder]) -> list[Row]:
        """Applies a label-free measure or ABX to every layer on the test split, for checkpoints and baselines."""

        more = {"library": self.config.abx} if self.name == "abx" else {}

        def measure(encoder: FrozenEncoder) -> intrinsic.Found:
            return intrinsic.MEASURES[self.name](
                encoder, self.parts[2], self.phones, self.classes, self.waves, self.silence, **more
            )

        return self.unfitted(encoders, measure, context=0)
