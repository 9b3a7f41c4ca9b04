"""A cut run equals the model that it was cut from: up to the last kept block, or with the gates that were closed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data_pipeline.core.schema import ConfigError, dump, load
from launch.main import main
from pretrain.checkpointing.locate import find_checkpoint
from pretrain.checkpointing.weights import LoadedCheckpoint, load_checkpoint
from pretrain.compression.cut import cut_blocks, cut_gates, cut_widths, require_closed
from pretrain.config import Config
from pretrain.evaluate.frozen_encoders import open_encoder
from pretrain.interfaces.frames import BlockGates, ModelGates
from pretrain.interfaces.models import SpeechModel
from pretrain.interfaces.objectives import Pruning
from pretrain.interop.graph_export import export_graph
from pretrain.nn.block_stack import BlockStack
from pretrain.nn.importance import importance
from pretrain.train import Ending
from pretrain.train_module import build_model
from tests.support.contract_cases import small
from tests.support.parity_table import Parity
from tests.support.training import config as training_config
from tests.support.training import run, save

ENCODERS: dict[str, dict[str, Any]] = {
    "post-norm": small("encoders", "transformer", layers=3),
    "pre-norm": small("encoders", "transformer", layers=3, norm="pre", positions="rope"),
    "relative bias": small("encoders", "transformer", layers=3, relative_bias=True, relative_buckets=16),
    "conformer": small("encoders", "conformer", layers=3),
    "U-shape": small("encoders", "transformer", layers=3, norm="pre", positions="rope", half_rate_blocks=1),
    "widths": small("encoders", "conformer", layers=3, widths=[[1, 48], [2, 64], [3, 16]]),
}
FRONT_ENDS: dict[str, dict[str, Any]] = {
    "log-mel, one convolution": {"name": "log_mel", "subsampling": 2},
    "log-mel, three convolutions": {"name": "log_mel", "subsampling": 8, "widths": [24, 16, 40]},
    "log-mel, none": {"name": "log_mel", "subsampling": 1},
    "waveform, group norm": {"name": "waveform_conv", "channels": 16, "bias": True},
    "waveform, layer norms": {"name": "waveform_conv", "norm": "layer", "widths": [8, 16, 24, 16, 16, 16, 20]},
    "three branches": {"name": "multiscale", "wave_channels": 16, "wave_widths": [8, 12, 16]},
}
WAVES = 0.1 * torch.randn(2, 12_000, generator=torch.Generator().manual_seed(0))


def trained(encoder: str, frontend: str = "") -> LoadedCheckpoint:
    """Returns a model whose weights, biases and norms are all random."""
    front = FRONT_ENDS[frontend] if frontend else {"name": "log_mel"}
    values = {"data": {"shards": "none"}, "frontend": front, "encoder": ENCODERS[encoder]}
    config = load(Config, values | {"objective": small("objectives", "best_rq")})
    module = build_model(config).eval()
    torch.manual_seed(3)
    with torch.no_grad():
        for weight in module.model.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    return LoadedCheckpoint(module, config, 7)


@torch.no_grad()
def layers(model: SpeechModel, gates: ModelGates = ModelGates()) -> tuple[Tensor, ...]:  # noqa: B008 (immutable)
    model.eval()
    features = model.extract(WAVES, torch.tensor([12_000, 9_000]), gates.frontend)
    output = model.encoder(model.project(features, gates.frontend), None, gates.blocks)
    return tuple(layer[output.final.valid_BF()] for layer in output.layers)


@pytest.mark.parametrize("blocks", [1, 2, 3])
@pytest.mark.parametrize("encoder", [name for name in ENCODERS if name != "U-shape"])
def test_a_model_cut_after_a_block_ends_with_that_layer(encoder: str, blocks: int, parity: Parity) -> None:
    found = trained(encoder)
    cut = cut_blocks(found, blocks).module.model.eval()
    found.module.model.encoder.stop_after = None if blocks == 3 else blocks
    expected = layers(found.module.model)
    given = layers(cut)
    assert len(given) == len(expected) == blocks + 1
    for one, other in zip(given, expected, strict=True):
        parity("cut after a block = stop_after: all layers", 1e-6, float((one - other).abs().max()))


def some_gates(found: LoadedCheckpoint, heads: bool) -> ModelGates:
    """Returns soft gates of blocks of which some are 0; those of the second block's channels all are."""
    generator, gates = torch.Generator().manual_seed(1), []
    for number, width in enumerate(found.config.encoder.block_widths):  # type: ignore[attr-defined]
        parts = []
        for size in (width.heads, *(width.ffn_dim for _ in found.module.model.encoder.feed_forwards)):  # type: ignore[union-attr]
            gate = torch.rand(size, generator=generator)
            gate[torch.rand(size, generator=generator) < 0.4] = 0.0
            parts.append(gate if number != 1 or size < 8 else torch.zeros(size))
        gates.append(BlockGates(parts[0] if heads else torch.ones_like(parts[0]), tuple(parts[1:])))
    return ModelGates(blocks=tuple(gates))


