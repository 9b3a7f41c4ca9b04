"""Small sets of weights: fresh ones change nothing, only they learn; batches, packing and merging change no output."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from data_pipeline.core.schema import load
from pretrain.config import Config
from pretrain.interfaces.frames import StepContext
from pretrain.interfaces.models import SpeechModel
from pretrain.nn.block_stack import BlockStack
from pretrain.nn.tuning import LoRALinear, is_added, learned_share, merge
from pretrain.train_module import build_model
from tests.support.synthetic_reader import synthetic_batch

ENCODERS: dict[str, dict[str, Any]] = {
    "transformer": {"name": "transformer"},
    "conformer": {"name": "conformer", "kernel": 5},
    "u_shape": {"name": "transformer", "half_rate_blocks": 2, "positions": "rope"},
    "registers": {"name": "transformer", "attention": "local_global", "registers": 2, "window": 8},
    "chunked": {
        "name": "transformer", "attention": "chunked", "positions": "rope", "chunk_frames": [4], "left_chunks": [1],
    },
    "relative_bias": {"name": "transformer", "relative_bias": True, "norm": "pre"},
}  # fmt: skip
WAYS = ("head", "bias", "prompt", "lora", "adapter")


def config(encoder: str = "transformer", frontend: str = "log_mel", packed: bool = False, **tune: Any) -> Config:
    values = {
        "data": {"shards": "synthetic"},
        "frontend": {"name": frontend},
        "encoder": {"dim": 16, "layers": 4, "heads": 2, "ffn_dim": 32, "layer_drop": 0.0, **ENCODERS[encoder]},
        "objective": {"name": "none"},
        "heads": {"mood": {"name": "classifier", "label": "mood", "classes": ["calm", "angry"], "loss": "softmax"}},
        "engine": {"name": "torch", "packed": packed},
        "tune": tune,
    }
    return load(Config, values)


def audio() -> tuple[Tensor, Tensor]:
    lengths_B = torch.tensor([4800, 3000, 4100])
    wave_BT = 0.1 * torch.randn(3, 4800, generator=torch.Generator().manual_seed(0))
    return wave_BT * (torch.arange(4800) < lengths_B[:, None]), lengths_B


@torch.no_grad()
def final(model: SpeechModel, wave_BT: Tensor, lengths_B: Tensor) -> Tensor:
    found: Tensor = model.eval()(wave_BT, lengths_B).final.x_BFD
    return found


@torch.no_grad()
def stir(model: nn.Module) -> None:
    """Gives the added weights random values, as after training."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if is_added(name):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("encoder", ENCODERS)
def test_padding_and_packing_change_no_output_and_fresh_weights_change_no_bit(encoder: str) -> None:
    wave_BT, lengths_B = audio()
    base = final(build_model(config(encoder)).model, wave_BT, lengths_B)
    for way in WAYS:
        padded, packed = (build_model(config(encoder, packed=p, name=way)).model for p in (False, True))
        if way != "prompt":
            assert torch.equal(final(padded, wave_BT, lengths_B), base), way
        stir(padded)
        packed.load_state_dict(padded.state_dict())
        whole = final(padded, wave_BT, lengths_B)
        alone = final(padded, wave_BT[1:2, :3000], lengths_B[1:2])
        frames = int(padded.frontend.frame_lengths(lengths_B)[1])
        assert torch.allclose(whole[1, :frames], alone[0, :frames], atol=1e-5), way
        assert torch.allclose(whole[1, :frames], final(packed, wave_BT, lengths_B)[1, :frames], atol=1e-5), way
        assert way in ("head", "bias") or not torch.allclose(whole, base, atol=1e-3), way


