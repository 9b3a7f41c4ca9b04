"""Watches a run: pools what the detectors of health.py need, remembers since when, and says what to do.

Rank 0 judges; its wish rides along with the next step's all-reduce, so that every rank does the same after the same
step. What could change an update (the limit that skips outliers) is computed alike on every rank and kept in the
checkpoint, so a resumed run stays bitwise the uninterrupted one.
"""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from data_pipeline.core.jsonl import append_row, read_rows
from data_pipeline.core.types import SAMPLE_RATE, Batch, Step
from pretrain.checkpointing.run_folder import RunFolder
from pretrain.config import Config
from pretrain.engines.base import Engine, NumpySum, StepResult
from pretrain.interfaces.frames import StepContext
from pretrain.monitoring import detectors
from pretrain.monitoring.activation_stats import StageGauge
from pretrain.monitoring.batch_dump import MAX_KEPT, save_batches
from pretrain.monitoring.detectors import Finding

NORMS = 100
"""Gradient norms that the running median is taken of."""
JUDGED = ("accuracy", "non-silence", "PNMI")
"""Measures of evaluations that should not fall."""
LOSSES = ("loss/contrastive", "loss/prediction", "loss/objective")
"""Where the loss per target is found, the first that an objective reports."""


class UnhealthyError(RuntimeError):
    """The run was stopped because it does not learn; the message is one sentence for the user."""


@dataclass(frozen=True)
class Observation:
    """One step, as far as the pooled detectors need it."""

    loss: float
    accuracy: float
    """Share of hits, or NaN where the objective counts none."""
    books: tuple[np.ndarray, ...]
    """How often each code came, of each code book."""
    samples: int
    seconds: float
    waits: np.ndarray


