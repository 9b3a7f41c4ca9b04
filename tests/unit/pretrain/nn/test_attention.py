"""Encoder attention: chunks, registers, frame positions, layer drop and dropout."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pretrain.interfaces.frames import Frames, StepContext
from pretrain.models.encoders import conformer, transformer
from pretrain.nn.attention_patterns import Pattern, attend
from pretrain.nn.dropout import dropout

SMALL = {"dim": 32, "layers": 3, "heads": 2, "ffn_dim": 64}
STREAMING = {"attention": "chunked", "chunk_frames": (8,), "left_chunks": (1,)}
ENCODERS = {
    "transformer": transformer.build(transformer.Config(**SMALL, **STREAMING, norm="pre", positions="rope")),
    "conformer": conformer.build(conformer.Config(**SMALL, **STREAMING, causal=True, kernel=5)),
}


@pytest.mark.parametrize("name", ENCODERS)
def test_a_chunk_does_not_depend_on_later_audio(name: str) -> None:
    """Output up to the end of a chunk equals that of the input truncated there, as streaming requires."""
    encoder = ENCODERS[name].eval()
    x_BFD = torch.randn(1, 40, 32)
    whole = encoder(Frames(x_BFD, torch.tensor([40]), 25.0)).final.x_BFD
    cut = encoder(Frames(x_BFD[:, :16], torch.tensor([16]), 25.0)).final.x_BFD
    torch.testing.assert_close(whole[:, :16], cut, rtol=0, atol=1e-5)
    later = encoder(Frames(x_BFD[:, :24], torch.tensor([24]), 25.0)).final.x_BFD
    assert (later[:, 16:] - whole[:, 16:24]).abs().max() < 1e-5


@pytest.mark.parametrize("kind", [transformer, conformer])
def test_local_global_with_registers_ignores_padding(kind: object) -> None:
    pattern = {"attention": "local_global", "window": 8, "registers": 2, "full_every": 3, "positions": "rope"}
    config = kind.Config(**SMALL, **pattern)  # type: ignore[attr-defined]
    encoder = kind.build(config).eval()  # type: ignore[attr-defined]
    x_BFD = torch.randn(1, 30, 32)
    alone = encoder(Frames(x_BFD, torch.tensor([30]), 25.0))
    padded = encoder(Frames(F.pad(x_BFD, (0, 0, 0, 17)), torch.tensor([30]), 25.0))
    for short, long in zip(alone.layers, padded.layers, strict=True):
        assert short.shape == (1, 30, 32)
        torch.testing.assert_close(long[:, :30], short, rtol=0, atol=1e-5)


def test_chunk_patterns_vary_by_update_and_are_equal_on_all_ranks() -> None:
    config = transformer.Config(**SMALL, attention="chunked", chunk_frames=(4, 8, 0), left_chunks=(2, -1))
    encoder = transformer.build(config).train()
    drawn = [encoder.chunk_pattern(StepContext(0, step)) for step in range(60)]
    assert set(drawn) == {Pattern(chunk=chunk, left_chunks=left) for chunk in (4, 8) for left in (2, -1)} | {Pattern()}
    assert drawn == [transformer.build(config).train().chunk_pattern(StepContext(0, step)) for step in range(60)]
    assert encoder.eval().chunk_pattern(None) == Pattern(chunk=4, left_chunks=2)
    encoder.stream = Pattern(chunk=6, left_chunks=1)
    assert encoder.chunk_pattern(None) == encoder.stream
    assert encoder.train().chunk_pattern(StepContext(0, 0)) == drawn[0]


def test_layer_drop_drops_the_same_layers_on_all_ranks() -> None:
    """Pitfall: ranks that drop different layers hang under ZeRO-3."""
    config = transformer.Config(**SMALL | {"layers": 12}, layer_drop=0.5)
    here, there = transformer.build(config).train(), transformer.build(config).train()
    torch.manual_seed(1)
    first = [here.kept_blocks(StepContext(7, step)) for step in range(20)]
    torch.manual_seed(2)
    assert first == [there.kept_blocks(StepContext(7, step)) for step in range(20)]
    assert 0.35 < sum(map(sum, first)) / 240 < 0.65
    assert all(here.eval().kept_blocks(StepContext(7, 0)))


@pytest.mark.parametrize("positions", ["rope", "conv", "conv_stack"])
def test_frame_positions_follow_the_given_time_indices(positions: str) -> None:
    config = transformer.Config(**SMALL, positions=positions, conv_positions_kernel=5, conv_positions_groups=4)
    encoder = transformer.build(config).eval()
    x_BFD = torch.randn(2, 20, 32)
    lengths_B = torch.tensor([20, 20])
    plain = encoder(Frames(x_BFD, lengths_B, 25.0)).final.x_BFD
    named = encoder(Frames(x_BFD, lengths_B, 25.0, places_BF=torch.arange(20).repeat(2, 1))).final.x_BFD
    torch.testing.assert_close(named, plain)
    order = torch.randperm(20)  # attention depends on the time index of frames, not on their order in memory
    shuffled = encoder(Frames(x_BFD[:, order], lengths_B, 25.0, places_BF=order.repeat(2, 1))).final.x_BFD
    torch.testing.assert_close(shuffled, plain[:, order], rtol=0, atol=1e-5)


@pytest.mark.parametrize("masked", ["no mask", "bool", "bias"])
def test_plain_attention_equals_fused_attention(masked: str) -> None:
    q, k, v = (torch.randn(2, 3, 9, 8, dtype=torch.bfloat16) for _ in range(3))
    mask = {"no mask": None, "bool": torch.rand(2, 1, 9, 9) < 0.7, "bias": torch.randn(3, 9, 9).bfloat16()}[masked]
    if masked == "bool":
        mask = mask | torch.eye(9, dtype=torch.bool)
    exact = None if mask is None else mask if mask.dtype == torch.bool else mask.double()
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), attn_mask=exact)
    torch.testing.assert_close(attend(q, k, v, mask).double(), expected, rtol=0.05, atol=0.02)


def test_dropout_drops_the_configured_share_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    x = torch.ones(400_001, requires_grad=True)
    y = dropout(x, 0.3)
    y.sum().backward()
    assert float((y == 0).float().mean()) == pytest.approx(0.3, abs=0.005)
    assert float(y.detach().mean()) == pytest.approx(1.0, abs=0.01)
    assert torch.equal(x.grad, y.detach())
    assert dropout(x, 0.3, training=False) is x
    torch.manual_seed(0)
    assert torch.equal(dropout(x, 0.3), y)
