"""Policy: what to do about findings (warn, stop, roll back), and when a finding is certain enough."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pretrain.config import HealthConfig
from pretrain.monitoring.detectors import Finding

Action = Literal["warn", "stop", "rollback"]
AT_ONCE = ("target entropy", "target inputs", "silent audio")
"""Detectors whose finding at the first update is certain: training will not change it."""


class UnhealthyError(RuntimeError):
    """Raised to stop a run that does not learn; the message is one sentence for the user."""


@dataclass(frozen=True)
class Alarm:
    """A confirmed finding, with the step of its confirmation and of its first occurrence."""

    step: int
    since: int
    finding: Finding

    @property
    def sentence(self) -> str:
        """The message for the user."""
        return self.finding.sentence(self.since)


class Policy:
    """Confirms findings over several checks, and holds the action that rank 0 requests."""

    def __init__(self, settings: HealthConfig, rollbacks: int) -> None:
        self.settings, self.rollbacks = settings, rollbacks
        self.reset()

    def reset(self) -> None:
        """Discards all findings, after a roll-back."""
        self._seen: dict[str, tuple[int, int, int]] = {}
        """Per finding of the last check: step when first seen, number of checks, step from which it may be present."""
        self._alarmed: set[str] = set()
        self.stop = False
        self.roll_back_before = 0
        """Roll back to a checkpoint before this step; 0: no."""
        self.why = ""

    def decide(self, step: int, findings: Sequence[Finding]) -> list[Alarm]:
        """Adds the findings of one check; returns those that it confirmed."""
        present = {found.detector: found for found in findings}
        self._seen = {name: self._seen.get(name, (step, 0, step - found.pooled)) for name, found in present.items()}
        self._alarmed &= present.keys()
        alarms = []
        for name, found in present.items():
            since, times, begun = self._seen[name]
            self._seen[name] = (since, times + 1, begun)
            certain = times + 1 >= self.settings.confirm or (step == 0 and name in AT_ONCE)
            if certain and name not in self._alarmed:
                self._alarmed.add(name)
                alarms.append(Alarm(step, since, found))
                self._answer(alarms[-1], begun)
        return alarms

    def _answer(self, alarm: Alarm, begun: int) -> None:
        """Records the action that the config selects; of two roll-backs, the one to the earlier step."""
        action = self.action(alarm.finding)
        if action == "warn":
            return
        self.why = alarm.sentence
        healthy = begun - self.settings.every
        if action == "rollback" and healthy > 0:
            self.roll_back_before = min(healthy, self.roll_back_before or healthy)
        else:
            self.stop = True

    def action(self, finding: Finding) -> Action:
        """Returns the action that the config selects for a finding of this kind."""
        settings = self.settings
        actions: Mapping[str, Action] = {
            "nan": settings.on_nan,
            "collapse": settings.on_collapse,
            "chance": settings.on_chance,
            "recipe": settings.on_recipe,
        }
        return actions.get(finding.kind, "warn")

    def count_rollback(self, before: int, why: str) -> int:
        """Returns the step to roll back before. Raises UnhealthyError if no roll-back is left."""
        self.rollbacks += 1
        if self.rollbacks > self.settings.max_rollbacks:
            raise UnhealthyError(f"{why}; health.max_rollbacks={self.settings.max_rollbacks} are used up")
        return before
