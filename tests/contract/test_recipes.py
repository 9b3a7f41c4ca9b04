"""Every shipped YAML file of a model composes, loads strictly and builds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from data_pipeline.core.schema import ConfigError, load
from data_pipeline.text.tokenizer import write_tokens
from launch.cli.compose import compose
from launch.cli.groups import CONF
from launch.config import PretrainJob
from launch.runs.metadata import run_config
from pretrain import registry
from pretrain.config import Config
from pretrain.interop.export_tolerance import TOLERANCE
from pretrain.interop.hf_export import SMALL_RECIPES, describe, export, exports
from pretrain.nn.attention_patterns import Pattern
from pretrain.profiling.flops import forward_gflop
from pretrain.train_module import build_model


def stems(group: str) -> list[str]:
    return sorted(file.stem for file in (CONF / group).glob("*.yaml"))


def composed(*overrides: str) -> Config:
    values = compose("pretrain", ["data.shards=nowhere", *overrides])
    return run_config(load(PretrainJob, values))


@pytest.mark.parametrize("experiment", stems("experiment"))
def test_every_experiment_builds(experiment: str) -> None:
    config = composed(f"experiment={experiment}")
    with torch.device("meta"):
        module = build_model(config)
    assert sum(weight.numel() for weight in module.parameters()) > 100_000
    assert config.schedule.warmup_steps < config.train.steps


@pytest.mark.parametrize("name", registry.names("objectives"))
def test_every_objective_has_a_yaml_file(name: str) -> None:
    head = ["heads.text.name=ctc"] if name == "none" else []
    assert composed(f"objective={name}", *head).objective.name == name


@pytest.mark.parametrize(("group", "name"), [(g, n) for g in ("frontend", "encoder") for n in stems(g)])
def test_every_front_end_and_encoder_has_a_yaml_file(group: str, name: str) -> None:
    with torch.device("meta"):
        build_model(composed(f"{group}={name}"))


NEEDED = {
    "sequence": ["heads.task.vocabulary=20"],
    "synthesis": ["heads.task.vocabulary=20"],
    "units": ["heads.task.vocabulary=20"],
    "classifier": ["heads.task.classes=[ann,bob]"],
    "joint_embedding": [
        "heads.task.towers.text.embedding.name=tokens",
        "heads.task.towers.text.embedding.vocabulary=20",
    ],
}


@pytest.mark.parametrize("name", registry.names("heads"))
def test_every_head_has_a_yaml_file(name: str) -> None:
    config = composed(
        "experiment=best_rq_tiny", f"add_head@heads.task={name}", "heads.task.weight=0.5", *NEEDED.get(name, [])
    )
    assert (config.heads["task"].name, config.heads["task"].weight) == (name, 0.5)
    with torch.device("meta"):
        assert sum(weight.numel() for weight in build_model(config).heads.parameters()) > 0


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("add_head=ctc", "write add_head@heads.NAME=ctc"),
        ("add_head@heads.text=ctcc", r"not a choice of add_head \(did you mean ctc\?\)"),
    ],
)
def test_a_wrong_choice_of_a_head_is_named(given: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        composed(given)


@pytest.mark.parametrize("name", ["data2vec_base", "data2vec2_base", "dinosr_base"])
def test_crops_and_optimizer_match_the_released_config(name: str) -> None:
    """max_sample_size 320000, min_sample_size 32000, adam_betas (0.9, 0.98), adam_eps 1e-6, weight_decay 0.01."""
    config = composed(f"experiment={name}")
    assert (config.data.max_seconds, config.data.min_seconds) == (20.0, 2.0)
    optimizer = config.optimizer
    assert (optimizer.betas, optimizer.eps, optimizer.weight_decay) == ((0.9, 0.98), 1e-6, 0.01)


@pytest.mark.parametrize(
    ("name", "millions"),
    [("wav2vec2_base", 95.0), ("wav2vec2_large", 317.4), ("hubert_base", 94.7), ("wavlm_base", 94.7)],
)
def test_published_parameter_counts(name: str, millions: float) -> None:
    with torch.device("meta"):
        module = build_model(composed(f"experiment={name}"))
    count = sum(weight.numel() for weight in module.parameters() if weight.requires_grad)
    assert count / 1e6 == pytest.approx(millions, abs=0.05)


def test_forward_flops_of_wav2vec2_base() -> None:
    """Counted by hand: 15.3 GFLOP per second of audio in the forward pass, with crops of 15 s."""
    model = build_model(composed("experiment=wav2vec2_base")).model
    assert forward_gflop(model, 15.0) == pytest.approx(15.3, abs=0.5)


@pytest.mark.parametrize("experiment", ["efficient_base", "efficient_tiny"])
def test_the_efficient_default_streams_or_uses_full_context(experiment: str) -> None:
    """Audio cut at the end of a chunk gives the same frames; with full context later audio changes them."""
    small = ["encoder.dim=32", "encoder.heads=2", "encoder.ffn_dim=32"]
    model = build_model(composed(f"experiment={experiment}", *small)).model.eval()
    wave_BT = torch.randn(1, 80_000)
    cut = (
        64 * 640 + 240
    )  # four chunks of 16 frames, and the samples that the last window and convolution need beyond them
    for stream, streams in ((Pattern(chunk=16, left_chunks=2), True), (None, False)):
        model.encoder.stream = stream  # type: ignore[assignment]
        with torch.no_grad():
            whole = model(wave_BT, torch.tensor([80_000])).final.x_BFD[:, :64]
            first = model(wave_BT[:, :cut], torch.tensor([cut])).final.x_BFD
        assert first.shape == whole.shape
        assert (float((whole - first).abs().max()) <= 1e-5) == streams


@pytest.mark.parametrize("experiment", SMALL_RECIPES.values())
def test_a_small_recipe_of_each_family_exports_to_hugging_face(experiment: str, tmp_path: Path) -> None:
    small = ["encoder.layers=2", "encoder.dim=32", "encoder.heads=2", "encoder.ffn_dim=32", "frontend.channels=16"]
    config = composed(f"experiment={experiment}", *small)
    assert export(config, build_model(config), tmp_path / "exported") <= TOLERANCE["hugging_face"]


@pytest.mark.parametrize("name", ["best_rq_tiny", "wav2vec2_tiny", "hubert_tiny"])
def test_the_refusal_of_rotary_positions_names_the_recipe_to_take(name: str) -> None:
    config = composed(f"experiment={name}")
    assert not exports(config)
    assert exports(composed(f"experiment={SMALL_RECIPES[config.objective.name]}"))
    with pytest.raises(ConfigError, match=rf"positions=rope.*\+experiment={name.replace('_tiny', '_conv_tiny')}\)"):
        describe(config, "Wav2Vec2")


def test_the_recipe_with_an_attention_decoder_exports_to_hugging_face(tmp_path: Path) -> None:
    write_tokens(str(tmp_path / "tokens"), {"kind": "characters", "label": "text", "case": "lower", "symbols": ["a"]})
    small = ["encoder.layers=2", "encoder.dim=32", "encoder.heads=2", "encoder.ffn_dim=32", "frontend.channels=16"]
    tokens = [f"data.tokens.text={tmp_path}/tokens", "heads.text.vocabulary=1", "heads.ctc.vocabulary=1"]
    config = composed("experiment=wav2vec2_aed_base", *small, *tokens)
    assert export(config, build_model(config), tmp_path / "exported", "text") <= TOLERANCE["hugging_face"]
    assert "SpeechEncoderDecoderModel" in (tmp_path / "exported" / "config.json").read_text()


def benchmarked() -> list[str]:
    from benchmarks.train_step import RECIPES

    return list(RECIPES)


@pytest.mark.parametrize("name", benchmarked())
def test_the_benchmark_uses_the_shipped_model_configs(name: str) -> None:
    """benchmarks/train_step.py must run without Hydra, and therefore repeats values of conf/experiment."""
    from benchmarks.train_step import RECIPES

    shipped = composed(f"experiment={name}")
    measured = load(Config, {"data": {"shards": "nowhere"}, **RECIPES[name]})
    for part in ("frontend", "encoder", "objective"):
        assert getattr(measured, part) == getattr(shipped, part), part