class Watch:
    """One rank's view of the run's health. `remembered` is what an earlier start's `memory()` gave."""

    def __init__(
        self,
        config: Config,
        engine: Engine,
        run: RunFolder,
        remembered: Mapping[str, Any],
        say: Callable[[str], None] = print,
    ) -> None:
        self.config, self.settings, self._say = config, config.health, say
        self._run, self._rank, self._world = run, engine.world.rank, engine.world.size
        self._objective, self._all_ranks = engine.module.objective, engine.world
        self.rollbacks: int = remembered.get("rollbacks", 0)
        self._outdated: tuple[int, int] = tuple(remembered.get("outdated", (0, 0)))
        self._remember(remembered)
        self.alarms: list[tuple[int, Finding, int]] = []
        """(step, finding, since) of each alarm of this start."""
        self.gauge = StageGauge(engine.module) if self._rank == 0 else None

    def _remember(self, healthy: Mapping[str, Any]) -> None:
        """Begins anew with what a checkpoint remembers."""
        self._norms: deque[float] = deque(healthy.get("norms", []), NORMS)
        self._first: dict[str, float] = dict(healthy.get("first", {}))
        self._best: dict[str, float] = dict(healthy.get("best", {}))
        self._targets_since: int = healthy.get("targets_since", 0)
        self._heard: int = healthy.get("heard", 0)
        """Samples of audio computed on up to here, from the first update on."""
        self._report: dict[str, float] = {}
        self._relabelled = bool(getattr(self._objective, "relabelled", False))
        self._recent: deque[Observation] = deque(maxlen=self.settings.window)
        self._seen: dict[str, tuple[int, int, int]] = {}
        """Of each finding of the last check: since when it is seen, how often, and from when on it may be there."""
        self._alarmed: set[str] = set()
        self._wish = {"stop": 0.0, "rollback": 0.0}
        self._why = ""

    @property
    def why(self) -> str:
        """The sentence of what this rank last wanted to stop or go back for."""
        return self._why or ELSEWHERE

    @property
    def limit(self) -> float:
        """The gradient norm above which an update is an outlier; alike on all ranks."""
        return detectors.gradient_limit(list(self._norms), self.settings.spike_factor, self.config.optimizer.clip_norm)

    @property
    def skip_above(self) -> float:
        """The gradient norm above which the engine shall leave the weights alone."""
        return self.limit if self.settings.on_spike == "skip" else math.inf

    def memory(self) -> dict[str, Any]:
        """What a resumed run must know, for the checkpoint."""
        return {
            "norms": list(self._norms),
            "first": self._first,
            "best": self._best,
            "targets_since": self._targets_since,
            "heard": self._heard,
            "rollbacks": self.rollbacks,
            "outdated": self._outdated,
        }

    def go_back(self, step: int, healthy: Mapping[str, Any]) -> None:
        """The run has rolled back to `step`: nothing seen since counts, the evaluations of later steps neither."""
        self._remember(healthy)
        self._outdated = (len(read_rows(self._run.path / "evaluations.jsonl")), step)

    def extras(self, ctx: StepContext, waited: float) -> dict[str, float]:
        """What this rank adds to the step's all-reduce: rank 0's wish, and how long each rank waited for data."""
        if self.gauge is not None:
            self.gauge.armed = ctx.step % self.settings.every == 0
        waits = {f"wait/{rank}": waited if rank == self._rank else 0.0 for rank in range(self._world)}
        return {f"health/{wish}": value for wish, value in self._wish.items()} | waits

    def may_begin(self, metrics: Mapping[str, NumpySum]) -> None:
        """Judges what stands before the first update. Raises UnhealthyError, on every rank, where that rules it out."""
        found: list[Finding | None] = []
        if self._objective.targets_stand:
            books = self._books(metrics)
            found += [detectors.low_target_entropy(counts, self.settings.min_target_entropy) for counts in books]
        if self.gauge and self.gauge.target_inputs:
            found.append(detectors.off_scale("the features that targets are made of", *self.gauge.target_inputs))
        if self._rank == 0:
            self._judge(0, found)
        stop = torch.tensor([self._wish["stop"]], device=self._all_ranks.device)
        if self._all_ranks.sum(stop).item():
            raise UnhealthyError(self.why)

    def obey(self, result: StepResult) -> int | None:
        """Before which step to roll back to, or None. Raises UnhealthyError on every rank when rank 0 wants to stop."""
        if result.extras["health/stop"]:
            raise UnhealthyError(self.why)
        before = int(result.extras["health/rollback"])
        return self._count_rollback(before, self._why) if before else None

    def diverged(self, error: FloatingPointError, ctx: StepContext, batches: Sequence[Batch]) -> int:
        """Keeps the batch for `auricle replay`; the step to roll back before, if the config says so, else raises."""
        found = Finding("not finite", "nan", str(error), _NAN_HELPS)
        kept = save_batches(self._run, self._rank, ctx, batches, found.seen, room=2 * MAX_KEPT)
        self._alarm(ctx.step, ctx.step, found)
        if self.settings.on_nan == "stop":
            where = f"the batch is kept: auricle replay {self._run.path}" if kept else "RUN/health is full: not kept"
            raise UnhealthyError(f"{found.sentence(ctx.step)} ({where})")
        self._why = found.sentence(ctx.step)
        return self._count_rollback(ctx.step, self._why)

    def report(self) -> dict[str, float]:
        """Scalars of the updates since the last report (rank 0): those skipped, the newest check, the hours heard."""
        report, self._report = self._report, {}
        hours = {"data/audio_hours": self._heard / SAMPLE_RATE / 3600}
        return {"health/skipped": 0.0, "health/alarms": float(len(self.alarms))} | report | hours

    def after(self, ctx: StepContext, result: StepResult, step: Step, seconds: float) -> None:
        """Takes in one finished update."""
        self._heard += result.samples
        spike = detectors.gradient_spike(result.grad_norm, self.limit)
        self._norms.append(result.grad_norm)
        if spike:
            save_batches(self._run, self._rank, ctx, step.batches, spike.seen)
        if self._rank != 0:
            return
        if spike:
            self._alarm(ctx.step, ctx.step, spike)
        waits = np.array([result.extras[f"wait/{rank}"] for rank in range(self._world)])
        books = self._books(result.metrics)
        if self._recent and [*map(len, books)] != [*map(len, self._recent[-1].books)]:
            self._new_targets(ctx.step)
        self._recent.append(Observation(_loss(result), _accuracy(result), books, result.samples, seconds, waits))
        self._report["health/skipped"] = self._report.get("health/skipped", 0.0) + result.skipped
        if ctx.step % self.settings.every == 0:
            stages, ranks = self.gauge.read() if self.gauge else ({}, {})
            self._report |= {f"health/std/{name}": value for name, value in stages.items()}
            self._report |= {f"health/rank/{name}": value for name, value in ranks.items()}
            deviations = {
                name.rpartition("/")[2]: float(total[0]) / count
                for name, (total, count) in result.metrics.items()
                if name.endswith("_std") and count > 0
            }
            self._judge(ctx.step, self._findings(ctx.step, stages | deviations, ranks))
        if not self._relabelled and getattr(self._objective, "relabelled", False):
            self._relabelled = True
            self._new_targets(ctx.step + 1)

    def _findings(self, step: int, stages: dict[str, float], ranks: dict[str, float]) -> list[Finding | None]:
        limits = self.settings
        found: list[Finding | None] = []
        for name, value in stages.items():
            share = limits.min_prediction_std if name.startswith("prediction") else limits.min_stage_std
            found.append(detectors.shrunken(name, value, self._first.setdefault(name, value), share))
        for name, measured in self._evaluations().items():
            steps = sorted(measured)
            fell = detectors.falling(name, [measured[at] for at in steps])
            # the first of them was the best, and its checkpoint is healthy
            found.append(fell and dataclasses.replace(fell, pooled=max(0, step - steps[-4] - limits.every)))
        books = [np.sum(counts, axis=0) for counts in zip(*(seen.books for seen in self._recent), strict=True)]
        if step >= self._ranks_from:
            for name, rank in ranks.items():
                best = self._best[name] = max(rank, self._best.get(name, 0.0))
                found.append(detectors.rank_fell(name, rank, best, limits.min_rank))
        if len(self._recent) >= limits.window:
            samples = sum(seen.samples for seen in self._recent) / len(self._recent)
            found.append(
                detectors.wrong_audio(samples / SAMPLE_RATE, self.config.data.batch_seconds, limits.audio_tolerance)
            )
            waits = dict(enumerate(np.mean([seen.waits for seen in self._recent], axis=0).tolist()))
            seconds = sum(seen.seconds for seen in self._recent) / len(self._recent)
            found.append(detectors.waiting_ranks(waits, seconds, limits.max_data_wait))
        grace = min(limits.grace_steps, (self.config.train.steps - self._targets_since) * 2 // 3)
        if step >= self._targets_since + grace and len(self._recent) >= limits.window:
            learning = self._learning_findings(books)
            found += [seen and dataclasses.replace(seen, pooled=limits.window) for seen in learning]
        return found

    def _new_targets(self, step: int) -> None:
        """From `step` on the model has other targets, which it must learn anew."""
        self._targets_since = step
        self._recent.clear()
        self._best.pop("perplexity", None)

    def _evaluations(self) -> dict[str, dict[int, float]]:
        """What `auricle evaluate follow=true` has measured beside this run, by name and step."""
        measured: dict[str, dict[int, float]] = {}
        before, healthy = self._outdated
        for number, row in enumerate(read_rows(self._run.path / "evaluations.jsonl")):
            if str(row["measure"]).startswith(JUDGED) and (number >= before or row["step"] <= healthy):
                measured.setdefault(row["name"], {})[row["step"]] = row["value"]
        return measured

    @property
    def _ranks_from(self) -> int:
        """From this step on ranks are judged: in the warm-up they fall from those of random weights, as they should."""
        warm = max(self.config.schedule.warmup_steps, self.settings.window)
        return min(warm, self.config.train.steps * 2 // 3)

    def _learning_findings(self, books: Sequence[np.ndarray]) -> list[Finding | None]:
        limits, found = self.settings, list[Finding | None]()
        losses = [seen.loss for seen in self._recent]
        chance, loss = self._chance(books), sum(losses) / len(losses)
        found.append(detectors.at_chance(loss, chance, limits.chance_margin))
        negatives = getattr(self.config.objective, "negatives", 0)
        hits = [seen.accuracy for seen in self._recent if not math.isnan(seen.accuracy)]
        if negatives and hits:
            found.append(detectors.accuracy_at_chance(sum(hits) / len(hits), 1 / (1 + negatives)))
        for number, counts in enumerate(books, 1):
            what = "the targets" if len(books) == 1 else f"the targets of code book {number} of {len(books)}"
            found.append(detectors.low_code_use(counts, limits.min_perplexity, what=what))
            found.append(detectors.dead_codes(counts, limits.max_dead_codes, what=what))
        if books and negatives:
            perplexity = sum(math.exp(detectors.entropy(counts)) for counts in books)
            best = self._best["perplexity"] = max(perplexity, self._best.get("perplexity", 0.0))
            found.append(detectors.too_good(loss, chance, perplexity, best))
        return found

    def _chance(self, books: Sequence[np.ndarray]) -> float:
        """The loss of a model that knows nothing but how frequent each target is; 0 where that is not defined."""
        if negatives := getattr(self.config.objective, "negatives", 0):
            return math.log(1 + negatives)
        return sum(map(detectors.entropy, books)) / len(books) if books else 0.0

    def _books(self, metrics: Mapping[str, NumpySum]) -> tuple[np.ndarray, ...]:
        """How often each code came in one update. One metric may hold several books of one size, end to end."""
        objective = self.config.objective
        within = getattr(objective, "codebooks", 0) or getattr(objective, "groups", 1)
        names = sorted(name for name in metrics if name.startswith("hist/codes"))
        return tuple(book for name in names for book in np.split(metrics[name][0], within))

    def _judge(self, step: int, findings: Sequence[Finding | None]) -> None:
        present = {found.detector: found for found in findings if found is not None}
        self._seen = {name: self._seen.get(name, (step, 0, step - found.pooled)) for name, found in present.items()}
        self._alarmed &= present.keys()
        for name, found in present.items():
            since, times, begun = self._seen[name]
            self._seen[name] = (since, times + 1, begun)
            sure = times + 1 >= self.settings.confirm or found.detector in AT_ONCE
            if sure and name not in self._alarmed:
                self._alarmed.add(name)
                self._alarm(step, since, found)
                self._answer(since, begun, found)

    def _answer(self, since: int, begun: int, found: Finding) -> None:
        """Asks for what the config wants done; of two findings that go back, for the earlier step."""
        settings = self.settings
        actions = {"collapse": settings.on_collapse, "chance": settings.on_chance, "recipe": settings.on_recipe}
        action = actions.get(found.kind, "warn")
        if action == "warn":
            return
        self._why = found.sentence(since)
        healthy = begun - settings.every
        if action == "rollback" and healthy > 0:
            self._wish["rollback"] = min(healthy, self._wish["rollback"] or math.inf)
        else:
            self._wish["stop"] = 1.0

    def _alarm(self, step: int, since: int, found: Finding) -> None:
        self.alarms.append((step, found, since))
        if self._rank == 0:
            self._say(f"health: {found.sentence(since)}")
            event = {"step": step, "since": since, "detector": found.detector, "kind": found.kind}
            append_row(self._run.path / "health.jsonl", event | {"message": found.sentence(since)})

    def _count_rollback(self, before: int, why: str) -> int:
        self.rollbacks += 1
        if self.rollbacks > self.settings.max_rollbacks:
            raise UnhealthyError(f"{why}; health.max_rollbacks={self.settings.max_rollbacks} are used up")
        return before


ELSEWHERE = "rank 0 found the run unhealthy; see its log and RUN/health.jsonl"
AT_ONCE = ("target entropy", "target inputs")
"""Detectors of what can be seen before the first update, and will not change."""
_NAN_HELPS = "a lower optimizer.lr, a longer warm-up, optimizer.clip_norm=1, or engine.precision=fp32"


def _loss(result: StepResult) -> float:
    for name in LOSSES:
        total, count = result.metrics.get(name, (np.zeros(1), 0.0))
        if count > 0:
            return float(total[0]) / count
    return result.loss


def _accuracy(result: StepResult) -> float:
    total, count = result.metrics.get("metric/accuracy", (np.zeros(1), 0.0))
    return float(total[0]) / count if count > 0 else math.nan
