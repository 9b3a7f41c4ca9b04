"""Evaluates checkpoints and baselines on each task; returns the rows of one table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from data_pipeline.core.schema import ConfigError
from pretrain.evaluate import asr, intrinsic, streaming
from pretrain.evaluate.config import EvaluateConfig, items, layer_numbers, task_names
from pretrain.evaluate.features import GRID_HZ, SILENCE, Labelled, Waves, grid_frames, phone_frames, pooled
from pretrain.evaluate.frozen_encoders import FrozenEncoder, freeze, log_mel_with_context, open_encoder
from pretrain.evaluate.intrinsic import point, verification
from pretrain.evaluate.manifest import (
    Utterance,
    find_manifest,
    grid_labels,
    read_manifest,
    read_phones,
    require_disjoint,
)
from pretrain.evaluate.metrics import Tally, bootstrap
from pretrain.evaluate.probe import View, choose_view, fit_probe
from pretrain.evaluate.supervised import Example, fit_supervised
from pretrain.evaluate.tasks import MEASURES, PROBES, RECOGNITION, Task, splits
from pretrain.recognition.recogniser import open_recogniser

Say = Callable[[str], None]


@dataclass(frozen=True)
class Row:
    """One row of the table. Intervals are 95 % over test speakers; differences are paired by speaker.

    For measures without fitting, value and interval of random weights are means over the seeds.
    """

    task: str
    measure: str
    who: str
    value: float
    low: float = float("nan")
    high: float = float("nan")
    over_log_mel: tuple[float, float, float] | None = None
    over_random: tuple[float, float, float] | None = None
    retained: float | None = None
    """(value − log-mel) / (supervised − log-mel)."""


def evaluate(config: EvaluateConfig, say: Say = print, encoders: Sequence[FrozenEncoder] = ()) -> list[Row]:
    """Evaluates all checkpoints on all tasks.

    Args:
        config: checkpoints, tasks, manifest and settings of the probes.
        say: receives progress messages, one line each.
        encoders: the checkpoints, if they are already loaded.

    Returns:
        One row per task, measure and encoder, including baselines.

    Raises:
        ConfigError: a task, checkpoint or corpus is unknown.
        ValueError: a checkpoint or the manifest is damaged.
    """
    names, _ = task_names(config), layer_numbers(config)
    if not encoders and not items(config.checkpoint):
        raise ConfigError(f"checkpoint={config.checkpoint}: names no checkpoint")
    probing = [name for name in names if name not in RECOGNITION]
    if probing and not encoders:
        encoders = [open_encoder(given, config.device) for given in items(config.checkpoint)]
    utterances = read_manifest(find_manifest(config.manifest))
    rows: list[Row] = []
    for name in names:
        if name in RECOGNITION:
            rows += _recognition(config, name, utterances, say)
            continue
        task = TaskEvaluation(config, name, utterances, say)
        rows += task.measures(encoders) if name in MEASURES else task.probes(encoders)
    return rows


def _recognition(config: EvaluateConfig, task: str, utterances: Sequence[Utterance], say: Say) -> list[Row]:
    """Measures the error rates of the checkpoints, which must be recognisers, or their streams."""
    rows, waves = [], Waves()
    for given in items(config.checkpoint):
        recogniser = open_recogniser(given, config.asr.head, config.device)
        who = f"{recogniser.name} (step {recogniser.step})"
        if task == "streaming":
            found = streaming.report(config, recogniser, utterances, waves, say)
        else:
            rates = asr.error_rates(config, recogniser, utterances, waves, say)
            found = ((f"{measure}, {decoder}", rate) for measure, decoder, rate in rates)
        rows += [Row(task, measure, who, rate.value, rate.low, rate.high) for measure, rate in found]
    return rows


class TaskEvaluation:
    """One task with its utterances, phones and decoded audio."""

    def __init__(self, config: EvaluateConfig, name: str, utterances: Sequence[Utterance], say: Say) -> None:
        self.config, self.name, self.say = config, name, say
        self.task: Task = PROBES.get(name, PROBES["phones"])
        corpora = items(config.corpora)
        self.phones = {}
        if self.task.target is None:
            self.phones = read_phones(find_manifest(config.manifest).parent / config.phones)
            utterances = [u for u in utterances if u.name in self.phones]
        self.parts = splits(self.task, utterances, corpora, config.max_utterances, config.ask)
        if not self.task.hold_out:
            require_disjoint(self.parts[0], self.parts[2])
        labels = (
            {i.phone for part in self.parts for u in part for i in self.phones[u.name]}
            if self.task.target is None
            else {self.task.target(u) for part in self.parts for u in part}
        )
        self.classes = {label: number for number, label in enumerate(sorted(labels))}
        self.layers = layer_numbers(config)
        self.waves = Waves()

    def features(self, encoder: FrozenEncoder, part: Sequence[Utterance]) -> Labelled:
        """Returns the labelled feature vectors of one split."""
        self.say(f"{self.name}: {encoder.name} encodes {len(part)} utterances")
        if self.task.target is None:
            return phone_frames(encoder, part, self.phones, self.classes, self.waves, self.layers)
        return pooled(encoder, part, self.task.target, self.classes, self.waves, self.task.pool, self.layers)

    def counted(self, test: Labelled) -> dict[str, np.ndarray]:
        """Returns the weight (0 or 1) of each vector, (N,), by the name of the measure."""
        everything = np.ones(len(test.y_N))
        if self.task.target is not None:
            return {"accuracy": everything}
        silent = [self.classes[phone] for phone in SILENCE if phone in self.classes]
        return {"non-silence frames": 1.0 - np.isin(test.y_N.numpy(), silent), "all frames": everything}

    def probe(self, make: Callable[[int], FrozenEncoder], same: bool) -> dict[str, list[Tally]]:
        """Fits a probe per seed and returns their tallies by measure.

        Args:
            make: returns the encoder of a seed.
            same: whether the encoder is the same for all seeds, so that its features are computed once.
        """
        tallies: dict[str, list[Tally]] = {}
        parts: list[Labelled] = []
        view: View | None = None
        for seed in range(self.config.seeds):
            if not (same and parts):
                parts = []  # frees the last seed's features before the next are computed
                encoder = make(seed)
                parts = [self.features(encoder, part) for part in self.parts]
            train, valid, test = parts
            view = view or choose_view(train, valid, len(self.classes), self.config.probe, seed)
            probe = fit_probe(train, valid, len(self.classes), self.config.probe, seed, view)
            hits = (probe.predict(test.x_NLD) == test.y_N.numpy()).astype(float)
            for measure, counts in self.counted(test).items():
                tallies.setdefault(measure, []).append(test.tally(hits, counts))
        return tallies

    def supervised(self, encoder: FrozenEncoder) -> dict[str, list[Tally]]:
        """Trains the encoder's architecture from scratch on the training split; returns tallies by measure."""
        assert encoder.fresh is not None
        examples = [[self._example(u, encoder.rate_hz) for u in part] for part in self.parts]
        tallies: dict[str, list[Tally]] = {}
        speakers = tuple(sorted({u.speaker for u in self.parts[2]}))
        owners = np.concatenate(
            [np.full(len(e[2]), speakers.index(u.speaker)) for u, e in zip(self.parts[2], examples[2], strict=True)]
        )
        truth = torch.cat([labels for _, _, labels in examples[2]])
        test = Labelled(torch.zeros(0), truth, owners, speakers)
        for seed in range(self.config.seeds):
            predict = fit_supervised(
                encoder.fresh(seed),
                examples[0],
                examples[1],
                len(self.classes),
                self.config.supervised,
                seed,
                self.task.target is None,
                self.config.device,
            )
            hits = (np.concatenate(predict(examples[2])) == truth.numpy()).astype(float)
            for measure, counts in self.counted(test).items():
                tallies.setdefault(measure, []).append(test.tally(hits, counts))
        return tallies

    def _example(self, utterance: Utterance, rate_hz: float) -> Example:
        wave_T = self.waves(utterance)
        if self.task.target is not None:
            return wave_T, torch.zeros(1, dtype=torch.long), torch.tensor([self.classes[self.task.target(utterance)]])
        labels = grid_labels(self.phones[utterance.name], len(wave_T) / 16_000, GRID_HZ)
        known = [cell for cell, phone in enumerate(labels) if phone in self.classes]
        frames = grid_frames(rate_hz, 10**9, len(labels))[known]
        return wave_T, frames, torch.tensor([self.classes[labels[cell]] for cell in known], dtype=torch.long)

    def probes(self, encoders: Sequence[FrozenEncoder]) -> list[Row]:
        """Probes the checkpoints, and the baselines of each architecture."""
        rows: list[Row] = []
        if self.task.caveat:
            self.say(f"{self.name}: {self.task.caveat}")
        log_mel: dict[str, list[Tally]] = {}
        if self.config.baselines:
            baseline = log_mel_with_context()
            log_mel = self._report(baseline.name, self.probe(lambda seed: baseline, same=True))
            rows += self._rows(baseline.name, log_mel, {}, {}, {})
        for encoder in encoders:
            random: dict[str, list[Tally]] = {}
            supervised: dict[str, list[Tally]] = {}
            if self.config.baselines and encoder.fresh is not None:
                name = f"random weights ({encoder.name})"
                made = partial(self.random, encoder)
                random = self._report(name, self.probe(made, same=False))
                rows += self._rows(name, random, log_mel, {}, {})
                if self.config.supervised.epochs:
                    name = f"supervised from scratch ({encoder.name})"
                    supervised = self._report(name, self.supervised(encoder))
                    rows += self._rows(name, supervised, log_mel, random, {})
            found = self._report(encoder.name, self.probe(lambda seed: encoder, same=True))  # noqa: B023
            rows += self._rows(f"{encoder.name} (step {encoder.step})", found, log_mel, random, supervised)
        return rows + (self.verification(encoders) if self.name == "speaker" else [])

    def verification(self, encoders: Sequence[FrozenEncoder]) -> list[Row]:
        """Measures equal error rates on held-out speakers, if the manifest has such splits."""
        everyone = [u for part in self.parts for u in part]
        valid, test = ([u for u in everyone if u.split == split] for split in ("valid", "test"))
        if not valid or not test:
            return []

        def measure(encoder: FrozenEncoder) -> intrinsic.Found:
            return [("EER of verification", point(verification(encoder, valid, test, self.waves)))]

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

    def _report(self, who: str, tallies: dict[str, list[Tally]]) -> dict[str, list[Tally]]:
        for measure, by_seed in tallies.items():
            value = bootstrap(by_seed, 100).value
            self.say(f"{self.name}, {measure}: {value:.1%}  {who}")
        return tallies

    def _rows(
        self,
        who: str,
        tallies: dict[str, list[Tally]],
        log_mel: dict[str, list[Tally]],
        random: dict[str, list[Tally]],
        supervised: dict[str, list[Tally]],
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
            rows.append(Row(self.name, measure, who, own.value, own.low, own.high, over[0], over[1], retained))
        return rows

    def measures(self, encoders: Sequence[FrozenEncoder]) -> list[Row]:
        """Applies a label-free measure or ABX to every layer on the test split, for checkpoints and baselines."""

        def measure(encoder: FrozenEncoder) -> intrinsic.Found:
            return intrinsic.MEASURES[self.name](encoder, self.parts[2], self.phones, self.classes, self.waves)

        return self.unfitted(encoders, measure, context=0)


def plain(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Returns the rows as plain values for JSON."""
    return [asdict(row) for row in rows]
