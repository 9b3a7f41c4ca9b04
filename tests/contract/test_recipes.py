"""Every shipped yaml of a model composes, loads strictly and builds."""

from __future__ import annotations

import pytest
import torch

from data_pipeline.schema import load
from launch.compose import CONF, compose
from pretrain import plugins
from pretrain.config import Config
from pretrain.model import build_model


def stems(group: str) -> list[str]:
    return sorted(file.stem for file in (CONF / group).glob("*.yaml"))


def composed(*overrides: str) -> Config:
    values = compose("pretrain", ["data.shards=nowhere", *overrides])
    return load(Config, {name: value for name, value in values.items() if name != "launcher"})


@pytest.mark.parametrize("experiment", stems("experiment"))
def test_experiment(experiment: str) -> None:
    config = composed(f"experiment={experiment}")
    with torch.device("meta"):
        module = build_model(config)
    assert sum(weight.numel() for weight in module.parameters()) > 100_000
    assert config.schedule.warmup_steps < config.train.steps


@pytest.mark.parametrize("name", plugins.names("objectives"))
def test_objective_has_a_yaml(name: str) -> None:
    assert composed(f"objective={name}").objective.name == name


@pytest.mark.parametrize(("group", "name"), [(g, n) for g in ("frontend", "encoder") for n in stems(g)])
def test_frontend_and_encoder_yaml(group: str, name: str) -> None:
    with torch.device("meta"):
        build_model(composed(f"{group}={name}"))


def test_published_parameter_counts() -> None:
    """wav2vec2-base: 95.04 M with quantiser and projections (fairseq's log and its checkpoint)."""
    with torch.device("meta"):
        module = build_model(composed("experiment=wav2vec2_base"))
    assert sum(weight.numel() for weight in module.parameters()) == pytest.approx(95.04e6, rel=1e-3)
    assert sum(weight.numel() for weight in module.model.parameters()) == pytest.approx(94.37e6, rel=1e-3)
