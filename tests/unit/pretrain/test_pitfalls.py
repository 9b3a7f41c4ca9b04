"""Known pitfalls of released pretraining code that are not tested next to the module concerned."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from data_pipeline.core.schema import ConfigError, load
from pretrain.config import Config
from pretrain.engines import make_engine
from pretrain.engines.distributed import DistributedContext
from pretrain.engines.optimizer import make_optimizer
from pretrain.interfaces.frames import StepContext
from pretrain.interfaces.models import Frontend, SpeechModel
from pretrain.models.encoders import transformer
from pretrain.models.frontends import log_mel, multiscale, waveform_conv
from pretrain.nn.numerics import full_precision
from pretrain.self_supervision.quantizers import RandomProjectionQuantizer
from pretrain.train_module import build_model
from tests.support.contract_cases import FRONTENDS, batch, make, small


def test_adamw_decays_weight_matrices_only() -> None:
    """Pitfall: a weight decay option that is not passed to the optimizer (transformers' script)."""
    module = make("wav2vec2")
    config = load(Config, {"data": {"shards": "none"}, "optimizer": {"weight_decay": 0.25}, **PARTS})
    optimizer = make_optimizer(module, config.optimizer)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, weight in module.named_parameters():
        assert decay[id(weight)] == (0.25 if weight.dim() > 1 else 0.0), name
    decayed = next(weight for weight in module.parameters() if weight.dim() > 1)
    before = decayed.detach().clone()
    for weight in module.parameters():
        weight.grad = torch.zeros_like(weight)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    optimizer.step()
    torch.testing.assert_close(decayed.detach(), before * (1 - 0.1 * 0.25))


PARTS: dict[str, Any] = {
    "objective": small("objectives", "best_rq"),
    "frontend": FRONTENDS["log_mel"] | {"dropout": 0.0},
    "encoder": small("encoders", "transformer") | {"layer_drop": 0.0, "dropout": 0.0, "attention_dropout": 0.0},
}


def test_bf16_needs_no_loss_scaling_and_the_norm_is_of_the_mean_gradient() -> None:
    """Pitfalls: a loss scaler under bf16; a norm computed before gradients are averaged (fairseq#4555)."""
    values = {"data": {"shards": "none", "micro_batches": 2}, "engine": {"name": "torch", "precision": "bf16"}} | PARTS
    config = load(Config, values)
    batches, ctx = [batch(first_seed=0), batch(first_seed=5)], StepContext(0, 0)
    engine = make_engine(config, build_model(config), DistributedContext())
    by_hand = build_model(config).train()
    plans = [by_hand.prepare(data, ctx) for data in batches]
    counts = plans[0].counts_K + plans[1].counts_K
    for data, plan in zip(batches, plans, strict=True):
        by_hand(data, plan, counts, ctx)[0].backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in by_hand.parameters() if p.grad is not None])
    assert engine.step(batches, ctx, 1e-4).grad_norm == pytest.approx(float(norm), rel=1e-5)


def test_an_fp16_norm_cannot_overflow() -> None:
    """Pitfall: a sum of squares in fp16, or before gradients are averaged, overflows at 65,504 (fairseq#4555)."""
    norms = {}
    for precision in ("fp32", "fp16"):
        values = {"data": {"shards": "none"}, "engine": {"name": "torch", "precision": precision}} | PARTS
        module = build_model(load(Config, values))
        with torch.no_grad():
            module.objective.get_submodule("classifiers.0").weight.mul_(2e3)
        engine = make_engine(load(Config, values), module, DistributedContext())
        norms[precision] = engine.step([batch()], StepContext(0, 0), 1e-4).grad_norm
    assert norms["fp32"] ** 2 > 65_504
    assert norms["fp16"] == pytest.approx(norms["fp32"], rel=0.03)


def test_full_precision_regions_disable_tf32() -> None:
    """Pitfall: distances in TF32 select wrong codes; `nearest_codes` and the losses run in full precision."""
    matmul, before = torch.backends.cuda.matmul, torch.backends.cuda.matmul.allow_tf32
    try:
        matmul.allow_tf32 = True
        with full_precision(torch.device("cuda")):
            assert not matmul.allow_tf32
        assert matmul.allow_tf32
    finally:
        matmul.allow_tf32 = before


class Largest(TorchDispatchMode):
    """Records the most elements and the widest type of all tensors that operations return."""

    elements = 0
    bytes_each = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                self.elements = max(self.elements, tensor.numel())
                self.bytes_each = max(self.bytes_each, tensor.element_size())
        return out


def test_code_look_ups_need_little_memory() -> None:
    """Pitfall: distances as a float64 tensor of B × T × 16 × 8192 (NEST)."""
    quantizer, frames_ND = RandomProjectionQuantizer(80, 16, 8192), torch.randn(5_000, 80)
    with Largest() as seen:
        quantizer(frames_ND)
    assert seen.elements <= 2_048 * 8_192, "one chunk of frames × codes, independent of the number of frames"
    assert seen.bytes_each == 4


def depends_on_later_audio(frontend: Frontend, positions: str, seconds: float = 0.5) -> bool:
    """Returns whether the output of the first `seconds` changes with the audio after one second."""
    pattern = {"attention": "chunked", "chunk_frames": (4,), "left_chunks": (-1,)}
    sizes = {"dim": 32, "layers": 1, "heads": 2, "ffn_dim": 32}
    convolution = {"conv_positions_kernel": 16, "conv_positions_groups": 4}
    encoder = transformer.build(transformer.Config(**sizes, **pattern, **convolution, norm="pre", positions=positions))
    model = SpeechModel(frontend, encoder).eval()
    wave_BT = torch.randn(1, 32_000, generator=torch.Generator().manual_seed(0))
    other_BT = torch.cat([wave_BT[:, :16_000], 3 * wave_BT[:, 16_000:]], dim=1)
    with torch.no_grad():
        one, two = (model(x, torch.tensor([32_000])).final.x_BFD for x in (wave_BT, other_BT))
    first = int(seconds * frontend.rate_hz)
    return bool((one[:, :first] - two[:, :first]).abs().max() > 1e-5)


def test_streaming_output_does_not_depend_on_later_audio() -> None:
    """Pitfall: streaming with a group norm over time, utterance statistics or symmetric positional convolutions."""
    stem = {"channels": 32, "norm": "layer"}
    fixed = log_mel.build(log_mel.Config(normalize="fixed", subsampling=2), 32)
    assert not depends_on_later_audio(fixed, "rope")
    assert not depends_on_later_audio(fixed, "rope", seconds=0.95)
    assert depends_on_later_audio(fixed, "conv", seconds=0.95)
    assert not depends_on_later_audio(waveform_conv.build(waveform_conv.Config(**stem), 32), "rope")
    assert depends_on_later_audio(log_mel.build(log_mel.Config(normalize="utterance", subsampling=2), 32), "rope")
    assert depends_on_later_audio(waveform_conv.build(waveform_conv.Config(**stem | {"norm": "group"}), 32), "rope")
    assert depends_on_later_audio(waveform_conv.build(waveform_conv.Config(**stem, normalize=True), 32), "rope")


def test_the_multiscale_front_end_requires_a_different_mfcc_window() -> None:
    """Pitfall: MFCCs of the same window are a linear map of its log-mel features, not another scale."""
    assert multiscale.Config().mfcc_window == 1_024
    frontend = FRONTENDS["log_mel"] | {"name": "multiscale", "mfcc_window": 400}
    with pytest.raises(ConfigError, match=r"mfcc_window=400"):
        load(Config, {"data": {"shards": "none"}, **PARTS, "frontend": frontend})
