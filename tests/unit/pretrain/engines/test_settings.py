"""Settings passed to torch and DeepSpeed for GPUs, tested without a GPU."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import torch

from data_pipeline.core.schema import dump, load
from pretrain import registry
from pretrain.config import Config, EngineConfig, OptimizerConfig
from pretrain.engines import distributed
from pretrain.engines.deepspeed import deepspeed_config
from pretrain.engines.distributed import DistributedContext


@pytest.mark.parametrize(("cuda", "backend"), [(True, "nccl"), (False, "gloo")])
def test_the_collective_timeout_comes_from_the_config(
    cuda: bool, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr("torch.cuda.is_available", lambda: cuda)
    monkeypatch.setattr("torch.cuda.set_device", lambda number: None)
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: False)
    monkeypatch.setattr("torch.distributed.init_process_group", lambda name, **more: given.update(more, name=name))
    for name, value in {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    joined = distributed.join("auto", 7.5)
    assert (given["name"], given["timeout"]) == (backend, timedelta(minutes=7.5))
    assert (given["rank"], given["world_size"]) == (3, 8)
    assert joined == DistributedContext(3, 8, 1, "cuda:1" if cuda else "cpu")


@pytest.mark.parametrize("stage", range(4))
def test_deepspeed_overlaps_communication_on_gpus_and_accumulates_micro_batches(stage: int) -> None:
    module, optimizer = torch.nn.Linear(8, 8), OptimizerConfig(lr=1e-3, clip_norm=2.0)
    config = EngineConfig(zero_stage=stage, offload="cpu" if stage else "none")
    made = deepspeed_config(config, optimizer, 4, DistributedContext(0, 8, 0, "cuda:0"), module)
    assert made["zero_optimization"]["overlap_comm"] is True
    assert made["zero_optimization"]["stage"] == stage
    assert made["zero_optimization"]["offload_optimizer"]["pin_memory"] is True
    assert (made["train_batch_size"], made["gradient_accumulation_steps"]) == (32, 4)
    assert made["gradient_clipping"] == 2.0
    for more in ({"world": DistributedContext(0, 8)}, {"same_blocks": False}):
        given = {"world": DistributedContext(0, 8, 0, "cuda:0")} | more
        assert not deepspeed_config(config, optimizer, 4, module=module, **given)["zero_optimization"]["overlap_comm"]


def test_the_former_name_of_the_torch_engine_still_loads() -> None:
    parts = {"data": {"shards": "none"}, "frontend": {"name": "log_mel"}, "encoder": {"name": "transformer"}}
    config = load(Config, {**parts, "objective": {"name": "best_rq"}, "engine": {"name": "local"}})
    assert config.engine.name == "torch"
    assert dump(config)["engine"]["name"] == "torch"


def test_each_front_end_gives_the_shortest_audio_for_a_number_of_frames() -> None:
    """Windows of 400 samples, hop 160: a 25 Hz log-mel frame needs 4 windows, a 50 Hz stem frame 400 samples."""
    shapes = {"log_mel": {1: 400 + 3 * 160, 3: 400 + 11 * 160}, "waveform_conv": {1: 400, 2: 720}}
    for name, expected in shapes.items():
        frontend = registry.build_frontend(registry.config_type("frontends", name)(), 32)
        assert {frames: frontend.least_samples(frames) for frames in expected} == expected