@pytest.mark.parametrize("encoder", ["transformer", "conformer", "u_shape"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_gradients_reach_the_tuned_weights_alone(encoder: str, way: str, checkpointing: str) -> None:
    module = build_model(config(encoder, name=way)).train()
    module.model.encoder.activation_checkpointing = checkpointing  # type: ignore[assignment]
    batch, ctx = synthetic_batch(0, 0), StepContext(0, 0)
    encoded = module.objective(module.model, batch, module.objective.prepare(module.model, batch, ctx), ctx)[1]
    if way != "head":
        encoded.final.x_BFD.square().sum().backward()
    with_gradient = {name for name, weight in module.model.named_parameters() if weight.grad is not None}
    expected = {
        name
        for name, _ in module.model.named_parameters()
        if (name.endswith(".bias") if way == "bias" else is_added(name))
    }
    assert with_gradient == expected
    assert (way == "head") == (not expected)
    learned, total = learned_share(module.model)
    assert learned == sum(weight.numel() for name, weight in module.model.named_parameters() if name in expected)
    assert total == sum(weight.numel() for weight in module.model.parameters())


def test_lora_equals_its_formula_and_merges() -> None:
    layer = LoRALinear(nn.Linear(12, 20).double(), rank=3, alpha=6.0)
    nn.init.normal_(layer.lora_b_OR)
    x = torch.randn(5, 12, dtype=torch.float64)
    a, b, w, bias = (t.detach().numpy() for t in (layer.lora_a_RI, layer.lora_b_OR, layer.weight, layer.bias))
    expected = x.numpy() @ w.T + bias + 6.0 / 3 * (x.numpy() @ a.T @ b.T)
    np.testing.assert_allclose(layer(x).detach().numpy(), expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(layer.merged()(x).detach().numpy(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("encoder", ["transformer", "conformer"])
def test_a_merged_model_has_the_weights_of_a_plain_one_and_the_same_outputs(encoder: str) -> None:
    wave_BT, lengths_B = audio()
    tuned = build_model(config(encoder, name="lora", rank=2)).model.double()
    stir(tuned)
    before = final(tuned, wave_BT.double(), lengths_B)
    merge(tuned)
    plain = build_model(config(encoder)).model.double()
    plain.load_state_dict(tuned.state_dict())
    assert torch.allclose(final(plain, wave_BT.double(), lengths_B), before, rtol=0, atol=1e-10)


def test_each_row_may_have_its_own_prompts() -> None:
    wave_BT, lengths_B = audio()
    model = build_model(config(name="prompt", prompts=3)).model.eval()
    assert isinstance(model.encoder, BlockStack)
    prompts_BLPD = torch.randn(3, 4, 3, 16, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        frames = model.project(model.extract(wave_BT, lengths_B))
        mixed = model.encoder(frames, prompts_BLPD=prompts_BLPD).final
        for row in range(3):
            model.encoder.prompts_LPD = nn.Parameter(prompts_BLPD[row])
            valid = int(mixed.lengths_B[row])
            alone = final(model, wave_BT, lengths_B)
            assert torch.allclose(alone[row, :valid], mixed.x_BFD[row, :valid], atol=1e-5)
    taken_LPD = model.encoder.take_prompts()
    assert taken_LPD is not None
    assert torch.equal(taken_LPD, prompts_BLPD[2])
    assert model.encoder.take_prompts() is None


@pytest.mark.parametrize(
    ("tune", "said"),
    [
        ({"name": "lora", "rank": 17}, "must be at most 16, since encoder.blocks.0.attention.qkv is 48 × 16"),
        (
            {"name": "lora", "modules": ["query"]},
            "there is no 'query'; there are: attention.out, ",
        ),
    ],
)
def test_what_does_not_fit_is_refused(tune: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match="tune") as refused:
        build_model(config(**tune))
    assert said in str(refused.value)


def test_lora_updates_the_linear_layers_of_all_blocks_unless_some_are_named() -> None:
    def updated(**tune: Any) -> set[str]:
        encoder = build_model(config(name="lora", **tune)).model.encoder
        return {
            name.partition(".")[2].partition(".")[2] for name, m in encoder.named_modules() if isinstance(m, LoRALinear)
        }

    assert {"attention.qkv", "attention.out", "ffn_in", "ffn_out"} <= updated()
    assert updated(modules=["attention.out"]) == {"attention.out"}
