"""Memory of one of two ranks under each ZeRO stage, and of a forward pass, against `auricle plan-run`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from data_pipeline.core.schema import load
from data_pipeline.core.types import SAMPLE_RATE, Batch
from launch.cli.compose import compose
from launch.config import PretrainJob
from pretrain.interfaces.frames import StepContext
from pretrain.profiling.cost_model import Cost, Measured, activation_bytes, bucket_bytes, measure, state_bytes
from pretrain.train_module import build_model
from tests.support.engine_runs import case, run


@pytest.mark.slow
def test_memory_of_each_zero_stage_equals_the_forecast(tmp_path: Path) -> None:
    cases = {str(stage): case("deepspeed", stage, memory=True) | {"steps": 2} for stage in range(4)}
    for made in cases.values():
        made["config"]["encoder"] |= {"dim": 192, "heads": 4, "ffn_dim": 768, "layers": 4}
    found = run(tmp_path, "memory", 2, cases)
    parameters = found["0"]["parameters"]
    model = Measured(parameters, parameters, Cost(0, 0), Cost(0, 0), differentiated=Cost(0, 0))
    activations = found["0"]["held"] - state_bytes(model, 0, 2)
    assert 0 < activations < 0.2 * found["0"]["held"]
    for stage in (1, 2, 3):
        held, forecast = found[str(stage)]["held"] - activations, state_bytes(model, stage, 2)
        print(f"ZeRO {stage}: {held / parameters:.2f} bytes a parameter held, {forecast / parameters:.2f} forecast")
        # under stage 2 the bucket is not allocated before the backward pass
        expected = forecast - (bucket_bytes(model) if stage == 2 else 0.0)
        assert 0.93 * expected < held < 1.03 * expected


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("experiment", ["best_rq_tiny", "wav2vec2_tiny"])
def test_activation_memory_of_a_micro_batch_is_close_to_the_forecast(experiment: str, precision: str) -> None:
    """Compares with the allocator's statistics of a forward pass over the largest micro-batch."""
    seconds, segments = 4, 6
    data = (f"data.max_seconds={seconds}", f"data.batch_seconds={seconds * segments}", "data.micro_batches=1")
    given = [f"+experiment={experiment}", "data.shards=none", *data, f"engine.precision={precision}"]
    config = load(PretrainJob, compose("pretrain", given))
    forecast = activation_bytes(measure(config, (1.0, 2.0)), config)
    module, context = build_model(config), StepContext(0, 0)
    samples = seconds * SAMPLE_RATE
    keys = tuple(map(str, range(segments)))
    batch = Batch(0.1 * torch.randn(segments, samples), torch.full((segments,), samples), keys, 0)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as account:
        plan = module.prepare(batch, context)
        result = module(batch, plan, plan.counts_K, context)
    held = sum(event.self_cpu_memory_usage for event in account.events())
    del result
    print(f"{experiment} in {precision}: {held / 1e6:.1f} MB held, {forecast / 1e6:.1f} forecast")
    assert 0.8 * held < forecast < 1.25 * held
