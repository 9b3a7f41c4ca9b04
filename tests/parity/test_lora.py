"""LoRA equals that of peft: outputs, gradients and merged weights of a Conformer."""

from __future__ import annotations

import copy

import pytest
import torch

from data_pipeline.core.schema import load
from pretrain.config import Config
from pretrain.nn.tuning import LoRALinear
from pretrain.train_module import build_model
from tests.support.parity_table import Parity

peft = pytest.importorskip("peft", reason="needs peft: pip install --no-deps peft accelerate")


TUNE = {"name": "lora", "rank": 4, "alpha": 8, "modules": ["attention.qkv", "attention.out"]}


def test_lora_equals_peft(parity: Parity) -> None:
    values = {
        "data": {"shards": "none"},
        "frontend": {"name": "log_mel"},
        "encoder": {"name": "conformer", "kernel": 5, "dim": 32, "layers": 2, "heads": 2, "ffn_dim": 64},
        "objective": {"name": "none"},
        "heads": {"text": {"name": "ctc"}},
    }
    base = build_model(load(Config, values)).model.double().eval()
    ours = build_model(load(Config, values | {"tune": TUNE})).model.double().eval()
    ours.load_state_dict(base.state_dict(), strict=False)
    settings = peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=["qkv", "attention.out"])
    theirs = peft.inject_adapter_in_model(settings, copy.deepcopy(base)).double().eval()
    layers = {name: module for name, module in ours.named_modules() if isinstance(module, LoRALinear)}
    assert len(layers) == 4
    with torch.no_grad():
        for name, layer in layers.items():
            torch.nn.init.normal_(layer.lora_b_OR, std=0.2)
            theirs.get_submodule(name).lora_A["default"].weight.copy_(layer.lora_a_RI)
            theirs.get_submodule(name).lora_B["default"].weight.copy_(layer.lora_b_OR)
    wave_BT, lengths_B = 0.1 * torch.randn(2, 8000, dtype=torch.float64), torch.tensor([8000, 8000])
    found, expected = (model(wave_BT, lengths_B).final.x_BFD for model in (ours, theirs))
    parity("LoRA = peft: outputs", 1e-6, float((found - expected).detach().abs().max()))
    found.square().sum().backward()
    expected.square().sum().backward()
    for name, layer in layers.items():
        other = theirs.get_submodule(name)
        for mine, part in ((layer.lora_a_RI, other.lora_A), (layer.lora_b_OR, other.lora_B)):
            parity("LoRA = peft: gradients", 1e-6, float((mine.grad - part["default"].weight.grad).abs().max()))
        other.merge()
        merged = layer.merged().weight - other.base_layer.weight
        parity("LoRA = peft: merged weights", 1e-6, float(merged.detach().abs().max()))