@pytest.mark.parametrize("encoder", ENCODERS)
def test_a_model_cut_by_its_gates_equals_the_gated_model(encoder: str, parity: Parity) -> None:
    found = trained(encoder)
    gates = some_gates(found, heads=encoder != "relative bias")
    cut = cut_gates(found, gates)
    before, after = (sum(w.numel() for w in m.model.parameters()) for m in (found.module, cut.module))
    assert after < 0.9 * before
    assert cut.made == []
    for one, other in zip(layers(cut.module.model), layers(found.module.model, gates), strict=True):
        error = float((one - other).abs().max() / other.abs().max())
        parity("cut = gated with the same gates: all layers, as a share of the largest", 1e-6, error)
    whole = layers(found.module.model)
    assert float((layers(cut.module.model)[-1] - whole[-1]).abs().max()) > 1e-3, "the gates change the model"


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("frontend", [name for name in FRONT_ENDS if name != "log-mel, none"])
def test_a_front_end_cut_by_its_gates_equals_the_gated_one(frontend: str, packed: bool, parity: Parity) -> None:
    found, generator = trained("pre-norm", frontend), torch.Generator().manual_seed(2)
    model = found.module.model
    if packed and not found.config.frontend.packable:
        packed = False
    gates_of_groups = []
    for number, group in enumerate(model.frontend.channel_groups()):
        gate_C = torch.rand(group.size, generator=generator)
        gate_C[torch.rand(group.size, generator=generator) < 0.5] = 0.0
        gates_of_groups.append(gate_C if number != 1 else torch.zeros(group.size))  # all closed: one is kept
    gates = some_gates(found, heads=True)._replace(frontend=tuple(gates_of_groups))
    cut = cut_gates(found, gates)
    kept = [group.size for group in cut.module.model.frontend.channel_groups()]
    assert kept == [max(1, int((gate_C > 0).sum())) for gate_C in gates.frontend]
    model.frontend.packed = cut.module.model.frontend.packed = packed
    expected, given = layers(model, gates), layers(cut.module.model)
    for one, other in zip(given, expected, strict=True):
        error = float((one - other).abs().max() / other.abs().max())
        parity("cut = gated with the same gates: all layers, as a share of the largest", 1e-6, error)
    assert float((expected[0] - layers(model)[0]).abs().max()) > 1e-3, "the gates change the model"
    again = load(Config, dump(cut.config))
    assert again.frontend == cut.config.frontend


def test_a_front_end_without_convolutions_has_no_gates() -> None:
    assert trained("pre-norm", "log-mel, none").module.model.frontend.channel_groups() == ()


