"""Forecasts against published operation counts and the memory of real optimizers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from data_pipeline.core.schema import ConfigError, load
from launch import main
from launch.cli.compose import compose
from launch.config import PretrainJob
from launch.exit_codes import ExitCode
from pretrain.config import Config
from pretrain.profiling import cost_model
from tests.support.paths import ROOT


def config(*overrides: str) -> Config:
    return load(PretrainJob, compose("pretrain", ["data.shards=none", *overrides]))


def test_wav2vec2_base_matches_published_parameters_and_flops() -> None:
    measured = cost_model.measure(config("+experiment=wav2vec2_base"), (1.0, 2.0))
    assert measured.parameters == pytest.approx(95.05e6, rel=1e-3), (
        "the number of parameters of transformers' Wav2Vec2ForPreTraining"
    )
    assert measured.flops.of(15.0) / 15.0 == pytest.approx(15.3e9, rel=0.06), "counted by hand"


def test_optimizer_state_sizes_equal_those_of_a_real_optimizer() -> None:
    small = config("+experiment=best_rq_tiny")
    measured = cost_model.measure(small, (1.0, 1.5))
    from pretrain.train_module import build_model

    trained = [parameter for parameter in build_model(small).parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    sum(parameter.sum() for parameter in trained).backward()
    optimizer.step()
    held = [*trained, *(parameter.grad for parameter in trained)]
    held += [value for state in optimizer.state.values() for value in state.values() if value.numel() > 1]
    real = sum(tensor.numel() * tensor.element_size() for tensor in held if tensor is not None)
    assert cost_model.state_bytes(measured, 0, 1) == pytest.approx(real, rel=0.02)
    held = {
        stage: cost_model.state_bytes(measured, stage, 1024) - cost_model.bucket_bytes(measured) for stage in (1, 2, 3)
    }
    assert held[1] > held[2]
    assert held[3] - 4 * measured.parameters == pytest.approx(20 * measured.trained / 1024, rel=0.05)


def test_forecast_speedup_never_exceeds_the_number_of_gpus() -> None:
    flops = cost_model.Cost(15e9, 1e7)
    measured = cost_model.Measured(95_000_000, 95_000_000, flops, cost_model.Cost(1e8, 0.0), flops)
    base, cluster = config("+experiment=wav2vec2_base"), cost_model.Cluster(128, 8, "H100")
    steps = [cost_model.forecast(measured, base, cluster, gpus, 0.3).step for gpus in cost_model.counts(1024)]
    assert steps == sorted(steps, reverse=True)
    assert all(steps[0] / step <= 1024 >> shift for shift, step in enumerate(reversed(steps)))
    one = cost_model.forecast(measured, base, cluster, 1, 0.3)
    assert one.sent == one.exposed == 0.0


def test_fp16_is_as_fast_as_bf16_and_both_are_faster_than_tf32() -> None:
    flops = cost_model.Cost(15e9, 1e7)
    measured = cost_model.Measured(95_000_000, 95_000_000, flops, cost_model.Cost(1e8, 0.0), flops)
    cluster = cost_model.Cluster(1, 8, "H100")
    times = {}
    for precision in ("fp32", "bf16", "fp16"):
        wanted = config("+experiment=wav2vec2_base", f"engine.precision={precision}", "engine.tf32=true")
        times[precision] = cost_model.forecast(measured, wanted, cluster, 8, 0.3).compute
    assert times["fp16"] == times["bf16"]
    assert times["fp32"] == pytest.approx(2 * times["fp16"], rel=0.01)


@pytest.mark.parametrize("offload", ["none", "cpu"])
def test_costs_that_offloading_leaves_out_are_reported(offload: str) -> None:
    wanted = config("+experiment=best_rq_tiny", "engine.zero_stage=1", f"engine.offload={offload}")
    found = cost_model.assumptions(wanted, cost_model.Cluster(1, 8, "H100"), (0.1, 0.1))
    assert ("engine.offload=cpu" in found.get("offload", "")) == (offload == "cpu")


def test_planning_needs_no_frame_labels(capsys: pytest.CaptureFixture[str]) -> None:
    small = ("encoder.layers=1", "encoder.dim=32", "encoder.ffn_dim=64", "encoder.heads=2")
    assert main.main(["plan-run", "+experiment=hubert_base", *small]) == 0
    assert "GiB per GPU" in capsys.readouterr().out


def test_the_forecast_of_a_chain_covers_all_iterations(capsys: pytest.CaptureFixture[str]) -> None:
    small = ("encoder.layers=1", "encoder.dim=32", "encoder.ffn_dim=64", "encoder.heads=2")
    days = []
    for of in ((), ("~chain",)):
        assert main.main(["plan-run", "+experiment=hubert_base", *small, *of, "mfu=0.3"]) == 0
        said = capsys.readouterr().out
        on_one_gpu = [line.split() for line in said.splitlines() if line.split()[:1] == ["1"]][-1]
        days.append(float(on_one_gpu[6]))
        assert (("650,000 updates" in said) and ("it1 250,000 + it2 400,000" in said)) == (not of)
    assert days[0] == pytest.approx(days[1] * 650 / 400, abs=0.02)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["cluster=8x8xH10"], ["H100", "8x8xH100"]), (["cluster=8"], ["NODESxGPUSxKIND"]), (["mfu=2"], ["mfu=2"])],
)
def test_invalid_arguments_are_reported(
    arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(["plan-run", "+experiment=best_rq_tiny", *arguments]) == ExitCode.USAGE
    said = capsys.readouterr().err
    assert all(word in said for word in words)
    with pytest.raises(ConfigError):
        cost_model.parse_cluster("0x8xH100")


def test_the_plan_starts_from_published_mfu_and_fits_80_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launch.cli.tables.PIPED_WIDTH", 80)
    small = ("encoder.layers=1", "encoder.dim=32", "encoder.ffn_dim=64", "encoder.heads=2")
    assert main.main(["plan-run", "+experiment=hubert_base", "~chain", *small]) == 0
    said = capsys.readouterr().out
    assert "9% to 11% of the peak" in said
    row = next(line for line in said.splitlines() if line.split()[:1] == ["1"] and "–" in line)
    fast, slow = (float(days.replace(",", "")) for days in row.split()[6].split("–"))
    assert slow / fast == pytest.approx(11 / 9, rel=0.05)
    assert "…" not in said
    assert max(map(len, said.splitlines())) <= 80
    table = [line for line in said.splitlines() if line.split()[:1] and line.split()[0].isdigit()]
    assert len(table) >= 11 + 4, "no row is wrapped"


def test_planning_holds_no_weights_in_memory() -> None:
    """Building half of wav2vec 2.0 LARGE for a plan takes less than 30 % of the memory of its weights."""
    cost_model.build_without_memory(config("+experiment=wav2vec2_tiny"))  # what torch imports on the way is not counted
    large = config("+experiment=wav2vec2_large", "encoder.layers=12")
    before = psutil.Process().memory_info().rss
    module = cost_model.build_without_memory(large)
    assert not any(bool(weight.detach().any()) for weight in module.parameters())
    weights = sum(weight.numel() * weight.element_size() for weight in module.parameters())
    assert psutil.Process().memory_info().rss - before < 0.5 * weights


@pytest.mark.slow
@pytest.mark.parametrize("experiment", ["wav2vec2_large", "multitask_base", "whisper_like_small", "data2vec2_base"])
def test_planning_a_run_fits_a_login_node(experiment: str) -> None:
    """The whole command uses at most 1 GiB of memory."""
    command = [sys.executable, "-m", "launch.main", "plan-run", f"+experiment={experiment}", "data.shards=none"]
    measured = "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)"
    measured += "; print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    done = subprocess.run([sys.executable, "-c", measured, *command], cwd=ROOT, capture_output=True, check=True)
    assert int(done.stdout) <= 1024**2, "KiB"


def test_a_measured_rate_gives_its_own_utilisation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At the measured rate, the forecast for one GPU is that rate: audio hours per GPU hour."""
    rows = [{"model": "ours hubert_base", "precision": "bf16", "audio_s_per_s": 123.0}]
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps({"recipes": {"rows": rows}}))
    small = ("encoder.layers=1", "encoder.dim=32", "encoder.ffn_dim=64", "encoder.heads=2", "engine.precision=bf16")
    run = ["plan-run", "+experiment=hubert_base", "~chain", *small, "cluster=1x1xH100"]
    assert main.main([*run, f"measured={path}"]) == 0
    said = capsys.readouterr().out
    row = next(line.split() for line in said.splitlines() if line.split()[:1] == ["1"] and len(line.split()) > 6)
    assert float(row[5]) == pytest.approx(123, abs=1)
    for wrong, words in (
        (rows[0] | {"model": "ours wavlm_base"}, ["hubert_base", "wavlm_base bf16"]),
        (rows[0] | {"audio_s_per_s": 1e12}, ["more than a H100"]),
    ):
        path.write_text(json.dumps({"rows": [wrong]}))
        assert main.main([*run, f"measured={path}"]) == ExitCode.USAGE
        said = capsys.readouterr().err
        assert all(word in said for word in words)


def test_the_backward_pass_of_a_teacher_is_not_counted() -> None:
    with_teacher = cost_model.measure(config("+experiment=data2vec_base", "encoder.layers=2"), (1.0, 2.0))
    assert with_teacher.differentiated.of(2.0) < 0.85 * with_teacher.flops.of(2.0)
    without = cost_model.measure(config("+experiment=best_rq_tiny"), (1.0, 2.0))
    assert without.differentiated.of(2.0) > 0.95 * without.flops.of(2.0), "only targets are computed without gradients"
