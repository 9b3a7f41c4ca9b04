"""The health monitor of one rank: observes updates, runs the checks, and applies the policy.

Rank 0 decides; its decision is part of the next update's all-reduce, so that every rank acts after the same update.
State that affects updates (the limit above which outliers are skipped, tasks without targets) is the same on every rank
and saved in the checkpoint, so that a resumed run is bitwise equal to an uninterrupted one.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from data_pipeline.core.jsonl import read_rows
from data_pipeline.core.types import SAMPLE_RATE, Batch, Step
from pretrain.checkpointing.run_folder import RunFolder
from pretrain.config import Config
from pretrain.engines.base import Engine, NumpySum, StepResult
from pretrain.engines.signals import RankSignals
from pretrain.interfaces.frames import StepContext
from pretrain.monitoring import detection, detectors
from pretrain.monitoring.activation_stats import ActivationStats
from pretrain.monitoring.append_log import AppendLog
from pretrain.monitoring.batch_dump import MAX_KEPT, save_batches
from pretrain.monitoring.detection import Check, Deviation, Silence
from pretrain.monitoring.detectors import Finding
from pretrain.monitoring.observation import (
    MonitoringState,
    UpdateObservation,
    code_counts,
    deviation_of,
    observe,
    pool,
    silent_segments,
)
from pretrain.monitoring.policy import Alarm, Policy, UnhealthyError

__all__ = ["HealthMonitor", "UnhealthyError"]

MONITORED = ("accuracy", "non-silence", "PNMI")
"""Measures of evaluations that must not fall."""
ELSEWHERE = "rank 0 found the run unhealthy; see its log and RUN/health.jsonl"
_NAN_HELPS = "a lower optimizer.lr, a longer warm-up, optimizer.clip_norm=1, or engine.precision=fp32"


class HealthMonitor:
    """One rank's view of the run's health.

    Args:
        config: the run's config.
        engine: gives access to the module and the ranks.
        run: the run folder, for alarms and saved batches.
        remembered: the result of `memory()` from the checkpoint; empty for a new run.
        say: prints a line.
    """

    def __init__(
        self,
        config: Config,
        engine: Engine,
        run: RunFolder,
        remembered: Mapping[str, Any],
        say: Callable[[str], None] = print,
    ) -> None:
        self.config, self.settings, self._say, self._run = config, config.health, say, run
        self._world, self._module = engine.world, engine.module
        self._objective = engine.module.objective
        self.policy = Policy(config.health, remembered.get("rollbacks", 0))
        self.alarms: list[Alarm] = []
        """Alarms of this start."""
        self.stats = ActivationStats(engine.module) if self._world.rank == 0 else None
        self._log = AppendLog(run, run.path / "health.jsonl", say)
        self._outdated: tuple[int, int] = tuple(remembered.get("outdated", (0, 0)))
        self._resume(remembered)

    def _resume(self, healthy: Mapping[str, Any]) -> None:
        """Restores the state that a checkpoint contains."""
        self._memory = MonitoringState.load(healthy)
        self._record = self._objective.monitoring()
        self._recent: deque[UpdateObservation] = deque(maxlen=self.settings.window)
        self._report: dict[str, float] = {}
        self._silence = Silence()
        self.policy.reset()

    def memory(self) -> dict[str, Any]:
        """Returns the state that a resumed run needs, as plain JSON for the checkpoint."""
        return self._memory.dump() | {"rollbacks": self.policy.rollbacks, "outdated": self._outdated}

    @property
    def why(self) -> str:
        """The reason for this rank's last request to stop or roll back."""
        return self.policy.why or ELSEWHERE

    @property
    def limit(self) -> float:
        """The gradient norm above which an update is an outlier; the same on all ranks."""
        norms, clip = list(self._memory.norms), self.config.optimizer.clip_norm
        return detectors.gradient_limit(norms, self.settings.spike_factor, clip)

    @property
    def skip_above(self) -> float:
        """The gradient norm above which the engine must skip an update."""
        return self.limit if self.settings.on_spike == "skip" else math.inf

    # before an update

    def begin(self, ctx: StepContext, step: Step, waited: float, stop_requested: bool) -> RankSignals:
        """Prepares the observation of the next update.

        Args:
            ctx: seed and step.
            step: this rank's micro-batches.
            waited: seconds that this rank waited for them.
            stop_requested: whether this rank was requested to stop.

        Returns:
            This rank's signals to the other ranks.
        """
        self._record = self._objective.monitoring()
        segments, keys = 0, list[str]()
        if ctx.step % self.settings.every == 0:
            if self.stats is not None:
                self.stats.arm()
            segments, keys = sum(len(batch.keys) for batch in step.batches), silent_segments(step.batches)
        self._silence = Silence(keys=tuple(keys))
        return RankSignals(
            stop_requested=stop_requested,
            unhealthy=self.policy.stop,
            roll_back_before=self.policy.roll_back_before,
            skipped_segments=step.skipped,
            segments=segments,
            silent_segments=len(keys),
            wait_seconds=RankSignals.waited(self._world.rank, self._world.size, waited),
        )

    def check_targets(self, metrics: Mapping[str, NumpySum], signals: RankSignals) -> None:
        """Checks targets that exist before the first update.

        Raises:
            UnhealthyError: on every rank, if rank 0's policy refuses the targets.
        """
        if self._world.rank == 0:
            books = code_counts(self._record, metrics) if self._record.fixed_targets else ()
            inputs = self.stats.target_inputs() if self.stats else None
            silence = self._silence_of(signals)
            self._decide(0, detection.before_first_update(books, inputs, silence, self.settings))
        stop = torch.tensor([float(self.policy.stop)], device=self._world.device)
        if self._world.sum(stop).item():
            raise UnhealthyError(self.why)

    # after an update

    def apply_decision(self, result: StepResult) -> int | None:
        """Returns the step to roll back before, or None.

        Raises:
            UnhealthyError: on every rank, if rank 0 ends the run.
        """
        if result.signals.unhealthy:
            raise UnhealthyError(self.why)
        before = result.signals.roll_back_before
        return self.policy.count_rollback(before, self.why) if before else None

    def handle_divergence(self, error: FloatingPointError, ctx: StepContext, batches: Sequence[Batch]) -> int:
        """Saves the batches of a non-finite update for `auricle replay`.

        Args:
            error: the engine's error.
            ctx: seed and step of the update.
            batches: this rank's micro-batches.

        Returns:
            The step to roll back before.

        Raises:
            UnhealthyError: if the config does not request a roll-back.
        """
        silent = silent_segments(batches)
        counts = self._world.sum(
            torch.tensor([len(silent), _segments(batches)], dtype=torch.float64, device=self._world.device)
        ).tolist()
        note = f" ({detectors.silence_note(int(counts[0]), int(counts[1]), silent)})" if counts[0] else ""
        if silent and self._world.rank:  # rank 0 writes the findings, without the keys of other ranks
            print(detectors.silence_note(len(silent), _segments(batches), silent), flush=True)
        found = Finding("not finite", "nan", f"{error}{note}", _NAN_HELPS)
        kept = save_batches(self._run, self._world.rank, ctx, batches, found.seen, limit=2 * MAX_KEPT)
        alarm = Alarm(ctx.step, ctx.step, found)
        self._raise_alarm(alarm)
        if self.settings.on_nan == "stop":
            where = f"kept: auricle replay {self._run.path}" if kept else "not kept: RUN/health is full or not writable"
            raise UnhealthyError(f"{alarm.sentence} (the batch is {where})")
        self.policy.why = alarm.sentence
        return self.policy.count_rollback(ctx.step, alarm.sentence)

    def record_update(self, ctx: StepContext, result: StepResult, step: Step, seconds: float) -> None:
        """Records one finished update.

        Args:
            ctx: seed and step of the update.
            result: the sums over all ranks.
            step: this rank's micro-batches.
            seconds: wall time of the step.

        Raises:
            UnhealthyError: on every rank, if a task had no target for too long.
        """
        spike = detectors.gradient_spike(result.grad_norm, self.limit)
        tasks = self._module.tasks if self.config.objective.has_loss else tuple(self._module.heads)
        self._memory.add(result, tasks)
        if spike:
            save_batches(self._run, self._world.rank, ctx, step.batches, spike.seen)
        if self._world.rank == 0:
            if spike:
                self._raise_alarm(Alarm(ctx.step, ctx.step, spike))
            self._observe(ctx, result, seconds)
        self._require_targets(ctx)

    def _observe(self, ctx: StepContext, result: StepResult, seconds: float) -> None:
        """Pools the update, and checks the pooled measurements every few updates. Rank 0 only."""
        seen = observe(self._record, result, seconds, self._module.infeasible_metrics())
        if self._recent and [*map(len, seen.books)] != [*map(len, self._recent[-1].books)]:
            self._new_targets(ctx.step)
        self._recent.append(seen)
        self._report["health/skipped"] = self._report.get("health/skipped", 0.0) + result.skipped
        if ctx.step % self.settings.every == 0:
            self._check(ctx.step, result)
        if self._objective.monitoring().target_version != self._record.target_version:
            self._new_targets(ctx.step + 1)

    def _check(self, step: int, result: StepResult) -> None:
        stages, ranks = self.stats.read() if self.stats else ({}, {})
        self._report |= {f"health/std/{name}": value for name, value in stages.items()}
        self._report |= {f"health/rank/{name}": value for name, value in ranks.items()}
        self._report["data/silent_segments"] = float(result.signals.silent_segments)
        targets = deviation_of(result.metrics, self._record.target_deviation)
        predictions = deviation_of(result.metrics, self._record.prediction_deviation)
        memory, pooled, best = self._memory, pool(self._recent), dict[str, float]()
        if step >= detection.ranks_from(self.config):
            best = {name: memory.best_of(name, rank) for name, rank in ranks.items()}
        learning = step >= memory.targets_since + detection.grace(self.config, memory.targets_since)
        if learning and pooled.contrastive and pooled.books and pooled.updates >= self.settings.window:
            best["perplexity"] = memory.best_of("perplexity", detection.total_perplexity(pooled.books))
        check = Check(
            step=step,
            stages={name: self._deviation(name, value) for name, value in stages.items()},
            targets=None if targets is None else self._deviation(detection.TARGETS, targets),
            predictions=None if predictions is None else self._deviation(detection.PREDICTIONS, predictions),
            ranks=ranks,
            best=best,
            evaluations=self._evaluations(),
            pooled=pooled,
            targets_since=memory.targets_since,
            silence=self._silence_of(result.signals),
        )
        self._decide(step, detection.at_check(check, self.config))

    def _deviation(self, name: str, value: float) -> Deviation:
        return Deviation(value, self._memory.first_of(name, value))

    def _require_targets(self, ctx: StepContext) -> None:
        for task, updates in self._memory.without_targets.items():
            head = task != "objective"
            limit = self.settings.window if head else self.settings.max_updates_without_targets
            most, lasting = min(limit, self.config.train.steps), head and self.settings.on_collapse == "warn"
            if updates == most or (updates > most and not lasting):
                alarm = Alarm(ctx.step, ctx.step + 1 - updates, detectors.without_targets(task, updates))
                self._raise_alarm(alarm)
                if not lasting:
                    raise UnhealthyError(alarm.sentence)

    def go_back(self, step: int, healthy: Mapping[str, Any]) -> None:
        """Discards observations after `step`, to which the run has rolled back, and evaluations of later steps."""
        self._resume(healthy)
        self._outdated = (len(read_rows(self._run.path / "evaluations.jsonl")), step)

    def report(self) -> dict[str, float]:
        """Returns scalars since the last report (rank 0): skipped updates, the newest check, hours of audio."""
        report, self._report = self._report, {}
        hours = {"data/audio_hours": self._memory.heard / SAMPLE_RATE / 3600}
        return {"health/skipped": 0.0, "health/alarms": float(len(self.alarms))} | report | hours

    def _new_targets(self, step: int) -> None:
        """Resets the checks at `step`, from which on the model has new targets."""
        self._memory.targets_since = step
        self._recent.clear()
        self._memory.best.pop("perplexity", None)

    def _evaluations(self) -> dict[str, dict[int, float]]:
        """Returns the results of `auricle evaluate follow=true` for this run, by name and step."""
        measured: dict[str, dict[int, float]] = {}
        before, healthy = self._outdated
        for number, row in enumerate(read_rows(self._run.path / "evaluations.jsonl")):
            if str(row["measure"]).startswith(MONITORED) and (number >= before or row["step"] <= healthy):
                measured.setdefault(row["name"], {})[row["step"]] = row["value"]
        return measured

    def _silence_of(self, signals: RankSignals) -> Silence:
        return Silence(signals.silent_segments, signals.segments, self._silence.keys)

    def _decide(self, step: int, findings: Sequence[Finding]) -> None:
        for alarm in self.policy.decide(step, findings):
            self._raise_alarm(alarm)

    def _raise_alarm(self, alarm: Alarm) -> None:
        self.alarms.append(alarm)
        if self._world.rank == 0:
            self._say(f"health: {alarm.sentence}")
            found = alarm.finding
            event = {"step": alarm.step, "since": alarm.since, "detector": found.detector, "kind": found.kind}
            self._log.append(event | {"message": alarm.sentence})


def _segments(batches: Sequence[Batch]) -> int:
    return sum(len(batch.keys) for batch in batches)
