"""What follows a finding: it is confirmed over several checks, and then warns, stops or rolls back."""

from __future__ import annotations

from typing import Any

import pytest

from pretrain.config import HealthConfig
from pretrain.monitoring.detectors import Finding
from pretrain.monitoring.policy import Policy, UnhealthyError


def finding(kind: Any = "collapse", name: str = "variance", pooled: int = 0) -> Finding:
    return Finding(name, kind, "seen", "helps", pooled=pooled)


def policy(rollbacks: int = 0, **values: Any) -> Policy:
    return Policy(HealthConfig(**{"every": 10, "confirm": 2, **values}), rollbacks)


def test_a_finding_is_confirmed_once_by_checks_in_a_row() -> None:
    made = policy(on_collapse="stop")
    assert made.decide(10, [finding()]) == []
    assert made.decide(20, []) == []
    assert made.decide(30, [finding()]) == []
    assert not made.stop
    [alarm] = made.decide(40, [finding()])
    assert (alarm.step, alarm.since) == (40, 30)
    assert made.stop
    assert made.decide(50, [finding()]) == [], "one alarm until it is gone"
    made.decide(60, [])
    assert made.decide(70, [finding()]) == []
    assert len(made.decide(80, [finding()])) == 1


def test_targets_are_judged_before_the_first_update_at_once() -> None:
    made = policy(on_collapse="stop")
    assert len(made.decide(0, [finding(name="target entropy")])) == 1
    assert made.decide(0, [finding(name="another")]) == []


def test_a_roll_back_returns_to_before_what_the_finding_was_measured_over() -> None:
    made = policy(on_collapse="rollback")
    made.decide(100, [finding(pooled=35)])
    made.decide(110, [finding(pooled=35)])
    assert made.roll_back_before == 100 - 35 - 10
    assert made.why
    made.reset()
    assert (made.roll_back_before, made.stop, made.why) == (0, False, "")
    made.decide(10, [finding()])
    made.decide(20, [finding()])
    assert made.stop, "there is no healthy state before step 10"


@pytest.mark.parametrize("kind", ["nan", "collapse", "chance", "recipe"])
def test_each_kind_of_finding_has_its_own_action(kind: Any) -> None:
    every = dict.fromkeys(("on_nan", "on_collapse", "on_chance", "on_recipe"), "warn")
    for name in every:
        made = policy(**{**every, name: "stop"})
        assert made.action(finding(kind)) == ("stop" if name == f"on_{kind}" else "warn")


def test_no_more_than_the_configured_roll_backs() -> None:
    made = policy(rollbacks=1, max_rollbacks=2)
    assert made.count_rollback(30, "why") == 30
    with pytest.raises(UnhealthyError, match=r"why; health\.max_rollbacks=2"):
        made.count_rollback(30, "why")
