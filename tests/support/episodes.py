"""Episodes of synthetic speech, and tiny runs that adapt to them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from data_pipeline.core.schema import dump, load
from data_pipeline.core.types import PART, QUERY, SUPPORT, WAY, Batch
from pretrain import registry
from pretrain.config import Config
from tests.support.contract_cases import CASES, HEADS, TEXTS, batch, labelled

WAYS, SHOTS, QUERIES = 2, 1, 1


def episode(number: int = 0, seconds: tuple[float, ...] = (1.0, 0.7, 0.9, 0.8)) -> Batch:
    """Returns an episode of two classes, with one example and one query each."""
    texts = (*TEXTS, *TEXTS)
    made = labelled(batch(seconds, first_seed=4 * number), texts)
    labels = {**made.labels, WAY: ("0", "1", "0", "1"), PART: (SUPPORT, SUPPORT, QUERY, QUERY)}
    return dataclasses.replace(made, labels=labels, micro_batch=number)


def settings(
    objective: str = "none",
    head: str | None = "episode",
    more: Mapping[str, Any] | None = None,
    **meta: Any,
) -> Config:
    """Returns the config of a tiny run on episodes.

    Args:
        objective: of the contract suite.
        head: one of the contract suite, under the name task; None: none.
        more: fields that differ, by section.
        **meta: fields of engine.meta.
    """
    head_config = {"name": "episode", "ways": WAYS} if head == "episode" else HEADS[head] if head else None
    task = "objective" if head is None else "task"
    encoder = {"name": "transformer", "layers": 2, "dim": 32, "heads": 2, "ffn_dim": 64}
    values: dict[str, Any] = {
        "data": {"shards": "none", "micro_batches": 2, "episodes": {"label": "word", "ways": WAYS}},
        "objective": _plugin("objectives", CASES.get(objective, {"name": objective})),
        "heads": {"task": _plugin("heads", head_config)} if head_config else {},
        "frontend": _plugin("frontends", {"name": "log_mel", "n_mels": 20}),
        "encoder": _plugin("encoders", encoder),
        "optimizer": {"lr": 1e-3, "weight_decay": 0.0},
        "schedule": {"name": "constant", "warmup_steps": 0},
        "engine": {"name": "meta", "meta": {"inner": task, "inner_steps": 2, "inner_lr": 0.1, **meta}},
        "train": {"steps": 6, "checkpoint_every": 2, "media_every": 0},
    }
    return load(Config, _merged(values, more or {}))


def _merged(values: dict[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    return values | {
        key: _merged(values.get(key, {}), value) if isinstance(value, Mapping) else value for key, value in more.items()
    }


def calm(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a config with the probabilities of random draws set to 0."""
    random = ("layer_drop", "stochastic_depth")
    return {
        key: calm(value) if isinstance(value, Mapping) else 0.0 if key.endswith("dropout") or key in random else value
        for key, value in values.items()
    }


def _plugin(kind: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return calm(dump(load(registry.config_type(kind, values["name"]), dict(values))))
