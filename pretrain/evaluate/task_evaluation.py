"""The evaluation of one task: scores of encoders and baselines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch

from pretrain.evaluate import few_shot, intrinsic, retrieval, text_probe, verification
from pretrain.evaluate.config import EvaluateConfig
from pretrain.evaluate.features import GRID_HZ, Labelled, Waves, grid_frames
from pretrain.evaluate.frozen_encoders import FrozenEncoder, freeze, log_mel_with_context
from pretrain.evaluate.manifest import SPLITS, Utterance, grid_labels
from pretrain.evaluate.metrics import Tally, bootstrap
from pretrain.evaluate.neural_probe import fit_neural
from pretrain.evaluate.probe import View, fit, fit_probe, joined
from pretrain.evaluate.rows import Detail, ResultRow
from pretrain.evaluate.supervised import Example, fit_supervised
from pretrain.evaluate.task_data import split_of
from pretrain.evaluate.task_inputs import Say, TaskInputs

Tallies = dict[str, list[Tally]]
"""Hits and trials by speaker of each seed, by the name of the measure."""


class TaskEvaluation:
    """Scores encoders and baselines on one task.

    Args:
        config: the evaluation.
        name: a task, or a measure on the labels of the task `config.frames`.
        say: receives progress messages.
        waves: decoded audio, shared by tasks.

    Raises:
        ConfigError: as `TaskInputs`.
        ValueError: a speaker is in two splits.
    """

    def __init__(self, config: EvaluateConfig, name: str, say: Say, waves: Waves | None = None) -> None:
        self.config, self.say = config, say
        self.inputs = TaskInputs(config, name, say, waves)
        self.name = self.inputs.name
        self.details: list[Detail] = []

    def scores(self, make: Callable[[int], FrozenEncoder], same: bool) -> Tallies:
        """Returns the tallies of encoders by measure, for each seed.

        Args:
            make: returns the encoder of a seed.
            same: whether the encoder is the same for all seeds. Fits that draw nothing are then made once.
        """
        inputs = self.inputs
        if inputs.kind == "text":
            return self._texts(make, same)
        tallies: Tallies = {}
        view: View | None = None
        for seed in range(1 if same else self.config.seeds):
            encoder = make(seed)
            train, valid, test = (inputs.features(encoder, part) for part in inputs.parts)
            if inputs.kind == "ranking":
                layer = retrieval.best_layer(retrieval.for_choice(train, valid, self.config.probe))
                if layer is None:
                    self._say_last_layer("two speakers with an utterance of the same label")
                    layer = test.x_NLD.shape[1] - 1
                found = retrieval.ranking(test, layer)
                tallies.setdefault("mean average precision", []).append(found)
                continue
            if inputs.kind == "few_shot":
                learner = self._learner(encoder)
                whole = joined(train, test)
                for measure, tally in few_shot.tallies(valid, whole, self.config.few_shot, seed, learner).items():
                    tallies.setdefault(measure, []).append(tally)
                continue
            classes, settings, disjoint = len(inputs.classes), self.config.probe, inputs.task.disjoint
            self.say(f"{self.name}: fits a probe to the features of {encoder.name}")
            if view is None:
                probe = fit_probe(train, valid, classes, config=settings, disjoint=disjoint, silent=inputs.silent)
                view = probe.view
            else:
                probe = fit(train, classes, view, settings)
            guesses_N = probe.predict(test.x_NLD)
            self._tally(tallies, test, guesses_N)
            if seed == 0:
                self.details.append(self._detail(encoder.name, view, test, guesses_N))
            del train, valid, test  # before the features of the next seed are computed
        return tallies

    def _say_last_layer(self, needed: str) -> None:
        self.say(
            f"{self.name}: no layer can be chosen, which needs {needed} outside of the test part; the last one is taken"
        )

    def _learner(self, encoder: FrozenEncoder) -> few_shot.EpisodeLearner | None:
        """Returns what a run with engine.name=meta learned; None, after a message, where these features do not fit."""
        learner = few_shot.learner_of(encoder.run.module, encoder.run.config) if encoder.run else None
        if learner is None:
            return None
        pool = self.inputs.task.config.pool
        if self.inputs.layers or learner.head.config.pool != pool:
            self.say(
                f"{self.name}: the head of {encoder.name} reads all layers with pool={learner.head.config.pool}; with "
                f"layers={self.config.layers} and the task's pool={pool} what it learned is not measured"
            )
            return None
        return learner

    def _tally(self, tallies: Tallies, test: Labelled, guesses_N: np.ndarray) -> None:
        hits = (guesses_N == test.y_N.numpy()).astype(float)
        for measure, counts in self.inputs.counted(test).items():
            tallies.setdefault(measure, []).append(test.tally(hits, counts))

    def _detail(self, who: str, view: View, test: Labelled, guesses_N: np.ndarray) -> Detail:
        inputs = self.inputs
        size, (counts_N, *_) = len(inputs.classes), inputs.counted(test).values()
        chosen = counts_N > 0
        pairs = test.y_N.numpy()[chosen] * size + guesses_N[chosen]
        confusion_CC = np.bincount(pairs, minlength=size * size).reshape(size, size)
        return Detail(self.name, who, view.by_layer, confusion_CC, tuple(inputs.classes))

    def neural(self, encoder: FrozenEncoder) -> Tallies:
        """Trains a network with as many weights as the encoder on log-mel with context; returns tallies by measure."""
        inputs = self.inputs
        assert encoder.fresh is not None
        weights = sum(weight.numel() for weight in encoder.fresh(0).parameters())
        train, valid, test = (inputs.features(log_mel_with_context(), part) for part in inputs.parts)
        tallies: Tallies = {}
        for seed in range(self.config.seeds):
            self.say(f"{self.name}: trains a network on log-mel, run {seed + 1} of {self.config.seeds}")
            net = fit_neural(train, valid, len(inputs.classes), weights=weights, config=self.config.neural, seed=seed)
            self._tally(tallies, test, net.predict(test.x_NLD[:, 0]))
        return tallies

    def _texts(self, make: Callable[[int], FrozenEncoder], same: bool) -> Tallies:
        tallies: Tallies = {}
        spoken: list[list[text_probe.UtteranceFeatures]] = []
        for seed in range(self.config.seeds):
            if not (same and spoken):
                encoder = make(seed)
                self.say(f"{self.name}: {encoder.name} encodes {sum(map(len, self.inputs.parts))} utterances")
                spoken = [[self._spoken(encoder, u) for u in part] for part in self.inputs.parts]
            probe = text_probe.fit_text(spoken[0], spoken[1], self.config.text, seed)
            for measure, by_words in (("word error rate", True), ("character error rate", False)):
                tallies.setdefault(measure, []).append(text_probe.counted(probe, spoken[2], by_words))
        return tallies

    def _spoken(self, encoder: FrozenEncoder, utterance: Utterance) -> text_probe.UtteranceFeatures:
        inputs = self.inputs
        x_LFD = encoder.encode(inputs.waves(utterance))
        chosen = x_LFD[inputs.layers] if inputs.layers and len(x_LFD) > 1 else x_LFD
        return text_probe.UtteranceFeatures(chosen.half(), " ".join(utterance.text.lower().split()), utterance.speaker)

    def supervised(self, encoder: FrozenEncoder) -> Tallies:
        """Trains the encoder's architecture from scratch on the training split; returns tallies by measure."""
        inputs = self.inputs
        assert encoder.fresh is not None
        examples = [[self._example(u, encoder.rate_hz) for u in part] for part in inputs.parts]
        tallies: Tallies = {}
        speakers = tuple(sorted({u.speaker for u in inputs.parts[2]}))
        owners = np.concatenate(
            [np.full(len(e[2]), speakers.index(u.speaker)) for u, e in zip(inputs.parts[2], examples[2], strict=True)]
        )
        truth = torch.cat([labels for _, _, labels in examples[2]])
        test = Labelled(torch.zeros(0), truth, owners, speakers)
        for seed in range(self.config.seeds):
            self.say(f"{self.name}: trains {encoder.name} from scratch, run {seed + 1} of {self.config.seeds}")
            predict = fit_supervised(
                encoder.fresh(seed),
                train=examples[0],
                valid=examples[1],
                classes=len(inputs.classes),
                config=self.config.supervised,
                seed=seed,
                per_frame=inputs.kind == "frames",
                device=self.config.device,
            )
            self._tally(tallies, test, np.concatenate(predict(examples[2])))
        return tallies

    def _example(self, utterance: Utterance, rate_hz: float) -> Example:
        inputs = self.inputs
        wave_T = inputs.waves(utterance)
        if inputs.kind != "frames":
            return (
                wave_T,
                torch.zeros(1, dtype=torch.long),
                torch.tensor([inputs.classes[inputs.label[utterance.name]]]),
            )
        labels = grid_labels(inputs.phones[utterance.name], len(wave_T) / 16_000, GRID_HZ)
        known = [cell for cell, phone in enumerate(labels) if phone in inputs.classes]
        frames = grid_frames(rate_hz, 10**9, len(labels))[known]
        return wave_T, frames, torch.tensor([inputs.classes[labels[cell]] for cell in known], dtype=torch.long)

    def rows(self, encoders: Sequence[FrozenEncoder]) -> list[ResultRow]:
        """Scores the checkpoints, and the baselines of each architecture."""
        inputs = self.inputs
        if inputs.task.config.caveat:
            self.say(f"{self.name}: {inputs.task.config.caveat}")
        return self.verification(encoders) if inputs.kind == "pairs" else self.probes(encoders)

    def probes(self, encoders: Sequence[FrozenEncoder]) -> list[ResultRow]:
        """Probes the checkpoints, and the baselines of each architecture."""
        inputs = self.inputs
        rows: list[ResultRow] = []
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
                fitted = inputs.kind in ("frames", "utterances")
                if self.config.neural.epochs and fitted:
                    name = f"{log_mel_with_context().name}, network as large as {encoder.name}"
                    rows += self._rows(name, self._report(name, self.neural(encoder)), log_mel, {}, {})
                if self.config.supervised.epochs and fitted:
                    name = f"supervised from scratch ({encoder.name})"
                    supervised = self._report(name, self.supervised(encoder))
                    rows += self._rows(name, supervised, log_mel, random, {})
            found = self._report(encoder.name, self.scores(lambda seed: encoder, same=True))  # noqa: B023
            rows += self._rows(f"{encoder.name} (step {encoder.step})", found, log_mel, random, supervised)
        by_speaker = inputs.kind == "utterances" and inputs.task.config.label == ("speaker",)
        return rows + (self.verification(encoders) if by_speaker else [])

    def verification(self, encoders: Sequence[FrozenEncoder]) -> list[ResultRow]:
        """Measures equal error rates: of the task's pairs, or of the speakers of the split that is asked for."""
        inputs = self.inputs
        train, valid, test = inputs.parts
        if inputs.kind != "pairs":
            everyone = [u for part in inputs.parts for u in part]
            train, valid, test = ([u for u in everyone if split_of(inputs.task, u) == split] for split in SPLITS)
            if self.config.ask == "valid":
                valid, test = [], valid
            if not train + valid or len({u.speaker for u in test}) < 2:
                return []
        others = verification.for_choice(train, valid, self.config.probe.least_speakers)
        if not verification.can_choose(others):
            self._say_last_layer("two speakers, and two recordings of one,")

        def measure(encoder: FrozenEncoder) -> intrinsic.Found:
            rate = verification.verification(
                encoder,
                others,
                test,
                waves=inputs.waves,
                trials=inputs.trials,
                times=min(200, self.config.bootstrap),
            )
            return [("EER of verification", rate)]

        return self.unfitted(encoders, measure, context=10)

    def random(self, encoder: FrozenEncoder, seed: int) -> FrozenEncoder:
        """Builds the architecture of `encoder` with the random weights of a seed."""
        assert encoder.fresh is not None
        return freeze(encoder.fresh(seed), f"random weights ({encoder.name})", self.config.device)

    def unfitted(
        self, encoders: Sequence[FrozenEncoder], measure: Callable[[FrozenEncoder], intrinsic.Found], context: int
    ) -> list[ResultRow]:
        """Applies a measure without fitting to log-mel, random weights (mean over seeds) and the checkpoints.

        Args:
            encoders: the checkpoints.
            measure: returns the results of one encoder by layer.
            context: frames on either side that log-mel gets.
        """
        rows: list[ResultRow] = []
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

    def _found(self, who: str, by_seed: Sequence[intrinsic.Found]) -> list[ResultRow]:
        self.say(f"{self.name}: {who} measured")
        rows = []
        for same in zip(*by_seed, strict=True):
            means = np.mean([(i.value, i.low, i.high) for _, i in same], axis=0).tolist()
            rows.append(ResultRow(self.name, same[0][0], who, *means))
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
    ) -> list[ResultRow]:
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
                ResultRow(
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

    def measures(self, encoders: Sequence[FrozenEncoder]) -> list[ResultRow]:
        """Applies a label-free measure or ABX to every layer on the test split, for checkpoints and baselines."""
        inputs = self.inputs

        more = {"library": self.config.abx} if self.name == "abx" else {}

        def measure(encoder: FrozenEncoder) -> intrinsic.Found:
            return intrinsic.MEASURES[self.name](
                encoder,
                inputs.parts[2],
                inputs.phones,
                inputs.classes,
                inputs.waves,
                inputs.silence,
                **more,
            )

        return self.unfitted(encoders, measure, context=0)