@pytest.mark.parametrize(
    ("frontend", "words"),
    [
        ({"name": "log_mel", "subsampling": 4, "widths": [8]}, r"widths.*must be 2 numbers from 1 on, as .*=4"),
        ({"name": "waveform_conv", "widths": [8, 8]}, r"widths.*must be 7 numbers"),
        ({"name": "multiscale", "wave_widths": [8, 0, 8]}, r"wave_widths.*must be 3 numbers from 1 on"),
    ],
)
def test_widths_of_a_front_end_that_do_not_fit_are_refused(frontend: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load(Config, {"data": {"shards": "none"}, "frontend": frontend, "objective": {"name": "hubert"}})


@pytest.mark.parametrize("encoder", ["pre-norm", "conformer"])
def test_widths_keep_the_heads_and_channels_with_the_largest_weights(encoder: str) -> None:
    """Weights out of all others are zero, so nothing changes if the right ones are kept."""
    found, kept = trained(encoder), [[1, 40], [2, 8], [1, 1]]
    stack: Any = found.module.model.encoder
    with torch.no_grad():
        for block, (heads, ffn_dim) in zip(stack.blocks, kept, strict=True):
            block.attention.out.weight[:, : (2 - heads) * 16] = 0.0
            for _, outer in stack.feed_forwards:
                block.get_submodule(outer).weight[:, : 64 - ffn_dim] = 0.0
    cut = cut_widths(found, kept)
    assert cut.config.encoder.widths == tuple(map(tuple, kept))  # type: ignore[attr-defined]
    for one, other in zip(layers(cut.module.model), layers(found.module.model), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    same = cut_widths(found, [[2, 64]] * 3)
    assert torch.equal(layers(same.module.model)[-1], layers(found.module.model)[-1])
    narrow = cut.module.model.encoder
    assert isinstance(narrow, BlockStack)
    assert [len(score.heads_H) for score in importance(narrow)] == [1, 2, 1]


def test_a_cut_run_trains_on_exports_and_is_evaluated(tmp_path: Path) -> None:
    settings = {"encoder": ENCODERS["pre-norm"], "runs": str(tmp_path)}
    ending, _ = run(tmp_path / "whole", training_config(steps=4, name="whole", **settings))
    assert ending is Ending.FINISHED
    (tmp_path / "widths.json").write_text("[[1, 32], [2, 16]]")
    assert main(["compress", str(tmp_path / "whole"), str(tmp_path / "two"), "--blocks", "2"]) == 0
    widths = ["--widths", str(tmp_path / "widths.json")]
    assert main(["compress", str(tmp_path / "two"), str(tmp_path / "small"), *widths]) == 0
    whole, two, small_one = (load_checkpoint(find_checkpoint(str(tmp_path / n))) for n in ("whole", "two", "small"))
    assert (two.step, two.config.name, two.config.encoder.layers) == (0, "two", 2)
    assert json.loads((tmp_path / "two" / "compressed.json").read_text())["from"]["step"] == whole.step == 4
    for name, weight in two.module.objective.state_dict().items():
        assert torch.equal(weight, whole.module.objective.state_dict()[name])
    assert export_graph(small_one.config, small_one.module.model, tmp_path / "graph", "torchscript") <= 1e-5
    assert open_encoder(str(tmp_path / "small")).encode(WAVES[0]).shape[0] == 3
    ending, _ = run(tmp_path / "small", small_one.config)
    assert ending is Ending.FINISHED
    trained_on = load_checkpoint(find_checkpoint(str(tmp_path / "small")))
    assert trained_on.step == small_one.config.train.steps
    assert not torch.equal(*(layers(m.module.model)[-1] for m in (trained_on, small_one)))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--blocks", "3"], r"--blocks 3: this model has 1 to 2 blocks to keep"),
        (["--widths", "PAIRS:[[2, 64]]"], r"1 pairs, and this model has 2 blocks"),
        (["--widths", "PAIRS:[[2, 64], [2, 65]]"], r"block 1 has 1 to 2 heads and 1 to 64 inner channels"),
        (["--widths", "PAIRS:[[2, 64.5], [2, 6]]"], r"must hold \[\[heads, ffn_dim\], …\], two whole numbers"),
        (["--widths", "PAIRS:{"], r"cannot be read as JSON"),
        (["--widths", "PAIRS:[]", "--blocks", "1"], r"give one of them"),
        ([], r"objective.name=best_rq: this run has no gates of structured pruning"),
    ],
)
def test_a_cut_that_does_not_fit_is_refused(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "run", 2)
    for number, argument in enumerate(arguments):
        if argument.startswith("PAIRS:"):
            (tmp_path / "pairs.json").write_text(argument.removeprefix("PAIRS:"))
            arguments = [*arguments[:number], str(tmp_path / "pairs.json"), *arguments[number + 1 :]]
    assert main(["compress", str(tmp_path / "run"), str(tmp_path / "out"), *arguments]) == 2
    assert re.search(words, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_a_u_shape_is_not_cut_after_a_block_and_open_gates_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"encoder.half_rate_blocks=1 join and split frames"):
        cut_blocks(trained("U-shape"), 2)
    with pytest.raises(ConfigError, match=r"objective.sparsity=75% was requested, but the closed gates remove 70.0%"):
        require_closed(Pruning((), 0.75, 0.7))
    require_closed(Pruning((), 0.75, 0.74))
