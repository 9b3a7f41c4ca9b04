"""Checks whether a run may continue from a checkpoint: same data, and same config except for fields that may change.

Each config field declares what a resumed run may change in it (`about(..., resume=...)` in data_pipeline.core.schema).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipeline.core.schema import ConfigError, Resume, diff, dump, load, resume_rules
from pretrain.config import Config
from pretrain.lr_schedule import Prolongation, learning_rate
from pretrain.train_module import open_run_reader

SMALL = 1e-3
"""Relative change of the learning rate below which none is reported."""


def require_same_config(saved: Mapping[str, Any], config: Config, folder: Path) -> None:
    """Checks that a run with `config` may continue from a checkpoint that was saved with `saved`.

    Args:
        saved: The config in the checkpoint, as plain values.
        config: The config of the resumed run.
        folder: The checkpoint, for the message.

    Raises:
        ConfigError: A field that must not change differs; the message lists each one with both values.
    """
    rules = resume_rules(Config)
    changed = [
        f"{path}: {before!r} in the checkpoint, {now!r} now"
        for path, before, now in diff(_as_today(saved), dump(config))
        if not _may_change(_rule(rules, path), before, now)
    ]
    if changed:
        raise ConfigError(
            f"{folder} was saved with another config, and a resumed run keeps it. Set these back, or start a new run "
            "under another name=: " + "; ".join(changed)
        )


def require_same_data(state: Mapping[str, Any], config: Config, folder: Path) -> None:
    """Checks that data whose path changed is the data that the run was trained on, by the hash of the step plan.

    Data at an unchanged path is not opened here: the ranks compare its hash when they start.

    Args:
        state: The checkpoint's state.json.
        config: The config of the resumed run.
        folder: The checkpoint, for the message.

    Raises:
        ConfigError: The data differs; the message lists each path with both values.
    """
    rules = resume_rules(Config)
    moved = [
        (path, before, now)
        for path, before, now in diff(_as_today(state["config"]), dump(config))
        if _rule(rules, path) == "data" and not same_path(before, now)
    ]
    if not moved or not state.get("cursor") or config.data.reader != "plan":  # a stream has no plan to compare
        return
    reader = open_run_reader(config)
    try:
        plan_hash = reader.plan_hash
    finally:
        reader.close()
    if plan_hash != state["cursor"]["plan_hash"]:
        listed = "; ".join(f"{path}: {before!r} in the checkpoint, {now!r} now" for path, before, now in moved)
        raise ConfigError(
            f"{folder} was trained on other data ({listed}; plan {state['cursor']['plan_hash']} in the checkpoint, "
            f"{plan_hash} now). Name a copy of the same shards and labels, or start a new run under another name="
        )


def same_path(one: Any, other: Any) -> bool:
    """Returns whether two config values name the same file, folder or URL, or the same ones in the same order."""
    if isinstance(one, str) and isinstance(other, str):
        return bool(one) == bool(other) and _resolved(one) == _resolved(other)
    if isinstance(one, Sequence) and isinstance(other, Sequence):
        return len(one) == len(other) and all(same_path(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)


def is_prolongation(value: Any) -> bool:
    """Returns whether a value of state.json is null or an object that `prolongation` reads."""
    numbers = (int, float)
    return value is None or (
        isinstance(value, dict)
        and value.keys() == {"step", "rate"}
        and isinstance(value["step"], int)
        and isinstance(value["rate"], numbers)
    )


def prolongation(
    saved: Mapping[str, Any], config: Config, step: int, before: Mapping[str, Any] | None
) -> Prolongation | None:
    """Returns step and learning rate at which train.steps last changed in a run; None if it never did.

    Args:
        saved: The config in the checkpoint.
        config: The config of the resumed run.
        step: Updates done.
        before: The prolongation in the checkpoint's state.json, if any.

    Raises:
        ConfigError: schedule.continue=constant would keep a learning rate of 0.
    """
    earlier = Prolongation(**before) if before else None
    then = _loaded(saved)
    found = earlier
    if then is not None and then.train.steps != config.train.steps and step:
        rate = learning_rate(then.optimizer, then.schedule, then.train.steps, step - 1, earlier)
        found = Prolongation(step, rate)
    if found and config.schedule.continuation == "constant" and not found.rate and step < config.train.steps:
        raise ConfigError(
            f"schedule.continue=constant: the learning rate of the last update, {found.step}, is 0; take "
            "schedule.continue=rewarm or as_planned"
        )
    return found


def prolongation_notice(saved: Mapping[str, Any], config: Config, step: int, found: Prolongation | None) -> str:
    """Returns a message on a learning rate that changes because `train.steps` did; "" if it does not change.

    Args:
        saved: the config in the checkpoint.
        config: the config of the resumed run.
        step: updates done.
        found: the prolongation in force, if any.
    """
    then = _loaded(saved)
    if then is None or found is None or then.train.steps == config.train.steps or step >= config.train.steps:
        return ""
    after = learning_rate(config.optimizer, config.schedule, config.train.steps, step, found)
    planned = learning_rate(then.optimizer, then.schedule, then.train.steps, step) if step < then.train.steps else None
    if abs(after - (planned if planned is not None else found.rate)) <= SMALL * config.optimizer.lr:
        return ""
    return (
        f"train.steps was {then.train.steps} and is {config.train.steps}: the learning rate goes from {found.rate:.3g} "
        f"(update {step}) to {after:.3g} (update {step + 1}), with schedule.continue={config.schedule.continuation}; "
        "as_planned follows the schedule of the new length, rewarm warms up to it again, constant keeps the last rate"
    )


def _as_today(saved: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns a checkpoint's config with current field names and defaults; unchanged if this version cannot read it."""
    then = _loaded(saved)
    return saved if then is None else dump(then)


def _loaded(saved: Mapping[str, Any]) -> Config | None:
    try:
        return load(Config, saved)
    except ConfigError:
        return None


def _rule(rules: Mapping[str, Resume], path: str) -> Resume:
    """Returns the rule of a field, or of the nearest section above it that has one."""
    parts = path.split(".")
    prefixes = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((rules[prefix] for prefix in prefixes if prefix in rules), "fixed")


def _may_change(rule: Resume, before: Any, now: Any) -> bool:
    return rule in ("free", "data") or (rule == "path" and same_path(before, now))


def _resolved(place: str) -> str:
    local = place.removeprefix("file://")
    return place.rstrip("/") if "://" in local else str(Path(local).expanduser().resolve())
